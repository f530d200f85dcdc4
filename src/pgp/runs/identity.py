"""What a run records of its data, as JSON values: in `classes.json` and in every checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pgp.runs.checkpoint import reading

PARTS = {
    "names": "classes",
    "tasks": "classes in each task",
    "task_names": "names of tasks",
    "images": "number of images in each task",
    "fingerprint": "labels or names of images",
}
"""Keys of what is recorded (see `pgp.training.tasks.describe_data`), and their names in messages."""


KINDS = {"names": list, "tasks": list, "task_names": list, "images": dict, "fingerprint": list}


class Identity(NamedTuple):
    """Identity of a run as JSON values: its configuration, and what it records of its data."""

    run: str
    """Random identifier of the run, which distinguishes its files from those of other runs."""
    config: dict[str, Any]
    classes: dict[str, Any]


def checked(classes: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Return what is recorded of some data, after checking its types.

    Raises:
        RunError: Naming `path`, if it is something else.
    """
    with reading(path):
        for key, kind in KINDS.items():
            if type(classes[key]) is not kind:
                raise TypeError(f"expected {key} as a {kind.__name__}")
        names, tasks = classes["names"], classes["tasks"]
        labels = [label for task in tasks for label in task]
        if not (tasks and all(type(name) is str for name in names) and all(type(label) is int for label in labels)):
            raise TypeError("expected names of classes, and labels of each task")
        if not all(0 <= label < len(names) for label in labels):
            raise ValueError(f"expected labels below {len(names)}")
    return dict(classes)


def difference(known: Mapping[str, Any], classes: Mapping[str, Any], *, images: bool, tasks: int | None) -> str | None:
    """Return a description of how data differ from what is recorded of them, or None if they do not differ.

    Args:
        known: What is recorded.
        classes: The same for the data as they are now. Data that were added and are not recorded yet come last.
        images: Whether to compare numbers of images and fingerprints.
        tasks: Number of recorded tasks to compare. If None, all.
    """
    recorded = _first(known, tasks)
    current = _first(classes, len(recorded["tasks"]) if images else None)
    added = len(recorded.get("fingerprint", [""])) - 1
    for tree in (recorded, current):  # an added task is named after the path of its data, which may have changed
        if "task_names" in tree:
            tree["task_names"] = tree["task_names"][: len(tree["task_names"]) - added]
    for key, what in PARTS.items():
        if (images or key not in ("images", "fingerprint")) and recorded[key] != current[key]:
            before, after = _differing(recorded[key], current[key])
            return f"the {what} differ ({before} before, {after} now)"
    return None


def _first(classes: Mapping[str, Any], tasks: int | None) -> dict[str, Any]:
    """Return what is recorded of the first tasks only, without tasks that were added later."""
    more = len(classes["tasks"]) - (len(classes["tasks"]) if tasks is None else tasks)
    if more <= 0:
        return dict(classes)
    count = 1 + max(label for labels in classes["tasks"][:tasks] for label in labels)
    return {
        "names": classes["names"][:count],
        "tasks": classes["tasks"][:tasks],
        "task_names": classes["task_names"][:tasks],
        "images": {part: counts[:tasks] for part, counts in classes["images"].items()},
        "fingerprint": classes["fingerprint"][:-more],
    }


def _differing(one: Any, other: Any) -> tuple[Any, Any]:
    """Return the first values in which two JSON values differ."""
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return next(_differing(one[key], other[key]) for key in one if one[key] != other[key])
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return next(_differing(*pair) for pair in zip(one, other, strict=True) if pair[0] != pair[1])
    if isinstance(one, list) and isinstance(other, list):
        return f"{len(one)} of them", f"{len(other)}"
    return one, other
