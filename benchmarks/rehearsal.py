"""A tiny encoder, images and runs for `--tiny` of every benchmark, so that a test takes a second."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image

from pgp.backbones.vit import ViT
from pgp.config import Config
from pgp.datasets.folder import Folder
from pgp.datasets.transforms import Transforms
from pgp.rng import make_generator

SIZE = 32
ENCODER = ViT.Config("vit_tiny_patch16_224", "random", {"patch_size": 8, "embed_dim": 112, "depth": 5, "num_heads": 4})


def pictures(root: Path, classes: int = 4, parts: dict[str, int] | None = None) -> Path:
    """Write an image folder of noise, `root/<part>/<class>/<number>.png`, and return `root`."""
    for part, count in (parts or {"train": 4, "test": 2}).items():
        for label in range(classes):
            folder = root / part / f"class{label}"
            folder.mkdir(parents=True)
            draw = make_generator(label, "rehearsal", part)
            for number in range(count):
                pixels = torch.randint(256, (SIZE, SIZE, 3), generator=draw, dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(folder / f"{number}.png")
    return root


def tiny(config: Config, root: Path) -> Config:
    """Return the same run on the pictures of `root`: two tasks, one epoch, the tiny encoder."""
    views = Transforms(size=SIZE, resize=SIZE, flip=0.0)
    return replace(
        config,
        dataset=Folder(root),
        backbone=ENCODER,
        transforms=views,
        tasks=2,
        epochs=1,
        batch_size=4,
        drift_images=2,
    )
