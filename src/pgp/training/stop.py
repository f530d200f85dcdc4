"""A signal ends training where nothing is lost: after a step, which is saved, or after a task."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator

import torch
from torch import Tensor

from pgp.runs.run import Run
from pgp.scenario import Task
from pgp.system import platforms
from pgp.system.signals import Interrupted, describe, handled_by
from pgp.system.storage import RunError
from pgp.training.session import Learner


@contextlib.contextmanager
def stoppable(learner: Learner, run: Run) -> Iterator[None]:
    """Within the block, `learner.stop` takes the first signal; whatever ends training for a signal says how to go on.

    Raises:
        Interrupted: If a second signal comes, or what else the first one reached cannot go on.
    """
    with handled_by(learner.stop):
        try:
            yield
        except Interrupted as error:
            raise error if error.message else _lost(run, error.number) from None
        except KeyboardInterrupt:
            raise _lost(run, signal.SIGINT) from None
        except RuntimeError as error:
            if learner.stop.number is None or isinstance(error, RunError):
                raise
            raise _lost(run, learner.stop.number) from error  # processes beside this one ended by the same signal


def is_asked_to_stop(learner: Learner, *, together: bool) -> bool:
    """Return whether a signal asked any process of the run to stop. Collective, if `together`.

    Args:
        learner: The run.
        together: Whether all processes ask at this step. Several processes agree only there, for it makes them wait
            for each other.
    """
    asked = learner.stop.number is not None
    if learner.fabric.world_size == 1:
        return asked
    if not together:
        return False
    total = learner.fabric.all_reduce(torch.tensor(float(asked)), reduce_op="sum")
    assert isinstance(total, Tensor)
    return bool(total > 0)


def stop_within(learner: Learner, task: Task, run: Run) -> None:
    """Save where training stands inside a task, unless the projection forbids it, and end.

    Raises:
        Interrupted: Always.
    """
    title = learner.scenario.describe(task)
    collect = learner.projection.observation
    if learner.step == 0:
        told = f"nothing of {title} is learned yet"
    elif collect and collect.when == "before":
        told = f"this projection cannot be saved inside a task, so that {title} begins anew"
    else:
        learner.save(run)
        told = f"step {learner.step} of {title} is saved"
    raise _agreed(learner, run, told)


def stop_after(learner: Learner, task: Task, run: Run) -> None:
    """End after a task, which is saved.

    Raises:
        Interrupted: Always.
    """
    raise _agreed(learner, run, f"{learner.scenario.describe(task)} is saved")


def _agreed(learner: Learner, run: Run, told: str) -> Interrupted:
    number = learner.stop.number or signal.SIGTERM  # another process was asked
    finished = learner.task == len(learner.scenario)
    left = f"the run at {run.folder} is finished" if finished else _how_to_go_on(run)
    return Interrupted(number, f"{describe(number)}: {told}; {left}", agreed=True)


def _lost(run: Run, number: int) -> Interrupted:
    last = run.latest_checkpoint()
    since = f"what was learned since {run.checkpoints.folder / last} is lost" if last else "nothing is saved yet"
    return Interrupted(number, f"{describe(number)}: {since}; {_how_to_go_on(run)}")


def _how_to_go_on(run: Run) -> str:
    return f"go on by pgp train --resume {platforms.quoted(run.folder)}"
