"""Differences between Linux, macOS and Windows. Only this module asks which system it runs on."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import multiprocessing
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

WINDOWS: bool = sys.platform == "win32"
PAUSES = (0.01, 0.03, 0.1, 0.3, 1.0)
"""Seconds between attempts to rename a file that another program has opened, which Windows refuses."""


RESERVED = frozenset(
    {"con", "prn", "aux", "nul", *(f"{port}{number}" for port in ("com", "lpt") for number in range(1, 10))}
)
"""Names that Windows reserves for devices, in any case and with any suffix."""


HOST = re.sub(r"[^\w-]", "-", socket.gethostname(), flags=re.ASCII)[:40]
"""Name of this machine in the names of unfinished files."""


UNFINISHED = re.compile(r"\..+\.(?P<process>[0-9]{1,10})@(?P<host>[\w-]*)", re.DOTALL)
DAY = 86400.0
"""Age in seconds after which an unfinished file of another machine counts as abandoned."""


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a path beside `path` to write to. Afterwards, the file is flushed to the disk and renamed to `path`.

    If the block raises, `path` stays as it was and what was written is deleted.
    """
    partial = unfinished_name(path)
    try:
        yield partial
        sync_file(partial)
        replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def unfinished_name(path: Path) -> Path:
    """Return a path beside `path` for an unfinished file. Its name contains the machine and this process."""
    return path.with_name(f".{path.name}.{os.getpid()}@{HOST}")


def is_abandoned(path: Path) -> bool:
    """Return whether `path` is an unfinished file whose process no longer runs."""
    found = UNFINISHED.fullmatch(path.name)
    if found is None:
        return False
    if found["host"] == HOST and not WINDOWS:  # asking on Windows would disturb the process
        return not is_alive(int(found["process"]))
    return time.time() - path.lstat().st_mtime > DAY


def is_alive(process: int) -> bool:
    """Return whether a process of this machine runs; always true on Windows, where asking would disturb it."""
    if WINDOWS:
        return True
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def replace(source: Path, target: Path) -> None:
    """Rename a file to `target`, which it replaces in one step if it exists."""
    _retried(lambda: source.replace(target))


def move_folder(source: Path, target: Path) -> None:
    """Rename a folder to `target`, which must not exist or be an empty folder.

    Raises:
        OSError: If `target` holds something, or the system refuses.
    """
    if WINDOWS and target.is_dir():
        target.rmdir()  # Linux and macOS replace an empty folder in one step
    _retried(lambda: source.rename(target))


def _retried(move: Callable[[], object]) -> None:
    """Call `move`, and retry for a while if an open file prevents it."""
    for pause in PAUSES if WINDOWS else ():
        with contextlib.suppress(PermissionError):
            move()
            return
        time.sleep(pause)
    move()


def sync_file(path: Path) -> None:
    """Flush the content of a file to the disk."""
    with path.open("r+b") as file:  # Windows refuses to sync what is open for reading only
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Flush the names in a folder to the disk; Windows offers no way to do so."""
    if WINDOWS:
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_all() -> None:
    """Flush everything to the disk, if the system offers a way to do so."""
    if hasattr(os, "sync"):
        os.sync()


def cpu_facts() -> dict[str, str]:
    """Return the properties of the first CPU by their names in /proc/cpuinfo; empty without /proc."""
    facts: dict[str, str] = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            facts.setdefault(key.strip(), value.strip())
    return facts


def cores() -> int:
    """Return how many CPU cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return max(1, len(os.sched_getaffinity(0)))
    return os.cpu_count() or 1


def peak_memory() -> int | None:
    """Return the largest resident size of this process so far in bytes; None if the system does not say."""
    if WINDOWS:
        return None
    import resource  # only Unix has it

    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else 1024 * largest


def quoted(path: Path) -> str:
    """Return a path quoted for a shell of this system."""
    return subprocess.list2cmdline([str(path)]) if WINDOWS else shlex.quote(str(path))


def is_broken_pipe(error: Exception) -> bool:
    """Return whether an error means that a stream has no reader any more; Windows has no error number for it."""
    if WINDOWS and isinstance(error, OSError) and error.errno == errno.EINVAL:
        return error.filename is None  # with a file name, it means that Windows does not accept the name
    return isinstance(error, BrokenPipeError)


def ending_signals() -> list[signal.Signals]:
    """Return the signals, besides that of Ctrl-C, that ask a program to end on this system."""
    return [getattr(signal, name) for name in ("SIGTERM", "SIGHUP", "SIGBREAK") if hasattr(signal, name)]


def loader_start() -> str | None:
    """Return the start method for processes that load images; None for the default.

    On Linux they are forked, so that they share decoded images, although Python 3.14 has another default. A program
    that has chosen to spawn its processes keeps its choice.
    """
    return "fork" if sys.platform == "linux" and multiprocessing.get_start_method() != "spawn" else None


def safe_name(text: str, longest: int = 100, otherwise: str = "unnamed") -> str:
    """Return a short name for a file or folder that is valid on every file system.

    >>> safe_name("projection.energy .9, space: union"), safe_name("Aux.txt"), safe_name("...", otherwise="point")
    ('projection.energy-.9_space--union', '_Aux.txt', 'point')
    """
    name = re.sub(r"[^\w.+-]+", "-", text.replace(", ", "_").replace(" ", "-"), flags=re.ASCII).strip(".-") or otherwise
    if name.partition(".")[0].lower() in RESERVED:
        name = f"_{name}"
    if len(name) > longest:
        name = f"{name[: longest - 9]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return name


def readable_name(text: str, longest: int = 60, otherwise: str = "unnamed") -> str:
    """Return a name for a file that keeps all letters and spaces, but is valid on every file system, and has no suffix.

    It has at most `longest` bytes in UTF-8.

    >>> readable_name("sea lion"), readable_name("../<b>"), readable_name("CON"), readable_name("...")
    ('sea lion', 'b', '_CON', 'unnamed')
    >>> readable_name("\N{FOX FACE}" * 100, longest=11)
    '\N{FOX FACE}\N{FOX FACE}'
    """
    short = re.sub(r'[\x00-\x1f<>:"/\\|?*.%]+', "_", text).encode()[:longest].decode(errors="ignore")
    name = short.strip(" _") or otherwise
    return f"_{name}" if name.lower() in RESERVED else name
