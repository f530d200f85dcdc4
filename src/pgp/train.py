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
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from pgp import metrics, processes
from pgp.boundary import fitted, look_ahead, look_back
from pgp.checkpoint import CheckpointName
from pgp.config import Config, Hardware
from pgp.curriculum import check_images, located, training_plan
from pgp.datasets import Address, Batch, DatasetConfig, batches
from pgp.datasets.own import own_data
from pgp.evaluate import tell, tracked
from pgp.learner import Learner, fabric_for, opened
from pgp.paths import Place
from pgp.places import record_places, with_places
from pgp.run import Run, RunError
from pgp.scenario import Task
from pgp.starting import begin, go_on, is_begun
from pgp.stopping import is_asked_to_stop, stop_after, stop_within, stoppable


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
        if run and not processes.started():  # before other processes start, which would all fail
            Run.check_free(run.folder, located(config))
            if run.folder.is_dir():
                held.enter_context(run.writing())
        fabric = fabric_for(config)
        fabric.launch()
        learner = Learner(fabric, config, progress if progress and fabric.is_global_zero else _quiet())
        check_images(learner.data, learner.scenario, skip_bad=config.on_bad_image == "skip", learned=0)
        return _learn(learner, begin(learner, run, learner.config, held))


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
        data: Where the data of the run lie now, if they have moved; see `pgp.places.with_places`.

    Raises:
        ValueError: if `add` does not fit.
        RunError: if the run cannot go on: its data are others, tasks before `add` are not closed, or another process
            writes to it.
    """
    run = Run.open(folder)
    if not (add is None or isinstance(add, DatasetConfig)):
        add = own_data(add)
    began = run.config

    def here(config: Config) -> Config:
        return replace(config, hardware=hardware or began.hardware, on_bad_image=on_bad_image or began.on_bad_image)

    with contextlib.ExitStack() as held:
        if not processes.started():
            held.enter_context(run.writing())
            if drop:
                run.checkpoints.drop_step()
        fabric = fabric_for(here(began))
        fabric.launch()
        fabric.barrier()  # nobody looks for checkpoints before the folder is tidy
        name = run.checkpoints.latest()
        config, new = with_places(run.config_of(run.describe(name)), data), add.located() if add else None
        if new and not is_begun(run, name, config, new):
            config = replace(config, added=(*config.added, new))
        learner = Learner(fabric, here(config), progress if progress and fabric.is_global_zero else _quiet())
        learned = name.finished.task if name and name.finished else 0
        skip_bad = learner.config.on_bad_image == "skip"
        check_images(learner.data, learner.scenario, skip_bad=skip_bad, learned=learned)
        if name is None:
            run.check_begun(began)
            if data and learner.fabric.is_global_zero:
                run.check_data(learner.description)
                record_places(run, config)
            return _learn(learner, begin(learner, run, config, held))
        go_on(learner, run, name, new)
        return _learn(learner, run)


def reevaluate(
    run: Run, config: Config, progress: Progress | None = None, *, every_task: bool = False
) -> dict[str, Tensor]:
    """Accuracy matrices `(T, T)` by column, measured anew on one device; NaN where nothing was measured.

    Args:
        run: a run with at least one finished task.
        config: the run's own, with other evaluation settings.
        progress: where to draw progress bars; nowhere, where None.
        every_task: measure after each finished task whose checkpoint is there; after the latest only, if False.
    """
    learner, last = opened(run, config, progress or _quiet())
    names = run.checkpoints.finished() if every_task else [CheckpointName(last)]
    if every_task and len(names) < last:
        kept = ", ".join(str(name.task) for name in names)
        warnings.warn(f"{run.folder} has checkpoints of {len(names)} of {last} finished tasks, and is evaluated after"
                      f" tasks {kept}; see --keep-checkpoints of pgp train", stacklevel=2)  # fmt: skip
    matrices: dict[str, Tensor] = {}
    for name in names:
        if every_task:
            learner.load(run, name)
        row = learner.evaluation.row(learner.method, learner.readouts, name.task - 1, learner.progress)
        metrics.put(matrices, row.accuracy, name.task - 1, len(learner.scenario))
    return matrices


def _quiet() -> Progress:
    return Progress(console=Console(quiet=True), disable=True)


def _learn(learner: Learner, run: Run) -> Run:
    """Task after task, fit it and close it."""
    with stoppable(learner, run):
        for task in learner.scenario.tasks[learner.task :]:
            started = time.perf_counter()
            fit_task(learner, task, run)
            trained = time.perf_counter()
            close_task(learner, task, run, seconds={"train": trained - started})
            if is_asked_to_stop(learner, together=True):
                stop_after(learner, task, run)
    return run


def fit_task(learner: Learner, task: Task, run: Run) -> None:
    """Train on one task, from the step at which the run stands."""
    config, method, projection = learner.config, learner.method, learner.projection
    if learner.step == 0:
        if learner.meter:
            learner.meter.start_task()
        look_ahead(learner, task)
        with projection.confined(), learner.fabric.autocast():
            method.begin_task(task)
        if is_asked_to_stop(learner, together=True):
            stop_within(learner, task, run)
    plan = training_plan(config, task, learner.fabric.world_size)
    ahead = foretold(learner, task, plan[learner.step :]) if learner.stream else itertools.repeat(None)
    if not any(parameter.requires_grad for parameter in method.parameters()):
        if learner.stream:
            learner.step = sum(1 for _ in ahead)
            learner.log_stream(run, task)
            learner.step = 0
        return
    settings = config.optimizer.of_task(task.index)
    plain = settings.build(method, config.batch_size)
    if learner.restored:
        plain.load_state_dict(learner.restored)
    handles = [learner.meter.attach(plain)] if learner.meter else []
    handles.append(projection.attach(plain))
    optimizer: Any = learner.fabric.setup_optimizers(plain)
    learner.optimizer, learner.restored = optimizer, None

    stream = batches(learner.viewed("train", "view", task), plan[learner.step :], learner.evaluation.loading)
    stream = tracked(learner.progress, stream, len(plan) - learner.step, f"{learner.scenario.title(task)}, training")
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
def foretold(learner: Learner, task: Task, plan: Sequence[Sequence[Address]]) -> Iterator[None]:
    """Predict the images of one batch of `plan` after the other, in their test view, each when it is asked for."""
    assert learner.stream is not None
    fabric, seen = learner.fabric, learner.scenario.seen(task.index)
    coming = batches(learner.viewed("test", "arriving", task), plan, learner.evaluation.loading)
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
        prepared = learner.method.prepare(images, task)
    parts = torch.arange(len(images), device=images.device).split(learner.part or len(images))
    with fabric.autocast():
        shared = learner.method.shared(task) if len(parts) > 1 and fabric.world_size == 1 else {}
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


def close_task(learner: Learner, task: Task, run: Run, seconds: dict[str, float]) -> None:
    """Learn from a finished task what to protect, evaluate on all tasks so far, and save."""
    method, readouts = learner.method, learner.readouts
    with learner.fabric.autocast():
        method.end_task(task)
    started = time.perf_counter()
    meter = learner.meter
    stats = meter.projection_stats() if meter else {}
    look_back(learner, task)
    ranks = learner.projection.end_task()
    kept = {readout.name: fitted(readout) for readout in readouts if readout.fitted}
    observed = time.perf_counter()
    row = learner.evaluation.row(method, readouts, task.index, learner.progress, meter.watch if meter else None)
    metrics.put(learner.matrices, row.accuracy, task.index, len(learner.scenario))
    metrics.put(learner.within, row.within, task.index, len(learner.scenario))
    evaluated = time.perf_counter()
    moved = {"drift": meter.end_task(method, task, learner.progress) | stats} if meter else {}
    learner.task = task.index + 1
    seconds |= {"boundary": observed - started, "evaluation": evaluated - observed}
    seconds |= {"drift": time.perf_counter() - evaluated} if moved else {}
    averages = {column: metrics.average_accuracy(matrix) for column, matrix in learner.matrices.items()}
    streamed = {"stream_accuracy": learner.stream.accuracy(task)} if learner.stream else {}
    measured = {"within": row.within, "identified": row.identified}
    figures = {figure: {column: each.tolist() for column, each in of.items()} for figure, of in measured.items()}
    about: dict[str, Any] = {"seconds": seconds, "ranks": ranks, "readouts": kept, "average_accuracy": averages}
    for figure, matrices in (("forgetting", learner.matrices), ("forgetting_within", learner.within)):
        about[figure] = {column: metrics.forgetting(matrix) for column, matrix in matrices.items()}
    learner.log(run, "task", task=task.index, **about, **figures, **moved, **streamed)  # a kill from here on loses none
    learner.save(run)
    if learner.fabric.is_global_zero:
        run.write_matrices(learner.matrices)
    spoken = ", ".join(f"{100 * average:.1f} % ({column})" for column, average in averages.items())
    spoken += "".join(f"; along the stream {100 * accuracy:.1f} %" for accuracy in streamed.values())
    tell(learner.progress, f"{learner.scenario.title(task)}: average accuracy {spoken}")


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
