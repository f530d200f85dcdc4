"""Your own images in one folder per class, and optionally one per domain."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pgp.datasets.base import Dataset, DatasetConfig, require_folder
from pgp.datasets.files import FileSplit
from pgp.datasets.holdout import check_test_share
from pgp.datasets.ignored import Ignored
from pgp.datasets.layout import check_inside, class_folders, find_layout, find_test_folder
from pgp.datasets.scan import contents, images_below
from pgp.datasets.text import lines_of, normalized, read_text, repeated

COMMON_SUFFIXES = (".jpg", ".png", ".gif", ".webp", ".tif")
"""Common suffixes of image files, for messages. All are in `pgp.datasets.decode.SUFFIXES`."""
NAMES = "names.txt"
"""File beside the class folders with the names of classes: in each line a folder and its name."""

SETTINGS_FILES = (NAMES, "class_order.txt", "tasks.json")
"""Files that are read, here or in `pgp.training.tasks`, so they are not reported as ignored."""


@dataclass(frozen=True)
class Folder(DatasetConfig):
    """Images in one folder per class, read in place.

    Training and test images are in `root/train/<class>/*` and `root/test/<class>/*`. The second folder may also be
    called `val`, `valid`, `validation` or `eval`, in any case. If all images are in `root/<class>/*`, some of each
    class are held out for testing.

    With domains, the folders of classes are inside folders of domains: `root/train/<domain>/<class>/*` and
    `root/test/<domain>/<class>/*`, or `root/<domain>/<class>/*`.

    The name of a class is the name of its folder, unless `root/names.txt` exists, with a folder and its name per line.
    """

    tag = "folder"

    root: Path = Path("data")
    """Folder with `train` and `test`, or with a folder per class."""
    test_share: float = 0.2
    """Fraction of each class to hold out for testing if there is no folder `test`: at least one image, or none with 0,
    which leaves accuracy unmeasured."""
    split_seed: int = 0
    """Seed that decides which images are held out."""
    domains: bool = False
    """Whether the folders of classes are inside folders of domains; --setting dil turns it on."""
    train_folder: str | None = None
    """Folder of the training images in `root`; `.` if `root` itself contains the class folders. If None, a folder with
    a common name, such as `train`."""
    test_folder: str | None = None
    """Folder of the test images in `root`. If None, a folder with a common name, such as `test`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_test_share(self.test_share)

    @property
    def search_paths(self) -> tuple[Path, ...]:
        """See `DatasetConfig.search_paths`."""
        return (self.root,)

    def build(self) -> Dataset:
        """Return the images, with classes and domains from the folders of `train`, or of `root`, in alphabetical order.

        Raises:
            ValueError: If it is not clear which folders are what, or a class has no training images.
        """
        root = require_folder(self.root)
        ignored, notes = Ignored(root, SETTINGS_FILES), Notes()
        layout = find_layout(root, self.train_folder, self.test_folder, ignored)
        train = _read(layout.train, self.domains, ignored, notes, layout.test)
        test = _read(layout.test, self.domains, ignored, notes) if layout.test else Part()
        for folder, part in ((layout.train, train), (layout.test, test)):
            if folder and not part.images:
                raise ValueError("; ".join([self._nothing(folder), *ignored.lines()]))
        names, domains = train.classes(), train.domains()
        for kind, own, known in (("class", test.classes(), names), ("domain", test.domains(), domains)):
            if unknown := sorted(set(own) - set(known)):
                raise ValueError(f"expected every {kind} of {layout.test} in {layout.train} too, got {unknown[:5]} in"
                                 f" {layout.test.name if layout.test else ''} only")  # fmt: skip
        if missing := [name for name in train.unusable if name not in names]:
            message = f"expected training images of every class, got none of {missing[:5]}, {len(missing)} in all"
            raise ValueError("; ".join([f"{message}: add some, or take the class out", *ignored.lines()]))
        domains = domains if self.domains else ()
        all_images = train.split(names, domains)
        if layout.test:
            splits = all_images, test.split(names, domains)
        else:
            splits = all_images.parted(self.test_share, self.split_seed)
        class_names = _class_names(root / NAMES, names)
        lines = (*layout.notes, *notes.lines(names))
        kept = (ignored,) if ignored else ()
        return Dataset(*splits, class_names, domains=domains, folder=root, notes=lines, ignored=kept)

    def read_test(self, class_names: Sequence[str]) -> FileSplit | None:
        """See `DatasetConfig.read_test`. Folders of domains cannot be read without training images."""
        folder = find_test_folder(self.root, self.test_folder) if self.root.is_dir() else None
        if folder is None or self.domains:
            return None
        test = _read(folder, False, Ignored(self.root), Notes())
        folders = test.classes()
        names = dict(zip(_class_names(self.root / NAMES, folders), folders, strict=True))
        if not names.keys() <= set(class_names):
            return None
        return test.split(tuple(names.get(name, "") for name in class_names), ())

    def _nothing(self, folder: Path) -> str:
        """Say that there are no images in `folder`."""
        if not self.domains:
            return f"no images in {folder}/<class>/: expected files ending in {', '.join(COMMON_SUFFIXES)} or the like"
        found = contents(folder, links=True).folders
        inside = sorted({path.name for domain in found for path in contents(domain, links=True).folders})
        return (
            f"expected folders DOMAIN/CLASS with images in {folder}, got folders {[path.name for path in found][:5]}"
            f" with {inside[:5] or 'none'} inside"
        )

    def with_domains(self) -> Folder:
        """Return the same settings with folders of domains."""
        return replace(self, domains=True)


class Part:
    """The images of training or of the test."""

    def __init__(self) -> None:
        self.images: dict[tuple[str, str], list[Path]] = {}
        """By the names of domain and class, as far as there are any."""
        self.unusable: list[str] = []
        """Classes whose folder holds files, but no image."""

    def classes(self) -> tuple[str, ...]:
        """Return the names of the classes in alphabetical order."""
        return tuple(sorted({name for _, name in self.images}))

    def domains(self) -> tuple[str, ...]:
        """Return the names of the domains in alphabetical order."""
        return tuple(sorted({domain for domain, _ in self.images}))

    def split(self, names: tuple[str, ...], domains: tuple[str, ...]) -> FileSplit:
        """Return the images by domain, class and file name, with the numbers of `names` and `domains` as labels."""
        found = [
            (path, label, number)
            for number, domain in enumerate(domains or [""])
            for label, name in enumerate(names)
            for path in self.images.get((domain, name), ())
        ]
        paths, labels, numbers = (list(column) for column in zip(*found, strict=True))
        return FileSplit(paths, labels, numbers if domains else None)


class Notes:
    """What a user may not expect of how folders are read."""

    def __init__(self) -> None:
        self.nested: list[str] = []
        """Images that lie deeper than in the folder of their class."""
        self.renamed: list[str] = []
        """Folders whose names are not UTF-8."""

    def lines(self, names: tuple[str, ...]) -> list[str]:
        """Return a line for each finding; `names` are those of the classes."""
        lines = []
        if self.nested:
            lines.append(f"{len(self.nested):,} images lie deeper than in the folder of their class, and count for it,"
                         f" such as {self.nested[0]}")  # fmt: skip
        if self.renamed:
            lines.append(f"{len(self.renamed):,} folders have names that are not UTF-8; what is not stands as"
                         f" \N{REPLACEMENT CHARACTER}: {', '.join(self.renamed[:3])}")  # fmt: skip
        folded: dict[str, list[str]] = {}
        for name in names:
            folded.setdefault(name.casefold(), []).append(name)
        if alike := [both for both in folded.values() if len(both) > 1]:
            lines.append(f"classes whose names differ only in case are different classes: {', '.join(alike[0])}")
        return lines


def _read(folder: Path, domains: bool, ignored: Ignored, notes: Notes, test: Path | None = None) -> Part:
    """Return the images in the folders of classes, or of domains, in `folder`, of which `test` is none."""
    part = Part()
    above = class_folders(folder, ignored, test)
    check_inside(above.values())
    for domain, inside in above.items() if domains else [("", folder)]:
        folders = class_folders(inside, ignored) if domains else above
        if domains:
            check_inside(folders.values())
        for name, place in folders.items():
            own = Ignored(ignored.root)
            images = images_below(place, own)
            if images:
                part.images[domain, name] = images
            elif own.counts.keys() <= {"system", "hidden", "output"}:
                own.add("empty_folder", place)
            else:
                part.unusable.append(name)
            ignored.update(own)
            notes.nested += [ignored.shown(path) for path in images if path.parent != place]
            notes.renamed += [name] if normalized(place.name) != place.name and "\ufffd" in name else []
    return part


def _class_names(path: Path, folders: tuple[str, ...]) -> tuple[str, ...]:
    """Return the class names of `folders`."""
    if not os.path.lexists(path):
        return folders
    names = dict.fromkeys(folders, "")
    for line in map(normalized, lines_of(read_text(path))):
        found = [
            (text[:end], text[end:].strip())
            for text in (line, line.strip())
            for end, char in enumerate(text)
            if char in " \t" and text[:end] in names
        ]
        if found:
            folder, name = max(found, key=lambda pair: len(pair[0]))
            if names[folder]:
                raise ValueError(f"expected one line for each folder in {path}, got several for {folder!r}")
            names[folder] = name
    if without := [folder for folder in folders if not names[folder]]:
        raise ValueError(f"expected a line 'FOLDER NAME' in {path} for each folder, got none for {without[:5]}")
    if twice := repeated(names.values()):
        raise ValueError(f"expected a name of its own for each folder in {path}, got {twice[:5]} more than once")
    return tuple(names.values())
