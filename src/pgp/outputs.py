"""Folders that pgp writes: a marker tells them from folders of images, so that no run learns its own figures."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

MARKER = ".pgp-output"
"""Name of the file that marks a folder; whatever lies below such a folder is never read as data."""


def make_output(folder: Path) -> None:
    """Create `folder` with its parents, and mark it unless it holds something already."""
    folder.mkdir(parents=True, exist_ok=True)
    if not any(folder.iterdir()):
        (folder / MARKER).write_text(
            "pgp wrote this folder and never reads it as images.\n", encoding="utf-8", newline="\n"
        )


def check_outside(folder: Path, data: Iterable[Path]) -> None:
    """Raise if what is written to `folder` would lie among the images of `data`, in a class folder or the like."""
    folder = folder.resolve()
    for place in data:
        above = [folder, *folder.parents]
        if place.resolve() not in above[1:] or not folder.is_dir() or is_empty(folder):
            continue
        if not any((one / MARKER).exists() for one in above[: above.index(place.resolve())]):
            raise ValueError(f"expected an output folder outside the images of {place}, got {folder}: its figures would"
                             " be learned as images; name another --output")  # fmt: skip


def is_empty(folder: Path) -> bool:
    """Return whether `folder` holds nothing but the marker."""
    return all(path.name == MARKER for path in folder.iterdir())
