"""Learning a stream of tasks. Read this first.

`train` calls `fit`. For each task, `fit` calls `fit_task`, which calls `train_step` for each batch, then `end_task`.

A `Session` (pgp.training.session) is everything that training needs: devices, data, the run folder, the log. A
`TrainState` (pgp.training.state) is exactly what a checkpoint holds: method, projection, readouts, optimizer, matrices.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from rich.progress import Progress
from torch import Tensor

from pgp.config import Config, Hardware
from pgp.datasets.base import DatasetConfig
from pgp.datasets.loader import Batch, SampleKey, batches
from pgp.runs.run import Run
from pgp.scenario import Task
from pgp.system.paths import StrPath
from pgp.training import start
from pgp.training.compiling import compile_blocks
from pgp.training.health import StepHealth, check_finite, check_projection, clip_gradients
from pgp.training.observe import (
    compute_queries,
    fit_readout,
    observe_after_training,
    observe_before_training,
    warn_of_similar_classes,
)
from pgp.training.session import Session
from pgp.training.state import TrainState
from pgp.training.stop import is_asked_to_stop, stop_after, stop_within
from pgp.training.tasks import training_batches
from pgp.training.trackers import TrackerName, check_trackers, report_to


def train(
    config: Config,
    output: StrPath | None = None,
    progress: Progress | None = None,
    trackers: Sequence[TrackerName] = (),
) -> Run:
    """Learn all tasks of `config`, and leave the run in `output`.

    Args:
        config: What to do; `pgp.recipes` has complete configurations.
        output: Run folder: one that does not exist yet, an empty one, or one with a run of the same configuration that
            was stopped before its first checkpoint. If None, a new folder in `runs/`.
        progress: Where to draw progress bars. If None, nowhere.
        trackers: Names of experiment trackers to which the run is reported, too. If a tracker fails, the run continues.

    Returns:
        The finished run.

    Raises:
        ValueError: If settings contradict each other or do not fit the data, or if a tracker is not installed.
        RunError: If `output` holds something else or another process writes to it, if the loss is not finite, or if the
            disk is full.
        Interrupted: After a signal such as Ctrl-C. The state is saved first.
    """
    names = check_trackers(trackers)
    with start.start(config, output, progress) as (session, state), report_to(session, names):
        return fit(session, state)


def resume(
    folder: StrPath,
    hardware: Hardware | None = None,
    progress: Progress | None = None,
    add: DatasetConfig | StrPath | None = None,
    on_bad_image: Literal["error", "skip"] | None = None,
    *,
    drop: bool = False,
    data: Sequence[StrPath] = (),
    trackers: Sequence[TrackerName] = (),
) -> Run:
    """Resume the run in `folder` from its latest checkpoint, or learn one more task.

    On the same CPU, the result is bitwise equal to that of a run that was never interrupted.

    Args:
        folder: Run folder.
        hardware: Replaces the hardware that the run was started with.
        progress: Where to draw progress bars. If None, nowhere.
        add: Data to learn as one more task, or their path. All earlier tasks must be finished. Until the new task is
            finished, the run predicts as before.
        on_bad_image: Replaces the run's own setting. Apart from this, the hardware and the paths of its data, a resumed
            run keeps its settings.
        drop: Discard an unfinished task, and resume after the latest finished one.
        data: New paths of the run's data, if they were moved; see `pgp.runs.data_paths.with_data_paths`.
        trackers: Names of experiment trackers, as in `train`.

    Returns:
        The finished run.

    Raises:
        ValueError: If `add` does not fit, or a tracker is not installed.
        RunError: If the run cannot be resumed: its data have changed, tasks before `add` are not finished, or another
            process writes to it.
        Interrupted: After a signal such as Ctrl-C. The state is saved first.
    """
    names = check_trackers(trackers)
    with (
        start.resume(folder, hardware, progress, add, on_bad_image, drop=drop, data=data) as (session, state),
        report_to(session, names),
    ):
        return fit(session, state)


def fit(session: Session, state: TrainState) -> Run:
    """Learn the remaining tasks, one after the other."""
    if session.config.hardware.compile:
        compile_blocks(session, state)
    for task in session.remaining(state):
        with session.timed("train"):
            fit_task(session, state, task)
        end_task(session, state, task)
        if is_asked_to_stop(session, together=True):
            stop_after(session, state, task)
    return session.run


def fit_task(session: Session, state: TrainState, task: Task) -> None:
    """Train on one task, starting at `state.step`, which is above 0 if the run was stopped within the task."""
    config = session.config
    state.method.trains_head_only = not session.adapts(task)
    if state.step == 0:
        begin_task(session, state, task)
    plan = training_batches(config, task, session.fabric.world_size)
    remaining = plan[state.step :]
    compute_queries(session, state, task)
    predictions = predict_before_training(session, state, task, remaining)
    if not session.trains(state, task):
        _predict_only(session, state, task, predictions)
        return
    settings = config.optimizer_of(task.index)
    plain = settings.build(state.method, config.batch_size, fused=session.scaler is not None)
    state.restore_optimizer(plain)
    handles = [state.meter.attach(plain)] if state.meter else []
    handles.append(state.projection.attach(plain))  # every step is projected from here on
    optimizer: Any = session.fabric.setup_optimizers(plain)
    state.start_training(optimizer)

    health = StepHealth(session, task)
    for loaded, _ in zip(session.training_stream(task, remaining), predictions, strict=False):
        batch = session.with_queries(state, loaded)
        if len(batch.indices):
            settings.set_rate(optimizer, state.step, len(plan), config.batch_size)
            # a single process counts the images that it could read; several have a part of the batch each, and use its
            # planned size, which is right because they never skip images
            global_batch_size = len(plan[state.step]) if session.fabric.world_size > 1 else len(batch.indices)
            health.add(state.step, train_step(session, state, optimizer, batch, task, global_batch_size))
        state.count_step()
        is_last = state.step == len(plan)
        saves = not is_last and bool(config.save_every_steps) and state.step % config.save_every_steps == 0
        logs = saves or is_last or state.step % config.log_every_steps == 0
        stops = is_asked_to_stop(session, together=logs)
        if health and (logs or stops):
            health.log(state.step)  # raises if the loss is not finite, so that such a state is not saved
            session.log_online(state, task)
        if stops:
            stop_within(session, state, task)
        if saves:
            session.save(state)
    for handle in handles:
        handle.remove()
    state.finish_training()


def begin_task(session: Session, state: TrainState, task: Task) -> None:
    """Prepare a task: snapshot protected parameters, observe its images, initialise prompts.

    Images are observed only if the projection or a readout needs them as they are before training.
    """
    if state.meter:
        state.meter.start_task()
    observe_before_training(session, state, task)
    check_projection(session, state.projection, task)
    with state.projection.constrain(), session.fabric.autocast():
        prepare = state.method.begin_task if session.adapts(task) else state.method.skip_task
        prepare(task)
    if is_asked_to_stop(session, together=True):
        stop_within(session, state, task)


@torch.no_grad()
def predict_before_training(
    session: Session, state: TrainState, task: Task, plan: Sequence[Sequence[SampleKey]]
) -> Iterator[None]:
    """In an online run, predict the next batch of `plan` at each iteration, before the caller trains on it.

    In other runs, each iteration does nothing.
    """
    if state.online is None:
        yield from itertools.repeat(None, len(plan))
        return
    fabric, seen_classes = session.fabric, session.scenario.seen_classes(task.index)
    stream = batches(session.transformed("test", "arriving", task), plan, session.evaluator.loader_options)
    # images left to predict; a batch that is padded with images of earlier batches has more
    left = len(task.train) - state.step * session.config.batch_size
    for batch, keys in zip(stream, plan, strict=True):
        images, labels, _, query = session.with_queries(state, batch).to(fabric.device)
        own = len(range(fabric.global_rank, min(left, len(keys)), fabric.world_size))
        left -= len(keys)
        if own and len(images):
            with fabric.autocast():
                query = None if query is None else query[:own]
                state.online.predict(state.method, images[:own], labels[:own], task, seen_classes, query)
        yield


def _predict_only(session: Session, state: TrainState, task: Task, predictions: Iterator[None]) -> None:
    """In an online run, predict all images of a task that is not trained on. In other runs, do nothing."""
    if state.online:
        for _ in predictions:
            state.count_step()
        session.log_online(state, task)
        state.finish_training()


def train_step(
    session: Session, state: TrainState, optimizer: Any, batch: Batch, task: Task, global_batch_size: int
) -> Tensor:
    """Make one step on this process's part of a batch of `global_batch_size` images.

    Returns:
        The loss, and the norm of the gradients before clipping, `(2,)`. They stay on the device, so that the CPU does
        not wait for a GPU at every step.

    Raises:
        RunError: On a CPU, if the loss or the norm is not finite; the step is then not made. On a GPU, they are checked
            later, by `StepHealth.log`: whenever losses are logged, and before anything is saved.
    """
    fabric, method, model = session.fabric, state.method, session.model
    images, labels, _, query = batch.to(fabric.device)
    with fabric.autocast():
        prepared = method.prepare_batch(images, task, query)
    micro_batches = torch.arange(len(images), device=images.device).split(session.micro_batch_size or len(images))
    shares_constants = len(micro_batches) > 1 and fabric.world_size == 1
    with fabric.autocast():
        constants = method.batch_constants(task) if shares_constants else {}
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in constants.items()}
    total = torch.zeros((), device=images.device)
    for number, rows in enumerate(micro_batches, 1):  # activations of one micro-batch at a time
        with fabric.no_backward_sync(model, enabled=number < len(micro_batches)):
            inputs = {name: tensor[rows] for name, tensor in prepared.items()} | leaves
            weight = len(rows) * fabric.world_size / global_batch_size
            with fabric.autocast():  # Fabric itself casts in loss() only with several devices
                loss = model.loss(images[rows], labels[rows], task, inputs) * weight
            fabric.backward(loss)
        total += loss.detach()
    for name, leaf in leaves.items():
        constants[name].backward(leaf.grad)
    norm = clip_gradients(session, optimizer)
    health = torch.stack([total, norm.to(total)])
    if health.device.type == "cpu":
        check_finite(session, task, {state.step: health})
    optimizer.step()  # the projection's hooks run in here; a scaled step that is not finite changes nothing
    optimizer.zero_grad()
    return health


def end_task(session: Session, state: TrainState, task: Task) -> None:
    """Extend the projection, fit the readouts, evaluate the tasks so far, and save a checkpoint."""
    method, meter = state.method, state.meter
    evaluated = session.config.evaluated_tasks(task.index, len(session.scenario))
    stats = meter.projection_stats() if meter else {}  # before method and projection end the task
    with session.fabric.autocast():
        method.end_task(task)
    with session.timed("boundary"):
        observe_after_training(session, state, task)
        ranks = state.projection.end_task()
        fitted = {readout.name: fit_readout(readout) for readout in state.fitted_readouts}
    warn_of_similar_classes(session, state, task)
    with session.timed("evaluation"):
        watch = meter.watch if meter else None
        row = session.evaluator.evaluate(method, state.readouts, task.index, session.progress, watch, evaluated)
    drift = None
    if meter:
        with session.timed("drift"):
            drift = meter.end_task(method, task, session.progress, evaluated) | stats
    state.finish_task(task, row)
    # log first, then save: after a kill in between, the task is trained and logged again, so no line is missing
    session.log_task(state, task, row, ranks=ranks, readouts=fitted, drift=drift)
    session.save(state)
    session.write_accuracy(state)
    session.print_accuracy(state, task)
