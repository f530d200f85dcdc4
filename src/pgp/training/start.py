"""How a run begins, goes on from a checkpoint, or learns one task more."""

from __future__ import annotations

import contextlib
from dataclasses import asdict, replace
from pathlib import Path

from pgp.config import Config
from pgp.datasets.base import DatasetConfig
from pgp.progress import print_line
from pgp.runs import identity
from pgp.runs.checkpoint import CheckpointName
from pgp.runs.data_paths import record_data_paths
from pgp.runs.environment import describe_environment
from pgp.runs.run import Run
from pgp.system.outputs import make_output, make_unique_folder
from pgp.system.storage import RunError
from pgp.training.session import Learner


def is_begun(run: Run, name: CheckpointName | None, config: Config, new: DatasetConfig) -> bool:
    """Return whether the latest checkpoint, `name`, stands inside the task that `new` adds.

    Raises:
        RunError: If it stands inside another task.
    """
    finished, tasks = run.progress()
    inside = name is not None and name.step is not None
    if inside and len(config.added) > len(run.config.added):
        if config.added[-1] == new:
            return True
        where = ", ".join(map(str, config.added[-1].search_paths))
        raise RunError(f"{run.folder} has begun to learn {where}: go on with it by pgp train --resume {run.folder}, or"
                       " drop what was begun by --drop beside --add")  # fmt: skip
    if inside or finished < tasks:
        raise RunError(f"expected a run whose tasks are all finished, got {run.folder}: go on with it first, by pgp"
                       f" train --resume {run.folder}")  # fmt: skip
    return False


def go_on(learner: Learner, run: Run, name: CheckpointName, new: DatasetConfig | None) -> None:
    """Take up the checkpoint `name` of `run`; or what came before it if `new` data, which it knows, have changed."""
    known = run.describe(name)
    tasks, root = len(known.classes["tasks"]), learner.fabric.is_global_zero
    adds = len(learner.scenario) > tasks
    if new and not adds and identity.difference(known.classes, learner.description, images=True, tasks=None):
        adds, tasks = True, tasks - 1  # it was begun, and has been mended since
    run.check_data(learner.description, tasks=tasks, known=known.classes)
    if root:
        record_data_paths(run, learner.config)
    if adds and root:
        run.checkpoints.drop_step()
        began = run.config
        config = replace(learner.config, hardware=began.hardware, on_bad_image=began.on_bad_image)
        names = [*known.classes["task_names"][:tasks], *learner.description["task_names"][tasks:]]
        run.add(config, learner.description | {"task_names": names})
        _tell_concerns(learner, run)
    elif root:
        run.accept_config(name)
    learner.fabric.barrier()
    learner.load(run, run.checkpoints.latest() or name)
    config = learner.config
    where = {
        "hardware": asdict(config.hardware),
        "environment": describe_environment(),
        "on_bad_image": config.on_bad_image,
    }
    learner.log(run, "resumed", task=learner.task, step=learner.step, **where)
    if learner.matrices and root:
        run.write_matrices(learner.matrices)  # a crash may have come between checkpoint and table


def begin(learner: Learner, run: Run | None, config: Config, held: contextlib.ExitStack) -> Run:
    """Return a run that begins, recorded as `config`; its lock is `held`. A new one below `runs/`, if `run` is None."""
    if learner.fabric.is_global_zero:
        run = run or Run(make_unique_folder(Path("runs"), f"{config.name}-seed{config.seed}"))
        make_output(run.folder)
        held.enter_context(run.writing())
        run.start(config, learner.description)
        _tell_concerns(learner, run)
    folder = Path(learner.fabric.broadcast(str(run.folder if run else "")))
    return run or Run(folder)


def _tell_concerns(learner: Learner, run: Run) -> None:
    if learner.data.ignored:
        run.log("data", ignored=[ignored.to_json() for ignored in learner.data.ignored])
    for concern in learner.concerns:
        run.log("data", warning=concern)
        print_line(learner.progress, f"pgp: warning: {concern}")
