"""Raw results of benchmarks: one JSON object per line, in a file that is only appended to."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RENAMED = {"sequential": "head"}


def read(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of a file; none if it does not exist."""
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            yield json.loads(line, object_hook=lambda tree: {RENAMED.get(key, key): tree[key] for key in tree})


def append(path: Path, line: dict[str, Any]) -> None:
    """Append a line to a file, and print it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(line)
    with path.open("a", encoding="utf-8", newline="\n") as file:
        file.write(text + "\n")
    print(text, flush=True)


def write_page(results: Path, text: str) -> None:
    """Write a page made from the results beside them, and print it."""
    results.with_suffix(".md").write_text(text, encoding="utf-8", newline="\n")
    print(text)
