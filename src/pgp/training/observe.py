"""What is learned of a task's images around its training: what to protect, and what to remember of its classes."""

from __future__ import annotations

import itertools
import time
from typing import Any

import torch
from torch import Tensor

from pgp.datasets.loader import batches, sequential_batches
from pgp.distributed import all_gather_object, all_gather_rows
from pgp.evaluation.accuracy import FeatureBatch
from pgp.progress import track
from pgp.projections.base import ObservationSpec, Projection
from pgp.readouts.base import Readout
from pgp.scenario import Task
from pgp.training.session import Learner


def observe_before_training(learner: Learner, task: Task) -> None:
    """Run a task's images through the model before training, if the projection or a readout needs it.

    Collective: every process must call it.
    """
    if _observes_at(learner, "before"):
        observe(learner, task, learner.projection, [])
    if task.index and any(readout.needs_drift for readout in learner.readouts):
        kept = _gather_features(observe(learner, task, None, [], keep=True))
        learner.before = {"indices": kept.indices, "features": kept.features}


def observe_after_training(learner: Learner, task: Task) -> None:
    """Show a task's images to the projection and to readouts after training.

    Collective: every process must call it.
    """
    projection = learner.projection
    readouts = [readout for readout in learner.readouts if readout.needs_fit]
    observes, keep = _observes_at(learner, "after"), learner.before is not None
    if (
        observes and projection.observation == ObservationSpec()
    ):  # it wants the views that readouts want: one pass serves both
        kept = observe(learner, task, projection, readouts, keep)
    else:
        if observes:
            observe(learner, task, projection, [])
        kept = observe(learner, task, None, readouts, keep) if readouts else []
    if learner.before is not None:
        before, after = _align_by_index(learner.before, _gather_features(kept))
        for readout in readouts:
            readout.compensate(
                readout.select_features(before, after.queries), readout.select_features(after.features, after.queries)
            )
        learner.before = None


def fit_readout(readout: Readout) -> dict[str, Any]:
    """Fit a readout to what it observed, and return the seconds that took and the bytes that it keeps.

    Collective: every process must call it.
    """
    started = time.perf_counter()
    readout.end_task()
    size = sum(tensor.numel() * tensor.element_size() for tensor in readout.state_dict().values())
    return {"seconds": time.perf_counter() - started, "bytes": size}


@torch.no_grad()
def observe(
    learner: Learner, task: Task, projection: Projection | None, readouts: list[Readout], keep: bool = False
) -> list[FeatureBatch]:
    """Show the images of a task to a projection, to readouts, or to both in one pass.

    Collective: every process must call it.

    Returns:
        The batches of this process, if the caller wants to `keep` them.

    Raises:
        ValueError: If a process has no image to look at: none is readable, or they are fewer than processes.
    """
    method, fabric, config = learner.method, learner.fabric, learner.config
    collect = (projection.observation if projection else None) or ObservationSpec()
    viewed = learner.viewed(collect.view, "observed", task)
    kept: list[FeatureBatch] = []
    for number in itertools.count() if collect.repeat else range(1):
        plan = sequential_batches(task.train, (learner.part or config.eval_batch_size) * fabric.world_size, number)
        seen = 0
        stream = batches(viewed, plan, learner.evaluation.loader_options)
        for batch in track(learner.progress, stream, len(plan), f"{learner.scenario.describe(task)}, looking at it"):
            if len(batch.indices):
                seen += len(batch.indices)
                images, labels, indices = batch.to(fabric.device)
                with fabric.autocast():
                    query = learner.evaluation.query(method, images) if projection or readouts else None
                    rows = method.activations(images, query) if projection else {}
                    features = method.features(images, query).float() if readouts or keep else None
                for space, met in rows.items():
                    assert projection is not None
                    projection.observe(space, met)
                for readout in readouts:
                    assert features is not None
                    readout.observe(readout.select_features(features, query), labels)
                if keep and features is not None:
                    kept.append(FeatureBatch(indices, features.cpu(), None if query is None else query.cpu()))
            if collect.repeat and projection and projection.has_enough():
                return kept
        _check_seen(all_gather_object(seen), task)
    return kept


def _check_seen(seen: list[int], task: Task) -> None:
    """Raise if a process has seen no image of the task, by how many each has seen."""
    if not sum(seen):
        raise ValueError(f"expected training images in task {task.index + 1}, but every single one is unreadable")
    if not all(seen):
        raise ValueError(f"expected images in task {task.index + 1} for each of {len(seen)} processes, got {sum(seen)}"
                         f" that can be read: train on at most {sum(map(bool, seen))}, by --devices")  # fmt: skip


def _gather_features(kept: list[FeatureBatch]) -> FeatureBatch:
    """Return the images of all processes in the order of the split, on the CPU, however many processes share them.

    Collective: every process must call it.
    """
    indices, features = (
        all_gather_rows(torch.cat(parts)) for parts in ([k.indices for k in kept], [k.features for k in kept])
    )
    queries = [each.queries for each in kept if each.queries is not None]
    order = indices.argsort()
    return FeatureBatch(
        indices[order], features[order], all_gather_rows(torch.cat(queries))[order] if queries else None
    )


def _align_by_index(before: dict[str, Tensor], after: FeatureBatch) -> tuple[Tensor, FeatureBatch]:
    """Return features `(n, D)` before, and all that is known after, of the images that could be read both times."""
    was, now = (torch.isin(*pair) for pair in ((before["indices"], after.indices), (after.indices, before["indices"])))
    if not bool(was.any()):
        raise ValueError("expected images of this task that can be read before and after its training, got none")
    queries = None if after.queries is None else after.queries[now]
    return before["features"][was], FeatureBatch(after.indices[now], after.features[now], queries)


def _observes_at(learner: Learner, when: str) -> bool:
    """Return whether the projection wants to see the images of a task before, or after, it is trained."""
    collect = learner.projection.observation
    return collect is not None and collect.when == when and bool(learner.projection.protected)
