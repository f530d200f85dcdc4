"""Learning a stream of tasks: for each, fit it, then close it. Start reading here, from `train` downwards."""

from __future__ import annotations

import contextlib
import itertools
import math
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from rich.progress import Progress
from torch import Tensor

from pgp import distributed
from pgp.config import Config, Hardware
from pgp.datasets.base import DatasetConfig
from pgp.datasets.loader import Batch, SampleKey, batches
from pgp.datasets.own import dataset_from_path
from pgp.evaluation import metrics
from pgp.progress import no_progress, print_line, track
from pgp.runs.checkpoint import CheckpointName
from pgp.runs.data_paths import record_data_paths, resolve_paths, with_data_paths
from pgp.runs.run import Run
from pgp.scenario import Task
from pgp.system.paths import Place
from pgp.system.storage import RunError
from pgp.training.observe import fit_readout, observe_after_training, observe_before_training
from pgp.training.session import Learner, build_fabric, load_latest
from pgp.training.start import begin, go_on, is_begun
from pgp.training.stop import is_asked_to_stop, stop_after, stop_within, stoppable
from pgp.training.tasks import check_readable, training_batches


def train(config: Config, output: Place | None = None, progress: Progress | None = None) -> Run:
    """Learn all tasks of `config`, and leave the run in `output`.

    Args:
        config: what to do; `pgp.recipes` has complete ones.
        output: run folder: new or empty, or with a run of the same configuration that was stopped before its first
            checkpoint, which is started over. A free folder below `runs/`, if None.
        progress: where to draw progress bars; nowhere, where None.

    Returns:
        The finished run.

    Raises:
        ValueError: if the configuration cannot be carried out.
        RunError: if `output` holds something else or another process writes to it, the loss stops being a number, or
            the disk is full.
        Interrupted: If a signal asks for it, such as Ctrl-C; where training stands is saved.
    """
    if not isinstance(config, Config):
        raise TypeError(f"expected a Config, such as pgp.RECIPES['demo'](), got {type(config).__name__}")
    run = None if output is None else Run(output)
    with contextlib.ExitStack() as held:
        if run and not distributed.is_child_process():  # before other processes start, which would all fail
            Run.require_empty(run.folder, resolve_paths(config))
            if run.folder.is_dir():
                held.enter_context(run.writing())
        fabric = build_fabric(config)
        fabric.launch()
        learner = Learner(fabric, config, progress if progress and fabric.is_global_zero else no_progress())
        check_readable(learner.data, learner.scenario, skip_bad=config.on_bad_image == "skip", learned=0)
        return fit(learner, begin(learner, run, learner.config, held))


def resume(
    folder: Place,
    hardware: Hardware | None = None,
    progress: Progress | None = None,
    add: DatasetConfig | Place | None = None,
    on_bad_image: Literal["error", "skip"] | None = None,
    *,
    drop: bool = False,
    data: Sequence[Place] = (),
) -> Run:
    """Go on with the run in `folder` from its latest checkpoint; on the same CPU the result is bitwise the same.

    Args:
        folder: run folder.
        hardware: replaces what the run was started with.
        progress: where to draw progress bars; nowhere, where None.
        add: data to learn as one more task, or where they lie, once all tasks so far are closed. The run stays as it
            is until that task is finished.
        on_bad_image: replaces what the run was started with; nothing else of it can change.
        drop: go on from the latest finished task, without what was begun of the next one.
        data: Where the data of the run lie now, if they have moved; see `pgp.runs.data_paths.with_data_paths`.

    Raises:
        ValueError: if `add` does not fit.
        RunError: if the run cannot go on: its data are others, tasks before `add` are not closed, or another process
            writes to it.
    """
    run = Run.open(folder)
    if not (add is None or isinstance(add, DatasetConfig)):
        add = dataset_from_path(add)
    began = run.config

    def here(config: Config) -> Config:
        return replace(config, hardware=hardware or began.hardware, on_bad_image=on_bad_image or began.on_bad_image)

    with contextlib.ExitStack() as held:
        if not distributed.is_child_process():
            held.enter_context(run.writing())
            if drop:
                run.checkpoints.drop_step()
        fabric = build_fabric(here(began))
        fabric.launch()
        fabric.barrier()  # nobody looks for checkpoints before the folder is tidy
        name = run.checkpoints.latest()
        config, new = (
            with_data_paths(run.config_of(run.describe(name)), data),
            add.with_absolute_paths() if add else None,
        )
        if new and not is_begun(run, name, config, new):
            config = replace(config, added=(*config.added, new))
        learner = Learner(fabric, here(config), progress if progress and fabric.is_global_zero else no_progress())
        learned = name.finished.task if name and name.finished else 0
        skip_bad = learner.config.on_bad_image == "skip"
        check_readable(learner.data, learner.scenario, skip_bad=skip_bad, learned=learned)
        if name is None:
            run.require_same_start(began)
            if data and learner.fabric.is_global_zero:
                run.check_data(learner.description)
                record_data_paths(run, config)
            return fit(learner, begin(learner, run, config, held))
        go_on(learner, run, name, new)
        return fit(learner, run)


def evaluate_checkpoints(
    run: Run, config: Config, progress: Progress | None = None, *, every_task: bool = False
) -> dict[str, Tensor]:
    """Accuracy matrices `(T, T)` by column, measured anew on one device; NaN where nothing was measured.

    Args:
        run: a run with at least one finished task.
        config: the run's own, with other evaluation settings.
        progress: where to draw progress bars; nowhere, where None.
        every_task: measure after each finished task whose checkpoint is there; after the latest only, if False.
    """
    learner, last = load_latest(run, config, progress or no_progress())
    names = run.checkpoints.finished() if every_task else [CheckpointName(last)]
    if every_task and len(names) < last:
        kept = ", ".join(str(name.task) for name in names)
        warnings.warn(f"{run.folder} has checkpoints of {len(names)} of {last} finished tasks, and is evaluated after"
                      f" tasks {kept}; see --keep-checkpoints of pgp train", stacklevel=2)  # fmt: skip
    matrices: dict[str, Tensor] = {}
    for name in names:
        if every_task:
            learner.load(run, name)
        row = learner.evaluation.evaluate(learner.method, learner.readouts, name.task - 1, learner.progress)
        metrics.write_row(matrices, row.accuracy, name.task - 1, len(learner.scenario))
    return matrices


def fit(learner: Learner, run: Run) -> Run:
    """Task after task, fit it and close it."""
    with stoppable(learner, run):
        for task in learner.scenario.tasks[learner.task :]:
            started = time.perf_counter()
            fit_task(learner, task, run)
            trained = time.perf_counter()
            end_task(learner, task, run, seconds={"train": trained - started})
            if is_asked_to_stop(learner, together=True):
                stop_after(learner, task, run)
    return run


def fit_task(learner: Learner, task: Task, run: Run) -> None:
    """Train on one task, from the step at which the run stands."""
    config, method, projection = learner.config, learner.method, learner.projection
    if learner.step == 0:
        if learner.meter:
            learner.meter.start_task()
        observe_before_training(learner, task)
        with projection.constrain(), learner.fabric.autocast():
            method.begin_task(task)
        if is_asked_to_stop(learner, together=True):
            stop_within(learner, task, run)
    plan = training_batches(config, task, learner.fabric.world_size)
    ahead = predict_before_training(learner, task, plan[learner.step :]) if learner.stream else itertools.repeat(None)
    if not any(parameter.requires_grad for parameter in method.parameters()):
        if learner.stream:
            learner.step = sum(1 for _ in ahead)
            learner.log_stream(run, task)
            learner.step = 0
        return
    settings = config.optimizer.for_task(task.index)
    plain = settings.build(method, config.batch_size)
    if learner.restored:
        plain.load_state_dict(learner.restored)
    handles = [learner.meter.attach(plain)] if learner.meter else []
    handles.append(projection.attach(plain))
    optimizer: Any = learner.fabric.setup_optimizers(plain)
    learner.optimizer, learner.restored = optimizer, None

    stream = batches(learner.viewed("train", "view", task), plan[learner.step :], learner.evaluation.loader_options)
    stream = track(learner.progress, stream, len(plan) - learner.step, f"{learner.scenario.describe(task)}, training")
    healths: dict[int, Tensor] = {}
    for batch, _ in zip(stream, ahead, strict=False):  # a batch is predicted before it is learned
        if len(batch.indices):
            settings.set_rate(optimizer, learner.step, len(plan), config.batch_size)
            whole = len(plan[learner.step]) if learner.fabric.world_size > 1 else len(batch.indices)  # none skipped
            healths[learner.step] = train_step(learner, optimizer, batch, task, whole)
        learner.step += 1
        last, saves = learner.step == len(plan), config.save_every_steps
        saving = bool(saves) and learner.step % saves == 0 and not last
        looking = saving or last or learner.step % config.log_every_steps == 0
        stopping = is_asked_to_stop(learner, together=looking)
        if healths and (looking or stopping):
            _log_losses(learner, task, run, healths)  # stops before a broken state is saved
            learner.log_stream(run, task)
            healths = {}
        if stopping:
            stop_within(learner, task, run)
        if saving:
            learner.save(run)
    for handle in handles:
        handle.remove()
    learner.step, learner.optimizer = 0, None


@torch.no_grad()
def predict_before_training(learner: Learner, task: Task, plan: Sequence[Sequence[SampleKey]]) -> Iterator[None]:
    """Predict the images of one batch of `plan` after the other, in their test view, each when it is asked for."""
    assert learner.stream is not None
    fabric, seen = learner.fabric, learner.scenario.seen_classes(task.index)
    coming = batches(learner.viewed("test", "arriving", task), plan, learner.evaluation.loader_options)
    left = len(task.train) - learner.step * learner.config.batch_size  # what is above fills a last batch up
    for batch, addresses in zip(coming, plan, strict=True):
        images, labels, _ = batch.to(fabric.device)
        own = len(range(fabric.global_rank, min(left, len(addresses)), fabric.world_size))
        left -= len(addresses)
        if own and len(images):
            with fabric.autocast():
                learner.stream.predict(learner.method, images[:own], labels[:own], task, seen)
        yield


def train_step(learner: Learner, optimizer: Any, batch: Batch, task: Task, global_batch_size: int) -> Tensor:
    """Make one step on this process's share of a batch of `global_batch_size` images.

    Returns:
        The loss and the norm of the gradients before clipping, `(2,)`, left on the device.

    Raises:
        RunError: On a CPU, if either is not finite; nothing is changed then. On a GPU, where looking at them would wait
            for the device, `check_finite` is called whenever losses are logged and before anything is saved.
    """
    fabric, model, clip = learner.fabric, learner.model, learner.config.optimizer.clip
    images, labels, _ = batch.to(fabric.device)
    with fabric.autocast():
        prepared = learner.method.prepare_batch(images, task)
    parts = torch.arange(len(images), device=images.device).split(learner.part or len(images))
    with fabric.autocast():
        shared = learner.method.batch_constants(task) if len(parts) > 1 and fabric.world_size == 1 else {}
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in shared.items()}
    total = torch.zeros((), device=images.device)
    for number, part in enumerate(parts, 1):  # activations of one part at a time
        with fabric.no_backward_sync(model, enabled=number < len(parts)):
            rows = {name: tensor[part] for name, tensor in prepared.items()} | leaves
            weight = len(part) * fabric.world_size / global_batch_size
            with fabric.autocast():  # Fabric itself casts for other methods than forward on several devices only
                loss = model.loss(images[part], labels[part], task, rows) * weight
            fabric.backward(loss)
        total += loss.detach()
    for name, leaf in leaves.items():
        shared[name].backward(leaf.grad)
    if clip:
        norm = fabric.clip_gradients(model, optimizer, max_norm=clip, error_if_nonfinite=False)
        assert norm is not None
    else:
        norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    health = torch.stack([total, norm.to(total)])
    if health.device.type == "cpu":
        check_finite(learner, task, {learner.step: health})
    optimizer.step()  # the projection's hooks run in here
    optimizer.zero_grad()
    return health


def end_task(learner: Learner, task: Task, run: Run, seconds: dict[str, float]) -> None:
    """Learn from a finished task what to protect, evaluate on all tasks so far, and save."""
    method, readouts = learner.method, learner.readouts
    with learner.fabric.autocast():
        method.end_task(task)
    started = time.perf_counter()
    meter = learner.meter
    stats = meter.projection_stats() if meter else {}
    observe_after_training(learner, task)
    ranks = learner.projection.end_task()
    kept = {readout.name: fit_readout(readout) for readout in readouts if readout.needs_fit}
    observed = time.perf_counter()
    row = learner.evaluation.evaluate(method, readouts, task.index, learner.progress, meter.watch if meter else None)
    metrics.write_row(learner.matrices, row.accuracy, task.index, len(learner.scenario))
    metrics.write_row(learner.within_task, row.within_task, task.index, len(learner.scenario))
    evaluated = time.perf_counter()
    moved = {"drift": meter.end_task(method, task, learner.progress) | stats} if meter else {}
    learner.task = task.index + 1
    seconds |= {"boundary": observed - started, "evaluation": evaluated - observed}
    seconds |= {"drift": time.perf_counter() - evaluated} if moved else {}
    averages = {column: metrics.average_accuracy(matrix) for column, matrix in learner.matrices.items()}
    streamed = {"stream_accuracy": learner.stream.accuracy(task)} if learner.stream else {}
    measured = {"within": row.within_task, "identified": row.task_id_accuracy}
    figures = {figure: {column: each.tolist() for column, each in of.items()} for figure, of in measured.items()}
    about: dict[str, Any] = {"seconds": seconds, "ranks": ranks, "readouts": kept, "average_accuracy": averages}
    for figure, matrices in (("forgetting", learner.matrices), ("forgetting_within", learner.within_task)):
        about[figure] = {column: metrics.forgetting(matrix) for column, matrix in matrices.items()}
    learner.log(run, "task", task=task.index, **about, **figures, **moved, **streamed)  # a kill from here on loses none
    learner.save(run)
    if learner.fabric.is_global_zero:
        run.write_matrices(learner.matrices)
    spoken = ", ".join(f"{100 * average:.1f} % ({column})" for column, average in averages.items())
    spoken += "".join(f"; along the stream {100 * accuracy:.1f} %" for accuracy in streamed.values())
    print_line(learner.progress, f"{learner.scenario.describe(task)}: average accuracy {spoken}")


def check_finite(learner: Learner, task: Task, healths: dict[int, Tensor]) -> Tensor:
    """Return the losses and gradient norms of some steps, `(n, 2)` on the CPU, averaged over processes.

    Collective: every process must call it.

    Raises:
        RunError: In every process, if one is not finite in any; the message names the step.
    """
    means = learner.fabric.all_reduce(torch.stack(list(healths.values())), reduce_op="mean")
    assert isinstance(means, Tensor)
    means = means.cpu()
    for step, values in zip(healths, means, strict=True):
        for what, value in zip(("loss", "norm of the gradients"), values.tolist(), strict=True):
            if not math.isfinite(value):
                raise RunError(
                    f"the {what} is {value} at step {step} of task {task.index + 1}: start a new run with a lower"
                    f" --optimizer.lr. {learner.last_good_state()}"
                )
    return means


def _log_losses(learner: Learner, task: Task, run: Run, healths: dict[int, Tensor]) -> None:
    """Log the mean loss and gradient norm since the last look."""
    loss, norm = check_finite(learner, task, healths).mean(0).tolist()
    learner.log(run, "train", task=task.index, step=learner.step, loss=loss, gradient_norm=norm)
