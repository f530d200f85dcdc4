"""Memory that this process may still use, within the limits of the machine, its control groups and the process."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

PROC = Path("/proc")


def free_memory() -> int:
    """Return how many bytes of memory this process may still use, or 0 if this is unknown.

    This is the smallest of three: what the machine has available, what the control group of this process and each of
    its parents leave (cgroup v1 and v2), and what the limits of this process leave (RLIMIT_AS and RLIMIT_DATA).
    """
    available = _sizes(PROC / "meminfo").get("MemAvailable", 0)
    return max(0, min([available, *_left_by_groups(), *_left_by_process_limits()]))


def _left_by_groups() -> Iterator[int]:
    for group in _groups():
        stat = dict(line.split()[:2] for line in _lines(group / "memory.stat") if " " in line)
        # the kernel frees inactive page cache before the limit is reached
        cache = int(stat.get("total_inactive_file", stat.get("inactive_file", "0")))
        for limit, used in (
            ("memory.max", "memory.current"),
            ("memory.high", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            numbers = [line for name in (limit, used) for line in _lines(group / name) if line.isdigit()]
            if len(numbers) == 2:  # the line has no number if there is no limit
                yield int(numbers[0]) - int(numbers[1]) + cache


def _groups() -> Iterator[Path]:
    """Yield the folders of the memory control groups of this process: its own first, then all parents."""
    own: dict[str, str] = {}  # group path by the controllers that it is for; cgroup v2 names none
    for line in _lines(PROC / "self" / "cgroup"):
        _, controllers, path = line.split(":", 2)
        own |= dict.fromkeys(controllers.split(","), path)
    for line in _lines(PROC / "self" / "mountinfo"):
        mount, _, filesystem = line.partition(" - ")
        kind, _, options = filesystem.split(" ", 2)
        controller = {"cgroup": "memory", "cgroup2": ""}.get(kind)
        if controller not in own or (controller and controller not in options.split(",")):
            continue
        root, top = (_unescaped(field) for field in mount.split(" ")[3:5])
        group = PurePosixPath(own[controller])
        # a container may show this process a part of the tree that its group is not in; then the top has its limit
        below = group.relative_to(root) if group.is_relative_to(root) and ".." not in group.parts else PurePosixPath()
        yield from (Path(top, *below.parts[:depth]) for depth in range(len(below.parts), -1, -1))


def _left_by_process_limits() -> Iterator[int]:
    try:
        import resource
    except ImportError:  # Windows
        return
    used = _sizes(PROC / "self" / "status")
    for limit, size in ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData")):
        soft, _ = resource.getrlimit(limit)
        if soft != resource.RLIM_INFINITY:
            yield soft - used.get(size, 0)


def _sizes(path: Path) -> dict[str, int]:
    """Return the sizes in bytes that the file at `path` lists, one `Name: 123 kB` a line."""
    found = (re.fullmatch(r"(\w+):\s+(\d+) kB", line) for line in _lines(path))
    return {match[1]: int(match[2]) * 1024 for match in found if match}


def _lines(path: Path) -> list[str]:
    """Return the lines of a file of the kernel; none if it is not there."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def _unescaped(field: str) -> str:
    r"""Return a field of mountinfo, where blanks and the like are octal numbers, as it was.

    >>> _unescaped(r"/sys/a\040b")
    '/sys/a b'
    """
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)
