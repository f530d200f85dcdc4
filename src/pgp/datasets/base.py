"""Base class of data sets: splits of images with labels, and the settings that create them."""

from __future__ import annotations

import abc
import bisect
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import ClassVar, NamedTuple

import torch
from rich.progress import Progress
from torch import Tensor

from pgp.datasets.archives import Archive
from pgp.datasets.ignored import Ignored
from pgp.system.paths import as_path


class BadImageError(ValueError):
    """An image file that cannot be read. The message names it."""


def with_advice(error: BadImageError) -> BadImageError:
    """Return the same error with advice on what to do, for a run that it stops."""
    if isinstance(error.__cause__, FileNotFoundError):  # it was there when the run began
        return BadImageError(f"{error}. Put the file back and resume the run, or begin another run without it")
    return BadImageError(f"{error}. --on-bad-image skip leaves such images out (also with --resume); pgp data"
                         " check lists them all")  # fmt: skip


class Split(abc.ABC):
    """Images with integer labels, map-style."""

    labels: Tensor
    """`(n,)`, int64."""
    domains: Tensor | None = None
    """Number of each image's domain, `(n,)`; None if the data have no domains."""

    @abc.abstractmethod
    def image(self, index: int) -> Tensor:
        """Return image number `index`, `(3, H, W)` uint8.

        Raises:
            BadImageError: If its file cannot be read.
        """

    def names(self) -> Iterable[str]:
        """Return the names of the images, in their order; empty if they have no names."""
        return ()

    def sources(self) -> tuple[Split, ...]:
        """Return the splits that this one was concatenated from, or the split itself."""
        return (self,)

    def __len__(self) -> int:
        return len(self.labels)


class ArraySplit(Split):
    """Images in memory: `images (n, H, W)` gray or `(n, 3, H, W)`, uint8."""

    def __init__(self, images: Tensor, labels: Tensor, domains: Tensor | None = None) -> None:
        if len(images) != len(labels):
            raise ValueError(f"expected one label per image, got {len(images)} images and {len(labels)} labels")
        self.images, self.labels, self.domains = images, labels.long(), domains

    def image(self, index: int) -> Tensor:
        """See `Split.image`."""
        image = self.images[index]
        return image.expand(3, -1, -1) if image.dim() == 2 else image


class ConcatSplit(Split):
    """Two splits, one after the other, with labels over the classes of both."""

    def __init__(self, first: Split, second: Split, labels: Tensor) -> None:
        """Concatenate two splits; `labels` are those of `second` among the classes of both."""
        self._parts = (*first.sources(), *second.sources())
        self._starts = [0, *itertools.accumulate(map(len, self._parts))]
        self.labels = torch.cat([first.labels, labels])

    def image(self, index: int) -> Tensor:
        """See `Split.image`."""
        part = bisect.bisect_right(self._starts, index) - 1
        return self._parts[part].image(index - self._starts[part])

    def sources(self) -> tuple[Split, ...]:
        """See `Split.sources`."""
        return self._parts


class Dataset(NamedTuple):
    """A training and a test split over the same classes."""

    train: Split
    test: Split
    """If it has no images, accuracy is not measured."""
    class_names: tuple[str, ...]
    tasks: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """Tasks defined by the data, in order: the name and the classes of each."""
    domains: tuple[str, ...] = ()
    """Names of the domains, by number."""
    folder: Path | None = None
    """Folder that may contain `class_order.txt` or `tasks.json`."""
    notes: tuple[str, ...] = ()
    """Notes for the user on how the data were read."""
    ignored: tuple[Ignored, ...] = ()
    """Files beside the images that are ignored, for each folder that contains any."""

    @property
    def classes(self) -> int:
        """Number of classes; labels run from 0."""
        return len(self.class_names)

    def messages(self) -> tuple[str, ...]:
        """Return the notes, and a line for each kind of files that are ignored."""
        return (*self.notes, *(line for ignored in self.ignored for line in ignored.lines()))


class DatasetSize(NamedTuple):
    """Number of images and classes of a data set."""

    train: int
    test: int
    classes: int


@dataclass(frozen=True)
class DatasetConfig(abc.ABC):
    """Settings of a data set; `build` creates it."""

    tag: ClassVar[str]
    """Name of this kind of data set in config.json. It must be unique among data sets and never change."""

    archives: ClassVar[tuple[Archive, ...]] = ()
    """Published archives that `fetch` downloads."""
    expected: ClassVar[DatasetSize | None] = None
    """Published size of the data set, if it has one."""

    def __post_init__(self) -> None:
        """Convert texts to paths. A subclass calls this before it checks its settings."""
        for one in fields(self):
            if isinstance(one.default, Path):
                what = f"dataset.{one.name}"
                object.__setattr__(self, one.name, as_path(getattr(self, one.name), what))

    @abc.abstractmethod
    def build(self) -> Dataset:
        """Return the data set. It is downloaded first if it is missing and can be downloaded."""

    def fetch(self, progress: Progress | None = None) -> None:  # noqa: B027 (most sets have nothing to fetch)
        """Download and unpack what `read` needs, if it is missing.

        Args:
            progress: Where to draw progress bars. If None, on standard error.
        """

    def read(self) -> Dataset:
        """Return the data set from this disk, without downloading."""
        return self.build()

    def read_test(self, class_names: Sequence[str]) -> Split | None:
        """Return the test images from this disk although the training images are gone.

        Args:
            class_names: Names of the classes, by label.

        Returns:
            The test images; None if there are none, or if the data set cannot be read without training images.
        """
        return None

    @property
    def search_paths(self) -> tuple[Path, ...]:
        """Paths where the data set is searched for, in order; empty for data that need no files."""
        return ()

    @property
    def place(self) -> str:
        """Where the data set is, for messages."""
        return ", ".join(map(str, self.search_paths)) or f"the data set {self.tag}"

    def with_absolute_paths(self) -> DatasetConfig:
        """Return the same settings with absolute paths, so that a run can be resumed from another directory."""
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        paths = {name: value.expanduser().absolute() for name, value in values.items() if isinstance(value, Path)}
        return replace(self, **paths)

    def without_paths(self) -> DatasetConfig:
        """Return the same settings with the default of every setting that names a file or a folder."""
        names = [one for one in fields(self) if _is_path(getattr(self, one.name))]
        return replace(self, **{one.name: one.default for one in names})

    def relocated(self, path: str) -> DatasetConfig:
        """Return the same data set at another path.

        Raises:
            ValueError: If it needs no files.
        """
        for one in fields(self):
            if one.name in ("root", "file"):
                return replace(self, **{one.name: Path(path)})
        raise ValueError(f"expected no --data for data that need no files, got {path}")

    def with_domains(self) -> DatasetConfig:
        """Return the same settings with domains, if the data set has a setting for them."""
        return self


def _is_path(value: object) -> bool:
    """Return whether a setting is a path, or a text with a character that a path of several parts has."""
    return isinstance(value, Path) or (isinstance(value, str) and any(char in value for char in "/\\~"))


def require_folder(folder: Path) -> Path:
    """Return `folder` as an absolute path, and raise a ValueError if it does not exist."""
    folder = folder.expanduser()
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"expected a folder of images, got {folder.absolute()}, which is none: name another,"
                         " by --data")  # fmt: skip
    if not folder.is_dir():
        raise ValueError(f"no data folder at {folder.absolute()}: name another, by --data")
    return folder.absolute()
