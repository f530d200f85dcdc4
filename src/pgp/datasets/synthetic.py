"""Synthetic images for tests: each class is a smooth random pattern, and each image is its pattern with noise."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from pgp.datasets.base import ArraySplit, Dataset, DatasetConfig
from pgp.rng import make_generator


@dataclass(frozen=True)
class Synthetic(DatasetConfig):
    """Synthetic images for tests, which can be learned in seconds."""

    tag = "synthetic"

    classes: int = 6
    per_class: int = 12
    """Number of training images per class. There are a third as many test images."""
    size: int = 32
    """Pixels a side."""
    noise: float = 0.15
    """Standard deviation of the noise, for pixel values in [0, 1]."""
    seed: int = 0
    domains: int = 0
    """Number of domains, for --setting dil. Each has its own tint, and `per_class` images of every class."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("classes", 1), ("per_class", 1), ("size", 1), ("domains", 0)):
            if (value := getattr(self, name)) < least:
                raise ValueError(f"expected dataset.{name} of at least {least}, got {value}")
        if not 0 <= self.noise < math.inf:
            raise ValueError(f"expected dataset.noise of at least 0, got {self.noise}")

    def build(self) -> Dataset:
        """Return the images, which are the same for the same settings."""
        patterns = torch.rand(self.classes, 3, 4, 4, generator=make_generator(self.seed, "patterns"))
        patterns = F.interpolate(patterns, self.size, mode="bicubic").clamp(0, 1)
        names = tuple(f"pattern {label}" for label in range(self.classes))
        train, test = self._split(patterns, "train", self.per_class), self._split(patterns, "test", self._tests)
        return Dataset(train, test, names, domains=tuple(f"tint {domain}" for domain in range(self.domains)))

    @property
    def _tests(self) -> int:
        return max(1, self.per_class // 3)

    def _split(self, patterns: torch.Tensor, part: str, per_class: int) -> ArraySplit:
        labels = torch.arange(self.classes).repeat_interleave(per_class).repeat(max(1, self.domains))
        noise = torch.randn(len(labels), 3, self.size, self.size, generator=make_generator(self.seed, part))
        images = (patterns[labels] + self.noise * noise).clamp(0, 1) * 255
        domains = torch.arange(self.domains).repeat_interleave(self.classes * per_class) if self.domains else None
        if domains is not None:
            tints = torch.rand(self.domains, 3, 1, 1, generator=make_generator(self.seed, "tints"))
            images = (images + 255 * tints[domains]) / 2
        return ArraySplit(images.to(torch.uint8), labels, domains)
