"""The 1,797 handwritten digits of 8 x 8 pixels that come with scikit-learn, so that no download is needed."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pgp.datasets.base import ArraySplit, Dataset, DatasetConfig
from pgp.rng import make_generator


@dataclass(frozen=True)
class Digits(DatasetConfig):
    """Images of ten digits, which come with scikit-learn; a fifth of them is held out for testing."""

    tag = "digits"

    def build(self) -> Dataset:
        """Return 1,437 training and 360 test images, the same every time."""
        from sklearn.datasets import load_digits  # imported here, because scikit-learn takes 70 MB of memory

        bunch = load_digits()
        images = torch.from_numpy(bunch.images / 16 * 255).round().to(torch.uint8)  # (n, 8, 8), 0 to 16 in the source
        labels = torch.from_numpy(bunch.target)
        order = torch.randperm(len(labels), generator=make_generator(0, "digits split"))
        test = torch.zeros(len(labels), dtype=torch.bool)
        test[order[::5]] = True
        names = tuple(str(name) for name in bunch.target_names)
        return Dataset(ArraySplit(images[~test], labels[~test]), ArraySplit(images[test], labels[test]), names)
