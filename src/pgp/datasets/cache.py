"""A cache of decoded images in memory, so that each file is decoded once instead of in every epoch."""

from __future__ import annotations

import mmap
import multiprocessing
import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from pgp.datasets.free_memory import free_memory
from pgp.distributed import world_size

FRACTION = 0.2
"""Fraction of the free memory for the cached images of all splits and all processes together."""


CHECK_EVERY = 1 << 24
"""Number of bytes of images after which a store checks again how much memory is free."""


processes = 1
"""Number of independent processes that share this machine, such as those of a sweep."""


class PixelStore:
    """Shared memory for images. It is filled from the front, and freed as a whole when it is no longer used."""

    def __init__(self, budget: int) -> None:
        """Reserve room for `budget` bytes; memory is used only when images are written.

        Raises:
            OSError: If the system does not grant them.
            ImportError: If it has no locks that processes share.
        """
        self.lock = multiprocessing.Lock()
        shared = mmap.mmap(-1, 24 + budget)  # anonymous and shared; pages are taken as they are written
        # bytes used, bytes allowed, and bytes at which to check the free memory again
        self._counts = torch.frombuffer(shared, dtype=torch.int64, count=3)
        self._counts[1] = budget
        self.pixels = torch.frombuffer(shared, dtype=torch.uint8, offset=24)

    @property
    def budget(self) -> int:
        """Maximum number of bytes of images in the store."""
        return int(self._counts[1])

    def add(self, image: Tensor) -> int | None:
        """Copy `image` into the store. The caller must hold its lock.

        Returns:
            The offset of the end of the copy, or None if the store is full.
        """
        taken, budget, check = self._counts.tolist()
        end: int = taken + image.numel()
        if end > budget:
            return None
        if end > check:
            if end > _budget() + FRACTION * taken:  # other programs need the memory: stop growing
                self._counts[1] = taken
                return None
            self._counts[2] = end + CHECK_EVERY
        self.pixels[taken:end] = image.flatten()
        self._counts[0] = end
        return end


class ImageCache:
    """The images of one split by number. Images that do not fit in the store are decoded again each time.

    Forked worker processes of a loader fill and read one memory together. Workers that are spawned decode every time:
    they live for one pass, and what they kept would go with them.
    """

    def __init__(self, images: int, store: PixelStore | None = None) -> None:
        """Keep up to `images` images in `store`. If None, use the store that all splits of this process share."""
        self._store = store or (_common_store() if images else None)
        if self._store is not None:
            try:
                rows = mmap.mmap(-1, 24 * images)
            except OSError:
                self._store = None
                return
            # (images, 3): byte behind the image in the store or 0, height, width
            self._rows = torch.frombuffer(rows, dtype=torch.int64).view(images, 3)

    @property
    def budget(self) -> int:
        """Maximum number of bytes of cached images, including those of other splits."""
        return self._store.budget if self._store else 0

    def get_or_decode(self, index: int, decode: Callable[[], Tensor]) -> Tensor:
        """Return image number `index`, `(3, H, W)` uint8, from the cache or decoded. It must not be written to."""
        if self._store is None:
            return decode()
        with self._store.lock:
            end, height, width = self._rows[index].tolist()
        if end:
            return self._store.pixels[end - 3 * height * width : end].view(3, height, width)
        image = decode()
        with self._store.lock:
            if not self._rows[index, 0] and (end := self._store.add(image)):
                self._rows[index] = torch.tensor([end, *image.shape[1:]])
        return image

    def __reduce__(self) -> tuple[type[ImageCache], tuple[int]]:  # called when the object is sent to a spawned process
        return ImageCache, (0,)


def _budget() -> int:
    """Return how much of the free memory, in bytes, the images of this process may use."""
    return int(FRACTION * free_memory() / (world_size() * processes))


_shared: weakref.ref[PixelStore] | None = None


def _common_store() -> PixelStore | None:
    """Return the store that the splits of this process share, or None if the system refuses the memory."""
    global _shared
    store = _shared() if _shared else None
    if store is None and (budget := _budget()):
        try:
            store = PixelStore(budget)
        except (OSError, ImportError):
            return None
        _shared = weakref.ref(store)
    return store
