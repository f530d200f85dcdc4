"""Transforms of images: random crops in training, the centre crop in evaluation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
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

    @property
    def resized(self) -> int:
        """Size in pixels to which the test transform resizes the shorter side."""
        return self.resize or int(self.size * 256 / 224)

    def train(self) -> v2.Transform:
        """Return the training transform, a random crop and flip: `(3, H, W)` uint8 -> `(3, S, S)` float."""
        crop = v2.RandomResizedCrop(self.size, self.scale, self.ratio, antialias=True)
        return v2.Compose([crop, v2.RandomHorizontalFlip(self.flip), *self._to_float()])

    def test(self) -> v2.Transform:
        """Return the test transform, a resize and centre crop: `(3, H, W)` uint8 -> `(3, S, S)` float."""
        resize = v2.Resize(self.resized, InterpolationMode.BICUBIC, antialias=True)
        return v2.Compose([v2.Lambda(_without_ends), resize, v2.CenterCrop(self.size), *self._to_float()])

    def _to_float(self) -> list[v2.Transform]:
        return [v2.ToDtype(torch.float32, scale=True), v2.Normalize(self.mean, self.std)]


class BatchTestTransform(nn.Module):
    """The test transform as operations on a batch of tensors, for exported graphs.

    It equals `Transforms.test` but for rounding: few pixels differ, by 1/255.

    >>> BatchTestTransform(Transforms(size=32))(torch.zeros(2, 3, 50, 40, dtype=torch.uint8)).shape
    torch.Size([2, 3, 32, 32])
    """

    mean: Tensor
    std: Tensor

    def __init__(self, transforms: Transforms) -> None:
        super().__init__()
        self.size, self.resized = transforms.size, transforms.resized
        self.register_buffer("mean", torch.tensor(transforms.mean)[:, None, None])
        self.register_buffer("std", torch.tensor(transforms.std)[:, None, None])

    def forward(self, images: Tensor) -> Tensor:
        """Resize, crop and normalise images `(B, 3, H, W)` uint8 of one size to `(B, 3, S, S)` float."""
        height, width = images.shape[2:]
        shorter = torch.sym_min(height, width)
        rows, columns = self.resized * height // shorter, self.resized * width // shorter
        pixels = images.float()
        for shape in ((height, columns), (rows, columns)):  # rounds after each direction, as torchvision does
            pixels = F.interpolate(pixels, shape, mode="bicubic", antialias=True)  # type: ignore[arg-type]
            pixels = pixels.round().clamp(0, 255)
        pixels = pixels.narrow(2, _margin(rows - self.size), self.size)
        pixels = pixels.narrow(3, _margin(columns - self.size), self.size)
        return (pixels / 255 - self.mean) / self.std


def _margin(excess: int | torch.SymInt) -> int | torch.SymInt:
    """Return half of `excess`, rounded half to even."""
    return excess // 2 + excess % 4 // 3


def _without_ends(image: Tensor) -> Tensor:
    """Crop the ends of an image `(3, H, W)` whose length is more than `LONGEST` times its breadth.

    Only its centre is needed, and resizing the full image would take gigabytes.
    """
    length = LONGEST * min(image.shape[1:])
    if max(image.shape[1:]) <= length:
        return image
    centre: Tensor = center_crop(image, [min(side, length) for side in image.shape[1:]])
    return centre
