"""CUB-200-2011 (Wah et al., 2011): 11,788 photographs of 200 species of birds."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from pgp.datasets.archives import Archive
from pgp.datasets.base import Dataset, DatasetSize
from pgp.datasets.published import DownloadableDataset, folders_in, images_in, labelled, require_files
from pgp.datasets.text import lines_of, read_text

SPECIES = re.compile(r"\d+\..+").fullmatch


@dataclass(frozen=True)
class CUB200(DownloadableDataset):
    """Photographs of birds, in `root/CUB_200_2011` with its index files, or in its folders train and test."""

    tag = "cub200"

    archives: ClassVar[tuple[Archive, ...]] = (
        Archive(
            "CUB_200_2011.tgz",
            "https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz",
            "md5:97eceeb196236b17998738112f37df78",
            "CUB_200_2011",
            1_150_585_339,
        ),
    )
    expected: ClassVar[DatasetSize | None] = DatasetSize(5_994, 5_794, 200)

    def read(self) -> Dataset:
        """Return 5,994 training and 5,794 test images by the official split, with labels by species number."""
        folder = self.folder()
        if (folder / "images").is_dir():
            return _indexed(folder)
        species = folders_in(folder / "train", SPECIES)
        if unknown := [name for name in folders_in(folder / "test", SPECIES) if name not in species]:
            raise ValueError(f"expected every class of {folder / 'test'} in {folder / 'train'}, got {unknown[:5]} too")
        train, test = (
            [(path, label) for label, name in enumerate(species) for path in images_in(folder / part / name)]
            for part in ("train", "test")
        )
        return _dataset(folder, train, test, species)


def _indexed(folder: Path) -> Dataset:
    """Return the data set from its four index files."""
    files, labels, parts, species = (
        _index(folder / name)
        for name in ("images.txt", "image_class_labels.txt", "train_test_split.txt", "classes.txt")
    )
    if not (files.keys() == labels.keys() == parts.keys()) or not set(labels.values()) <= species.keys():
        raise ValueError(f"expected the same images in images.txt, image_class_labels.txt and train_test_split.txt of"
                         f" {folder}, and their classes in classes.txt: unpack the archive again")  # fmt: skip
    require_files((folder / "images" / file for file in files.values()), folder / "images.txt")
    if malformed := [number for number in species if not number.isdecimal()]:
        raise ValueError(f"expected lines of a number and a name in {folder / 'classes.txt'}, got {malformed[0]!r}")
    order = sorted(species, key=int)
    pairs = {number: (folder / "images" / file, order.index(labels[number])) for number, file in files.items()}
    train, test = ([pairs[number] for number in files if parts[number] == part] for part in ("1", "0"))
    return _dataset(folder, train, test, [species[number] for number in order])


def _index(path: Path) -> dict[str, str]:
    """Return the text of each line of an index file by its number."""
    if not path.is_file():
        raise ValueError(f"expected {path} beside the images, got none: unpack the archive again")
    lines = (line.split(maxsplit=1) for line in lines_of(read_text(path)))
    return {line[0]: line[1].strip() for line in lines if len(line) == 2}


def _dataset(folder: Path, train: list[tuple[Path, int]], test: list[tuple[Path, int]], species: list[str]) -> Dataset:
    """Return the data set, after checking that it exists."""
    if not train or not test:
        raise ValueError(
            f"expected training and test images in {folder}, got {len(train)} and {len(test)}: its images lie in"
            f" images/<001.Name> with images.txt beside it, or in train/<001.Name> and test/<001.Name>"
        )
    names = tuple(name.partition(".")[2].replace("_", " ") for name in species)
    return Dataset(labelled(train), labelled(test), names)
