"""Everything that a run is, in memory: what learns, what it learns from, and how far it has come."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies.ddp import DDPStrategy
from rich.progress import Progress
from torch import Tensor

from pgp.analysis.drift import DriftMeter
from pgp.config import Config, Hardware
from pgp.datasets.base import DatasetSize
from pgp.datasets.loader import TransformedSplit
from pgp.evaluation import metrics
from pgp.evaluation.accuracy import Evaluator
from pgp.evaluation.online import OnlineAccuracy
from pgp.rng import make_generator
from pgp.runs.checkpoint import CheckpointName, reading
from pgp.runs.data_paths import record_data_paths, resolve_paths
from pgp.runs.run import Run
from pgp.scenario import Task
from pgp.subspace import float64_device
from pgp.system.signals import StopRequest
from pgp.system.storage import RunError
from pgp.training.tasks import build_tasks, describe_data, single_class_warning


class Learner:
    """A run in memory; its `state_dict` is everything that a checkpoint holds."""

    def __init__(self, fabric: Fabric, config: Config, progress: Progress) -> None:
        config = resolve_paths(config)
        self.data, self.scenario = build_tasks(config)
        self.config = config if config.joint else replace(config, tasks=len(self.scenario) - len(config.added))
        self.fabric, self.progress = fabric, progress
        backbone = config.backbone.build(config.transforms.size)
        self.fingerprint = backbone.fingerprint()
        if config.precision == "bf16-mixed":
            backbone.to_bfloat16_()
        self.method = config.method.build(backbone, self.data.class_names, make_generator(config.seed, "init"))
        self.model = fabric.setup_module(self.method)
        self.model.mark_forward_method("loss")
        self.projection = config.projection.build(self.method.protected(), config.seed)
        if config.save_every_steps and self.projection.observation and self.projection.observation.when == "before":
            raise ValueError("save_every_steps needs a projection that collects after a task, not before it")
        self.readouts = [readout.build(self.method.head, self.data.classes, config.seed) for readout in config.readouts]
        on_cpu = fabric.device.type == "cpu"
        self.part = config.hardware.micro_batch_size or (4 if on_cpu else None)
        self.evaluation = Evaluator(fabric, config, self.data, self.scenario)
        self.meter = DriftMeter(self.evaluation, self.projection, self.part) if config.drift_images else None
        self.stream = OnlineAccuracy(len(self.scenario)) if config.setting == "oil" else None
        self.matrices: dict[str, Tensor] = {}
        self.task, self.step = 0, 0
        """Where learning goes on: this many tasks are closed, and this many steps of the next are done."""
        self.optimizer: Any = None
        """The current task's, while it is being trained."""
        self.before: dict[str, Tensor] | None = None
        """`indices` and `features` of all of the current task's images before its training, where a readout will ask
        how they moved."""
        self.within_task: dict[str, Tensor] = {}
        """Matrices like `matrices`, of the accuracy among the classes of an image's own task."""
        self.stop = StopRequest()
        """What asks for the end of training, if anything."""
        self.restored: dict[str, Any] | None = None
        """State of the optimizer of a task that a checkpoint left in the middle."""
        self.saved: Path | None = None
        """The newest checkpoint."""

    def state_dict(self) -> dict[str, Any]:
        """The run so far."""
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
        state |= {"before": self.before} if self.before is not None else {}
        state |= {"drift": self.meter.state_dict()} if self.meter else {}
        return state | ({"stream": self.stream.state_dict()} if self.stream else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a run; refuses one that was learned on another encoder."""
        if missing := self.state_dict().keys() - state.keys():
            raise ValueError(f"expected {sorted(missing)} in it")
        Run.check_encoder(state["backbone"], self.fingerprint)
        task, step, size = state["task"], state["step"], len(self.scenario)
        if not (type(task) is type(step) is int and 0 <= task <= size and step >= 0):
            raise ValueError(f"expected up to {size} finished tasks and a step of the next, got {task!r} and {step!r}")
        self.task, self.step = task, step
        self.matrices, self.within_task = (
            {
                name: metrics.pad_matrix(matrix, size) for name, matrix in state[which].items()
            }  # tasks may have been added
            for which in ("matrices", "within")
        )
        self.method.load_trainable_state_dict(state["method"])
        self.projection.load_state_dict(state["projection"])
        device = float64_device(self.fabric.device)
        for readout in self.readouts:
            readout.load_state_dict({k: tensor.to(device) for k, tensor in state["readouts"][readout.name].items()})
        if self.meter:
            self.meter.load_state_dict(state["drift"])
        if self.stream:
            self.stream.load_state_dict(state["stream"])
        self.restored, self.before = state["optimizer"], state.get("before")

    def load(self, run: Run, name: CheckpointName) -> None:
        """Take up the state of a checkpoint.

        Raises:
            RunError: If it is damaged, or was learned on another encoder.
        """
        state = run.load(name)
        self.saved = run.checkpoints.folder / str(name)
        with reading(self.saved):
            self.load_state_dict(state)

    def save(self, run: Run) -> None:
        """Write a checkpoint of where learning stands.

        Raises:
            RunError: If what was learned is not finite: such a state is never saved.
        """
        state, name = self.state_dict(), CheckpointName.at(self.task, self.step)
        broken = [key for key, value in state["method"].items() if not bool(value.isfinite().all())]
        if broken:
            raise RunError(f"{', '.join(broken)} are not finite any more: start a new run with a lower --optimizer.lr."
                           f" {self.last_good_state()}")  # fmt: skip
        if self.fabric.is_global_zero:
            run.save(name, state)
        self.fabric.barrier()
        self.saved = run.checkpoints.folder / str(name)

    def last_good_state(self) -> str:
        """Return a sentence that names the newest checkpoint."""
        return f"The last good state is {self.saved}" if self.saved else "No state was saved yet"

    def log(self, run: Run, event: str, **values: Any) -> None:
        """Write one line of metrics."""
        if self.fabric.is_global_zero:
            run.log(event, **values)

    def log_stream(self, run: Run, task: Task) -> None:
        """Write the accuracy along the stream, in an online run."""
        if self.stream:
            self.log(run, "stream", task=task.index, step=self.step, **self.stream.summarize(task))

    def viewed(self, view: str, purpose: str, task: Task) -> TransformedSplit:
        """The training images under the `train` or `test` view."""
        chosen = self.config.transforms.train() if view == "train" else self.config.transforms.test()
        skip = self.config.on_bad_image == "skip"
        return TransformedSplit(self.data.train, chosen, self.config.seed, (purpose, task.index), skip)

    @property
    def concerns(self) -> list[str]:
        """In words, what of the data a user should know before an hour is spent on them."""
        return [
            *self.data.messages(),
            *(concern for concern in (self._shortfall, single_class_warning(self.scenario)) if concern),
        ]

    @property
    def _shortfall(self) -> str | None:
        """In words, how the data differ in size from what was published; None if they do not."""
        found = DatasetSize(len(self.data.train), len(self.data.test), self.data.classes)
        expected = self.config.dataset.expected
        if expected is None or self.config.added or found == expected:
            return None
        return (
            f"the data are not as published: {found.train:,} training and {found.test:,} test images of"
            f" {found.classes:,} classes, of {expected.train:,}, {expected.test:,} and {expected.classes:,}"
        )

    @property
    def description(self) -> dict[str, Any]:
        """What the run remembers of its data."""
        return describe_data(self.data, self.scenario)


def load_latest(run: Run, config: Config, progress: Progress) -> tuple[Learner, int]:
    """A run as its latest finished task left it, on one device, and how many tasks are finished.

    Args:
        run: a run with at least one finished task.
        config: the run's own, perhaps with other evaluation settings, other hardware or another place of its data.
        progress: where to draw progress bars.

    Raises:
        RunError: if no task is finished, or the data are others.
    """
    name = run.latest_finished()
    config = replace(config, hardware=replace(config.hardware, devices=1))
    learner = Learner(build_fabric(config), config, progress)
    _check_data_paths(learner, run)
    learner.load(run, name)
    return learner, name.task


def _check_data_paths(learner: Learner, run: Run) -> None:
    """Raise unless the data are those of `run`, and record their place if they have moved.

    Where they lie as recorded, they may have other images: that is a warning.
    """
    run.check_data(learner.description, images=False)
    known, now = run.config, learner.config
    if (known.dataset, known.added) == (now.dataset, now.added):
        try:
            run.check_data(learner.description)
        except RunError as error:
            warnings.warn(f"evaluated on other images: {error}", stacklevel=2)
        return
    run.check_data(learner.description)
    try:
        with run.writing():
            record_data_paths(run, now)
    except RunError as error:
        warnings.warn(f"the run does not record where its data lie now: {error}", stacklevel=2)


def build_fabric(config: Config) -> Fabric:
    """Return a Fabric for the hardware and precision of `config`.

    Raises:
        ValueError: If this machine does not have that hardware.
    """
    hardware = config.hardware
    try:
        return Fabric(
            accelerator=accelerator_name(hardware),
            devices=hardware.devices,
            precision=config.precision,
            strategy=DDPStrategy(find_unused_parameters=True) if hardware.devices > 1 else "auto",
        )
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"this machine cannot compute with --accelerator {hardware.accelerator} --devices"
                         f" {hardware.devices} --precision {config.precision}: {error}") from error  # fmt: skip


def accelerator_name(hardware: Hardware) -> str:
    """Return Fabric's name of the accelerator. Never let it choose: its `auto` takes MPS, which has no float64."""
    if hardware.accelerator == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return "cuda" if hardware.accelerator == "gpu" else hardware.accelerator
