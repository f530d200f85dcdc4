"""Run a task's images through the model before or after training: for the projection, and for the readouts."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pgp.datasets.loader import TransformedSplit, batches, sequential_batches
from pgp.distributed import all_gather_object, all_gather_rows
from pgp.evaluation.accuracy import FeatureBatch, FrozenCache, FrozenFeatures
from pgp.methods.base import to_device
from pgp.progress import track
from pgp.projections.base import ObservationSpec, Projection
from pgp.readouts.base import Features, Readout
from pgp.scenario import Task
from pgp.training.session import Session
from pgp.training.state import TrainState


def observe_before_training(session: Session, state: TrainState, task: Task) -> None:
    """Run the task's images through the model before training, if the projection or a readout needs it.

    Collective: in a distributed run, every process must call it.
    """
    if _observes_at(state.projection, "before"):
        observe(session, state, task, state.projection, [])
    if task.index and session.changes_features(state, task) and any(one.needs_drift for one in state.readouts):
        kept = observe(session, state, task, None, [], keep=True, cache=session.frozen)
        state.keep_features(_gather_features(kept))


def compute_queries(session: Session, state: TrainState, task: Task) -> None:
    """Compute the queries of the task's images without augmentation, if training uses them.

    They depend on nothing that is learned, so a resumed run computes them again.

    Collective: in a distributed run, every process must call it.
    """
    if session.uses_clean_queries(state):
        if not len(session.frozen):  # or the features before training needed them
            observe(session, state, task, None, [], cache=session.frozen)
        session.frozen.gather()


def observe_after_training(session: Session, state: TrainState, task: Task) -> None:
    """Run the task's images through the model after training, for the projection and the readouts.

    Collective: in a distributed run, every process must call it.
    """
    projection = state.projection
    readouts = state.fitted_readouts
    observes, keep = _observes_at(projection, "after"), state.features_before is not None
    cache = session.frozen if len(session.frozen) else None
    if observes and projection.observation == ObservationSpec():  # readouts want the same images: one pass serves both
        kept = observe(session, state, task, projection, readouts, keep, cache)
    else:
        if observes:
            observe(session, state, task, projection, [])
        kept = observe(session, state, task, None, readouts, keep, cache) if readouts else []
    session.frozen.clear()
    observe_views(session, state, task, readouts)
    if state.features_before is not None:
        before, after = _align_by_index(state.features_before, _gather_features(kept))
        for readout in (one for one in readouts if one.needs_drift):
            old = readout.select_features(after._replace(features=before))
            readout.compensate(old, readout.select_features(after))
        state.features_before = None


def observe_views(session: Session, state: TrainState, task: Task, readouts: Sequence[Readout]) -> None:
    """Pass augmented views of the task's images to readouts, as many as the configuration asks for.

    Collective: in a distributed run, every process must call it.
    """
    views = session.transformed("train", "readout views", None)  # so the order of the tasks does not change them
    for view in range(session.config.views if readouts else 0):
        observe(session, state, task, None, readouts, views=views, view=view)


def fit_readout(readout: Readout) -> dict[str, Any]:
    """Fit a readout to what it observed, and return the seconds that took and the bytes that it keeps.

    Collective: in a distributed run, every process must call it.
    """
    started = time.perf_counter()
    readout.end_task()
    size = sum(tensor.numel() * tensor.element_size() for tensor in readout.state_dict().values())
    return {"seconds": time.perf_counter() - started, "bytes": size}


def warn_of_similar_classes(session: Session, state: TrainState, task: Task) -> None:
    """Warn of added classes that look like classes that were learned before, perhaps under another name."""
    is_added = task.index >= len(session.scenario) - len(session.config.added)
    if not is_added or session.config.setting == "dil":
        return
    names = session.data.class_names
    pairs = [pair for readout in state.fitted_readouts for pair in readout.similar_classes.items()]
    for new, old in dict.fromkeys(pairs):
        session.warn(
            f"images of {names[new]} look like those of {names[old]}, which was learned before: is it the same class"
            " under another name?"
        )


@torch.no_grad()
def observe(
    session: Session,
    state: TrainState,
    task: Task,
    projection: Projection | None,
    readouts: Sequence[Readout],
    keep: bool = False,
    cache: FrozenCache | None = None,
    views: TransformedSplit | None = None,
    view: int = 0,
) -> list[FeatureBatch]:
    """Pass the images of a task to a projection, to readouts, or to both at once.

    Collective: in a distributed run, every process must call it.

    Args:
        session: Data and devices.
        state: The method.
        task: The task.
        projection: The projection, which says how it observes, or None.
        readouts: The readouts.
        keep: Whether to return the features.
        cache: Frozen features of these images without augmentation: those that it has are not computed again, and it
            keeps the others. If None, all are computed.
        views: Augmented images, of which the view number `view` is passed. If None, images as the projection asks for
            them, by default without augmentation.
        view: Number of the view.

    Returns:
        The features of this process's images, batch by batch, if `keep`.

    Raises:
        ValueError: If a process has no image to observe: none is readable, or they are fewer than processes.
    """
    fabric, evaluator = session.fabric, session.evaluator
    spec = (projection.observation if projection else None) or ObservationSpec()
    split = views or session.transformed(spec.transform, "observed", task)
    needs_memory = views is None and state.is_trainable  # a projection may hold the activations of these images
    at_once = (needs_memory and session.micro_batch_size) or session.config.eval_batch_size
    batch_size = at_once * fabric.world_size
    needs_frozen = bool(readouts) or state.method.uses_query
    kept: list[FeatureBatch] = []
    title = f"{session.scenario.describe(task)}, computing features"
    folds = session.folds(task)
    for epoch in itertools.count() if spec.repeat else [view]:
        plan, num_images = sequential_batches(task.train, batch_size, epoch), 0
        stream = batches(split, plan, evaluator.loader_options)
        for batch in track(session.progress, stream, len(plan), title):
            if len(batch.indices):
                num_images += len(batch.indices)
                images, labels, indices, _ = batch.to(fabric.device)
                cached = None if cache is None else indices
                frozen = evaluator.frozen(state.method, images, cached, cache) if needs_frozen else None
                features = _features(session, state, task, images, frozen, projection, wanted=bool(readouts) or keep)
                if features is not None:
                    held_out = _rows_by_fold(folds[batch.indices], fabric.device)
                    for readout in readouts:
                        selected = readout.select_features(features)
                        readout.observe(selected, labels)
                        for fold, rows in held_out.items():
                            readout.hold_out(selected[rows], labels[rows], fold=fold, augmented=views is not None)
                    if keep:
                        kept.append(FeatureBatch(indices, features).cpu())
            elif projection:
                projection.observe_nothing()
            if spec.repeat and projection and projection.has_enough():
                return kept
        _check_seen(all_gather_object(num_images), task)
    return kept


def _rows_by_fold(folds: Tensor, device: torch.device) -> dict[int, Tensor]:
    """Return the rows that are held out, by fold, on `device`; `folds` is on the CPU, so that it waits for no GPU."""
    used = [fold for fold in folds.unique().tolist() if fold >= 0]
    return {fold: to_device((folds == fold).nonzero()[:, 0], device) for fold in used}


def _features(
    session: Session,
    state: TrainState,
    task: Task,
    images: Tensor,
    frozen: FrozenFeatures | None,
    projection: Projection | None,
    *,
    wanted: bool,
) -> Features | None:
    """Pass images `(B, 3, S, S)` through the model, for `projection` if there is one; return their features if wanted.

    One pass serves both, unless the method has experts.
    """
    method, query, own = state.method, frozen and frozen.query, None
    if projection:
        with session.fabric.autocast(), method.backbone.uncompiled():  # what records inputs would be compiled anew
            if wanted and method.router is None:
                activations, own = method.activations_and_features(images, query)
            else:
                activations = method.activations(images, query)
        for space, inputs in activations.items():
            projection.observe(space, inputs)
    if own is not None:
        return Features(own.float(), *(frozen or (None, None)))
    return session.evaluator.features(method, images, frozen, task=task) if wanted else None


def _check_seen(seen: list[int], task: Task) -> None:
    """Raise if a process has seen no image of the task, by how many each has seen."""
    if not sum(seen):
        raise ValueError(f"expected training images in task {task.index + 1}, but every single one is unreadable")
    if not all(seen):
        raise ValueError(f"expected images in task {task.index + 1} for each of {len(seen)} processes, got {sum(seen)}"
                         f" that can be read: train on at most {sum(map(bool, seen))}, by --devices")  # fmt: skip


def _gather_features(kept: list[FeatureBatch]) -> FeatureBatch:
    """Return the images of all processes in the order of the split, on the CPU, however many processes share them.

    Collective: in a distributed run, every process must call it.
    """
    own = FeatureBatch.concat(kept)
    batch = FeatureBatch(all_gather_rows(own.indices), own.images.apply(all_gather_rows))
    return batch.rows(batch.indices.argsort())


def _align_by_index(before: dict[str, Tensor], after: FeatureBatch) -> tuple[Tensor, Features]:
    """Return features `(n, D)` before, and all that is known after, of the images that could be read both times."""
    common_before = torch.isin(before["indices"], after.indices)
    common_after = torch.isin(after.indices, before["indices"])
    if not bool(common_before.any()):
        raise ValueError("expected images of this task that can be read before and after its training, got none")
    return before["features"][common_before], after.rows(common_after).images


def _observes_at(projection: Projection, when: str) -> bool:
    """Return whether `projection` observes the images of a task `before`, or `after`, its training."""
    spec = projection.observation
    return spec is not None and spec.when == when and bool(projection.protected)
