"""Run many jobs: one after the other, in several processes of this machine, or on a Ray cluster."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

import torch

from pgp.datasets import cache
from pgp.system import platforms
from pgp.system.signals import Interrupted
from pgp.system.storage import RunError

Job = TypeVar("Job")
Result = TypeVar("Result")
Pairs = Generator[tuple[Job, Result | Exception], None, None]
"""Jobs in the order in which they end, each with its result or its error."""


class DiedError(RuntimeError):
    """The process of a job was killed or crashed."""


def run_local(work: Callable[[Job], Result], jobs: Sequence[Job], workers: int, gpus: int = 0) -> Pairs[Job, Result]:
    """Yield every job with its result, in the order in which they end.

    Args:
        work: Function that runs a job. It must be importable by name, because other processes import it.
        jobs: The jobs.
        workers: Number of processes that share the cores. If 1, this process runs the jobs.
        gpus: Number of GPUs to share. Each process sees one of them.
    """
    if workers == 1:
        for job in jobs:
            yield job, _run_guarded(work, job)
        return
    suspects: list[Job] = []
    yield from _run_pool(work, jobs, workers, gpus, suspects)
    for job in suspects:  # a process that dies breaks the whole pool, so each suspect is run again alone
        dead: list[Job] = []
        yield from _run_pool(work, [job], 1, gpus, dead)
        if dead:
            yield job, DiedError("its process was killed or died, twice; if memory ran out, use fewer --workers")


def run_on_ray(
    work: Callable[[Job], Result], jobs: Sequence[Job], address: str, gpu: bool = False
) -> Pairs[Job, Result]:
    """Run each job as a task of the Ray cluster at `address`, and yield it with its result when it ends.

    Args:
        work: Function that runs a job, as for `run_local`.
        jobs: The jobs.
        address: Address of the cluster; `auto` finds a running one, `local` starts one on this machine.
        gpu: Whether each job gets a GPU if the cluster has any.

    Raises:
        ValueError: If Ray is not installed, or there is no cluster at `address`.
    """
    try:
        import ray  # an optional dependency, slow to import
    except ImportError as error:
        raise ValueError("expected Ray for --ray, which is not installed: pip install"
                         " 'prompt-gradient-projection[ray]'") from error  # fmt: skip
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, ValueError) as error:
        raise ValueError(f"no Ray cluster at {address} ({error}): start one by ray start --head, or name"
                         " another --ray ADDRESS; local starts one for this call") from error  # fmt: skip
    running: dict[Any, Job] = {}
    try:
        wants = 1 if gpu and ray.cluster_resources().get("GPU") else 0
        # a job resumes where it stopped, so if its machine fails, it is retried
        remote = ray.remote(num_cpus=1, num_gpus=wants, max_retries=1)(_run_guarded)
        running = {remote.remote(work, job): job for job in jobs}
        while running:
            (done,), _ = ray.wait(list(running))
            job = running.pop(done)
            try:
                yield job, ray.get(done)
            except ray.exceptions.RayError as error:
                yield job, DiedError(f"its Ray task failed: {error}")
    finally:
        for task in running:
            with contextlib.suppress(ray.exceptions.RayError):
                ray.cancel(task, force=True)
        ray.shutdown()


def _run_pool(
    work: Callable[[Job], Result], jobs: Sequence[Job], workers: int, gpus: int, suspects: list[Job]
) -> Pairs[Job, Result]:
    """Yield every job with its result. Jobs that were running when a process died go to `suspects` instead."""
    left = list(reversed(jobs))
    while left:
        ours = set(multiprocessing.active_children())
        context = multiprocessing.get_context("spawn")  # fork would copy locks held by threads, and breaks CUDA
        settings = (workers, _visible_gpus(gpus), context.Value("i", 0))
        pool = ProcessPoolExecutor(min(workers, len(left)), context, _begin, settings)
        running: dict[Future[Result | Exception], Job] = {}
        try:
            while left or running:
                while left and len(running) < workers:  # submit no more than can run, to know which jobs died
                    running[pool.submit(_run_guarded, work, left[-1])] = left[-1]
                    left.pop()
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    result = future.result()
                    yield running.pop(future), result
        except BrokenProcessPool:
            suspects += running.values()
        finally:
            pool.shutdown(wait=not running, cancel_futures=True)
            for process in set(multiprocessing.active_children()) - ours if running else ():
                process.terminate()  # after an interrupt; unfinished jobs can be resumed from their checkpoints


def _begin(workers: int, gpus: list[str], counter: Any) -> None:
    """Prepare a new process: limit its threads, assign a GPU, and end it with the process that started it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent process handles Ctrl-C and ends this one
    torch.set_num_threads(max(1, platforms.cores() // workers))
    cache.processes = workers
    with counter.get_lock():
        number, counter.value = counter.value, counter.value + 1
    if gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[number % len(gpus)]
    threading.Thread(target=_follow, daemon=True).start()


def _follow() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)  # nobody would read the result, and this releases the locks of the run


def _visible_gpus(gpus: int) -> list[str]:
    """Return the names of the GPUs to share."""
    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return named[:gpus] or [str(number) for number in range(gpus)]


def _run_guarded(work: Callable[[Job], Result], job: Job) -> Result | Exception:
    """Return the result of a job, or its error, so that one failure does not stop the other jobs."""
    try:
        return work(job)
    except Interrupted as error:
        if multiprocessing.parent_process() is None:
            raise  # the sweep itself is asked to end
        return RuntimeError(str(error))
    except Exception as error:
        if os.environ.get("PGP_DEBUG"):
            return RuntimeError("".join(traceback.format_exception(error)))
        clear = isinstance(error, (ValueError, OSError, RunError))  # these messages say what to do
        return RuntimeError(str(error) if clear else f"{type(error).__name__}: {error}")
