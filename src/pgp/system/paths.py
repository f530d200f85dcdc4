"""Paths given by callers, as a path object or as text."""

from __future__ import annotations

import os
from pathlib import Path

StrPath = str | os.PathLike[str]
"""Type of paths in the arguments of public functions."""


def as_path(path: StrPath, what: str) -> Path:
    """Return `path` as a path.

    Args:
        path: A path, or a text that names one.
        what: What the path is of, for the error message.

    Raises:
        TypeError: If it is neither a path nor a text.
        ValueError: If it is empty or has a null character.

    >>> as_path("runs/demo", "a run folder").parts
    ('runs', 'demo')
    """
    text: object = os.fspath(path) if isinstance(path, str | os.PathLike) else None
    if not isinstance(text, str):
        shown = " ".join(repr(path).split())
        raise TypeError(f"expected the path of {what}, got {type(path).__name__}: {shown:.80}")
    if not text or "\0" in text:
        raise ValueError(f"expected the path of {what}, got {text!r:.80}")
    return Path(text)
