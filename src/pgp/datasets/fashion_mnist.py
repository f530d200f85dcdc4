"""Fashion-MNIST (Xiao et al., 2017): 70,000 gray images of clothes, 28 x 28 pixels, ten classes."""

from __future__ import annotations

import gzip
import math
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from rich.progress import Progress
from torch import Tensor
from torchvision import datasets as torchvision_sets

from pgp.datasets import ArraySplit, Counts, Dataset, DatasetConfig

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package `dataset-fashion-mnist` puts the four files."""


@dataclass(frozen=True)
class FashionMNIST(DatasetConfig):
    """Read in place where its four idx files lie (plain or .gz), else downloaded by torchvision."""

    expected: ClassVar[Counts | None] = Counts(60_000, 10_000, 10)

    root: Path = Path("data")
    """Folder with the files, or where a download goes."""

    def build(self) -> Dataset:
        """60,000 training and 10,000 test images."""
        self.fetch()
        return self.read()

    def fetch(self, progress: Progress | None = None) -> None:
        """See `DatasetConfig.fetch`; torchvision downloads and shows its own bars."""
        if self._folder() is not None:
            return
        try:
            torchvision_sets.FashionMNIST(str(self.root), download=True)
        except (RuntimeError, OSError) as error:
            raise ValueError(
                f"Fashion-MNIST is neither in {self.root.absolute()} nor in {DEBIAN}; its download failed ({error}):"
                " put its four idx files there, or install Debian's dataset-fashion-mnist"
            ) from error

    def read(self) -> Dataset:
        """See `DatasetConfig.read`."""
        folder = self._folder()
        if folder is None:
            raise ValueError(f"Fashion-MNIST is neither in {self.root.absolute()} nor in {DEBIAN}: pgp data get"
                             f" fetches it")  # fmt: skip
        return Dataset(_split(folder, "train"), _split(folder, "t10k"), tuple(torchvision_sets.FashionMNIST.classes))

    @property
    def places(self) -> tuple[Path, ...]:
        """See `DatasetConfig.places`."""
        return (self.root, self.root / "FashionMNIST" / "raw", DEBIAN)

    def _folder(self) -> Path | None:
        return next((folder for folder in self.places if _file(folder, "train-images-idx3-ubyte")), None)


def _split(folder: Path, name: str) -> ArraySplit:
    images, labels = _read(folder, f"{name}-images-idx3-ubyte"), _read(folder, f"{name}-labels-idx1-ubyte")
    return ArraySplit(images, labels)


def _file(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def _read(folder: Path, name: str) -> Tensor:
    """The unsigned bytes of an idx file: a magic number that tells the number of axes, their lengths, the data."""
    path = _file(folder, name)
    if path is None:
        raise ValueError(f"expected {name} or {name}.gz in {folder}, got neither")
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is damaged: {error}; delete it and fetch it again") from error
    axes = 3 if "idx3" in name else 1
    start = 4 + 4 * axes
    shape = [int(size) for size in np.frombuffer(data[4:start].ljust(4 * axes, b"\0"), ">u4")]
    if data[:4] != bytes([0, 0, 8, axes]) or len(data) != start + math.prod(shape):
        raise ValueError(f"{path} is no complete idx file of bytes; delete it and fetch it again")
    return torch.from_numpy(np.frombuffer(data, np.uint8, offset=start).reshape(shape).copy())
