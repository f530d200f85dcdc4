"""The 1,797 handwritten digits of 8 x 8 pixels that come with scikit-learn: real images, no download."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pgp.datasets.base import ArraySplit, Dataset, DatasetConfig
from pgp.rng import make_generator


@dataclass(frozen=True)
class Digits(DatasetConfig):
    """Ten digits; every fifth image of a fixed shuffle is held out for the test."""

    tag = "digits"

    def build(self) -> Dataset:
        """Return 1,437 training and 360 test images, always the same."""
        from sklearn.datasets import load_digits  # here, for scikit-learn takes 70 MB that other data need not pay

        bunch = load_digits()
        images = torch.from_numpy(bunch.images / 16 * 255).round().to(torch.uint8)  # (n, 8, 8), 0 to 16 in the source
        labels = torch.from_numpy(bunch.target)
        order = torch.randperm(len(labels), generator=make_generator(0, "digits split"))
        test = torch.zeros(len(labels), dtype=torch.bool)
        test[order[::5]] = True
        names = tuple(str(name) for name in bunch.target_names)
        return Dataset(ArraySplit(images[~test], labels[~test]), ArraySplit(images[test], labels[test]), names)
