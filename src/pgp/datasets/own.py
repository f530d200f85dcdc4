"""Data sets from a path, as given by `--data`."""

from __future__ import annotations

import os

from pgp.datasets.base import DatasetConfig
from pgp.datasets.folder import Folder
from pgp.datasets.hugging_face import HUB, HuggingFace
from pgp.datasets.manifest import SUFFIXES, Manifest
from pgp.system.paths import StrPath, as_path


def dataset_from_path(path: StrPath) -> DatasetConfig:
    """Return the data set at `path`: a table of images, a folder, or `hf:` with a Hugging Face data set.

    >>> dataset_from_path("photos.csv").file.name, dataset_from_path("photos").root.name
    ('photos.csv', 'photos')
    >>> dataset_from_path("hf:beans").name
    'beans'
    """
    file, name = as_path(path, f"data, or {HUB}NAME"), os.fspath(path)
    if name.startswith(HUB):
        if name == HUB:
            raise ValueError(f"expected the name or path of a Hugging Face data set after {HUB}, got none")
        return HuggingFace(name.removeprefix(HUB))
    if file.suffix.lower() in SUFFIXES and not file.is_dir():
        return Manifest(file)
    if file.is_file():
        raise ValueError(f"expected a folder of images, a table of them ({', '.join(sorted(SUFFIXES))}) or {HUB}NAME as"
                         f" data, got the file {file}")  # fmt: skip
    return Folder(file)


def relocate(config: DatasetConfig, path: StrPath) -> DatasetConfig:
    """Return the data set of a run at another path, with its own settings unless the new data are of another kind.

    >>> relocate(Folder("old", test_share=0.5), "new").test_share, type(relocate(Folder("old"), "new.csv")).__name__
    (0.5, 'Manifest')
    """
    moved = dataset_from_path(path)
    is_own = isinstance(config, (Folder, HuggingFace, Manifest))
    return moved if is_own and type(moved) is not type(config) else config.relocated(os.fspath(path))
