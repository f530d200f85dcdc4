"""Output folders. A marker file distinguishes them from image folders, so that no run learns its own figures."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from pgp.system import platforms, storage

MARKER = ".pgp-output"
"""Name of the file that marks a folder. Files below such a folder are never read as data."""


LOCK, WRITER = ".pgp-lock", ".pgp-writer.json"
"""Names of the lock file of a run, and of the file with the lock's owner; see `pgp.runs.lock`."""


def make_output(folder: Path) -> None:
    """Create `folder` with its parents, and mark it if it is empty; see `is_empty`.

    Raises:
        RunError: If the system refuses.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if is_empty(folder):
            mark(folder)
    except OSError as error:
        raise storage.write_error("write", folder, error) from error


def mark(folder: Path) -> None:
    """Mark `folder` as one that pgp made, so that nothing in it is read as data."""
    if not storage.exists(folder / MARKER):
        storage.write(folder / MARKER, "pgp wrote this folder and never reads it as images.\n")


def check_outside(folder: Path, data: Iterable[Path]) -> None:
    """Raise if `folder` is inside the image folders of `data`."""
    folder = folder.resolve()
    for images in data:
        above = [folder, *folder.parents]
        if images.resolve() not in above[1:] or not folder.is_dir() or is_empty(folder):
            continue
        if not any((one / MARKER).exists() for one in above[: above.index(images.resolve())]):
            raise ValueError(f"expected an output folder outside the images of {images}, got {folder}: its figures"
                             " would be learned as images; name another --output")  # fmt: skip


def is_empty(folder: Path) -> bool:
    """Return whether `folder` contains only the marker and files of a lock."""
    return all(path.name in (MARKER, LOCK, WRITER) for path in folder.iterdir())


def require_replaceable(folder: Path, what: str) -> None:
    """Raise a RunError unless another folder can take the place of `folder`; see `require_empty`."""
    if folder.resolve() == Path.cwd():
        raise storage.RunError(f"expected a new or empty folder for {what}, got the working directory, which cannot be"
                               " replaced: name one in it")  # fmt: skip
    if folder.is_symlink() or os.path.ismount(folder):
        raise storage.RunError(f"expected a new or empty folder for {what}, got {folder}, which is a link or the root"
                               " of a file system and cannot be replaced: name one in it")  # fmt: skip
    require_empty(folder, what)


def require_empty(folder: Path, what: str) -> None:
    """Raise a RunError unless `folder` is missing or empty; `what` says for what it is, such as the exported files."""
    if storage.exists(folder) and not (folder.is_dir() and not any(folder.iterdir())):
        raise storage.RunError(f"expected a new or empty folder for {what}, but {folder} is not empty: name another"
                               f" one")  # fmt: skip


def require_own(folder: Path, names: Iterable[str]) -> None:
    """Raise a RunError if `folder`, which pgp did not make, contains a file of one of these names."""
    if not folder.is_dir() or (folder / MARKER).exists():
        return
    if taken := [name for name in names if storage.exists(folder / name)]:
        raise storage.RunError(f"expected an output folder without {taken[0]}, got {folder}, which pgp did not make:"
                               " nothing in it is overwritten; name another --output")  # fmt: skip


def make_unique_folder(parent: Path, stem: str) -> Path:
    """Create and return a new folder: `parent/stem`, or `parent/stem-2`, `parent/stem-3`, ... if that exists.

    The stem may come from the run of a stranger, so it is changed into a name that cannot lead out of `parent`.

    Raises:
        RunError: If `parent` cannot be written.
    """
    make_output(parent)
    stem, number = platforms.safe_name(stem), 1
    while True:
        folder = parent / (stem if number == 1 else f"{stem}-{number}")
        try:
            folder.mkdir()
        except FileExistsError:
            number += 1
        except OSError as error:
            raise storage.write_error("write", folder, error) from error
        else:
            return folder
