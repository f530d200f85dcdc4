"""How much of a run's number is real: its latest checkpoint under the honest protocol and under those that leak."""

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
from pgp.datasets.loader import TransformedSplit, batches, sequential_batches
from pgp.evaluation.accuracy import FeatureBatch
from pgp.methods.base import mask_logits
from pgp.progress import track
from pgp.readouts.base import Readout
from pgp.readouts.statistics import StatisticsReadout
from pgp.runs.run import Run
from pgp.scenario import Task
from pgp.training.observe import observe
from pgp.training.session import Learner, load_latest

BATCHES = (1, 8, 128)


SCOPES = {
    "seen": "classes seen so far",
    "all": "all classes, seen or not",
    "cut": "classes up to the task of the batch, whose label it is told",
}


"""Over what classes an image is scored. `cut` lets the label in."""


class Finding(NamedTuple):
    """Average accuracy of one column under one protocol."""

    column: str
    choice: str
    """`image`: each image has prompts of its own choice. `vote`: a test batch, of one task, has one choice."""
    batch: int | None
    """Images of a test batch, where they vote."""
    scope: str
    """A key of `SCOPES`."""
    accuracy: float
    """In [0, 1]."""

    @property
    def honest(self) -> bool:
        """Whether nothing of the task leaks into the prediction."""
        return self.choice == "image" and self.scope == "seen"


@torch.no_grad()
def audit_run(
    run: Run, progress: Progress, sizes: Sequence[int] = BATCHES, config: Config | None = None
) -> list[Finding]:
    """The latest finished checkpoint of `run`, measured on all tasks that it has learned, by every protocol.

    Args:
        run: a run with at least one finished task.
        progress: where to draw progress bars.
        sizes: of test batches that vote for their prompts, where a method chooses any.
        config: The run's own, perhaps with another place of its data; as it is recorded, if None.

    Raises:
        RunError: if no task is finished, or the data are others.
    """
    learner, last = _load_finished(run, progress, config or run.config)
    tasks = learner.scenario.tasks[:last]
    out = []
    for size in (None, *(sizes if learner.method.uses_query else ())):  # where nothing is chosen, nothing is voted on
        hits: dict[tuple[str, str], Tensor] = {}
        counts = torch.zeros(last, dtype=torch.float64)  # of images that can be read
        for task, seen, labels in _features(learner, tasks, size):
            counts[task.index] += len(labels)
            for column, scope, logits in _predict(learner, seen, task, last):
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
    """What readouts from statistics would read if none were stale: fitted, after the last task, to the training images
    of all tasks as the final model sees them. Not to be had without old images; a bound.

    Returns:
        By the name of a readout: average accuracy, in [0, 1]; and how far the means that the run kept of old classes
        lie from the true ones, relative to the spread of the true ones, after what compensation made up for.
    """
    learner, last = _load_finished(run, progress, config or run.config)
    kept = {one.name: one for one in learner.readouts if isinstance(one, StatisticsReadout)}
    fresh: list[Readout] = []
    for one in learner.config.readouts:
        if one.name in kept:
            plain = replace(one, compensate="none") if isinstance(one, StatisticsReadout.Config) else one
            fresh.append(plain.build(learner.method.head, learner.data.classes, learner.config.seed))
            fresh[-1].name = one.name
    for task in learner.scenario.tasks[:last]:
        observe(learner, task, None, fresh)
    for readout in fresh:
        readout.end_task()
    row = learner.evaluation.evaluate(learner.method, fresh, last - 1, progress)
    out = {}
    for readout in fresh:
        assert isinstance(readout, StatisticsReadout)
        out[readout.name] = float(row.accuracy[readout.name].mean()), staleness(kept[readout.name], readout)
    return out


def to_json(findings: Sequence[Finding], bounds: Mapping[str, tuple[float, float]] | None = None) -> str:
    """Return the findings and, if there are any, the bounds of `oracle` as a JSON text; shares are in [0, 1]."""
    tree: dict[str, Any] = {"accuracy": [finding._asdict() | {"honest": finding.honest} for finding in findings]}
    if bounds is not None:
        tree["oracle"] = {
            name: {"accuracy": accuracy, "staleness": None if math.isnan(stale) else stale}
            for name, (accuracy, stale) in bounds.items()
        }
    return json.dumps(tree, indent=2)


def staleness(kept: StatisticsReadout, true: StatisticsReadout) -> float:
    """How far class means are from the true ones: the norm of the difference by that of the true means about their
    centre; NaN for a single class, which has nothing to be far by.
    """
    means, truth = kept.means[true.seen].cpu(), true.means[true.seen].cpu()
    return float((means - truth).norm() / (truth - truth.mean(0)).norm()) if len(truth) > 1 else math.nan


def _load_finished(run: Run, progress: Progress, config: Config) -> tuple[Learner, int]:
    """The run as its latest finished task left it, wherever this machine computes."""
    hardware = replace(config.hardware, accelerator="auto")
    return load_latest(run, replace(config, hardware=hardware, legacy_eval=False), progress)


def _features(learner: Learner, tasks: Sequence[Task], size: int | None) -> Iterator[tuple[Task, FeatureBatch, Tensor]]:
    """Features with queries, and labels of test batches of one task each; by vote of `size` images, where given."""
    config, evaluation = learner.config, learner.evaluation
    plan = [(task, part) for task in tasks for part in sequential_batches(task.test, size or config.eval_batch_size)]
    viewed = TransformedSplit(learner.data.test, config.transforms.test(), 0, ("test",), config.on_bad_image == "skip")
    stream = batches(viewed, [part for _, part in plan], evaluation.loader_options)
    what = "each image by itself" if size is None else f"a vote of {size} images"
    stream = track(learner.progress, stream, len(plan), f"evaluating {what}")
    for (task, _), batch in zip(plan, stream, strict=True):
        if len(batch.indices):
            images = batch.images.to(learner.fabric.device)
            seen = evaluation.features(learner.method, images, batch.indices, by_vote=size is not None)
            yield task, seen, batch.labels.to(images.device)


def _predict(learner: Learner, seen: FeatureBatch, task: Task, last: int) -> Iterator[tuple[str, str, Tensor]]:
    """Readout, scope and logits `(B, C)`; a task-incremental run is told the task anyway."""
    til = learner.config.setting == "til"
    for readout in learner.readouts:
        logits = readout.logits(readout.select_features(seen.features, seen.queries))
        scopes = {
            "seen": task.classes if til else learner.scenario.seen_classes(last - 1),
            "all": range(learner.data.classes),
            "cut": learner.scenario.seen_classes(task.index),
        }
        for scope, classes in scopes.items():
            yield readout.name, scope, mask_logits(logits, classes)
