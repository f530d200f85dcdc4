"""The state that a checkpoint stores: model, projection, readouts, accuracy matrices, position in training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pgp.analysis.drift import DriftMeter
from pgp.evaluation import metrics
from pgp.evaluation.accuracy import FeatureBatch, TaskAccuracies
from pgp.evaluation.online import OnlineAccuracy
from pgp.evaluation.predictions import Predictions
from pgp.methods.base import Method
from pgp.projections.base import Projection
from pgp.readouts.base import Readout
from pgp.runs.run import Run
from pgp.scenario import Task
from pgp.subspace import on_float64_device


class TrainState:
    """The state of training; its `state_dict` is a checkpoint.

    Only `pgp.training` assigns to its members.
    """

    def __init__(
        self,
        method: Method,
        projection: Projection,
        readouts: Sequence[Readout],
        *,
        fingerprint: str,
        num_tasks: int,
        device: torch.device,
        meter: DriftMeter | None = None,
        online: OnlineAccuracy | None = None,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        """Begin with no task learned.

        Args:
            method: The method.
            projection: The projection.
            readouts: The readouts.
            fingerprint: Hash of the frozen encoder's weights. A checkpoint of another encoder is refused.
            num_tasks: Number of tasks of the run, T.
            device: The device of the method.
            meter: The drift meter, or None.
            online: Counts of predictions before training, in an online run; else None.
            scaler: What scales the loss, in precision 16-mixed; else None.
        """
        self.method, self.projection, self.readouts = method, projection, list(readouts)
        self.meter, self.online, self.scaler = meter, online, scaler
        self.fingerprint, self.num_tasks, self.device = fingerprint, num_tasks, device
        self.matrices: dict[str, Tensor] = {}
        """Accuracy matrices `(T, T)` by column."""
        self.within_task: dict[str, Tensor] = {}
        """Matrices like `matrices`, of the accuracy among the classes of an image's own task."""
        self.predictions: Predictions | None = None
        """Predictions after the last finished task; None in a run of an older pgp, until its next task is finished."""
        self.task, self.step = 0, 0
        """Position in training: the number of finished tasks, and of finished steps of the next one."""
        self.optimizer: Any = None
        """The current task's, while it is being trained."""
        self.optimizer_state: dict[str, Any] | None = None
        """State of the optimizer, if a checkpoint was made inside a task."""
        self.features_before: dict[str, Tensor] | None = None
        """`indices` and `features` of the current task's images before its training, if a readout needs them."""

    @property
    def is_trainable(self) -> bool:
        """Whether any parameter learns."""
        return any(parameter.requires_grad for parameter in self.method.parameters())

    @property
    def fitted_readouts(self) -> list[Readout]:
        """All readouts that are fitted after each task, with the method's own."""
        own = [] if self.method.router is None else [self.method.router]
        return [readout for readout in (*self.readouts, *own) if readout.needs_fit]

    def restore_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Load the optimizer state of a checkpoint within the current task, if there is one."""
        if self.optimizer_state:
            optimizer.load_state_dict(self.optimizer_state)
            self.optimizer_state = None

    def start_training(self, optimizer: Any) -> None:
        """Save `optimizer`, as Fabric returned it, with every checkpoint inside the current task."""
        self.optimizer = optimizer

    def count_step(self) -> None:
        """Count one step of the current task."""
        self.step += 1

    def finish_training(self) -> None:
        """Reset the optimizer and the step counter after training of a task."""
        self.step, self.optimizer = 0, None

    def keep_features(self, batch: FeatureBatch) -> None:
        """Keep the features of the current task's images until its training has changed them."""
        self.features_before = {"indices": batch.indices, "features": batch.images.features}

    def finish_task(self, task: Task, row: TaskAccuracies) -> None:
        """Count `task` as finished, with the accuracies of all tasks up to it."""
        metrics.write_row(self.matrices, row.accuracy, task.index, self.num_tasks)
        metrics.write_row(self.within_task, row.within_task, task.index, self.num_tasks)
        self.predictions = row.predictions
        self.task = task.index + 1

    def state_dict(self) -> dict[str, Any]:
        """Return the state as nested dictionaries of tensors, numbers and strings."""
        state = {
            "backbone": self.fingerprint,
            "task": self.task,
            "step": self.step,
            "method": self.method.trainable_state_dict(),
            "projection": self.projection.state_dict(),
            "readouts": {readout.name: readout.state_dict() for readout in self.readouts},
            "matrices": self.matrices,
            "within": self.within_task,
            "optimizer": self.optimizer.state_dict() if self.step else None,
        }
        if self.features_before is not None:
            state["before"] = self.features_before
        if self.predictions is not None:
            state["predictions"] = self.predictions._asdict()
        if self.meter:
            state["drift"] = self.meter.state_dict()
        if self.online:
            state["stream"] = self.online.state_dict()
        if self.scaler:
            state["scaler"] = self.scaler.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a `state_dict`. It may be from before tasks were added.

        Raises:
            ValueError: If something is missing, or does not fit this run.
            RunError: If it was trained on another encoder.
        """
        if missing := self.state_dict().keys() - state.keys() - {"predictions"}:
            raise ValueError(f"expected {sorted(missing)} in it")
        Run.check_encoder(state["backbone"], self.fingerprint)
        task, step = state["task"], state["step"]
        if not (type(task) is type(step) is int and 0 <= task <= self.num_tasks and step >= 0):
            raise ValueError(f"expected up to {self.num_tasks} finished tasks and a step of the next, got {task!r} and"
                             f" {step!r}")  # fmt: skip
        self.task, self.step = task, step
        self.matrices = self._padded(state["matrices"])
        self.within_task = self._padded(state["within"])
        self.predictions = Predictions.from_state(state["predictions"]) if "predictions" in state else None
        self.method.load_trainable_state_dict(state["method"])
        self.projection.load_state_dict(state["projection"])
        for readout in self.readouts:
            readout.load_state_dict(on_float64_device(state["readouts"][readout.name], self.device))
        if self.meter:
            self.meter.load_state_dict(state["drift"])
        if self.online:
            self.online.load_state_dict(state["stream"])
        if self.scaler:
            self.scaler.load_state_dict(state["scaler"])
        self.optimizer_state, self.features_before = state["optimizer"], state.get("before")

    def non_finite(self) -> list[str]:
        """Return the names of learned tensors that have values which are not finite."""
        return [name for name, value in self.method.trainable_state_dict().items() if not bool(value.isfinite().all())]

    def _padded(self, matrices: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the matrices with NaN for tasks that were added since."""
        return {column: metrics.pad_matrix(matrix, self.num_tasks) for column, matrix in matrices.items()}
