"""CIFAR-100 (Krizhevsky, 2009): 60,000 colour images, 32 x 32 pixels, a hundred classes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torchvision import datasets as torchvision_sets

from pgp.datasets import ArraySplit, Dataset, DatasetConfig


@dataclass(frozen=True)
class CIFAR100(DatasetConfig):
    """Read from `root/cifar-100-python`, downloaded by torchvision on first use; its checksums are verified."""

    root: Path = Path("data")
    """Folder that holds `cifar-100-python`, or where a download goes."""

    def build(self) -> Dataset:
        """50,000 training and 10,000 test images, labels in alphabetical order of the names."""
        try:
            # torchvision unpickles these files, and only after their md5 has proved them to be the published ones
            train, test = (
                torchvision_sets.CIFAR100(str(self.root), train=part, download=True) for part in (True, False)
            )
        except (RuntimeError, OSError) as error:
            raise ValueError(
                f"CIFAR-100 is not in {self.root.absolute()} and its download failed ({error}): fetch"
                f" cifar-100-python.tar.gz elsewhere and put it there"
            ) from error
        return Dataset(_split(train), _split(test), tuple(train.classes))


def _split(part: torchvision_sets.CIFAR100) -> ArraySplit:
    return ArraySplit(torch.from_numpy(part.data).permute(0, 3, 1, 2), torch.tensor(part.targets))
