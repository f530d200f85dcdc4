"""A run small enough for tests."""

from __future__ import annotations

from dataclasses import replace

from pgp.backbones.vit import ViT
from pgp.config import Config, Optimizer
from pgp.datasets.synthetic import Synthetic
from pgp.datasets.transforms import Transforms
from pgp.methods.dualprompt import DualPrompt
from pgp.methods.l2p import L2P
from pgp.projections.orthogonal import Orthogonal
from pgp.readouts.head import MethodHead
from pgp.readouts.lda import LDA
from pgp.runs.identity import DataDescription
from pgp.runs.run import Run

DUALPROMPT = DualPrompt.Config(general_layers=(0,), expert_layers=(1,), pool_size=4)
BACKBONE = ViT.Config("vit_tiny_patch16_224", "random", {"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 4})


def config(**changes) -> Config:
    """Three tasks of two classes in a second."""
    base = Config(
        name="tiny",
        dataset=Synthetic(noise=0.05),
        backbone=BACKBONE,
        method=L2P.Config(top_k=2),
        projection=Orthogonal.Config(energy=0.9),
        readouts=(MethodHead.Config(), LDA.Config()),
        transforms=Transforms(size=32, resize=32, scale=(0.6, 1.0), flip=0.0),
        optimizer=Optimizer(lr=0.1),
        tasks=3,
        epochs=2,
        batch_size=8,
        log_every_steps=4,
    )
    return replace(base, **changes)


def described(names, tasks, task_names=None, data="0" * 16):
    """The description of data with one image of each class."""
    counts = tuple(map(len, tasks))
    titles = tuple(task_names or [""] * len(tasks))
    return DataDescription(tuple(names), tuple(map(tuple, tasks)), titles, counts, counts, (data,))


def reconfigure(folder, **changes):
    """Record other settings of a run, as `pgp` itself does of the paths of its data."""
    run = Run.open(folder)
    with run.writing():
        run.change_config(lambda config: replace(config, **changes))
