"""How a run starts, resumes from a checkpoint, or learns one more task."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Literal

from rich.progress import Progress

from pgp import distributed
from pgp.config import Config, Hardware
from pgp.datasets.base import DatasetConfig
from pgp.datasets.own import dataset_from_path
from pgp.progress import no_progress, print_line
from pgp.runs.checkpoint import CheckpointName
from pgp.runs.data_paths import record_data_paths, resolve_paths, with_data_paths
from pgp.runs.environment import describe_environment
from pgp.runs.run import Run
from pgp.system.outputs import make_output, make_unique_folder
from pgp.system.paths import StrPath
from pgp.system.storage import RunError
from pgp.training.devices import build_fabric
from pgp.training.session import Session
from pgp.training.state import TrainState
from pgp.training.stop import stoppable
from pgp.training.tasks import check_readable


@contextlib.contextmanager
def start(config: Config, output: StrPath | None, progress: Progress | None) -> Iterator[tuple[Session, TrainState]]:
    """Start a run, and hold its lock within the block; see `pgp.train.train`."""
    if not isinstance(config, Config):
        raise TypeError(f"expected a Config, such as pgp.RECIPES['demo'](), got {type(config).__name__}")
    Config.from_json(config.to_json())  # raises if a value is not one of those that its setting may have
    run = None if output is None else Run(output)
    with contextlib.ExitStack() as lock:
        if run and not distributed.is_child_process(config.hardware.devices):  # before others start, and all fail
            Run.require_empty(run.folder, resolve_paths(config))
            if run.folder.is_dir():
                lock.enter_context(run.writing())
        session = _open(config, progress)
        state = session.new_state()
        check_readable(session.data, session.scenario, skip_bad=config.on_bad_image == "skip")
        session.open_run(_create(session, run, session.config, lock))
        with stoppable(session):
            yield session, state


@contextlib.contextmanager
def resume(
    folder: StrPath,
    hardware: Hardware | None,
    progress: Progress | None,
    add: DatasetConfig | StrPath | None,
    on_bad_image: Literal["error", "skip"] | None,
    *,
    drop: bool,
    data: Sequence[StrPath],
) -> Iterator[tuple[Session, TrainState]]:
    """Resume the run in `folder`, and hold its lock within the block; see `pgp.train.resume`."""
    run = Run.open(folder)
    if not (add is None or isinstance(add, DatasetConfig)):
        add = dataset_from_path(add)
    recorded = run.config

    def adapted(config: Config) -> Config:
        """Return `config` with what may differ from the run's record."""
        bad = on_bad_image or recorded.on_bad_image
        return replace(config, hardware=hardware or recorded.hardware, on_bad_image=bad)

    with contextlib.ExitStack() as lock:
        if not distributed.is_child_process(adapted(recorded).hardware.devices):
            lock.enter_context(run.writing())
            if drop:
                run.checkpoints.drop_step()
        fabric = build_fabric(adapted(recorded))
        fabric.launch()
        fabric.barrier()  # nobody looks for checkpoints before the folder is tidy
        name = run.checkpoints.latest()
        config = with_data_paths(run.config_of(run.describe(name)), data)
        new = add.with_absolute_paths() if add else None
        if new and not _is_adding(run, name, config, new):
            config = replace(config, added=(*config.added, new))
        adds, first = len(config.added) > len(recorded.added), fabric.is_global_zero
        learned = run.data if adds and not data else None  # what is learned needs no images; new paths are checked
        session = Session(fabric, adapted(config), _progress_of_first(progress, first), learned=learned)
        state = session.new_state()
        finished = name.finished.task if name and name.finished else 0
        skip_bad = session.config.on_bad_image == "skip"
        check_readable(session.data, session.scenario, skip_bad=skip_bad, learned=finished)
        if name is None:
            run.require_same_start(recorded)
            if data and fabric.is_global_zero:
                run.check_data(session.description)
                record_data_paths(run, config)
            session.open_run(_create(session, run, config, lock))
        else:
            session.open_run(run)
            _restore(session, state, name, new)
        with stoppable(session):
            yield session, state


def load_latest(run: Run, config: Config, progress: Progress) -> tuple[Session, TrainState]:
    """Return a run as its latest finished task left it, on one device. Nothing is downloaded.

    Args:
        run: A run with at least one finished task.
        config: The run's own, perhaps with other evaluation settings, other hardware or other paths of its data.
        progress: Where to draw progress bars.

    Raises:
        RunError: If no task is finished, or the data are others.
        ValueError: If there are no test images.
    """
    name = run.latest_finished()
    config = replace(config, hardware=replace(config.hardware, devices=1))
    session = Session(build_fabric(config), config, progress, run, downloads=False)
    state = session.new_state()
    _check_data(session)
    if not len(session.data.test):
        raise ValueError(f"expected test images to measure accuracy on, got none: {run.folder} holds none out")
    session.load(state, name)
    return session, state


def _open(config: Config, progress: Progress | None) -> Session:
    """Return a session on the hardware of `config`, in each of its processes."""
    fabric = build_fabric(config)
    fabric.launch()
    return Session(fabric, config, _progress_of_first(progress, fabric.is_global_zero))


def _progress_of_first(progress: Progress | None, is_first: bool) -> Progress:
    """Return `progress` in the first of several processes; the others draw nothing."""
    return progress if progress and is_first else no_progress()


def _create(session: Session, run: Run | None, config: Config, lock: contextlib.ExitStack) -> Run:
    """Return a run that starts, recorded as `config`, and enter its lock. If `run` is None, make one in `runs/`."""
    if session.fabric.is_global_zero:
        run = run or Run(make_unique_folder(Path("runs"), f"{config.name}-seed{config.seed}"))
        make_output(run.folder)
        lock.enter_context(run.writing())
        run.start(config, session.description)
        _log_data_warnings(session, run)
    folder = Path(session.fabric.broadcast(str(run.folder if run else "")))
    return run or Run(folder)


def _is_adding(run: Run, name: CheckpointName | None, config: Config, new: DatasetConfig) -> bool:
    """Return whether the latest checkpoint, `name`, was made inside the task that `new` adds.

    Raises:
        RunError: If it was made inside another task.
    """
    finished, tasks = run.progress()
    inside = name is not None and name.step is not None
    if inside and len(config.added) > len(run.config.added):
        if config.added[-1] == new:
            return True
        where = config.added[-1].place
        raise RunError(f"{run.folder} has begun to learn {where}: resume with {run.resume_command}, or"
                       " drop the unfinished task with --drop and --add")  # fmt: skip
    if inside or finished < tasks:
        raise RunError(f"expected a run whose tasks are all finished, got {run.folder}: first"
                       f" resume with {run.resume_command}")  # fmt: skip
    return False


def _restore(session: Session, state: TrainState, name: CheckpointName, new: DatasetConfig | None) -> None:
    """Restore the checkpoint `name`; or the one before it, if `new` data were begun and have changed since."""
    run, is_first = session.run, session.fabric.is_global_zero
    recorded = run.data_of(run.describe(name))
    tasks = len(recorded.tasks)
    adds = len(session.scenario) > tasks
    if new and not adds and recorded.difference(session.description, images=True):
        adds, tasks = True, tasks - 1
    run.check_data(session.description, tasks=tasks, recorded=recorded)
    session.fabric.barrier()  # nobody reads the checkpoint any more that the first process may drop
    if is_first:
        record_data_paths(run, session.config)
        if adds:
            run.checkpoints.drop_step()
            kept = run.config
            config = replace(session.config, hardware=kept.hardware, on_bad_image=kept.on_bad_image)
            names = (*recorded.task_names[:tasks], *session.description.task_names[tasks:])
            run.add(config, replace(session.description, task_names=names))
            _log_data_warnings(session, run)
        else:
            run.accept_config(name)
    session.fabric.barrier()
    session.load(state, run.checkpoints.latest() or name)
    config = session.config
    session.log(
        "resumed",
        task=state.task,
        step=state.step,
        hardware=asdict(config.hardware),
        environment=describe_environment(),
        on_bad_image=config.on_bad_image,
    )
    session.write_accuracy(state)  # a crash may have come between checkpoint and table


def _log_data_warnings(session: Session, run: Run) -> None:
    """Log and print what a user should know of the data."""
    if session.data.ignored:
        run.log("data", ignored=[ignored.to_json() for ignored in session.data.ignored])
    for warning in session.data_warnings:
        run.log("data", warning=warning)
        print_line(session.progress, f"pgp: warning: {warning}")


def _check_data(session: Session) -> None:
    """Raise unless the data are those of the run, and record their paths if they have moved.

    Data at their recorded paths may have other images: that is a warning.
    """
    run, config = session.run, session.config
    run.check_data(session.description, images=False)
    recorded = run.config
    if (recorded.dataset, recorded.added) == (config.dataset, config.added):
        try:
            run.check_data(session.description)
        except RunError as error:
            warnings.warn(f"evaluated on other images: {error}", stacklevel=2)
        return
    run.check_data(session.description)
    try:
        with run.writing():
            record_data_paths(run, config)
    except RunError as error:
        warnings.warn(f"the run does not record where its data lie now: {error}", stacklevel=2)
