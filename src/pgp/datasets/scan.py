"""Listing of an image folder: its images, its subfolders, and ignored files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from pgp.datasets.decode import SUFFIXES, starts_like_image
from pgp.datasets.ignored import Ignored
from pgp.datasets.text import normalized
from pgp.system.outputs import MARKER

SYSTEM = frozenset(
    name.casefold()
    for name in (
        *("@eaDir", "#recycle", "#snapshot", "@Recycle", "@Recently-Snapshot", "@tmp", ".snapshot"),  # network storage
        *("$RECYCLE.BIN", "System Volume Information", "Thumbs.db", "ehthumbs.db", "desktop.ini"),  # Windows
        *("__MACOSX", ".DS_Store", ".Spotlight-V100", ".fseventsd", ".Trashes", ".TemporaryItems", "Icon\r"),  # macOS
        *(".DocumentRevisions-V100", ".AppleDouble", ".AppleDB", ".AppleDesktop", "Network Trash Folder"),
        *("lost+found", ".thumbnails", ".directory", ".nomedia"),  # Linux and Android
    )
)
"""Files and folders that operating systems and storage devices create, in any case."""
SYSTEM_STARTS = (".trash", "._")
"""Prefixes of more of these names."""


class Contents(NamedTuple):
    """Subfolders and images directly in a folder, without ignored ones, sorted by name."""

    folders: list[Path]
    images: list[Path]


def contents(folder: Path, ignored: Ignored | None = None, *, links: bool = False) -> Contents:
    """Return the folders and image files directly in `folder`; other files are added to `ignored`.

    Args:
        folder: A folder that exists.
        ignored: What counts the rest. If None, nothing is counted.
        links: Whether links to folders are folders, unless they lead to `folder` itself or to one above it.
    """
    found = Contents([], [])
    for path, reason in _kinds(folder, links):
        if reason == "folder":
            found.folders.append(path)
        elif reason == "image":
            found.images.append(path)
        elif ignored is not None:
            ignored.add(reason, path)
    return found


def images_below(folder: Path, ignored: Ignored | None = None) -> list[Path]:
    """Return the image files at any depth in alphabetical order; see `contents`. Links to folders are not followed."""
    return list(_below(folder, ignored))


def holds_images(folder: Path) -> bool:
    """Return whether there is an image in `folder` at any depth."""
    return next(_below(folder, None), None) is not None


def _below(folder: Path, ignored: Ignored | None) -> Iterator[Path]:
    levels = [_kinds(folder)]
    while levels:
        for path, reason in levels[-1]:
            if reason == "folder":
                levels.append(_kinds(path))
                break
            if reason == "image":
                yield path
            elif ignored is not None:
                ignored.add(reason, path)
        else:
            levels.pop()


def _kinds(folder: Path, links: bool = False) -> Iterator[tuple[Path, str]]:
    """Yield the entries of `folder` sorted by name, each with `folder`, `image`, or the reason for ignoring it."""
    try:
        with os.scandir(folder) as entries:
            listed = sorted(entries, key=lambda entry: (normalized(entry.name), entry.name))
    except PermissionError:
        yield folder, "locked_folder"
        return
    for entry in listed:
        yield Path(entry.path), _kind(entry, links)


def _kind(entry: os.DirEntry[str], links: bool) -> str:
    name = entry.name.casefold()
    if name in SYSTEM or name.startswith(SYSTEM_STARTS):
        return "system"
    if name.startswith("."):
        return "hidden"
    try:
        if entry.is_dir():
            if entry.is_symlink() and not (links and _leads_elsewhere(entry)):
                return "folder_link"
            return "output" if os.path.lexists(os.path.join(entry.path, MARKER)) else "folder"  # noqa: PTH118
        if not entry.is_file():
            return "special_file" if os.path.exists(entry.path) else "broken_link"  # noqa: PTH110
    except OSError:  # such as a link to itself
        return "broken_link"
    suffix = os.path.splitext(name)[1]  # noqa: PTH122 (a Path per image of a large set takes seconds)
    if suffix in SUFFIXES:
        return "image"
    if suffix.strip("."):
        return "unknown_suffix"
    return "image_without_suffix" if _starts_like_image(entry) else "no_suffix"


def _leads_elsewhere(entry: os.DirEntry[str]) -> bool:
    """Return whether a link leads to a folder that does not contain the link itself."""
    return Path(entry.path).resolve() not in Path(entry.path).parent.resolve().joinpath("x").parents


def _starts_like_image(entry: os.DirEntry[str]) -> bool:
    try:
        return starts_like_image(Path(entry.path))
    except OSError:
        return False
