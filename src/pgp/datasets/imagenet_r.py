"""ImageNet-R (Hendrycks et al., 2021): 30,000 renditions, from paintings to tattoos, of 200 classes of ImageNet."""

from __future__ import annotations

import gzip
import re
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from pgp.datasets.archives import Archive
from pgp.datasets.base import Dataset, DatasetSize
from pgp.datasets.published import DownloadableDataset, folders_in, images_in, labelled
from pgp.rng import make_generator

LISTS = Path(__file__).parent / "lists"
WNID = re.compile(r"n\d{8}").fullmatch
SPLIT = re.compile(r"shared|folders|random:(\d+)").fullmatch


@dataclass(frozen=True)
class ImageNetR(DownloadableDataset):
    """Renditions of ImageNet classes, in `root/imagenet-r/<wnid>/*`, or in its folders train and test."""

    tag = "imagenet-r"

    archives: ClassVar[tuple[Archive, ...]] = (
        Archive(
            "imagenet-r.tar",
            "https://people.eecs.berkeley.edu/~hendrycks/imagenet-r.tar",
            "md5:a61312130a589d0ca1a8fca1f2bd3337",
            "imagenet-r",
        ),
    )
    expected: ClassVar[DatasetSize | None] = DatasetSize(24_000, 6_000, 200)

    split: str = "shared"
    """Which images are test images. shared: 6,000 images from a list that several codebases use. random:SEED: a random
    fifth, drawn with this seed. folders: those in the folder test."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not SPLIT(self.split):
            raise ValueError(
                f"expected dataset.split shared, folders or random:SEED (a whole number), got {self.split!r}"
            )

    def read(self) -> Dataset:
        """Return 24,000 training and 6,000 test images, with labels in the order of the WordNet ids."""
        folder = self.folder()
        train, test = self._parts(folder)
        named = _names()
        wnids = sorted({name[:9] for name in (*train, *test)})
        if unknown := [wnid for wnid in wnids if wnid not in named]:
            raise ValueError(f"expected in {folder} folders of the 200 classes of ImageNet-R, got {unknown[:5]} too")
        if not train or not test:
            raise ValueError(
                f"expected training and test images of split {self.split} in {folder}, got {len(train)} and"
                f" {len(test)}: its images lie in <wnid>/*.jpg, or in train/<wnid>/*.jpg and test/<wnid>/*.jpg"
            )
        label_of = {wnid: label for label, wnid in enumerate(wnids)}
        splits = [labelled((path, label_of[name[:9]]) for name, path in part.items()) for part in (train, test)]
        return Dataset(splits[0], splits[1], tuple(named[wnid] for wnid in wnids))

    def _parts(self, folder: Path) -> tuple[dict[str, Path], dict[str, Path]]:
        """Return training and test files by `<wnid>/<file>`."""
        train, test = _files(folder / "train"), _files(folder / "test")
        if self.split == "folders":
            if both := sorted(set(train) & set(test)):
                raise ValueError(f"{len(both)} images are in {folder / 'train'} and in {folder / 'test'}, such as"
                                 f" {both[0]}: delete one of each")  # fmt: skip
            return train, test
        everything = {**test, **train, **_files(folder)}
        names = sorted(everything)
        if self.split == "shared":
            chosen = set(gzip.decompress((LISTS / "imagenet_r_test.txt.gz").read_bytes()).decode().split())
        else:
            order = torch.randperm(
                len(names), generator=make_generator(int(self.split[7:]), "imagenet-r split")
            ).tolist()
            chosen = {names[index] for index in order[: round(0.2 * len(names))]}
        return (
            {name: everything[name] for name in names if name not in chosen},
            {name: everything[name] for name in names if name in chosen},
        )


def _files(folder: Path) -> dict[str, Path]:
    return {f"{wnid}/{path.name}": path for wnid in folders_in(folder, WNID) for path in images_in(folder / wnid)}


def _names() -> dict[str, str]:
    """Return the class names by WordNet id."""
    lines = (LISTS / "imagenet_r_classnames.txt").read_text(encoding="utf-8").splitlines()
    return {wnid: name.replace("_", " ") for wnid, name in (line.split(maxsplit=1) for line in lines)}
