"""Progress bars, and lines printed above them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.text import Text

from pgp.system.escaping import printable

T = TypeVar("T")


def track(progress: Progress, items: Iterable[T], total: int, description: str) -> Iterator[T]:
    """Yield `items` under a progress bar, which is removed at the end."""
    bar = progress.add_task(escape(printable(description)), total=total)
    try:
        for item in items:
            yield item
            progress.advance(bar)
    finally:
        progress.remove_task(bar)


def print_line(progress: Progress, text: str) -> None:
    """Print one line above the progress bars, without wrapping and with control characters escaped."""
    progress.console.print(Text(printable(text)), soft_wrap=True)


def no_progress() -> Progress:
    """Return a progress bar that draws nothing."""
    return Progress(console=Console(quiet=True), disable=True)
