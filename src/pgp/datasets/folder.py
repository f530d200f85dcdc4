"""Your own images: a folder per class, and perhaps one per domain."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from pgp.datasets import BadImageError, Dataset, DatasetConfig, Split, existing
from pgp.datasets.memory import Memory
from pgp.datasets.parts import check_share, part_for_test

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"})


@dataclass(frozen=True)
class Folder(DatasetConfig):
    """Images in `root/train/<class>/*` and `root/test/<class>/*`, read in place; or in `root/<class>/*`, some of each
    for the test.

    With domains the folders of a class lie in those of their domain: `root/train/<domain>/<class>/*` and
    `root/test/<domain>/<class>/*`, or `root/<domain>/<class>/*`.
    A class is called by its folder, or as `root/names.txt` says, where it exists: lines of a folder and its name.
    """

    root: Path = Path("data")
    """Folder that holds `train` and `test`, or a folder per class."""
    test_share: float = 0.2
    """Share of each class that is kept for the test where there is no folder `test`; one image at least."""
    split_seed: int = 0
    """Decides which images these are."""
    domains: bool = False
    """Whether the folders of classes lie in folders of domains; --setting dil turns it on."""

    def __post_init__(self) -> None:
        check_share(self.test_share)

    @property
    def places(self) -> tuple[Path, ...]:
        """See `DatasetConfig.places`."""
        return (self.root,)

    def build(self) -> Dataset:
        """Classes and domains are the folders of `train`, or of `root`, in alphabetical order."""
        root = existing(self.root)
        train = root / "train" if (root / "train").is_dir() else root
        if train == root and (root / "test").is_dir():
            raise ValueError(f"no data folder at {root / 'train'}, beside {root / 'test'}")
        names, domains = self._levels(train)
        whole = FileSplit.of(train, names, domains)
        if (root / "test").is_dir():
            for kind, own, all_ in zip(("class", "domain"), self._levels(root / "test"), (names, domains), strict=True):
                if strangers := [name for name in own if name not in all_]:
                    raise ValueError(f"expected every {kind} of {root / 'test'} in {train} too, got {strangers[:5]} in"
                                     " test only")  # fmt: skip
            parts = whole, FileSplit.of(root / "test", names, domains)
        else:
            parts = whole.parted(self.test_share, self.split_seed)
        return Dataset(*parts, _spoken(root / "names.txt", names), domains=domains, folder=root)

    def by_domain(self) -> Folder:
        """The same with folders of domains."""
        return replace(self, domains=True)

    def _levels(self, folder: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Names of the classes below `folder`, and of the domains, if it has any."""
        if not self.domains:
            return _folders(folder), ()
        domains = _folders(folder)
        classes = tuple(sorted({name for domain in domains for name in _folders(folder / domain)}))
        if not classes or set(classes) <= {"train", "test"}:
            raise ValueError(f"expected folders DOMAIN/CLASS in {folder}, got folders {list(domains[:5])} with"
                             f" {list(classes) or 'none'} inside; put train and test above the domains")  # fmt: skip
        return classes, domains


def _folders(folder: Path) -> tuple[str, ...]:
    return tuple(sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")))


class FileSplit(Split):
    """Image files, decoded when asked for, and once where memory allows."""

    def __init__(self, paths: list[Path], labels: list[int], domains: list[int] | None = None) -> None:
        self.paths, self.labels = paths, torch.tensor(labels, dtype=torch.int64)
        self.memory = Memory(len(paths))
        self.domains = None if domains is None else torch.tensor(domains, dtype=torch.int64)

    @classmethod
    def of(cls, folder: Path, names: Sequence[str], domains: Sequence[str] = ()) -> FileSplit:
        """All images below `folder/<name>`, in alphabetical order, labelled by the place of the name in `names`; or
        below `folder/<domain>/<name>`, where there are domains.
        """
        found = [
            (path, label, number)
            for number, domain in enumerate(domains or [""])
            for label, name in enumerate(names)
            for path in sorted((folder / domain / name).rglob("*"))
            if path.suffix.lower() in SUFFIXES and path.is_file()
        ]
        if not found:
            inside = "<domain>/<class>" if domains else "<class>"
            raise ValueError(f"no images in {folder}/{inside}/: expected files ending in {', '.join(sorted(SUFFIXES))}")
        paths, labels, numbers = (list(column) for column in zip(*found, strict=True))
        return cls(paths, labels, numbers if domains else None)

    def parted(self, share: float, seed: int) -> tuple[FileSplit, FileSplit]:
        """Training and test images: of each class, `share` of its images drawn for the test, and one at least; of each
        class in each domain, where there are domains.
        """
        test = part_for_test(self, share, seed, lambda place: str(self.paths[place].parent))
        return self.at((~test).nonzero().flatten().tolist()), self.at(test.nonzero().flatten().tolist())

    def at(self, places: Iterable[int]) -> FileSplit:
        """The images at these places only, in this order."""
        places = list(places)
        domains = None if self.domains is None else self.domains[places].tolist()
        return FileSplit([self.paths[i] for i in places], self.labels[places].tolist(), domains)

    def names(self) -> list[str]:
        """Their paths, as far as they differ."""
        shared = os.path.commonpath([path.parent for path in self.paths])
        return [path.relative_to(shared).as_posix() for path in self.paths]

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


def read_image(path: Path, content: bytes | None = None) -> Tensor:
    """The image at `path` as the eye sees it, `(3, H, W)` uint8: upright, in RGB, transparency over white.

    Where its bytes are at hand as `content`, `path` is only what to call it.

    Raises:
        BadImageError: naming `path`, if it cannot be decoded.
    """
    try:
        with Image.open(path if content is None else io.BytesIO(content)) as file:
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
