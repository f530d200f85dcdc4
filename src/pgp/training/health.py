"""Loss and gradient norm of recent steps: logged regularly, and checked before anything is saved."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pgp.projections.base import Projection
from pgp.scenario import Task
from pgp.system.storage import RunError
from pgp.training.session import Session


def warn_of_full_spaces(session: Session, projection: Projection, task: Task) -> None:
    """Warn of protected parameters that cannot change in `task`, because old inputs span all directions."""
    full = projection.full_spaces()
    if not full:
        return
    if len(full) == len(projection.protected):
        what = "any protected parameter, so only what is not protected learns"
    else:
        what = f"{len(full)} of {len(projection.protected)} protected parameters ({', '.join(full[:3])}, ...)"
    session.warn(f"{session.scenario.describe(task)}: no free direction is left for {what}; a lower --projection.energy"
                 " leaves more")  # fmt: skip


class StepHealth:
    """The loss and the gradient norm of each step since the last line of the log, left on the device."""

    def __init__(self, session: Session, task: Task) -> None:
        self.session, self.task = session, task
        self._steps: dict[int, Tensor] = {}

    def __bool__(self) -> bool:
        """Return whether there were steps since the last line."""
        return bool(self._steps)

    def add(self, step: int, health: Tensor) -> None:
        """Take the loss and the gradient norm `(2,)` of one step."""
        self._steps[step] = health

    def log(self, step: int) -> None:
        """Log the means over the steps since the last call.

        Collective: in a distributed run, every process must call it.

        Raises:
            RunError: If one of them is not finite.
        """
        loss, norm = check_finite(self.session, self.task, self._steps).mean(0).tolist()
        self.session.log("train", task=self.task.index, step=step, loss=loss, gradient_norm=norm)
        self._steps = {}


def check_finite(session: Session, task: Task, steps: dict[int, Tensor]) -> Tensor:
    """Return the losses and gradient norms of some steps, `(n, 2)` on the CPU, averaged over processes.

    Collective: in a distributed run, every process must call it.

    Raises:
        RunError: In every process, if one is not finite in any; the message names the step.
    """
    means = session.fabric.all_reduce(torch.stack(list(steps.values())), reduce_op="mean")
    assert isinstance(means, Tensor)
    means = means.cpu()
    for step, values in zip(steps, means, strict=True):
        for what, value in zip(("loss", "norm of the gradients"), values.tolist(), strict=True):
            if not math.isfinite(value):
                raise RunError(
                    f"the {what} is {value} at step {step} of task {task.index + 1}: start a new run with a lower"
                    f" --optimizer.lr. {session.last_good_state()}"
                )
    return means
