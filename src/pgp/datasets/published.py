"""What published data sets have in common: they are downloaded where they are missing, and read where they lie."""

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
    """Read in place from `root/<its folder>`, or from `root` where that is the folder itself; else downloaded."""

    root: Path = Path("data")
    """Folder that holds the data set's own folder, or where a download goes."""

    def build(self) -> Dataset:
        """See `DatasetConfig.build`."""
        self.fetch()
        return self.read()

    def fetch(self, progress: Progress | None = None) -> None:
        """See `DatasetConfig.fetch`; a folder that is there is never downloaded again, nor written to."""
        if self._found() is None:
            for archive in self.archives:
                unpacked(archive, self.root, progress)

    @property
    def search_paths(self) -> tuple[Path, ...]:
        """See `DatasetConfig.places`."""
        (archive,) = self.archives
        root = self.root.expanduser().absolute()
        return (root / archive.folder, *([root] * (root.name == archive.folder)))

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
    """Return images with their labels, sorted by label and then by file name, whatever the layout."""
    ordered = sorted(pairs, key=lambda pair: (pair[1], pair[0].name))
    return FileSplit([path for path, _ in ordered], [label for _, label in ordered])


def images_in(folder: Path) -> list[Path]:
    """Return the image files directly in `folder`, by name; none if it is no folder."""
    if not folder.is_dir():
        return []
    return contents(folder).images


def folders_in(folder: Path, fits: Callable[[str], object]) -> list[str]:
    """Return the names of the folders in `folder` that fit, sorted; none if it is no folder."""
    if not folder.is_dir():
        return []
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and fits(path.name))


def require_files(paths: Iterable[Path], index: Path) -> list[Path]:
    """Return `paths`, which `index` names.

    Raises:     ValueError: If a file is missing.

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
