"""A data set of your own: images and labels in one .npz file of NumPy."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from pgp.datasets import Dataset, DatasetConfig
from pgp.datasets.base import ArraySplit


@dataclass(frozen=True)
class NpzImages(DatasetConfig):
    """Arrays `train_images (n, 3, H, W)` uint8, `train_labels (n,)`, `test_images`, `test_labels` and `names (C,)`."""

    tag = "npz-images"

    file: Path = Path("images.npz")
    """The file."""

    @property
    def search_paths(self) -> tuple[Path, ...]:
        """The file."""
        return (self.file,)

    def build(self) -> Dataset:
        """Return the data set.

        Raises:
            ValueError: If there is no such file.
        """
        if not self.file.is_file():
            raise ValueError(f"expected an .npz file with images at {self.file}: name another, by --dataset.file")
        with np.load(self.file, allow_pickle=False) as arrays:
            train, test = (
                ArraySplit(torch.from_numpy(arrays[f"{part}_images"]), torch.from_numpy(arrays[f"{part}_labels"]))
                for part in ("train", "test")
            )
            return Dataset(train, test, tuple(map(str, arrays["names"])))
