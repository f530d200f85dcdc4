"""Build a third data set, whose tasks come from different worlds: digits, clothing, emoji and characters in turn.

    python benchmarks/mixed_data.py           # write data/mixed and data/mixed-validation, print a summary
    python benchmarks/mixed_data.py --tiny    # test with digits and a few letters; nothing is kept

There are 8 tasks: 5 digits, 5 pieces of clothing, 10 emoji, 10 characters, and the same again with other classes. It
needs Debian's package dataset-fashion-mnist, ../shared/data/emoji_renditions_200.npz (which is not part of the
project), and what benchmarks/kanji_data.py needs. The digits are those of scikit-learn; who wrote them is not known, so
digits of one writer may be in training and test.

The images for tuning are other vendors of the emoji, other typefaces of the characters, and training images of the
digits and of the clothing that training does not use.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from PIL import Image

import emoji
import kanji_data
from pgp.datasets.base import Dataset
from pgp.datasets.digits import Digits
from pgp.datasets.fashion_mnist import DEBIAN, FashionMNIST
from pgp.rng import make_generator

Held = Literal["test", "validation"]
IMAGES = 20
"""Images of a digit or of a piece of clothing in each part."""
ROUNDS = 2
"""How often the worlds take turns."""
MARKER = ".settings"
"""Hidden file of an image folder with a digest of what it was written with."""


class World(NamedTuple):
    """One source of tasks."""

    name: str
    classes: int
    """Number of classes in each of its tasks."""
    images: Callable[[Held], Iterator[tuple[str, str, str, Image.Image]]]
    """Yields part (`train` or the name of the held-out images), class, file name and image of each of its pictures."""


def folder(
    held_out: Held = "test", data: Path = emoji.ROOT / "data", worlds: Callable[[], Sequence[World]] | None = None
) -> Path:
    """Return an image folder with tasks.json, which is written once: data/mixed, or data/mixed-validation for tuning.

    Pictures are `train/<class>/<name>.png` and `test/<class>/<name>.png`; the folder for tuning has no test image, and
    images for tuning in their place.

    Raises:
        DataError: If the folder was written with other settings, or a source of images is missing.
    """
    root = data / ("mixed" if held_out == "test" else "mixed-validation")
    sources = (worlds or all_worlds)()
    settings, marker = _settings(held_out, sources), root / MARKER
    if root.is_dir():
        if not marker.is_file() or marker.read_text(encoding="utf-8") != settings:
            raise kanji_data.DataError(f"expected {root} as the present settings make it, got one of others: delete it,"
                                       " and it is written again")  # fmt: skip
        return root
    with kanji_data.write_once(root) as partial:
        tasks: dict[str, list[str]] = {}
        for world in sources:
            names: list[str] = []
            for part, label, name, image in world.images(held_out):
                if label not in names and len(names) < ROUNDS * world.classes:
                    names.append(label)
                if label in names:
                    path = partial / ("train" if part == "train" else "test") / label / f"{name}.png"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    image.convert("RGB").save(path)
            for turn in range(ROUNDS):
                tasks[f"{world.name} {turn + 1}"] = names[turn * world.classes : (turn + 1) * world.classes]
        in_turn = sorted(tasks, key=lambda name: int(name.rpartition(" ")[2]))  # digits 1, clothing 1, …, digits 2, …
        text = json.dumps({name: tasks[name] for name in in_turn}, indent=1, ensure_ascii=False)
        (partial / "tasks.json").write_text(text + "\n", encoding="utf-8", newline="\n")
        (partial / MARKER).write_text(settings, encoding="utf-8", newline="\n")
    return root


def all_worlds() -> list[World]:
    """Return the four worlds."""
    return [
        World("digits", 5, lambda held_out: of_arrays("digit", Digits().build(), held_out)),
        World("clothing", 5, lambda held_out: of_arrays("clothing", clothing(), held_out)),
        World("emoji", 10, lambda held_out: of_folder(_emoji_folder(held_out), held_out, ROUNDS * 10)),
        World("characters", 10, lambda held_out: of_folder(kanji_data.folder(held_out), held_out, ROUNDS * 10)),
    ]


def tiny_worlds(data: Path) -> list[World]:
    """Return digits and letters, which need no other package."""
    letters = kanji_data.letters(data)
    return [
        World("digits", 2, lambda held_out: of_arrays("digit", Digits().build(), held_out)),
        World("letters", 2, lambda held_out: of_folder(kanji_data.folder(held_out, letters), held_out, 4)),
    ]


def clothing() -> Dataset:
    """Return Fashion-MNIST.

    Raises:
        DataError: If its files are missing or damaged.
    """
    try:
        return FashionMNIST().read()
    except ValueError as error:
        raise kanji_data.DataError(f"expected Fashion-MNIST in {DEBIAN}, got {error}: apt-get install"
                                   " dataset-fashion-mnist") from error  # fmt: skip


def of_arrays(name: str, data: Dataset, held_out: Held) -> Iterator[tuple[str, str, str, Image.Image]]:
    """Yield `IMAGES` images of each class for training and as many held out: of the test, or for tuning of training."""
    for label in range(data.classes):
        for part, split in (("train", data.train), (held_out, data.test if held_out == "test" else data.train)):
            of_class = (split.labels == label).nonzero().flatten()
            order = torch.randperm(len(of_class), generator=make_generator(label, "mixed", name))
            skipped = IMAGES if split is data.train and part != "train" else 0
            for index in of_class[order][skipped : skipped + IMAGES].tolist():
                image = Image.fromarray(split.image(index).permute(1, 2, 0).expand(-1, -1, 3).numpy())
                yield part, f"{name} {label}", str(index), image


def of_folder(root: Path, held_out: Held, classes: int) -> Iterator[tuple[str, str, str, Image.Image]]:
    """Yield the images of the first of `classes` drawn classes of an image folder."""
    names = sorted(path.name for path in (root / "train").iterdir())
    order = torch.randperm(len(names), generator=make_generator(0, "mixed", "classes"))[:classes].tolist()
    part_of_test = "test" if (root / "test").is_dir() else held_out
    for name in (names[index] for index in order):
        for part in ("train", part_of_test):
            for path in sorted((root / part / name).glob("*.png")):
                with Image.open(path) as image:
                    yield part, name, path.stem, image.copy()


def _settings(held_out: Held, worlds: Sequence[World]) -> str:
    """Return a digest of the numbers of classes and images, and of what is held out."""
    settings = (
        held_out,
        IMAGES,
        ROUNDS,
        [(world.name, world.classes) for world in worlds],
        (emoji.TEST, emoji.VALIDATION),
        [(font.part, font.package) for font in kanji_data.FONTS],
        kanji_data.CHARACTERS,
    )
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()


def _emoji_folder(held_out: Held) -> Path:
    if held_out == "test":
        return emoji.folder(emoji.TEST)
    return emoji.folder(emoji.VALIDATION, left_out=emoji.TEST)


def summary(root: Path) -> str:
    """Return the tasks with the number of their classes and images."""
    tasks = json.loads((root / "tasks.json").read_text(encoding="utf-8"))
    lines = [str(root)]
    for name, classes in tasks.items():
        counts = {
            part: sum(len(list((root / part / one).glob("*.png"))) for one in classes) for part in ("train", "test")
        }
        lines.append(f"{name}: {len(classes)} classes, {counts['train']} training and {counts['test']} test images")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Write both folders, and print a summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="test with digits and a few letters; nothing is kept")
    tiny = parser.parse_args(argv).tiny
    if not tiny:
        emoji.get_ready(emoji.IMAGES)
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) if tiny else emoji.ROOT / "data"
        try:
            for held_out in ("test", "validation"):
                worlds = (lambda: tiny_worlds(data)) if tiny else all_worlds
                print(summary(folder(held_out, data, worlds)))
        except (kanji_data.DataError, ValueError) as error:
            sys.exit(str(error))


if __name__ == "__main__":
    main()
