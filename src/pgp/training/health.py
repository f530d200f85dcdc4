"""Loss and gradient norm of recent steps: logged regularly, and checked before anything is saved."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pgp.projections.base import Projection
from pgp.scenario import Task
from pgp.system.storage import RunError
from pgp.training.session import Session


def check_projection(session: Session, projection: Projection, task: Task) -> None:
    """Warn of a projection without parameters to protect, and of protected ones that cannot change in `task`."""
    if task.index == 0 and session.config.experts != "none" and projection.observation and not projection.protected:
        session.warn(f"--projection {session.config.projection.tag} protects nothing: with --experts, tasks share no"
                     " parameters but the head")  # fmt: skip
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
        steps = check_finite(self.session, self.task, self._steps)
        record: dict[str, Any] = {"task": self.task.index, "step": step, "loss": float(steps[:, 0].mean())}
        made = steps[:, 1][steps[:, 1].isfinite()]
        record["gradient_norm"] = float(made.mean()) if len(made) else None
        if self.session.scaler:
            record |= {"skipped": len(steps) - len(made), "loss_scale": self.session.scaler.get_scale()}
        self.session.log("train", **record)
        self._steps = {}


def clip_gradients(session: Session, optimizer: Any) -> Tensor:
    """Clip the gradients of `optimizer`, without their scale in precision 16-mixed, and return their norm before it.

    Scaled gradients that are not finite are set to 0: the scaler has noticed them, and lets the optimizer make no step.
    """
    plain, clip = optimizer.optimizer, session.config.optimizer.clip
    if session.scaler:
        session.scaler.unscale_(plain)
    parameters = [parameter for group in plain.param_groups for parameter in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(parameters, clip or math.inf)
    if session.scaler:
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.nan_to_num_(0, 0, 0)
    return norm


def check_finite(session: Session, task: Task, steps: dict[int, Tensor]) -> Tensor:
    """Return the losses and gradient norms of some steps, `(n, 2)` on the CPU, averaged over processes.

    In precision 16-mixed, gradients that are not finite are no error at first: the step is skipped, and the scale of
    the loss halved. It is an error once the scale is below 1.

    Collective: in a distributed run, every process must call it.

    Raises:
        RunError: In every process, if one is not finite in any; the message names the step.
    """
    means = session.fabric.all_reduce(torch.stack(list(steps.values())), reduce_op="mean")
    assert isinstance(means, Tensor)
    means = means.cpu()
    may_skip = session.scaler is not None and session.scaler.get_scale() >= 1
    advice = "--optimizer.lr, or with --precision bf16-mixed or 32-true" if session.scaler else "--optimizer.lr"
    for step, (loss, norm) in zip(steps, means.tolist(), strict=True):
        for what, value, matters in (("loss", loss, True), ("norm of the gradients", norm, not may_skip)):
            if matters and not math.isfinite(value):
                raise RunError(
                    f"the {what} is {value} at step {step} of task {task.index + 1}: start a new run with a lower"
                    f" {advice}. {session.last_good_state()}"
                )
    return means
