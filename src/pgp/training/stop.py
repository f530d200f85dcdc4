"""Stop training after a signal: after the current step, which is saved, or after the current task."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator

import torch
from torch import Tensor

from pgp.runs.run import Run
from pgp.scenario import Task
from pgp.system.signals import Interrupted, describe, handled_by
from pgp.system.storage import RunError
from pgp.training.session import Session
from pgp.training.state import TrainState


@contextlib.contextmanager
def stoppable(session: Session) -> Iterator[None]:
    """Let `session.stop` take the first signal within the block; the error that ends training says how to resume.

    Raises:
        Interrupted: If a second signal comes, or if code outside the training loop must end as well.
    """
    with handled_by(session.stop):
        try:
            yield
        except Interrupted as error:
            raise error if error.message else _lost(session.run, error.number) from None
        except KeyboardInterrupt:
            raise _lost(session.run, signal.SIGINT) from None
        except RuntimeError as error:
            is_alone = session.fabric.world_size == 1
            if is_alone or session.stop.number is None or isinstance(error, RunError):
                raise
            raise _lost(session.run, session.stop.number) from error  # other processes ended by the same signal


def is_asked_to_stop(session: Session, *, together: bool) -> bool:
    """Return whether a signal asked any process of the run to stop.

    Collective, if `together`: every process must call it.

    Args:
        session: The session.
        together: Whether all processes call it at this step. With several processes, the answer is False otherwise,
            because asking makes them wait for each other.
    """
    asked = session.stop.number is not None
    if session.fabric.world_size == 1:
        return asked
    if not together:
        return False
    total = session.fabric.all_reduce(torch.tensor(float(asked)), reduce_op="sum")
    assert isinstance(total, Tensor)
    return bool(total > 0)


def stop_within(session: Session, state: TrainState, task: Task) -> None:
    """Save inside a task, unless the projection forbids it, and end.

    Raises:
        Interrupted: Always.
    """
    title = session.scenario.describe(task)
    observation = state.projection.observation
    if state.step == 0:
        outcome = f"nothing of {title} is learned yet"
    elif observation and observation.when == "before":
        outcome = f"this projection cannot be saved inside a task, so that {title} begins anew"
    else:
        session.save(state)
        outcome = f"step {state.step} of {title} is saved"
    raise _stopped(session, state, outcome)


def stop_after(session: Session, state: TrainState, task: Task) -> None:
    """End after a task, which is saved.

    Raises:
        Interrupted: Always.
    """
    raise _stopped(session, state, f"{session.scenario.describe(task)} is saved")


def _stopped(session: Session, state: TrainState, outcome: str) -> Interrupted:
    """Return the error of a run that all processes agreed to stop."""
    number = session.stop.number or signal.SIGTERM  # another process was asked
    next_step = f"resume with {session.run.resume_command}"
    if not session.remaining(state):
        next_step = f"the run at {session.run.folder} is finished"
    return Interrupted(number, f"{describe(number)}: {outcome}; {next_step}", agreed=True)


def _lost(run: Run, number: int) -> Interrupted:
    """Return the error of a run that stopped at once."""
    last = run.latest_checkpoint()
    since = f"what was learned since {run.checkpoints.folder / last} is lost" if last else "nothing is saved yet"
    return Interrupted(number, f"{describe(number)}: {since}; resume with {run.resume_command}")
