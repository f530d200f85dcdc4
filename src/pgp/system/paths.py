"""Paths given by callers, as a path object or as text."""

from __future__ import annotations

import os
from pathlib import Path

Place = str | os.PathLike[str]
"""Type of paths in the arguments of public functions."""


def as_path(place: Place, what: str) -> Path:
    """Return `place` as a path.

    Args:
        place: A path, or a text that names one.
        what: What lies there, for the message of an error.

    Raises:
        TypeError: If it is neither a path nor a text.
        ValueError: If no file can be called so.

    >>> as_path("runs/demo", "a run folder").parts
    ('runs', 'demo')
    """
    text: object = os.fspath(place) if isinstance(place, str | os.PathLike) else None
    if not isinstance(text, str):
        shown = " ".join(repr(place).split())
        raise TypeError(f"expected the path of {what}, got {type(place).__name__}: {shown:.80}")
    if not text or "\0" in text:
        raise ValueError(f"expected the path of {what}, got {text!r:.80}")
    return Path(text)
