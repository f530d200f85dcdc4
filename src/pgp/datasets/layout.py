"""Layout of a user's image folder: which subfolders are for training, for testing, and which are classes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from pgp.datasets.ignored import Ignored
from pgp.datasets.scan import contents, holds_images, images_below
from pgp.datasets.text import normalized

TRAIN = ("train", "training")
TEST = ("test", "testing")
VALIDATION = ("val", "valid", "validation", "eval")
"""Names of the folders of each split, in any case. A test folder is preferred to a validation folder."""
EVERY_FOLDER = "."
"""Value of `train_folder` for the data folder itself, whose subfolders are all classes."""
_HOW = (
    "Name them by --dataset.train-folder NAME and --dataset.test-folder NAME; --dataset.train-folder . takes every"
    " folder for a class. Or leave only train/<class> and test/<class> there"
)


class Layout(NamedTuple):
    """Training and test folders of a data folder."""

    train: Path
    """Folder with a subfolder per class or per domain; the data folder itself if it is not split."""
    test: Path | None
    """The same for test images; None if some training images are to be held out."""
    notes: tuple[str, ...]
    """Notes on how an ambiguous layout was interpreted."""


def find_layout(root: Path, train: str | None, test: str | None, ignored: Ignored) -> Layout:
    """Return the layout of `root`.

    Args:
        root: The data folder.
        train: Name of the folder of the training images. If None, it is looked for by the usual names.
        test: Name of the folder of the test images. If None, it is looked for by the usual names.
        ignored: Collects files in `root` itself that are not used, if `root` has parts; else `class_folders` does.

    Raises:
        ValueError: Saying what was found, if there are several readings, or none.
    """
    found = contents(root, links=True)
    if train == EVERY_FOLDER:
        return _apart(Layout(root, _named(root, test) if test else None, ()))
    trains = [_named(root, train)] if train else _called(TRAIN, found.folders)
    others = [folder for folder in found.folders if folder not in trains]
    tests, validations = ([_named(root, test)], []) if test else (_called(n, others) for n in (TEST, VALIDATION))
    if not (trains or tests or validations):
        return Layout(root, None, ())
    for image in contents(root, ignored, links=True).images:
        ignored.add("outside_classes", image)
    if not trains:
        raise ValueError(f"no data folder at {root / TRAIN[0]}, beside {_listed((*tests, *validations))}. {_HOW}")
    if len(trains) > 1:
        raise ValueError(f"expected one folder of training images in {root}, got {_listed(trains)}. {_HOW}")
    chosen, notes = _test_folder(root, tests, validations)
    for folder in found.folders:
        if folder in (trains[0], chosen):
            continue
        images = images_below(folder)
        if images and not _called((*TRAIN, *TEST, *VALIDATION), [folder]) and not (train and test):
            raise ValueError(f"expected folders of classes in {trains[0].name}/ only, got images in {folder.name}/"
                             f" beside it, in {root}. {_HOW}")  # fmt: skip
        if images:
            ignored.add("unused_part", images[0], len(images))
        else:
            ignored.add("unused_folder", folder)
    return _apart(Layout(trains[0], chosen, notes))


def find_test_folder(root: Path, test: str | None) -> Path | None:
    """Return the folder of test images in `root`, named `test` or as usual; None if there is none, or no single one."""
    found = contents(root, links=True).folders
    for folders in [[root / test]] if test else (_called(names, found) for names in (TEST, VALIDATION)):
        if good := _with_classes(folders):
            return good[0] if len(good) == 1 else None
    return None


def class_folders(part: Path, ignored: Ignored, test: Path | None = None) -> dict[str, Path]:
    """Return the folders in `part` by name, in order, without the folder `test`; images directly in `part` are ignored.

    Raises:
        ValueError: If two folders have the same name in two Unicode forms, or are one folder by a link, or if they
            hold folders for training and test themselves.
    """
    found = contents(part, ignored, links=True)
    for image in found.images:
        ignored.add("outside_classes", image)
    named: dict[str, Path] = {}
    folders_by_target: dict[Path, Path] = {}
    for folder in found.folders:
        if test and folder.resolve() == test.resolve():
            continue
        other = named.setdefault(normalized(folder.name), folder)
        if other is not folder:
            raise ValueError(f"expected every class once in {part}, got two folders {normalized(folder.name)!r}, whose"
                             f" names are spelled {other.name!a} and {folder.name!a}: join them")  # fmt: skip
        other = folders_by_target.setdefault(folder.resolve(), folder)
        if other is not folder:
            raise ValueError(f"expected every folder in {part} once, got {folder.name} and {other.name}, which are the"
                             " same by a link: take one away")  # fmt: skip
    return named


def check_inside(folders: Iterable[Path]) -> None:
    """Raise if a class folder contains training and test folders, because their images would be mixed."""
    for folder in folders:
        inside = contents(folder).folders
        trains, tests = _called(TRAIN, inside), _called((*TEST, *VALIDATION), inside)
        if trains and tests:
            raise ValueError(f"expected train and test above all other folders, got {trains[0].name} and"
                             f" {tests[0].name} inside {folder}: turn them round, to train/{folder.name} and"
                             f" test/{folder.name}; or name {folder} instead, if it holds the classes")  # fmt: skip


def _test_folder(root: Path, tests: list[Path], validations: list[Path]) -> tuple[Path | None, tuple[str, ...]]:
    """Return the folder of the test images, if there is one, and notes about the others."""
    every = (*tests, *validations)
    labelled = [_with_classes(tests), _with_classes(validations)]
    good = labelled[0] or labelled[1]
    if len(good) > 1:
        raise ValueError(f"expected one folder of test images in {root}, got {_listed(good)}. {_HOW}")
    if every and not good:
        raise ValueError(f"expected folders of classes with images in {_listed(every)} of {root}, got none, so that it"
                         " is not known what is on these images. Take them away, and some training images are kept for"
                         " the test; or name another folder, by --dataset.test-folder")  # fmt: skip
    chosen = good[0] if good else None
    others = [folder for folder in every if folder != chosen]
    notes = []
    for folder in others:
        why = "" if folder in (*labelled[0], *labelled[1]) else ", which has no folders of classes with images"
        notes.append(f"the test images are those of {chosen.name if chosen else ''}/, not those of {folder.name}/{why}")
    return chosen, tuple(notes)


def _apart(layout: Layout) -> Layout:
    """Return `layout` after checking that no image is in both parts. The test folder may be among the class folders."""
    if layout.test:
        train, test = layout.train.resolve(), layout.test.resolve()
        if test.parent != train and (train in (test, *test.parents) or test in train.parents):
            raise ValueError(f"expected a folder of test images apart from that of training images, {layout.train}, got"
                             f" {layout.test}, so that test images would be trained on: name another, by"
                             " --dataset.test-folder")  # fmt: skip
    return layout


def _with_classes(parts: Iterable[Path]) -> list[Path]:
    """Return those of `parts` that have folders with images."""
    return [
        part
        for part in parts
        if part.is_dir() and any(holds_images(folder) for folder in contents(part, links=True).folders)
    ]


def _called(names: Sequence[str], folders: Sequence[Path]) -> list[Path]:
    return [folder for folder in folders if folder.name.casefold() in names]


def _named(root: Path, name: str) -> Path:
    """Return the folder `name` of `root`, as given in the settings."""
    folder = root / name
    if not folder.is_dir():
        raise ValueError(f"expected a folder {name} in {root}, as --dataset.train-folder or --dataset.test-folder names"
                         f" it, got {_listed(contents(root, links=True).folders) or 'none'}")  # fmt: skip
    return folder


def _listed(folders: Iterable[Path]) -> list[str]:
    return [folder.name for folder in folders]
