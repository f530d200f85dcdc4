"""Fashion-MNIST (Xiao et al., 2017): 70,000 gray images of clothes, 28 x 28 pixels, ten classes."""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from rich.progress import Progress
from torch import Tensor
from torchvision import datasets as torchvision_sets

from pgp.datasets.archives import Archive, ArchiveError
from pgp.datasets.base import ArraySplit, Dataset, DatasetConfig, DatasetSize
from pgp.datasets.download import fetched

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package `dataset-fashion-mnist` puts the four files."""
LARGEST = 1 << 30
"""Most bytes that an idx file may have, unpacked."""


@dataclass(frozen=True)
class FashionMNIST(DatasetConfig):
    """Gray images of clothes, from four idx files (plain or .gz) in the layout of torchvision."""

    tag = "fashion-mnist"

    expected: ClassVar[DatasetSize | None] = DatasetSize(60_000, 10_000, 10)

    root: Path = Path("data")
    """Folder with the files, and for downloads."""

    def build(self) -> Dataset:
        """Return 60,000 training and 10,000 test images."""
        self.fetch()
        return self.read()

    def fetch(self, progress: Progress | None = None) -> None:
        """See `DatasetConfig.fetch`."""
        _, downloads, _ = self.search_paths
        if self._folder() not in (None, downloads):
            return
        try:
            for archive in _archives():
                if _file(downloads, archive.name.removesuffix(".gz")) is None:
                    fetched(archive, downloads, progress)
        except ArchiveError as error:
            raise ValueError(f"Fashion-MNIST is neither in {self.root.absolute()} nor in {DEBIAN}: {error}; or install"
                             " Debian's dataset-fashion-mnist") from error  # fmt: skip

    def read(self) -> Dataset:
        """See `DatasetConfig.read`."""
        folder = self._folder()
        if folder is None:
            raise ValueError(f"Fashion-MNIST is neither in {self.root.absolute()} nor in {DEBIAN}: pgp data get"
                             f" fetches it")  # fmt: skip
        return Dataset(_split(folder, "train"), _split(folder, "t10k"), tuple(torchvision_sets.FashionMNIST.classes))

    @property
    def search_paths(self) -> tuple[Path, ...]:
        """See `DatasetConfig.search_paths`."""
        root = self.root.expanduser()
        return (root, root / "FashionMNIST" / "raw", DEBIAN)

    def _folder(self) -> Path | None:
        return next((folder for folder in self.search_paths if _file(folder, "train-images-idx3-ubyte")), None)


def _archives() -> Iterator[Archive]:
    """Yield the four files as they are published."""
    published = torchvision_sets.FashionMNIST
    for name, digest in published.resources:
        yield Archive(name, f"{published.mirrors[0]}{name}", f"md5:{digest}", folder=name)


def _split(folder: Path, name: str) -> ArraySplit:
    images, labels = _read(folder, f"{name}-images-idx3-ubyte"), _read(folder, f"{name}-labels-idx1-ubyte")
    classes = len(torchvision_sets.FashionMNIST.classes)
    if len(images) != len(labels) or not len(labels) or int(labels.max()) >= classes:
        raise ValueError(f"expected a label below {classes} for each image of {name} in {folder}, got {len(images)}"
                         f" images and {len(labels)} labels up to {max([-1, *labels.tolist()])}")  # fmt: skip
    return ArraySplit(images, labels)


def _file(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def _read(folder: Path, name: str) -> Tensor:
    """Read the unsigned bytes of an idx file: magic number, length of each axis, data."""
    path = _file(folder, name)
    if path is None:
        raise ValueError(f"expected {name} or {name}.gz in {folder}, got neither")
    axes = 3 if "idx3" in name else 1
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            head = file.read(4 + 4 * axes)
            shape = [int(size) for size in np.frombuffer(head[4:].ljust(4 * axes, b"\0"), ">u4")]
            size = math.prod(shape)
            if head[:4] != bytes([0, 0, 8, axes]) or not 0 < size <= LARGEST:
                raise ValueError(f"{path} is no idx file of bytes; delete it and fetch it again")
            data = file.read(size + 1)  # one more, if there is one too many
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is damaged: {error}; delete it and fetch it again") from error
    if len(data) != size:
        raise ValueError(f"{path} is no complete idx file of {size:,} bytes; delete it and fetch it again")
    return torch.from_numpy(np.frombuffer(data, np.uint8).reshape(shape).copy())
