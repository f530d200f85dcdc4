from __future__ import annotations

import asyncio
import threading

import pytest

from pgp.serve.batching import Batcher
from pgp.serve.limits import RefusedError


def run(work):
    """Run `work(batcher, sizes, free)`, with a function that waits for `free` before its first batch."""

    async def main():
        sizes, free = [], threading.Event()

        def double(items):
            free.wait(10)
            if "bad" in items:
                raise ValueError("bad item")
            return [2 * item for item in items]

        batcher = Batcher(double, batch_size=4, waiting=10, on_batch=sizes.append)
        task = asyncio.create_task(batcher.run())
        try:
            return await work(batcher, sizes, free)
        finally:
            free.set()
            task.cancel()

    return asyncio.run(main())


def test_what_waits_is_computed_together():
    async def work(batcher, sizes, free):
        first = asyncio.create_task(batcher.submit([0]))
        await asyncio.sleep(0.05)
        others = [asyncio.create_task(batcher.submit([n, n + 10])) for n in (1, 2, 3)]
        await asyncio.sleep(0.05)
        assert len(batcher) == 6
        free.set()
        return await asyncio.gather(first, *others), sizes

    results, sizes = run(work)
    assert results == [[0], [2, 22], [4, 24], [6, 26]]
    assert sizes == [1, 4, 2]


def test_callers_that_went_away_are_left_out():
    async def work(batcher, sizes, free):
        first = asyncio.create_task(batcher.submit([0]))
        await asyncio.sleep(0.05)
        gone, stays = asyncio.create_task(batcher.submit([1])), asyncio.create_task(batcher.submit([2]))
        await asyncio.sleep(0.05)
        gone.cancel()
        await asyncio.sleep(0)
        free.set()
        return await asyncio.gather(first, stays), sizes

    assert run(work) == ([[0], [4]], [1, 1])


def test_an_error_is_the_answer_to_its_batch_only():
    async def work(batcher, sizes, free):
        free.set()
        with pytest.raises(ValueError, match="bad item"):
            await batcher.submit(["bad"])
        return await batcher.submit([3])

    assert run(work) == [6]


def test_too_many_are_refused_at_once():
    async def work(batcher, sizes, free):
        with pytest.raises(RefusedError, match="0 images wait already") as refused:
            await batcher.submit(list(range(11)))
        return refused.value.status, await asyncio.gather(batcher.submit([]), return_exceptions=True)

    assert run(work) == (503, [[]])
