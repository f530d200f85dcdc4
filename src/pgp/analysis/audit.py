"""Audit of a run: accuracy without task information, and with each protocol that uses the task of test images."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from rich.progress import Progress
from torch import Tensor

from pgp.config import Config
from pgp.datasets.loader import batches, sequential_batches
from pgp.evaluation.accuracy import FeatureBatch
from pgp.methods.base import mask_logits
from pgp.progress import track
from pgp.readouts.base import Readout
from pgp.readouts.statistics import StatisticsReadout
from pgp.runs.run import Run
from pgp.scenario import Task
from pgp.training.observe import observe, observe_views
from pgp.training.session import Session
from pgp.training.start import load_latest
from pgp.training.state import TrainState

BATCHES = (1, 8, 128)
SCOPES = {
    "seen": "classes seen so far",
    "all": "all classes of the run",
    "cut": "classes up to its task",
}
"""The classes among which an image is predicted. `cut` uses the image's task."""


class Finding(NamedTuple):
    """Average accuracy of one column under one protocol."""

    column: str
    choice: str
    """`image`: prompts are selected per image. `vote`: by majority vote over a test batch of one task."""
    batch: int | None
    """Images of a test batch, where they vote."""
    scope: str
    """A key of `SCOPES`."""
    accuracy: float
    """In [0, 1]."""

    @property
    def uses_task(self) -> bool:
        """Whether predictions use the task of an image, or the other images of its batch, which have the same task."""
        return self.choice != "image" or self.scope == "cut"


@torch.no_grad()
def audit_run(
    run: Run, progress: Progress, sizes: Sequence[int] = BATCHES, config: Config | None = None
) -> list[Finding]:
    """Measure the latest finished checkpoint of `run` on all tasks that it has learned, by every protocol.

    Args:
        run: A run with at least one finished task.
        progress: Where to draw progress bars.
        sizes: Sizes of test batches that vote on their prompts, if the method selects prompts.
        config: The run's own, perhaps with another path of its data. If None, it is as recorded.

    Raises:
        RunError: If no task is finished, or the data have changed.
    """
    session, state = _load_finished(run, progress, config or run.config)
    last = state.task
    out = []
    for size in (None, *(sizes if state.method.selects_prompts else ())):
        hits: dict[tuple[str, str], Tensor] = {}
        counts = torch.zeros(last, dtype=torch.float64)  # of images that can be read
        for task, features, labels in _features(session, state, size):
            counts[task.index] += len(labels)
            for column, scope, logits in _logits(session, state, features, task):
                right = hits.setdefault((column, scope), torch.zeros_like(counts))
                right[task.index] += float((logits.argmax(1) == labels).sum())
        choice = "image" if size is None else "vote"
        out += [
            Finding(column, choice, size, scope, float((right / counts).mean()))
            for (column, scope), right in hits.items()
        ]
    return out


@torch.no_grad()
def oracle(run: Run, progress: Progress, config: Config | None = None) -> dict[str, tuple[float, float]]:
    """Fit fresh statistics to the training images of all tasks, as the final model sees them: an upper bound.

    It needs the old images, which a run does not have.

    Returns:
        By the name of a readout: average accuracy with fresh statistics, in [0, 1]; and the `staleness` of the class
        means that the run kept.
    """
    session, state = _load_finished(run, progress, config or run.config)
    kept = {readout.name: readout for readout in state.readouts if isinstance(readout, StatisticsReadout)}
    fresh: list[Readout] = []
    for setting in session.config.readouts:
        if setting.name in kept:
            plain = replace(setting, compensate="none") if isinstance(setting, StatisticsReadout.Config) else setting
            fresh.append(plain.build(state.method.head, session.data.classes, session.config.seed))
            fresh[-1].name = setting.name
    for task in session.scenario.tasks[: state.task]:
        observe(session, state, task, None, fresh)
        observe_views(session, state, task, fresh)
    for readout in fresh:
        readout.end_task()
    row = session.evaluator.evaluate(state.method, fresh, state.task - 1, progress)
    out = {}
    for readout in fresh:
        assert isinstance(readout, StatisticsReadout)
        out[readout.name] = float(row.accuracy[readout.name].mean()), staleness(kept[readout.name], readout)
    return out


def to_json(findings: Sequence[Finding], bounds: Mapping[str, tuple[float, float]] | None = None) -> str:
    """Return the findings and, if there are any, the bounds of `oracle` as a JSON text; shares are in [0, 1]."""
    tree: dict[str, Any] = {"accuracy": [finding._asdict() | {"uses_task": finding.uses_task} for finding in findings]}
    if bounds is not None:
        tree["oracle"] = {
            name: {"accuracy": accuracy, "staleness": None if math.isnan(stale) else stale}
            for name, (accuracy, stale) in bounds.items()
        }
    return json.dumps(tree, indent=2)


def staleness(kept: StatisticsReadout, true: StatisticsReadout) -> float:
    """Return how far class means are from the true ones, relative to the spread of the true ones.

    It is the norm of the difference, divided by the norm of the true means about their centre; NaN for a single class.
    """
    means, truth = kept.means[true.seen].cpu(), true.means[true.seen].cpu()
    return float((means - truth).norm() / (truth - truth.mean(0)).norm()) if len(truth) > 1 else math.nan


def _load_finished(run: Run, progress: Progress, config: Config) -> tuple[Session, TrainState]:
    """Return the run as its latest finished task left it, on the accelerator of this machine."""
    hardware = replace(config.hardware, accelerator="auto")
    return load_latest(run, replace(config, hardware=hardware, legacy_eval=False), progress)


def _features(session: Session, state: TrainState, size: int | None) -> Iterator[tuple[Task, FeatureBatch, Tensor]]:
    """Yield the features and labels of test batches, each of one task; if `size`, that many images vote on prompts."""
    evaluator, tasks = session.evaluator, session.scenario.tasks[: state.task]
    batch_size = size or session.config.eval_batch_size
    plan = [(task, keys) for task in tasks for keys in sequential_batches(task.test, batch_size)]
    stream = batches(evaluator.test_split(), [keys for _, keys in plan], evaluator.loader_options)
    what = "each image by itself" if size is None else f"a vote of {size} images"
    stream = track(session.progress, stream, len(plan), f"evaluating {what}")
    for (task, _), batch in zip(plan, stream, strict=True):
        if len(batch.indices):
            images = batch.images.to(session.fabric.device)
            frozen = evaluator.frozen(state.method, images, batch.indices)
            features = evaluator.features(state.method, images, frozen, by_vote=size is not None)
            yield task, FeatureBatch(batch.indices, features), batch.labels.to(images.device)


def _logits(session: Session, state: TrainState, batch: FeatureBatch, task: Task) -> Iterator[tuple[str, str, Tensor]]:
    """Yield readout, scope and logits `(B, C)`. In a task-incremental run the task is given in every scope."""
    scenario, is_til = session.scenario, session.config.setting == "til"
    for readout in state.readouts:
        logits = readout.logits(readout.select_features(batch.images))
        scopes = {
            "seen": task.classes if is_til else scenario.seen_classes(state.task - 1),
            "all": range(session.data.classes),
            "cut": scenario.seen_classes(task.index),
        }
        for scope, classes in scopes.items():
            yield readout.name, scope, mask_logits(logits, classes)
