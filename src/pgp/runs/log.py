"""The log of a run, `metrics.jsonl`: one event per line, only ever appended to."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pgp.system import platforms, storage
from pgp.system.storage import RunError

Event = dict[str, Any]


class EventLog:
    """Events of a run, oldest first.

    The events `resumed` and `undone` name the checkpoint from which the run continues. Earlier events of steps after
    that checkpoint are ignored, because these steps are trained and logged again, or were undone.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.held: list[str] | None = None
        """Lines of a task that is being added, which are written when it is finished; None if no task is added."""
        self.listeners: list[Callable[[Event], None]] = []
        """Called with every event that is appended."""

    def append(self, event: str, **values: Any) -> None:
        """Write one line, or hold it back until `release`."""
        line = json.dumps({"event": event, **values}) + "\n"
        if self.held is None:
            storage.append(self.path, line)
        else:
            self.held.append(line)
        for listener in self.listeners:
            listener({"event": event, **values})

    def release(self) -> None:
        """Write the lines that were held back."""
        if self.held:
            storage.append(self.path, "".join(self.held))
        self.held = None

    def events(self) -> list[Event]:
        """Return the valid events. A line that a crash cut off is left out."""
        if not storage.exists(self.path):
            return []
        events: list[Event] = []
        for line in storage.read(self.path).splitlines():
            event = _event(line)
            if event is not None:
                if event["event"] in ("resumed", "undone"):
                    events = [earlier for earlier in events if not _beyond(earlier, event)]
                events.append(event)
        return events

    def stamp(self) -> tuple[int, str]:
        """Return the size of the file in bytes and its digest, after flushing it to the disk."""
        if not storage.exists(self.path):
            return 0, storage.digest(b"")
        data = storage.read(self.path)
        try:
            platforms.sync_file(self.path)
        except OSError as error:
            raise storage.write_error("write", self.path, error) from error
        return len(data), storage.digest(data)

    def check(self, stamp: tuple[int, str]) -> bool:
        """Return whether the file exists, and raise a RunError if it does not begin as it did at `stamp`.

        Raises:
            RunError: If it is there, but has been changed since.
        """
        size, digest = stamp
        if not storage.exists(self.path):
            return size == 0
        if storage.digest(storage.read(self.path)[:size]) != digest:
            raise RunError(f"{self.path} was changed or damaged after pgp wrote it: restore it, or move it away to do"
                           " without it")  # fmt: skip
        return True


def _event(line: bytes) -> Event | None:
    """Return the event on a line, or None if there is none."""
    with contextlib.suppress(ValueError, RecursionError):
        value = json.loads(line)
        if isinstance(value, dict) and isinstance(value.get("event"), str):
            return value
    return None


def _beyond(event: Event, resumed: Event) -> bool:
    """Return whether an event belongs to a step after the checkpoint from which the run was resumed."""
    if event["event"] not in ("task", "train", "stream"):
        return False
    task, step = event.get("task", 0), event.get("step", 0)
    resumed_task, resumed_step = resumed.get("task", 0), resumed.get("step", 0)
    if not all(type(value) is int for value in (task, step, resumed_task, resumed_step)):
        return False
    if event["event"] == "task":
        return bool(task >= resumed_task)
    return bool((task, step) > (resumed_task, resumed_step))
