"""Everything that training needs and a checkpoint does not hold: devices, data, evaluation, the run folder, the log."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from rich.progress import Progress
from torch import Tensor

from pgp.analysis.drift import DriftMeter
from pgp.config import Config
from pgp.datasets.base import DatasetSize
from pgp.datasets.loader import Batch, SampleKey, TransformedSplit, batches
from pgp.evaluation import metrics
from pgp.evaluation.accuracy import Evaluator, FrozenCache, TaskAccuracies
from pgp.evaluation.calibration import expected_calibration_error
from pgp.evaluation.online import OnlineAccuracy
from pgp.precision import mixed_dtype
from pgp.progress import print_line, track
from pgp.readouts.calibration import num_folds
from pgp.runs.checkpoint import CheckpointName, reading
from pgp.runs.data_paths import resolve_paths
from pgp.runs.identity import DataDescription
from pgp.runs.run import Run
from pgp.scenario import Task, stratified_folds
from pgp.system import platforms
from pgp.system.signals import StopRequest
from pgp.system.storage import RunError
from pgp.training.state import TrainState
from pgp.training.tasks import (
    build_tasks,
    describe_data,
    single_class_warning,
    unused_setting_warning,
    weight_decay_warning,
)


class Session:
    """Devices, data, evaluator and run folder of one process.

    Only `pgp.training` assigns to its members.
    """

    def __init__(
        self,
        fabric: Fabric,
        config: Config,
        progress: Progress,
        run: Run | None = None,
        learned: DataDescription | None = None,
        *,
        downloads: bool = True,
    ) -> None:
        """Open the data of `config`, and divide them into tasks.

        Args:
            fabric: Devices and precision, from `pgp.training.devices.build_fabric`.
            config: What to do.
            progress: Where to draw progress bars.
            run: The run folder. If None, `open_run` has to come before anything is logged or saved.
            learned: Description of data that are learned already, and whose images may be missing; see `build_tasks`.
            downloads: Whether data that are missing are downloaded, if they can be.
        """
        config = resolve_paths(config)
        self.data, self.scenario = build_tasks(config, learned, downloads=downloads)
        self._learned = learned
        self.config = config if config.joint else replace(config, tasks=len(self.scenario) - len(config.added))
        self.fabric, self.progress = fabric, progress
        self.micro_batch_size = config.hardware.micro_batch_size or (4 if fabric.device.type == "cpu" else None)
        """Images whose activations are in memory at once; a batch if None."""
        self.evaluator = Evaluator(fabric, config, self.data, self.scenario)
        self.model: Any = None
        """The method of the state, as Fabric has set it up for training."""
        self.stop = StopRequest()
        """The handler of stop signals."""
        self.saved: Path | None = None
        """The newest checkpoint."""
        self.frozen = FrozenCache()
        """Frozen features of the current task's training images without augmentation, while they are needed again."""
        self._run = run
        self._seconds: dict[str, float] = {}

    def new_state(self) -> TrainState:
        """Return a state that has learned nothing, and set its method up for training."""
        config, fabric = self.config, self.fabric
        backbone = config.backbone.build(config.transforms.size)
        fingerprint = backbone.fingerprint()
        method = config.build_method(backbone, self.data.class_names)
        if dtype := mixed_dtype(config.precision):
            backbone.to_mixed_(dtype)
        if any(parameter.requires_grad for parameter in method.parameters()):
            self.model = fabric.setup_module(method)
            self.model.mark_forward_method("loss")
        else:  # nothing is trained, which DDP would refuse
            fabric.to_device(method)
        projection = config.projection.build(method.protected(), config.seed)
        unlearned = [space for space, target in projection.protected.items() if not target.parameter.requires_grad]
        if unlearned and projection.observation and projection.apply_to == "gradient":
            raise ValueError("expected --projection.apply-to update with --method.no-train-input-side, got gradient:"
                             f" {unlearned[0]} has no gradient, and its draws would not be projected")  # fmt: skip
        if config.save_every_steps and projection.observation and projection.observation.when == "before":
            raise ValueError(f"expected --projection.when after with --save-every-steps {config.save_every_steps}, got"
                             " before: set one of them, or --save-every-steps 0")  # fmt: skip
        readouts = [readout.build(method.head, self.data.classes, config.seed) for readout in config.readouts]
        compensating = [readout.name for readout in readouts if readout.needs_drift]
        if config.experts != "none" and method.features_drift and compensating:
            raise ValueError(
                "expected readouts without +shift, +linear and +nearby for experts that share parameters, got"
                f" {compensating[0]}: drift is estimated on images of a task whose expert does not exist before its"
                " training. Choose others, such as --readouts experts head"
            )
        measures_drift = config.drift_images and config.evaluate != "last"
        meter = DriftMeter(self.evaluator, projection, self.micro_batch_size) if measures_drift else None
        return TrainState(
            method,
            projection,
            readouts,
            fingerprint=fingerprint,
            num_tasks=len(self.scenario),
            device=fabric.device,
            meter=meter,
            online=OnlineAccuracy(len(self.scenario), fabric.device) if config.setting == "oil" else None,
            scaler=self.scaler,
        )

    @property
    def scaler(self) -> torch.amp.GradScaler | None:
        """What scales the loss in precision 16-mixed, so that small gradients are not rounded to 0; else None."""
        return getattr(self.fabric.strategy.precision, "scaler", None)

    def open_run(self, run: Run) -> None:
        """Log to `run` and save in it from now on."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run folder."""
        if self._run is None:
            raise RuntimeError("expected a run folder: call open_run() first")
        return self._run

    def remaining(self, state: TrainState) -> tuple[Task, ...]:
        """Return the tasks that are not finished yet, in their order."""
        return self.scenario.tasks[state.task :]

    def transformed(self, which: str, purpose: str, task: Task | None) -> TransformedSplit:
        """Return the training images under the `train` or the `test` transform.

        Random transforms depend on `purpose` and, unless it is None, on `task`.
        """
        transforms = self.config.transforms
        transform = transforms.train() if which == "train" else transforms.test()
        skip_bad = self.config.on_bad_image == "skip"
        address = (purpose,) if task is None else (purpose, task.index)
        return TransformedSplit(self.data.train, transform, self.config.seed, address, skip_bad)

    def trains(self, state: TrainState, task: Task) -> bool:
        """Whether `task` is trained on: prompts learn, or a head that a readout or the accuracy of a stream uses."""
        uses_head = state.online is not None or any(readout.uses_head for readout in self.config.readouts)
        uses_prompts = bool(state.method.prompt_parameters()) and self.adapts(task)
        learns = state.method.can_learn(task) or self.config.optimizer_of(task.index).weight_decay > 0
        return state.is_trainable and learns and (uses_prompts or uses_head)

    def changes_features(self, state: TrainState, task: Task) -> bool:
        """Whether the training of `task` can change features."""
        return state.method.features_drift and self.adapts(task) and self.trains(state, task)

    def adapts(self, task: Task) -> bool:
        """Whether parameters outside the head may learn in `task`."""
        return self.config.optimizer_of(task.index).prompt_lr_scale > 0

    def folds(self, task: Task) -> Tensor:
        """Return the fold of each training image that readouts hold out for calibration, `(n,)`; -1 if they do not.

        The images of each class are divided into folds, as many of which are held out, one at a time, as are enough.
        A class of a single image has none.
        """
        folds, used = num_folds(len(task.train))
        fold = stratified_folds(self.data.train.labels[task.train], folds, self.config.seed)
        of_image = torch.full((len(self.data.train),), -1)
        of_image[task.train] = torch.where(fold < used, fold, -1)
        return of_image

    def training_stream(self, task: Task, plan: Sequence[Sequence[SampleKey]]) -> Iterator[Batch]:
        """Yield this process's part of the planned batches, under a progress bar."""
        stream = batches(self.transformed("train", "view", task), plan, self.evaluator.loader_options)
        return track(self.progress, stream, len(plan), f"{self.scenario.describe(task)}, training")

    def uses_clean_queries(self, state: TrainState) -> bool:
        """Whether training uses the queries of images without augmentation."""
        return self.config.query == "clean" and state.method.uses_query

    def with_queries(self, state: TrainState, batch: Batch) -> Batch:
        """Return a batch of the current task's training images with their clean queries, if training uses them.

        An image that could not be read when the queries were computed is left out.
        """
        if not self.uses_clean_queries(state):
            return batch
        held = self.frozen.holds(batch.indices)
        if not bool(held.all()):
            batch = Batch(batch.images[held], batch.labels[held], batch.indices[held])
        return batch._replace(query=self.frozen.get(batch.indices).query) if len(batch.indices) else batch

    @property
    def description(self) -> DataDescription:
        """Description of the data, which the run records."""
        return describe_data(self.data, self.scenario, self._learned)

    @property
    def data_warnings(self) -> list[str]:
        """Warnings about the data, and settings that do not fit them, as sentences."""
        config, scenario = self.config, self.scenario
        settings = [single_class_warning(config, scenario), weight_decay_warning(config, scenario)]
        found = [*self.data.messages(), self._size_mismatch, *settings, unused_setting_warning(config)]
        return [warning for warning in found if warning]

    @property
    def _size_mismatch(self) -> str | None:
        """How the data differ in size from what was published, as a sentence; None if they do not."""
        found = DatasetSize(len(self.data.train), len(self.data.test), self.data.classes)
        expected = self.config.dataset.expected
        if expected is None or self.config.added or found == expected:
            return None
        return (
            f"the data are not as published: {found.train:,} training and {found.test:,} test images of"
            f" {found.classes:,} classes, of {expected.train:,}, {expected.test:,} and {expected.classes:,}"
        )

    def load(self, state: TrainState, name: CheckpointName) -> None:
        """Restore `state` from a checkpoint of the run.

        Raises:
            RunError: If the checkpoint is damaged, or was learned on another encoder.
        """
        tree = self.run.load(name)
        self.saved = self.run.checkpoints.folder / str(name)
        with reading(self.saved):
            state.load_state_dict(tree)

    def save(self, state: TrainState) -> None:
        """Write a checkpoint.

        Raises:
            RunError: If what was learned is not finite: such a state is never saved.
        """
        if broken := state.non_finite():
            raise RunError(f"{', '.join(broken)} are not finite any more: start a new run with a lower --optimizer.lr."
                           f" {self.last_good_state()}")  # fmt: skip
        name = CheckpointName.at(state.task, state.step)
        if self.fabric.is_global_zero:
            self.run.save(name, state.state_dict())
        self.fabric.barrier()
        self.saved = self.run.checkpoints.folder / str(name)

    def last_good_state(self) -> str:
        """Return a sentence that names the newest checkpoint."""
        return f"The last good state is {self.saved}" if self.saved else "No state was saved yet"

    @contextlib.contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Record the duration of the block for the log of the current task."""
        started = time.perf_counter()
        yield
        self._seconds[what] = time.perf_counter() - started

    def log(self, event: str, **values: Any) -> None:
        """Write one line of `metrics.jsonl`."""
        if self.fabric.is_global_zero:
            self.run.log(event, **values)

    def warn(self, text: str) -> None:
        """Log and print a warning, as an event `data`."""
        self.log("data", warning=text)
        print_line(self.progress, f"pgp: warning: {text}")

    def log_online(self, state: TrainState, task: Task) -> None:
        """Log the accuracy of predictions before training, in an online run.

        Collective: in a distributed run, every process must call it.
        """
        if state.online:
            self.log("stream", task=task.index, step=state.step, **state.online.summarize(task))

    def log_task(
        self,
        state: TrainState,
        task: Task,
        row: TaskAccuracies,
        *,
        ranks: Mapping[str, float],
        readouts: Mapping[str, Mapping[str, Any]],
        drift: Mapping[str, Any] | None,
    ) -> None:
        """Log what was measured of a finished task.

        Args:
            state: The state, with `task` finished.
            task: The task.
            row: Accuracies of all tasks so far.
            ranks: Rank of each protected subspace.
            readouts: Seconds and bytes of each readout that was fitted.
            drift: What the drift meter found, if there is one.
        """
        accuracy, within = (metrics.trim(own, task.index + 1) for own in (state.matrices, state.within_task))
        record: dict[str, Any] = {
            "task": task.index,
            "seconds": self._seconds,
            "memory": self._peak_memory(),
            "ranks": ranks,
            "readouts": readouts,
            "average_accuracy": {column: metrics.average_accuracy(matrix) for column, matrix in accuracy.items()},
            "forgetting": {column: metrics.forgetting(matrix) for column, matrix in accuracy.items()},
            "calibration": {column: calibration_to_json(bins) for column, bins in row.calibration.items()},
        }
        if self.config.setting != "til" and not self.scenario.shares_classes:  # else, classes do not tell tasks apart
            record |= {
                "forgetting_within": {column: metrics.forgetting(matrix) for column, matrix in within.items()},
                "within": {column: values.tolist() for column, values in row.within_task.items()},
                "identified": {column: values.tolist() for column, values in row.task_id_accuracy.items()},
            }
        if drift is not None:
            record["drift"] = drift
        if state.online:
            record["stream_accuracy"] = state.online.accuracy(task)
        self.log("task", **_without_nan(record))
        self._seconds = {}

    def _peak_memory(self) -> dict[str, int]:
        """Return the peak memory of this process so far in bytes, by kind: resident (`ram`) and of its GPU (`gpu`)."""
        device, ram = self.fabric.device, platforms.peak_memory()
        gpu = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
        return {kind: size for kind, size in (("ram", ram), ("gpu", gpu)) if size is not None}

    def print_accuracy(self, state: TrainState, task: Task) -> None:
        """Print the average accuracy after `task`, or that of `task` alone if not all tasks are evaluated."""
        t, evaluated = task.index, self.config.evaluated_tasks(task.index, len(self.scenario))
        learned = metrics.trim(state.matrices, t + 1)
        what, accuracies = "average accuracy", {name: metrics.average_accuracy(m) for name, m in learned.items()}
        if len(evaluated) <= t:
            what, accuracies = "accuracy on this task", {name: float(m[t, t]) for name, m in state.matrices.items()}
        text = what + " " + ", ".join(f"{_percent(accuracy)} ({name})" for name, accuracy in accuracies.items())
        if not evaluated:
            text = "learned"
        elif (error := self.sampling_error(state, t + 1)) is not None and math.isfinite(error):
            text += f", ± {100 * error:.1f} from the sample of test images"
        if state.online:
            text += f"; along the stream {100 * state.online.accuracy(task):.1f} %"
        print_line(self.progress, f"{self.scenario.describe(task)}: {text}")

    def sampling_error(self, state: TrainState, learned: int) -> float | None:
        """Return the standard error of the first readout's average accuracy; see `metrics.sampling_error`."""
        counts = [len(task.test) for task in self.scenario.tasks]
        first = next(iter(metrics.trim(state.matrices, learned).values()), None)
        return None if first is None else metrics.sampling_error(first, counts, self.config.test_images)

    def write_accuracy(self, state: TrainState) -> None:
        """Write `accuracy.csv`."""
        if state.matrices and self.fabric.is_global_zero:
            self.run.write_matrices(state.matrices)


def _percent(accuracy: float) -> str:
    return "not measured" if math.isnan(accuracy) else f"{100 * accuracy:.1f} %"


def _without_nan(value: Any) -> Any:
    """Return a tree of values with None for NaN, which JSON does not have."""
    if isinstance(value, Mapping):
        return {key: _without_nan(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_without_nan(one) for one in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def calibration_to_json(bins: Tensor) -> dict[str, Any]:
    """Return the expected calibration error in [0, 1], and the bins that it is computed from."""
    images, confidence, hits = bins.T.tolist()
    error = expected_calibration_error(bins)
    return {"error": error, "images": images, "confidence": confidence, "hits": hits}
