"""Folders that pgp writes: a marker tells them from folders of images, so that no run learns its own figures."""

from __future__ import annotations

from pathlib import Path

MARKER = ".pgp-output"
"""Name of the file that marks a folder; whatever lies below such a folder is never read as data."""


def make_output(folder: Path) -> None:
    """Create `folder` with its parents, and mark it unless it holds something already."""
    folder.mkdir(parents=True, exist_ok=True)
    if not any(folder.iterdir()):
        (folder / MARKER).write_text("pgp wrote this folder and never reads it as images.\n", encoding="utf-8")


def is_empty(folder: Path) -> bool:
    """Return whether `folder` holds nothing but the marker."""
    return all(path.name == MARKER for path in folder.iterdir())
