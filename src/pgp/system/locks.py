"""Locks on files, which the system releases if a process dies."""

from __future__ import annotations

import errno
import inspect
import warnings
from pathlib import Path
from typing import Any

import filelock

_UNSUPPORTED = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK}
"""Numbers of the errors of a file system that has no locks."""
_SETTINGS: dict[str, Any] = {"fallback_to_soft": False}
"""A soft lock would stay if its process dies. Older versions of filelock never use one, and do not know the setting."""


def acquire(path: Path, timeout: float = -1) -> filelock.BaseFileLock | None:
    """Return the lock of the file `path`, acquired; None with a warning if the file system has no locks.

    Args:
        path: The file, which is created if it is missing.
        timeout: Seconds to wait for another process; -1 waits until it ends.

    Raises:
        filelock.Timeout: If another process still holds the lock.
        OSError: If the file cannot be written.
    """
    known = inspect.signature(filelock.FileLock.__init__).parameters
    lock = filelock.FileLock(path, **{name: value for name, value in _SETTINGS.items() if name in known})
    try:
        lock.acquire(timeout=timeout)
    except filelock.Timeout:  # which is an OSError
        raise
    except (NotImplementedError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in _UNSUPPORTED:
            raise
        warnings.warn(f"the file system of {path.parent} has no locks: make sure that no other process writes there",
                      stacklevel=3)  # fmt: skip
        return None
    return lock


def release(lock: filelock.BaseFileLock | None) -> None:
    """Release a lock, if there is one."""
    if lock:
        lock.release()
