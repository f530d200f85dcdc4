"""Transforms of images: random crops in training, the centre crop in evaluation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2.functional import center_crop

LONGEST = 100
"""Aspect ratio above which the ends of an image are cropped in the test transform."""


@dataclass(frozen=True)
class Transforms:
    """Size, augmentation and normalisation of images."""

    size: int = 224
    """Height and width of the model's input in pixels."""
    resize: int | None = None
    """Test transform: size in pixels to which the shorter side is resized (bicubic) before the centre is cropped. If
    None, 256/224 of `size`."""
    scale: tuple[float, float] = (0.05, 1.0)
    """Training transform: smallest and largest fraction of the image's area that a random crop covers."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Training transform: smallest and largest aspect ratio of the crop."""
    flip: float = 0.5
    """Training transform: probability of a horizontal flip."""
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Mean of each channel in [0, 1], which is subtracted. The published ViT recipes do not normalise."""
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """Standard deviation by which each channel is divided."""

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"expected transforms.size of at least 1, got {self.size}")
        if self.resize is not None and self.resize < self.size:
            raise ValueError(f"expected transforms.resize of at least transforms.size {self.size}, got {self.resize}")
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"expected transforms.scale (low, high) with 0 < low <= high <= 1, got {self.scale}")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"expected transforms.ratio (low, high) with 0 < low <= high, got {self.ratio}")
        if not 0 <= self.flip <= 1:
            raise ValueError(f"expected transforms.flip in [0, 1], got {self.flip}")
        if not min(self.std) > 0:
            raise ValueError(f"expected transforms.std above 0, got {self.std}")

    def train(self) -> v2.Transform:
        """Return the training transform, a random crop and flip: `(3, H, W)` uint8 -> `(3, S, S)` float."""
        crop = v2.RandomResizedCrop(self.size, self.scale, self.ratio, antialias=True)
        return v2.Compose([crop, v2.RandomHorizontalFlip(self.flip), *self._to_float()])

    def test(self) -> v2.Transform:
        """Return the test transform, a resize and centre crop: `(3, H, W)` uint8 -> `(3, S, S)` float."""
        resize = v2.Resize(self.resize or int(self.size * 256 / 224), InterpolationMode.BICUBIC, antialias=True)
        return v2.Compose([v2.Lambda(_without_ends), resize, v2.CenterCrop(self.size), *self._to_float()])

    def _to_float(self) -> list[v2.Transform]:
        return [v2.ToDtype(torch.float32, scale=True), v2.Normalize(self.mean, self.std)]


def _without_ends(image: Tensor) -> Tensor:
    """Crop the ends of an image `(3, H, W)` whose length is more than `LONGEST` times its breadth.

    Only its centre is needed, and resizing the full image would take gigabytes.
    """
    length = LONGEST * min(image.shape[1:])
    if max(image.shape[1:]) <= length:
        return image
    centre: Tensor = center_crop(image, [min(side, length) for side in image.shape[1:]])
    return centre
