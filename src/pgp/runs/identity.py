"""What identifies a run: its random identifier, its configuration, and a description of its data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from pgp.runs.checkpoint import reading


class Identity(NamedTuple):
    """Identity of a run as JSON values: its configuration, and the description of its data."""

    run: str
    """Random identifier of the run, which distinguishes its files from those of other runs."""
    config: dict[str, Any]
    classes: dict[str, Any]


@dataclass(frozen=True)
class DataDescription:
    """Description of the data of a run, to use its classes without the data, and to recognise the data.

    As JSON values it is in `classes.json` and in every checkpoint. It contains no paths.
    """

    class_names: tuple[str, ...]
    """Names of classes, by label."""
    tasks: tuple[tuple[int, ...], ...]
    """Labels of the classes of each task."""
    task_names: tuple[str, ...]
    """Name of each task, "" for none."""
    train_images: tuple[int, ...]
    """Number of training images of each task."""
    test_images: tuple[int, ...]
    """Number of test images of each task."""
    fingerprints: tuple[str, ...]
    """Digests of labels, domains and file names of the first data set, and of each that was added: one of the training
    images, followed by one of the test images."""

    def to_json(self) -> dict[str, Any]:
        """Return the description as JSON values."""
        return {
            "names": list(self.class_names),
            "tasks": [list(labels) for labels in self.tasks],
            "task_names": list(self.task_names),
            "images": {"train": list(self.train_images), "test": list(self.test_images)},
            "fingerprint": list(self.fingerprints),
        }

    @classmethod
    def from_json(cls, tree: Mapping[str, Any], path: Path) -> DataDescription:
        """Return the description in `tree`, which was read from `path`.

        Raises:
            RunError: Naming `path`, if `tree` is anything else.
        """
        with reading(path):
            images = tree["images"]
            description = cls(
                _tuple(tree["names"], str),
                tuple(_tuple(labels, int) for labels in _tuple(tree["tasks"], list)),
                _tuple(tree["task_names"], str),
                _tuple(images["train"], int),
                _tuple(images["test"], int),
                _tuple(tree["fingerprint"], str),
            )
            count, labels = len(description.class_names), [label for task in description.tasks for label in task]
            if not labels or not all(0 <= label < count for label in labels):
                raise ValueError(f"expected tasks with labels below {count}")
        return description

    def first_tasks(self, count: int) -> DataDescription:
        """Return the description without the tasks from number `count` on, each of which was added as a data set."""
        removed = len(self.tasks) - count
        if removed <= 0:
            return self
        classes = 1 + max(label for labels in self.tasks[:count] for label in labels)
        return DataDescription(
            self.class_names[:classes],
            self.tasks[:count],
            self.task_names[:count],
            self.train_images[:count],
            self.test_images[:count],
            self.fingerprints[:-removed],
        )

    def source(self, number: int) -> DataDescription:
        """Return the description of data set `number`, as if it were the only one; 0 is the first, then the added."""
        first = self.first_tasks(len(self.tasks) - len(self.fingerprints) + 1)
        if number == 0:
            return first
        index = len(first.tasks) + number - 1
        task = slice(index, index + 1)
        names = tuple(self.class_names[label] for label in self.tasks[index])
        return DataDescription(
            names,
            (tuple(range(len(names))),),
            self.task_names[task],
            self.train_images[task],
            self.test_images[task],
            self.fingerprints[number : number + 1],
        )

    def difference(self, current: DataDescription, *, images: bool, tasks: int | None = None) -> str | None:
        """Describe how the data differ from this description. Return None if they do not.

        Args:
            current: Description of the data as they are now. Added data that are not recorded yet come last.
            images: Whether to compare numbers of images and fingerprints.
            tasks: Number of tasks to compare. If None, all of this description.
        """
        recorded = self if tasks is None else self.first_tasks(tasks)
        current = current.first_tasks(len(recorded.tasks)) if images else current
        added = len(recorded.fingerprints) - 1
        recorded, current = recorded._without_names(added), current._without_names(added)
        for field, what in _COMPARED.items():
            before, after = getattr(recorded, field), getattr(current, field)
            if before != after and (images or field not in _ABOUT_IMAGES):
                return "the {} differ ({} before, {} now)".format(what, *_differing(before, after))
        return None

    def _without_names(self, added: int) -> DataDescription:
        """Return the description without the names of added tasks, which come from paths that may have changed."""
        return replace(self, task_names=self.task_names[: len(self.task_names) - added])


_COMPARED = {
    "class_names": "classes",
    "tasks": "classes in each task",
    "task_names": "names of tasks",
    "train_images": "numbers of training images",
    "test_images": "numbers of test images",
    "fingerprints": "labels or names of images",
}
"""Fields of a description in the order in which they are compared, and their names in messages."""
_ABOUT_IMAGES = ("train_images", "test_images", "fingerprints")


def _tuple(values: object, kind: type) -> tuple[Any, ...]:
    if not isinstance(values, list) or any(type(value) is not kind for value in values):
        raise TypeError(f"expected a list of {kind.__name__}, got {values!r:.80}")
    return tuple(values)


def _differing(one: Any, other: Any) -> tuple[Any, Any]:
    """Return the first values in which two nested sequences differ, or their lengths."""
    if not isinstance(one, tuple) or not isinstance(other, tuple):
        return one, other
    if len(one) != len(other):
        return f"{len(one)} of them", f"{len(other)}"
    return next(_differing(*pair) for pair in zip(one, other, strict=True) if pair[0] != pair[1])
