"""Your own data by where they lie: what `--data` means."""

from __future__ import annotations

from pathlib import Path

from pgp.datasets import DatasetConfig
from pgp.datasets.folder import Folder
from pgp.datasets.hugging_face import HuggingFace
from pgp.datasets.manifest import SUFFIXES, Manifest

HUB = "hf:"
"""What the name of a Hugging Face data set begins with."""


def own_data(place: str) -> DatasetConfig:
    """The data set at `place`: a table of images, `hf:` and the name or path of a Hugging Face data set, or a folder.

    >>> own_data("photos.csv"), own_data("photos")
    (Manifest(file=PosixPath('photos.csv'), test_share=0.2, split_seed=0),
     Folder(root=PosixPath('photos'), test_share=0.2, split_seed=0, domains=False))
    >>> own_data("hf:beans").name
    'beans'
    """
    if place.startswith(HUB):
        if place == HUB:
            raise ValueError(f"expected the name or path of a Hugging Face data set behind {HUB}, got none")
        return HuggingFace(place.removeprefix(HUB))
    path = Path(place)
    if path.suffix.lower() in SUFFIXES and not path.is_dir():
        return Manifest(path)
    if path.is_file():
        raise ValueError(f"expected a folder of images, a table of them ({', '.join(sorted(SUFFIXES))}) or {HUB}NAME as"
                         f" data, got the file {path}")  # fmt: skip
    return Folder(path)
