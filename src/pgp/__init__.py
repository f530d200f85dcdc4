"""Prompt-based continual learning with gradient projection.

The names below are loaded when they are first used, so that importing pgp is cheap. Begin with `pgp.train.train` for
whole runs, and with `Orthogonal` for a training loop of your own.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pgp.backbones.clip import CLIP as CLIP
    from pgp.backbones.vit import ViT as ViT
    from pgp.config import Config as Config
    from pgp.config import Hardware as Hardware
    from pgp.config import Optimizer as Optimizer
    from pgp.methods.clip_prompt import CLIPPrompt as CLIPPrompt
    from pgp.methods.dualprompt import DualPrompt as DualPrompt
    from pgp.methods.head_only import HeadOnly as HeadOnly
    from pgp.methods.l2p import L2P as L2P
    from pgp.predict import Predictor as Predictor
    from pgp.projections.orthogonal import Orthogonal as Orthogonal
    from pgp.projections.released import Released as Released
    from pgp.readouts.lda import LDA as LDA
    from pgp.recipes import RECIPES as RECIPES
    from pgp.run import Run as Run
    from pgp.subspace import Protected as Protected
    from pgp.subspace import Rows as Rows

__version__ = "0.1.0"

_HOMES = {
    "CLIP": "pgp.backbones.clip",
    "ViT": "pgp.backbones.vit",
    "Config": "pgp.config",
    "Hardware": "pgp.config",
    "Optimizer": "pgp.config",
    "CLIPPrompt": "pgp.methods.clip_prompt",
    "DualPrompt": "pgp.methods.dualprompt",
    "HeadOnly": "pgp.methods.head_only",
    "L2P": "pgp.methods.l2p",
    "Predictor": "pgp.predict",
    "Orthogonal": "pgp.projections.orthogonal",
    "Released": "pgp.projections.released",
    "LDA": "pgp.readouts.lda",
    "RECIPES": "pgp.recipes",
    "Run": "pgp.run",
    "Protected": "pgp.subspace",
    "Rows": "pgp.subspace",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'pgp' has no attribute {name!r}; it has {', '.join(_HOMES)}")


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]
