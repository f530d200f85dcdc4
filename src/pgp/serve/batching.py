"""Classify images of concurrent requests together: while one batch is computed, the next one gathers."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

from pgp.serve.limits import RefusedError

T = TypeVar("T")
R = TypeVar("R")


class Batcher(Generic[T, R]):
    """Collects items of concurrent callers into batches, in the order in which they come.

    No item waits for a batch to fill: as soon as the function is free, it gets what waits. `run` has to run in the
    event loop of the callers.

    Args:
        function: Takes a batch and returns a result for each item. It is called in a thread, once at a time.
        batch_size: Maximum number of items of a batch.
        waiting: Maximum number of items that wait.
        on_batch: Called with the size of each batch.
    """

    def __init__(
        self,
        function: Callable[[list[T]], Sequence[R]],
        batch_size: int,
        waiting: int,
        on_batch: Callable[[int], None] = lambda size: None,
    ) -> None:
        self.function, self.batch_size, self.waiting, self.on_batch = function, batch_size, waiting, on_batch
        self._queue: deque[tuple[T, asyncio.Future[R]]] = deque()
        self._arrived: asyncio.Event | None = None
        """Set when items may wait; None unless `run` runs."""

    def __len__(self) -> int:
        """Return the number of items that wait."""
        return len(self._queue)

    async def submit(self, items: Sequence[T]) -> list[R]:
        """Return the result for each item.

        Raises:
            RefusedError: If too many items wait.
        """
        if len(self._queue) + len(items) > self.waiting:
            raise RefusedError(503, f"{len(self._queue):,} images wait already: try again in a moment")
        loop = asyncio.get_running_loop()
        futures = [loop.create_future() for _ in items]
        self._queue.extend(zip(items, futures, strict=True))
        if self._arrived:
            self._arrived.set()
        return list(await asyncio.gather(*futures))

    async def run(self) -> None:
        """Compute batches until it is cancelled."""
        thread = ThreadPoolExecutor(1, "batches")  # of its own: it must not wait for images to be decoded
        self._arrived = arrived = asyncio.Event()  # of this event loop
        arrived.set()
        try:
            while True:
                await arrived.wait()
                if batch := self._next_batch():
                    await self._compute(batch, thread)
                else:
                    arrived.clear()
        finally:
            self._arrived = None
            self._queue.clear()
            thread.shutdown(wait=False)

    async def _compute(self, batch: list[tuple[T, asyncio.Future[R]]], thread: ThreadPoolExecutor) -> None:
        self.on_batch(len(batch))
        loop = asyncio.get_running_loop()
        try:
            results = await loop.run_in_executor(thread, self.function, [item for item, _ in batch])
        except Exception as error:  # it is the answer to these items; the next batch may do better
            for _, future in batch:
                if not future.done():
                    future.set_exception(error)
            return
        for (_, future), result in zip(batch, results, strict=True):
            if not future.done():
                future.set_result(result)

    def _next_batch(self) -> list[tuple[T, asyncio.Future[R]]]:
        """Take the items that waited longest from the queue, without those whose caller went away."""
        batch: list[tuple[T, asyncio.Future[R]]] = []
        while self._queue and len(batch) < self.batch_size:
            item, future = self._queue.popleft()
            if not future.done():
                batch.append((item, future))
        return batch
