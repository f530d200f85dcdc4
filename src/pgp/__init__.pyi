from .backbones.clip import CLIP as CLIP
from .backbones.vit import ViT as ViT
from .config import Config as Config
from .config import Hardware as Hardware
from .config import Optimizer as Optimizer
from .estimator import ContinualImageClassifier as ContinualImageClassifier
from .methods.clip_prompt import CLIPPrompt as CLIPPrompt
from .methods.dualprompt import DualPrompt as DualPrompt
from .methods.head_only import HeadOnly as HeadOnly
from .methods.l2p import L2P as L2P
from .predict import Predictor as Predictor
from .projections.orthogonal import Orthogonal as Orthogonal
from .projections.released import ReleasedBasis as ReleasedBasis
from .readouts.lda import LDA as LDA
from .recipes import RECIPES as RECIPES
from .runs.run import Run as Run
from .subspace import ProtectedInputs as ProtectedInputs
from .subspace import ProtectedParameter as ProtectedParameter

__version__: str
