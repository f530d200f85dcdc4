from .backbones.clip import CLIP as CLIP
from .backbones.vit import ViT as ViT
from .config import Config as Config
from .config import Hardware as Hardware
from .config import Optimizer as Optimizer
from .methods.clip_prompt import CLIPPrompt as CLIPPrompt
from .methods.dualprompt import DualPrompt as DualPrompt
from .methods.head_only import HeadOnly as HeadOnly
from .methods.l2p import L2P as L2P
from .predict import Predictor as Predictor
from .projections.orthogonal import Orthogonal as Orthogonal
from .projections.released import Released as Released
from .readouts.lda import LDA as LDA
from .recipes import RECIPES as RECIPES
from .run import Run as Run
from .subspace import Protected as Protected
from .subspace import Rows as Rows

__version__: str
