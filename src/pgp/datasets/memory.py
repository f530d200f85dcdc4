"""Decoded images in memory, so that a file is decoded once and not in every pass."""

from __future__ import annotations

import mmap
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pgp.processes import world

SHARE = 0.2
"""Of the memory that is free when a split is made, how much its images may take; divided among processes that train
together."""
MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")


class Memory:
    """Images by number, up to a number of bytes; what does not fit is decoded again each time.

    Forked worker processes of a loader fill and read one memory together. Workers that are spawned decode every time:
    they live for one pass, and what they kept would go with them.
    """

    def __init__(self, images: int, budget: int | None = None) -> None:
        """Keeps `budget` bytes at most; by default a share of what is free, and nothing where the system hides that."""
        self.budget = int(free_memory() * SHARE / world()) if budget is None else budget
        self._rows: Tensor | None = None
        if images and self.budget:
            head = 8 * (3 * images + 1)
            try:
                self._lock = multiprocessing.Lock()
                shared = mmap.mmap(-1, head + self.budget)  # anonymous and shared; pages are taken as they are written
            except (OSError, ImportError):  # a system that grants no room ahead, or has no locks
                return
            # (images, 3): byte behind the image or 0, height, width; at the end of all, how many bytes are taken
            whole = torch.frombuffer(shared, dtype=torch.int64, count=3 * images + 1)
            self._rows, self._taken = whole[:-1].view(images, 3), whole[-1:]
            self._pixels = torch.frombuffer(shared, dtype=torch.uint8, offset=head)

    def kept(self, index: int, decode: Callable[[], Tensor]) -> Tensor:
        """Image number `index`, `(3, H, W)` uint8; decoded only if it is not here. It is not to be written to."""
        if self._rows is None:
            return decode()
        with self._lock:
            end, height, width = self._rows[index].tolist()
        if end:
            return self._pixels[end - 3 * height * width : end].view(3, height, width)
        image = decode()
        with self._lock:
            end = int(self._taken) + image.numel()
            if end <= self.budget and not self._rows[index, 0]:
                self._pixels[end - image.numel() : end] = image.flatten()
                self._rows[index] = torch.tensor([end, *image.shape[1:]])
                self._taken.fill_(end)
        return image

    def __getstate__(self) -> dict[str, Any]:  # for processes that are spawned
        return {"budget": 0}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(0, **state)  # type: ignore[misc]


def free_memory() -> int:
    """Bytes that new data can take, within the limit of a container too; 0 where the system does not say."""
    try:
        lines = dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return 0
    try:
        limit, used = ((CGROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
        return free if limit == "max" else min(free, max(0, int(limit) - int(used)))
    except (OSError, ValueError):
        return free
