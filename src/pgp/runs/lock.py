"""A lock that lets one process at a time write to a run."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import filelock

from pgp.system import locks, platforms, storage
from pgp.system.outputs import LOCK, WRITER
from pgp.system.storage import RunError

PATIENCE = 10.0
"""Seconds to wait for the lock of a dead process, because its child processes may still hold it."""


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock a run folder for writing. The system releases the lock if the process dies.

    Raises:
        RunError: If another process holds it.
    """
    path, writer = folder / LOCK, folder / WRITER
    if storage.exists(path):
        storage.require_file(path)  # a link would be followed; on Windows, a locked file cannot be read
    else:
        storage.append(path, "")
    try:
        lock = _acquire(path, folder)
    except OSError as error:
        raise storage.write_error("write", path, error) from error
    try:
        owner = {"host": platforms.HOST, "process": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        storage.write(writer, json.dumps(owner))
        yield
    finally:
        with contextlib.suppress(OSError):
            writer.unlink()
        locks.release(lock)


def _acquire(path: Path, folder: Path) -> filelock.BaseFileLock | None:
    try:
        return locks.acquire(path, timeout=0)
    except filelock.Timeout:
        host, process, since = _holder(folder / WRITER)
        if host == platforms.HOST and process is not None and not platforms.is_alive(process):
            with contextlib.suppress(filelock.Timeout):
                return locks.acquire(path, timeout=PATIENCE)
        who = "another process" if process is None else f"process {process} on {host} since {since}"
        raise RunError(f"{folder} is being written to by {who}: wait until it ends, or stop it; nothing was"
                       " changed") from None  # fmt: skip


def _holder(path: Path) -> tuple[str, int | None, str]:
    """Return host, process id and start time of the process that holds the lock; the id is None if it is unknown."""
    with contextlib.suppress(RunError):
        owner = storage.read_json(path)
        if isinstance(owner, dict) and type(owner.get("process")) is int:
            return f"{owner.get('host')!s:.40}", owner["process"], f"{owner.get('since')!s:.40}"
    return "", None, ""
