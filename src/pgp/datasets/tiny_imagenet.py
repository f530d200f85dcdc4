"""TinyImageNet (Stanford CS231n, 2015): 110,000 labelled images of 64 x 64 pixels, 200 classes of ImageNet."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from pgp.datasets.archives import Archive
from pgp.datasets.base import Dataset, DatasetSize
from pgp.datasets.published import DownloadableDataset, folders_in, images_in, labelled, require_files
from pgp.datasets.text import lines_of, read_text

WNID = re.compile(r"n\d{8}").fullmatch


@dataclass(frozen=True)
class TinyImageNet(DownloadableDataset):
    """Small images of ImageNet classes, in `root/tiny-imagenet-200`; test images are those of `val`.

    Test images are in `val/images`, or in a folder per class in `val` or in `test`.
    """

    tag = "tiny-imagenet"

    archives: ClassVar[tuple[Archive, ...]] = (
        Archive(
            "tiny-imagenet-200.zip",
            "https://cs231n.stanford.edu/tiny-imagenet-200.zip",
            "md5:90528d7ca1a48142e341f4ef8d21d0de",
            "tiny-imagenet-200",
            248_100_043,
        ),
    )
    expected: ClassVar[DatasetSize | None] = DatasetSize(100_000, 10_000, 200)

    def read(self) -> Dataset:
        """Return 100,000 training and 10,000 test images, with labels in the order of the WordNet ids."""
        folder = self.folder()
        wnids = folders_in(folder / "train", WNID)
        train = [(path, label) for label, wnid in enumerate(wnids) for path in _of_class(folder / "train" / wnid)]
        if not train:
            raise ValueError(f"expected images in {folder / 'train'}/<wnid>/images, got none")
        return Dataset(labelled(train), labelled(_test(folder, wnids)), _names(folder / "words.txt", wnids))


def _test(folder: Path, wnids: list[str]) -> list[tuple[Path, int]]:
    """Return the test images and their labels."""
    index = folder / "val" / "val_annotations.txt"
    if index.is_file() and images_in(folder / "val" / "images"):
        lines = [line.split("\t") for line in lines_of(read_text(index)) if line]
        if unknown := [line for line in lines if len(line) < 2 or line[1] not in wnids]:
            raise ValueError(f"expected lines of an image and a class of {folder / 'train'} in {index}, got"
                             f" {unknown[0]}")  # fmt: skip
        paths = require_files((folder / "val" / "images" / line[0] for line in lines), index)
        return [(path, wnids.index(line[1])) for path, line in zip(paths, lines, strict=True)]
    for part in (folder / "val", folder / "test"):
        if unknown := [[wnid] for wnid in folders_in(part, WNID) if wnid not in wnids]:
            raise ValueError(f"expected every class of {part} in {folder / 'train'} too, got {unknown[0]}")
        if pairs := [(path, label) for label, wnid in enumerate(wnids) for path in _of_class(part / wnid)]:
            return pairs
    raise ValueError(f"expected test images in {folder}: val/images with val/val_annotations.txt, or"
                     f" val/<wnid>/images, or test/<wnid>/images, got none")  # fmt: skip


def _of_class(folder: Path) -> list[Path]:
    return images_in(folder / "images") or images_in(folder)


def _names(words: Path, wnids: list[str]) -> tuple[str, ...]:
    """Return the first synonym of each class, or its WordNet id if words.txt is missing."""
    if not words.is_file():
        warnings.warn(f"no {words}: classes are called by their WordNet ids", stacklevel=2)
        return tuple(wnids)
    lines = (line.partition("\t") for line in lines_of(read_text(words)))
    names = {wnid: synonyms.split(",")[0].strip() for wnid, _, synonyms in lines}
    if unnamed := [wnid for wnid in wnids if not names.get(wnid)]:
        raise ValueError(f"expected a line 'WNID<tab>NAME' in {words} for each class, got none for {unnamed[:5]}")
    return tuple(names[wnid] for wnid in wnids)
