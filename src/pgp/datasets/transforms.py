"""Transforms of images: random crops in training, the centre crop in evaluation."""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2.functional import center_crop

from pgp.datasets.enlarge import BICUBIC, BILINEAR, Crop, Interpolation, enlarge, margin

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

    def train(self) -> ImageTransform:
        """Return the training transform, a random crop and flip: `(3, H, W)` uint8 -> `(3, S, S)` float."""
        return _TrainTransform(self)

    def test(self) -> ImageTransform:
        """Return the test transform, a resize and centre crop: `(3, H, W)` uint8 -> `(3, S, S)` float."""
        return _TestTransform(self)


class ImageTransform(abc.ABC):
    """A transform of single images, and of batches of small images of one size on any device.

    An image is small if its longer side is at most half of the model's input. Small images are enlarged by
    `pgp.datasets.enlarge`, others by torchvision on the CPU. The draws are those of torchvision. So are the pixels: bit
    for bit on a processor with AVX2, and within rounding, by 1/255, on others.
    """

    interpolation: ClassVar[Interpolation]
    """How small images are enlarged."""

    def __init__(self, transforms: Transforms) -> None:
        self.transforms = transforms
        self._to_float = v2.Compose(
            [v2.ToDtype(torch.float32, scale=True), v2.Normalize(transforms.mean, transforms.std)]
        )

    def __call__(self, image: Tensor) -> Tensor:
        """Return the transform of an image `(3, H, W)` uint8, `(3, S, S)` float.

        Random draws come from torch's global generator.
        """
        crop = self.crop(image)
        if crop is None:
            view: Tensor = self._to_float(self._resize(image))
            return view
        return self.batch(image[None], torch.tensor([crop]))[0]

    @abc.abstractmethod
    def crop(self, image: Tensor) -> Crop | None:
        """Draw the crop of a small image `(3, H, W)`; return None for another."""

    def batch(self, images: Tensor, crops: Tensor) -> Tensor:
        """Return the transform of small images of one size, on their device.

        Args:
            images: `(B, 3, H, W)` uint8.
            crops: A crop for each of them, from `crop`, `(B, 5)` on the CPU.

        Returns:
            `(B, 3, S, S)` float.
        """
        resized = self._resized(images.shape[2], images.shape[3])
        return enlarge(images, crops, resized, self.transforms.size, self.interpolation, self._normalize_)

    def _normalize_(self, views: Tensor) -> None:
        """Scale values in [0, 255] to [0, 1], and normalise them."""
        views.mul_(1 / 255)
        mean, std = self.transforms.mean, self.transforms.std
        if any(mean):
            views.sub_(torch.tensor(mean, device=views.device)[:, None, None])
        if any(one != 1 for one in std):
            views.div_(torch.tensor(std, device=views.device)[:, None, None])

    def _is_small(self, image: Tensor) -> bool:
        return 2 * max(image.shape[1:]) <= self.transforms.size

    @abc.abstractmethod
    def _resize(self, image: Tensor) -> Tensor:
        """Return the view of an image that is not small, `(3, H, W)` uint8 -> `(3, S, S)` uint8."""

    @abc.abstractmethod
    def _resized(self, height: int, width: int) -> tuple[int, int]:
        """Return the height and width to which boxes of images of this height and width are resized."""


class _TrainTransform(ImageTransform):
    """A random crop, resized (bilinear), and a random flip."""

    interpolation = BILINEAR

    def __init__(self, transforms: Transforms) -> None:
        super().__init__(transforms)
        self._random_crop = v2.RandomResizedCrop(transforms.size, transforms.scale, transforms.ratio, antialias=True)
        self._random_flip = v2.RandomHorizontalFlip(transforms.flip)

    def crop(self, image: Tensor) -> Crop | None:
        """See `ImageTransform.crop`."""
        if not self._is_small(image):
            return None
        scale, ratio = list(self.transforms.scale), list(self.transforms.ratio)
        top, left, height, width = v2.RandomResizedCrop.get_params(image, scale, ratio)
        flip = bool(torch.rand(1) < self.transforms.flip)  # as RandomHorizontalFlip draws it
        return Crop(top, left, height, width, flip)

    def _resize(self, image: Tensor) -> Tensor:
        view: Tensor = self._random_flip(self._random_crop(image))
        return view

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        return self.transforms.size, self.transforms.size


class _TestTransform(ImageTransform):
    """The image, resized (bicubic), and its centre."""

    interpolation = BICUBIC

    def __init__(self, transforms: Transforms) -> None:
        super().__init__(transforms)
        resize = v2.Resize(transforms.resized, InterpolationMode.BICUBIC, antialias=True)
        self._resize_and_crop = v2.Compose([resize, v2.CenterCrop(transforms.size)])

    def crop(self, image: Tensor) -> Crop | None:
        """See `ImageTransform.crop`."""
        height, width = image.shape[1:]
        if not self._is_small(image) or _is_long(image):
            return None
        return Crop(0, 0, height, width, flip=False)

    def _resize(self, image: Tensor) -> Tensor:
        view: Tensor = self._resize_and_crop(_without_ends(image))
        return view

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        resized, shorter = self.transforms.resized, min(height, width)
        return resized * height // shorter, resized * width // shorter


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
        pixels = pixels.narrow(2, margin(rows - self.size), self.size)
        pixels = pixels.narrow(3, margin(columns - self.size), self.size)
        return (pixels / 255 - self.mean) / self.std


def _without_ends(image: Tensor) -> Tensor:
    """Crop the ends of an image `(3, H, W)` whose length is more than `LONGEST` times its breadth.

    Only its centre is needed, and resizing the full image would take gigabytes.
    """
    if not _is_long(image):
        return image
    length = LONGEST * min(image.shape[1:])
    centre: Tensor = center_crop(image, [min(side, length) for side in image.shape[1:]])
    return centre


def _is_long(image: Tensor) -> bool:
    return max(image.shape[1:]) > LONGEST * min(image.shape[1:])
