"""What exists, by name: one function per published row, each returning a complete configuration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from pgp.backbones import Backbone
from pgp.backbones.clip import CLIP
from pgp.backbones.vit import ViT
from pgp.config import Config, Optimizer
from pgp.datasets import DatasetConfig, Views
from pgp.datasets.cifar100 import CIFAR100
from pgp.datasets.digits import Digits
from pgp.datasets.fashion_mnist import FashionMNIST
from pgp.datasets.folder import Folder
from pgp.datasets.hugging_face import HuggingFace
from pgp.datasets.manifest import Manifest
from pgp.datasets.synthetic import Synthetic
from pgp.methods import Method
from pgp.methods.clip_prompt import CLIPPrompt, ZeroShot
from pgp.methods.dualprompt import DualPrompt
from pgp.methods.head_only import HeadOnly
from pgp.methods.l2p import L2P
from pgp.projections import Projection
from pgp.projections.none import NoProjection
from pgp.projections.orthogonal import Orthogonal
from pgp.projections.released import Released
from pgp.readouts import Readout
from pgp.readouts.lda import LDA
from pgp.readouts.sequential import Sequential

METHODS: dict[str, Method.Config] = {
    "l2p": L2P.Config(),
    "dualprompt": DualPrompt.Config(),
    "clip": CLIPPrompt.Config(),
    "zero-shot": ZeroShot.Config(),
    "head-only": HeadOnly.Config(),
}
PROJECTIONS: dict[str, Projection.Config] = {
    "orthogonal": Orthogonal.Config(),
    "released": Released.Config(),
    "none": NoProjection.Config(),
}
READOUTS: dict[str, Readout.Config] = {"sequential": Sequential.Config(), "lda": LDA.Config()}
DATASETS: dict[str, DatasetConfig] = {
    "digits": Digits(),
    "fashion-mnist": FashionMNIST(),
    "cifar100": CIFAR100(),
    "folder": Folder(),
    "manifest": Manifest(),
    "hugging-face": HuggingFace(),
    "synthetic": Synthetic(),
}
BACKBONES: dict[str, Backbone.Config] = {
    "vit": ViT.Config(),
    "clip": CLIP.Config(),
    "demo-clip": CLIP.Config("package:demo_clip_model.json", "package:demo_clip.safetensors"),
    "demo-vit": ViT.Config(
        "vit_tiny_patch16_224",
        weights="package:demo_vit.safetensors",
        arguments={"patch_size": 8, "embed_dim": 128, "depth": 6, "num_heads": 4},
    ),
}


SHELVES: dict[str, dict[str, Any]] = {
    "method": METHODS,
    "projection": PROJECTIONS,
    "readouts": READOUTS,
    "dataset": DATASETS,
    "backbone": BACKBONES,
}
"""By the field of a configuration: what can stand there."""


def demo() -> Config:
    """Digits in 5 tasks of 2 classes by L2P-PGP, on a small encoder that pgp ships. Offline, minutes on a laptop."""
    return Config(
        name="demo",
        dataset=Digits(),
        views=Views(size=32, resize=32, scale=(0.6, 1.0), flip=0.0),
        backbone=BACKBONES["demo-vit"],
        method=L2P.Config(top_k=2),
        projection=Orthogonal.Config(),
        readouts=(Sequential.Config(), LDA.Config()),
        tasks=5,
    )


def cifar100_10_l2p_pgp() -> Config:
    """Split CIFAR-100, 10 tasks of 10 classes, L2P-PGP on ViT-B/16 (in21k), as published but for the right basis."""
    return Config(
        name="10cifar100_l2p_pgp",
        dataset=CIFAR100(),
        backbone=ViT.Config(),
        method=L2P.Config(selection="batch"),
        projection=Orthogonal.Config(),
        readouts=(Sequential.Config(),),
        tasks=10,
        seed=42,
    )


def cifar100_20_l2p_pgp() -> Config:
    """Split CIFAR-100, 20 tasks of 5 classes, L2P-PGP on ViT-B/16 (in21k), as published but for the right basis."""
    return replace(cifar100_10_l2p_pgp(), name="20cifar100_l2p_pgp", tasks=20, seed=53)


def demo_dualprompt() -> Config:
    """Digits in 5 tasks of 2 classes by DualPrompt-PGP, on a small encoder that pgp ships. Offline, minutes."""
    return replace(demo(), name="demo-dualprompt", method=DualPrompt.Config())


def cifar100_10_dualprompt_pgp() -> Config:
    """Split CIFAR-100, 10 tasks of 10 classes, DualPrompt-PGP on ViT-B/16 (in21k), as published but for its reshape."""
    return replace(
        cifar100_10_l2p_pgp(),
        name="10cifar100_dualprompt_pgp",
        method=DualPrompt.Config(selection="batch"),
        epochs=20,
        batch_size=24,
        seed=59,
    )


def cifar100_20_dualprompt_pgp() -> Config:
    """Split CIFAR-100, 20 tasks of 5 classes, DualPrompt-PGP on ViT-B/16 (in21k), as published but for its reshape."""
    return replace(cifar100_10_dualprompt_pgp(), name="20cifar100_dualprompt_pgp", tasks=20, seed=42)


def demo_clip() -> Config:
    """Digits in 5 tasks of 2 classes by CLIP-PGP, on a small CLIP that pgp ships. Offline, minutes on a laptop."""
    return replace(
        demo(),
        name="demo-clip",
        backbone=BACKBONES["demo-clip"],
        method=CLIPPrompt.Config(),
        projection=Orthogonal.Config(energy=0.9),
        optimizer=Optimizer("sgd", lr=1.0, schedule="cosine"),
    )


def cifar100_10_clip_pgp() -> Config:
    """Split CIFAR-100, 10 tasks of 10 classes, CLIP-PGP on OpenAI's ViT-B/16, as published but for the right basis."""
    return replace(
        cifar100_10_l2p_pgp(),
        name="10cifar100_clip_pgp",
        backbone=CLIP.Config(),
        method=CLIPPrompt.Config(),
        projection=Orthogonal.Config(energy=0.9),
        views=Views(mean=(0.507, 0.487, 0.441), std=(0.267, 0.256, 0.276)),
        optimizer=Optimizer(
            "sgd", lr=0.08, weight_decay=2e-4, schedule="cosine", first_lr=0.008, first_weight_decay=5e-4
        ),  # .01 and .001 a step, for lr counts per 256 images
        batch_size=32,
        seed=1997,
    )


def own() -> Config:
    """Your own images: pgp train own --data ./photos --tasks 5. L2P-PGP on ViT-B/16 (in21k) with LDA."""
    return Config(
        name="own",
        dataset=Folder(),
        backbone=ViT.Config(),
        method=L2P.Config(),
        projection=Orthogonal.Config(),
        readouts=(LDA.Config(), Sequential.Config()),
        views=Views(scale=(0.4, 1.0)),
        tasks=None,
    )


RECIPES: dict[str, Callable[[], Config]] = {
    "demo": demo,
    "own": own,
    "10cifar100_l2p_pgp": cifar100_10_l2p_pgp,
    "20cifar100_l2p_pgp": cifar100_20_l2p_pgp,
    "demo-dualprompt": demo_dualprompt,
    "10cifar100_dualprompt_pgp": cifar100_10_dualprompt_pgp,
    "20cifar100_dualprompt_pgp": cifar100_20_dualprompt_pgp,
    "demo-clip": demo_clip,
    "10cifar100_clip_pgp": cifar100_10_clip_pgp,
}
