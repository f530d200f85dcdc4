"""Your own images: a folder per class."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from pgp.datasets import BadImageError, Dataset, DatasetConfig, Split, existing
from pgp.datasets.memory import Memory
from pgp.scenario import generator

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"})


@dataclass(frozen=True)
class Folder(DatasetConfig):
    """Images in `root/train/<class>/*` and `root/test/<class>/*`, read in place; or in `root/<class>/*`, some of each
    for the test.

    A class is called by its folder, or as `root/names.txt` says, where it exists: lines of a folder and its name.
    """

    root: Path = Path("data")
    """Folder that holds `train` and `test`, or a folder per class."""
    test_share: float = 0.2
    """Share of each class that is kept for the test where there is no folder `test`; one image at least."""
    split_seed: int = 0
    """Decides which images these are."""

    def __post_init__(self) -> None:
        if not 0 < self.test_share < 1:
            raise ValueError(f"expected dataset.test_share between 0 and 1, got {self.test_share}")

    def build(self) -> Dataset:
        """Classes are the folders of `train`, or of `root`, in alphabetical order."""
        root = existing(self.root)
        train = root / "train" if (root / "train").is_dir() else root
        if train == root and (root / "test").is_dir():
            raise ValueError(f"no data folder at {root / 'train'}, beside {root / 'test'}")
        names = _classes(train)
        spoken = _spoken(root / "names.txt", names)
        if not (root / "test").is_dir():
            return Dataset(*FileSplit.of(train, names).parted(self.test_share, self.split_seed), spoken)
        if strangers := [name for name in _classes(root / "test") if name not in names]:
            raise ValueError(
                f"expected every class of {root / 'test'} in {train} too, got {strangers[:5]} in test only"
            )
        return Dataset(FileSplit.of(train, names), FileSplit.of(root / "test", names), spoken)


def _classes(folder: Path) -> tuple[str, ...]:
    return tuple(sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")))


class FileSplit(Split):
    """Image files, decoded when asked for, and once where memory allows."""

    def __init__(self, paths: list[Path], labels: list[int]) -> None:
        self.paths, self.labels = paths, torch.tensor(labels, dtype=torch.int64)
        self.memory = Memory(len(paths))

    @classmethod
    def of(cls, folder: Path, names: tuple[str, ...]) -> FileSplit:
        """All images below `folder/<name>`, in alphabetical order, labelled by the place of the name in `names`."""
        pairs = [
            (path, label)
            for label, name in enumerate(names)
            for path in sorted((folder / name).rglob("*"))
            if path.suffix.lower() in SUFFIXES and path.is_file()
        ]
        if not pairs:
            raise ValueError(f"no images in {folder}/<class>/: expected files ending in {', '.join(sorted(SUFFIXES))}")
        return cls([path for path, _ in pairs], [label for _, label in pairs])

    def parted(self, share: float, seed: int) -> tuple[FileSplit, FileSplit]:
        """Training and test images: of each class, `share` of its images drawn for the test, and one at least."""
        chosen: set[int] = set()
        for label in self.labels.unique().tolist():
            places = (self.labels == label).nonzero().flatten()
            if len(places) < 2:
                raise ValueError(f"expected at least 2 images of every class, one of them for the test, got one in"
                                 f" {self.paths[int(places)].parent}")  # fmt: skip
            order = torch.randperm(len(places), generator=generator(seed, "part", label))
            chosen |= set(places[order[: max(1, round(share * len(places)))]].tolist())
        return self._only([i for i in range(len(self)) if i not in chosen]), self._only(sorted(chosen))

    def _only(self, places: list[int]) -> FileSplit:
        return FileSplit([self.paths[i] for i in places], [int(self.labels[i]) for i in places])

    def image(self, index: int) -> Tensor:
        """See `Split.image`."""
        return self.memory.kept(index, lambda: read_image(self.paths[index]))


def _spoken(path: Path, folders: tuple[str, ...]) -> tuple[str, ...]:
    """What the classes of `folders` are called."""
    if not path.is_file():
        return folders
    names = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        fitting = [folder for folder in folders if line.strip().startswith((f"{folder} ", f"{folder}\t"))]
        if fitting:
            folder = max(fitting, key=len)
            names[folder] = line.strip().removeprefix(folder).strip()
    if without := [folder for folder in folders if folder not in names]:
        raise ValueError(f"expected a line 'FOLDER NAME' in {path} for each folder, got none for {without[:5]}")
    return tuple(names[folder] for folder in folders)


def read_image(path: Path) -> Tensor:
    """The image at `path` as the eye sees it, `(3, H, W)` uint8: upright, in RGB, transparency over white.

    Raises:
        BadImageError: naming `path`, if it cannot be decoded.
    """
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            if image.mode.startswith("I"):  # 16 bit gray
                image = Image.fromarray(
                    (np.asarray(image, dtype=np.float64) / 257).round().clip(0, 255).astype(np.uint8)
                )
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise BadImageError(f"cannot read the image {path}: {error}") from error
