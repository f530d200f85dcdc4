"""Decoded images in memory, so that a file is decoded once and not in every pass."""

from __future__ import annotations

import mmap
import multiprocessing
import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from pgp.datasets.free_memory import free_memory
from pgp.distributed import world_size

SHARE = 0.2
"""How much of the free memory the images of all splits and all processes together may take."""


CHECK_EVERY = 1 << 24
"""Bytes of images after which a store looks again at how much memory is free."""


processes = 1
"""How many processes that do not train together share this machine, such as those of a sweep."""


class PixelStore:
    """Shared memory for images. It fills from the front, and is given back as a whole when nobody uses it any more."""

    def __init__(self, budget: int) -> None:
        """Make room for `budget` bytes; no memory is taken before images are written.

        Raises:
            OSError: If the system does not grant them.
            ImportError: If it has no locks that processes share.
        """
        self.lock = multiprocessing.Lock()
        shared = mmap.mmap(-1, 24 + budget)  # anonymous and shared; pages are taken as they are written
        # how many bytes are taken, how many may be, and at how many to look again at what is free
        self._counts = torch.frombuffer(shared, dtype=torch.int64, count=3)
        self._counts[1] = budget
        self.pixels = torch.frombuffer(shared, dtype=torch.uint8, offset=24)

    @property
    def budget(self) -> int:
        """How many bytes of images the store may hold."""
        return int(self._counts[1])

    def add(self, image: Tensor) -> int | None:
        """Copy `image` into the store, whose lock the caller holds.

        Returns:
            The number of the byte behind the copy, or None if the store may hold no more.
        """
        taken, budget, check = self._counts.tolist()
        end: int = taken + image.numel()
        if end > budget:
            return None
        if end > check:
            if end > _budget() + SHARE * taken:  # the memory is needed elsewhere: never grow again
                self._counts[1] = taken
                return None
            self._counts[2] = end + CHECK_EVERY
        self.pixels[taken:end] = image.flatten()
        self._counts[0] = end
        return end


class ImageCache:
    """The images of one split by number; what its store has no room for is decoded again each time.

    Forked worker processes of a loader fill and read one memory together. Workers that are spawned decode every time:
    they live for one pass, and what they kept would go with them.
    """

    def __init__(self, images: int, store: PixelStore | None = None) -> None:
        """Keep up to `images` images in `store`. If None, all splits of this process have one store together."""
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
        """How many bytes of images may be kept, together with those of other splits."""
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

    def __reduce__(self) -> tuple[type[ImageCache], tuple[int]]:  # for processes that are spawned
        return ImageCache, (0,)


def _budget() -> int:
    """Return how many bytes the images of this process may take of what is free now."""
    return int(SHARE * free_memory() / (world_size() * processes))


_shared: weakref.ref[PixelStore] | None = None


def _common_store() -> PixelStore | None:
    """Return the store that the splits of this process use; None if the system grants no memory."""
    global _shared
    store = _shared() if _shared else None
    if store is None and (budget := _budget()):
        try:
            store = PixelStore(budget)
        except (OSError, ImportError):
            return None
        _shared = weakref.ref(store)
    return store
