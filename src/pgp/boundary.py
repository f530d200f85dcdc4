"""What is learned of a task's images around its training: what to protect, and what to remember of its classes."""

from __future__ import annotations

import itertools
import time
from typing import Any

import torch
from torch import Tensor

from pgp.datasets import batches, in_order
from pgp.evaluate import tracked
from pgp.learner import Learner
from pgp.projections import Collect, Projection
from pgp.readouts import Readout
from pgp.scenario import Task

Kept = tuple[Tensor, Tensor | None]
"""Features `(B, D)` and queries `(B, Q)` of a batch."""


def look_ahead(learner: Learner, task: Task) -> None:
    """Show a task's images before it is trained, to a projection that wants them so; and keep their features, where a
    readout will ask how training moved them.
    """
    if _collects(learner, "before"):
        observe(learner, task, learner.projection, [])
    if task.index and any(readout.compensates for readout in learner.readouts):
        learner.before, _ = _together(observe(learner, task, None, [], keep=True))


def look_back(learner: Learner, task: Task) -> None:
    """Show a task's images after it is trained, to the projection and to readouts."""
    projection = learner.projection
    readouts = [readout for readout in learner.readouts if readout.fitted]
    after, keep = _collects(learner, "after"), learner.before is not None
    if after and projection.collect == Collect():  # it wants the views that readouts want: one pass serves both
        kept = observe(learner, task, projection, readouts, keep)
    else:
        if after:
            observe(learner, task, projection, [])
        kept = observe(learner, task, None, readouts, keep) if readouts else []
    if learner.before is not None:
        before, (features, queries) = learner.before.to(learner.fabric.device), _together(kept)
        for readout in readouts:
            readout.moved(readout.reads(before, queries), readout.reads(features, queries))
        learner.before = None


def fitted(readout: Readout) -> dict[str, Any]:
    """Fit a readout to what it observed; the seconds that took, and the bytes that it keeps."""
    started = time.perf_counter()
    readout.end_task()
    size = sum(tensor.numel() * tensor.element_size() for tensor in readout.state_dict().values())
    return {"seconds": time.perf_counter() - started, "bytes": size}


@torch.no_grad()
def observe(
    learner: Learner, task: Task, projection: Projection | None, readouts: list[Readout], keep: bool = False
) -> list[Kept]:
    """Show the images of a task to a projection, to readouts, or to both in one pass.

    Returns:
        Features, and queries where readouts read them, batch after batch of this process, where the caller wants to
        `keep` them.
    """
    method, fabric, config = learner.method, learner.fabric, learner.config
    collect = (projection.collect if projection else None) or Collect()
    viewed = learner.viewed(collect.view, "observed", task)
    kept: list[Kept] = []
    for number in itertools.count() if collect.repeat else range(1):
        plan = in_order(task.train, (learner.part or config.eval_batch_size) * fabric.world_size, number)
        seen = 0
        stream = batches(viewed, plan, learner.evaluation.loading)
        for batch in tracked(learner.progress, stream, len(plan), f"{learner.scenario.title(task)}, looking at it"):
            if not len(batch.indices):
                continue
            seen += len(batch.indices)
            images, labels, _ = batch.to(fabric.device)
            with fabric.autocast():
                query = learner.evaluation.query(method, images) if projection or readouts else None
                rows = method.activations(images, query) if projection else {}
                features = method.features(images, query).float() if readouts or keep else None
            for space, met in rows.items():
                assert projection is not None
                projection.observe(space, met)
            for readout in readouts:
                assert features is not None
                readout.observe(readout.reads(features, query), labels)
            if keep and features is not None:
                kept.append((features, query))
            if projection and projection.sated:
                return kept
        if not seen:
            raise ValueError(f"expected training images in task {task.index + 1}, but every single one is unreadable")
    return kept


def _together(kept: list[Kept]) -> tuple[Tensor, Tensor | None]:
    queries = [query for _, query in kept if query is not None]
    return torch.cat([features for features, _ in kept]), torch.cat(queries) if queries else None


def _collects(learner: Learner, when: str) -> bool:
    """Whether the projection wants to see the images of a task before, or after, it is trained."""
    collect = learner.projection.collect
    return collect is not None and collect.when == when and bool(learner.method.protected())
