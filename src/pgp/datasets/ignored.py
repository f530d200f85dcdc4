"""Files in a data folder that are not used, counted by reason, so that they can be reported."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any

EXAMPLES = 3
"""Number of files or folders that are named for each reason."""
REASONS = {
    "unknown_suffix": "files whose suffix is not that of an image",
    "no_suffix": "files without a suffix",
    "image_without_suffix": "images without a suffix, such as .jpg, which would make them count",
    "outside_classes": "images outside the class folders",
    "unused_part": "images of a part that is not used",
    "unused_folder": "folders beside those that are used",
    "empty_folder": "folders without any file",
    "folder_link": "links to folders",
    "broken_link": "links that lead nowhere",
    "special_file": "pipes, sockets and devices",
    "locked_folder": "folders that may not be opened",
    "output": "folders that pgp wrote",
    "system": "files and folders of operating systems and storage devices",
    "hidden": "hidden files and folders",
}
"""Reasons for ignoring a file, by their keys in `metrics.jsonl`."""


class Ignored:
    """Files and folders below `root` that are not used, by reason. Names in `known` directly in `root` are left out."""

    def __init__(self, root: Path, known: Collection[str] = ()) -> None:
        self.root = root
        self._known = {root / name for name in known}
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, list[str]] = {}
        self.suffixes: Counter[str] = Counter()

    def add(self, reason: str, path: Path, count: int = 1) -> None:
        """Count the file or folder at `path` for one of `REASONS`."""
        if path in self._known:
            return
        self.counts[reason] += count
        named = self.examples.setdefault(reason, [])
        if len(named) < EXAMPLES:
            named.append(self.shown(path))
        if reason == "unknown_suffix":
            self.suffixes[path.suffix.lower()] += count

    def shown(self, path: Path) -> str:
        """Return a path as it is shown to users: from `root`, if it is below."""
        return path.relative_to(self.root).as_posix() if path.is_relative_to(self.root) else str(path)

    def update(self, other: Ignored) -> None:
        """Add the counts of `other`."""
        for reason, count in other.counts.items():
            self.counts[reason] += count
            named = self.examples.setdefault(reason, [])
            named += other.examples[reason][: EXAMPLES - len(named)]
        self.suffixes.update(other.suffixes)

    def __bool__(self) -> bool:
        return bool(self.counts)

    def lines(self) -> list[str]:
        """Return a line for each reason, with the number and the first few."""
        lines = []
        for reason, text in REASONS.items():
            if count := self.counts[reason]:
                kinds = ", ".join(f"{suffix} {n:,}" for suffix, n in self.suffixes.most_common(5))
                text += f" ({kinds})" if reason == "unknown_suffix" else ""
                shown = self.examples[reason]
                rest = ", …" if count > len(shown) else ""
                lines.append(f"ignored: {count:,} {text}: {', '.join(shown)}{rest}")
        return lines

    def to_json(self) -> dict[str, Any]:
        """Return the counts as JSON values, for `metrics.jsonl`."""
        found: dict[str, Any] = {
            reason: {"count": self.counts[reason], "examples": self.examples[reason]}
            for reason in REASONS
            if self.counts[reason]
        }
        if self.suffixes:
            found["unknown_suffix"]["suffixes"] = dict(self.suffixes.most_common())
        return {"folder": str(self.root), **found}
