"""CIFAR-100 (Krizhevsky, 2009): 60,000 colour images, 32 x 32 pixels, a hundred classes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torchvision import datasets as torchvision_sets

from pgp.datasets.archives import Archive
from pgp.datasets.base import ArraySplit, Dataset, DatasetSize
from pgp.datasets.published import DownloadableDataset


@dataclass(frozen=True)
class CIFAR100(DownloadableDataset):
    """Colour images of 100 classes, in `root/cifar-100-python`; their checksums are verified every time."""

    tag = "cifar100"

    archives: ClassVar[tuple[Archive, ...]] = (
        Archive(
            "cifar-100-python.tar.gz",
            torchvision_sets.CIFAR100.url,
            f"md5:{torchvision_sets.CIFAR100.tgz_md5}",
            "cifar-100-python",
            169_001_437,
        ),
    )
    expected: ClassVar[DatasetSize | None] = DatasetSize(50_000, 10_000, 100)

    def read(self) -> Dataset:
        """Return 50,000 training and 10,000 test images, with labels in alphabetical order of the class names."""
        folder = self.folder()
        try:
            # torchvision unpickles these files, and only after their md5 has proved them to be the published ones
            train, test = (torchvision_sets.CIFAR100(str(folder.parent), train=part) for part in (True, False))
        except RuntimeError as error:
            raise ValueError(
                f"{folder} is not the published CIFAR-100: the checksums of its files are others, or one is missing."
                f" Move it away, and it is fetched anew"
            ) from error
        return Dataset(_split(train), _split(test), tuple(train.classes))


def _split(part: torchvision_sets.CIFAR100) -> ArraySplit:
    return ArraySplit(torch.from_numpy(part.data).permute(0, 3, 1, 2), torch.tensor(part.targets))
