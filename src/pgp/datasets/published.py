"""The base class of published data sets, which are downloaded if they are missing."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from rich.progress import Progress

from pgp.datasets.base import Dataset, DatasetConfig
from pgp.datasets.download import there, unpacked
from pgp.datasets.files import FileSplit
from pgp.datasets.scan import contents


@dataclass(frozen=True)
class DownloadableDataset(DatasetConfig):
    """A data set that is read from `root/<its folder>`, or from `root` if it has that name, or downloaded."""

    root: Path = Path("data")
    """Folder that contains the data set's own folder, and for downloads."""

    def build(self) -> Dataset:
        """See `DatasetConfig.build`."""
        self.fetch()
        return self.read()

    def fetch(self, progress: Progress | None = None) -> None:
        """Download and unpack the archives if the folder is missing. An existing folder is never written to."""
        if self._found() is None:
            for archive in self.archives:
                unpacked(archive, self.root, progress)

    @property
    def search_paths(self) -> tuple[Path, ...]:
        """See `DatasetConfig.search_paths`."""
        (archive,) = self.archives
        root = self.root.expanduser().absolute()
        own_folder = root / archive.folder
        return (own_folder, root) if root.name == archive.folder else (own_folder,)

    @abc.abstractmethod
    def read(self) -> Dataset:
        """See `DatasetConfig.read`."""

    def folder(self) -> Path:
        """Return the folder of the data set.

        Raises:
            ValueError: If it is not on this disk.
        """
        if folder := self._found():
            return folder
        raise ValueError(f"no data folder at {self.search_paths[0]}: pgp data get fetches it, or put what"
                         f" {self.archives[0].name} holds there")  # fmt: skip

    def _found(self) -> Path | None:
        return next((folder for folder in self.search_paths if there(folder)), None)


def labelled(pairs: Iterable[tuple[Path, int]]) -> FileSplit:
    """Return images with their labels, ordered by label and file name, so that the folder layout does not matter."""
    ordered = sorted(pairs, key=lambda pair: (pair[1], pair[0].name))
    return FileSplit([path for path, _ in ordered], [label for _, label in ordered])


def images_in(folder: Path) -> list[Path]:
    """Return the image files in `folder`, without subfolders, by name; empty if it is not a folder."""
    if not folder.is_dir():
        return []
    return contents(folder).images


def folders_in(folder: Path, fits: Callable[[str], object]) -> list[str]:
    """Return the sorted names of the folders in `folder` for which `fits` is true; empty if it is not a folder."""
    if not folder.is_dir():
        return []
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and fits(path.name))


def require_files(paths: Iterable[Path], index: Path) -> list[Path]:
    """Return the files `paths`, which `index` names, after checking that they exist.

    Raises:
        ValueError: If some are not there; it names the first.
    """
    found = list(paths)
    if missing := [path for path in found if not path.is_file()]:
        names = ", ".join(str(path) for path in missing[:3])
        raise ValueError(
            f"{len(missing)} of {len(found)} files that {index} names are missing, such as {names}: unpack the"
            f" archive again"
        )
    return found
