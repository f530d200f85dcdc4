"""Data sets from a path, as given by `--data`."""

from __future__ import annotations

import os

from pgp.datasets.base import DatasetConfig
from pgp.datasets.folder import Folder
from pgp.datasets.hugging_face import HUB, HuggingFace
from pgp.datasets.manifest import SUFFIXES, Manifest
from pgp.system.paths import Place, as_path


def dataset_from_path(place: Place) -> DatasetConfig:
    """Return the data set at `place`: a table of images, a folder, or `hf:` with a Hugging Face data set.

    >>> dataset_from_path("photos.csv").file.name, dataset_from_path("photos").root.name
    ('photos.csv', 'photos')
    >>> dataset_from_path("hf:beans").name
    'beans'
    """
    path = as_path(place, f"data, or {HUB}NAME")
    place = os.fspath(place)
    if place.startswith(HUB):
        if place == HUB:
            raise ValueError(f"expected the name or path of a Hugging Face data set behind {HUB}, got none")
        return HuggingFace(place.removeprefix(HUB))
    if path.suffix.lower() in SUFFIXES and not path.is_dir():
        return Manifest(path)
    if path.is_file():
        raise ValueError(f"expected a folder of images, a table of them ({', '.join(sorted(SUFFIXES))}) or {HUB}NAME as"
                         f" data, got the file {path}")  # fmt: skip
    return Folder(path)


def relocate(config: DatasetConfig, place: Place) -> DatasetConfig:
    """Return the data set of a run at another path, with its own settings unless the new data are of another kind.

    >>> relocate(Folder("old", test_share=0.5), "new").test_share, type(relocate(Folder("old"), "new.csv")).__name__
    (0.5, 'Manifest')
    """
    there = dataset_from_path(place)
    of_ones_own = isinstance(config, (Folder, HuggingFace, Manifest))
    return there if of_ones_own and type(there) is not type(config) else config.relocated(os.fspath(place))
