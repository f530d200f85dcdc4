"""Check that a data set on this disk is complete: its size, and every image file."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from rich.progress import Progress

from pgp.datasets.base import BadImageError, Dataset, DatasetConfig, DatasetSize, Split
from pgp.datasets.files import FileSplit, read_image
from pgp.system import platforms


class IntegrityReport(NamedTuple):
    """Result of checking a data set."""

    found: DatasetSize
    expected: DatasetSize | None
    """Published size of the data set, if it has one."""
    without: tuple[str, ...]
    """Classes without training images, or without test images if there are any at all."""
    bad: tuple[str, ...]
    """Error message for each image that cannot be read."""
    unreadable: tuple[str, ...] = ()
    """Classes of which no training image, or no test image, can be read."""
    notes: tuple[str, ...] = ()
    """Notes on how the data were read and what was ignored. They do not mean that anything is missing."""

    @property
    def is_complete(self) -> bool:
        """Whether no image is missing or unreadable."""
        return self.expected in (None, self.found) and not self.without and not self.bad

    def lines(self) -> list[str]:
        """Return the report as text, one finding per line."""
        found = self.found
        lines = [f"{found.train:,} training and {found.test:,} test images of {found.classes:,} classes"]
        if self.expected not in (None, found):
            assert self.expected is not None
            train, test, classes = self.expected
            lines.append(f"expected {train:,} training and {test:,} test images of {classes:,} classes")
        lines += [f"no training or no test image of {name}" for name in self.without]
        lines += [f"no training image or no test image of {name} can be read" for name in self.unreadable]
        return [*lines, *self.notes, *self.bad]


def check_images(
    config: DatasetConfig, progress: Progress | None = None, data: Dataset | None = None
) -> IntegrityReport:
    """Decode every image file of a data set on this disk, and report what was found. Nothing is downloaded.

    Args:
        config: The data set.
        progress: Where to draw a progress bar. If None, none is drawn.
        data: The data set of `config`. If None, it is read.

    Raises:
        ValueError: If the data set is missing, or its index names files that are missing.
    """
    data = data or config.read()
    bad: list[str] = []
    good: list[set[int]] = [set(), set()]
    bar = progress.add_task("checking images", total=len(data.train) + len(data.test)) if progress else None
    pool = ThreadPoolExecutor(min(8, platforms.cores()))
    try:
        for (split, index), problem in pool.map(_problem, _images(data)):
            if problem:
                bad.append(problem)
            else:
                good[split is data.test].add(int(split.labels[index]))
            if progress and bar is not None:
                progress.advance(bar)
    finally:
        pool.shutdown(cancel_futures=True)  # or an interrupt would wait for all the rest
    found = DatasetSize(len(data.train), len(data.test), data.classes)
    there = [set(split.labels.tolist()) for split in (data.train, data.test)]
    unreadable_labels = set().union(*(labels - read for labels, read in zip(there, good, strict=True)))
    unreadable = tuple(data.class_names[label] for label in sorted(unreadable_labels))
    return IntegrityReport(found, config.expected, _without(data), tuple(bad), unreadable, data.messages())


_Location = tuple[Split, int]
"""An image: its split, and its number there."""


def _images(data: Dataset) -> Iterator[_Location]:
    for split in (data.train, data.test):
        yield from ((split, index) for index in range(len(split)))


def _problem(location: _Location) -> tuple[_Location, str | None]:
    """Return an image and the error in reading it, or None if it can be read."""
    split, index = location
    try:
        if isinstance(split, FileSplit):
            read_image(split.paths[index])  # past the memory, which is for training
        else:
            split.image(index)
    except BadImageError as error:
        return location, str(error)
    return location, None


def _without(data: Dataset) -> tuple[str, ...]:
    splits = (data.train, data.test) if len(data.test) else (data.train,)
    counts = [torch.bincount(split.labels, minlength=data.classes) for split in splits]
    return tuple(name for name, *each in zip(data.class_names, *counts, strict=True) if not all(each))
