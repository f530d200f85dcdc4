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
from pgp.evaluation import metrics
from pgp.evaluation.accuracy import FeatureBatch
from pgp.methods.base import mask_logits
from pgp.progress import track
from pgp.readouts.base import Readout
from pgp.readouts.lda import NCM
from pgp.readouts.statistics import StatisticsReadout
from pgp.runs.checkpoint import reading
from pgp.runs.run import Run
from pgp.scenario import Task
from pgp.system import storage
from pgp.training.observe import observe, observe_views
from pgp.training.session import Session
from pgp.training.start import load_latest
from pgp.training.state import TrainState

AUDIT = "audit.json"
"""Name of the file with the findings in the run folder."""
BATCHES = (1, 8, 128)
SCOPES = {
    "seen": "seen so far",
    "all": "of the whole run",
    "cut": "up to the image's task",
}
"""Descriptions of the classes among which an image is predicted. `cut` uses the image's task."""


class Finding(NamedTuple):
    """Average accuracy of one column under one protocol."""

    column: str
    choice: str
    """How prompts are selected. `image`: per image. `vote`: by majority vote over a test batch, whose images are all of
    one task."""
    batch: int | None
    """Number of images that vote; None without a vote."""
    scope: str
    """A key of `SCOPES`."""
    accuracy: float
    """In [0, 1]; NaN if a task has no test images."""

    @property
    def uses_task(self) -> bool:
        """Whether predictions use the task of an image, either itself or by a vote of images of that task."""
        return self.choice != "image" or self.scope == "cut"


@torch.no_grad()
def audit_run(
    run: Run, progress: Progress, sizes: Sequence[int] = BATCHES, config: Config | None = None
) -> list[Finding]:
    """Evaluate the latest finished checkpoint of `run` on all tasks that it has learned, under every protocol.

    Args:
        run: A run with at least one finished task.
        progress: Where to draw progress bars.
        sizes: Numbers of images that vote. Methods that select no prompts are evaluated without votes.
        config: Configuration of the run, perhaps with new paths of its data. If None, as recorded.

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
    """Fit the statistics readouts again, on features of all training images by the final model: an upper bound.

    The old images are needed, which a run does not store.

    Returns:
        For each readout, by name: average accuracy with fresh statistics, in [0, 1]; and the `staleness` of the class
        means that the run stores.
    """
    config = config or run.config
    if not any(isinstance(readout, StatisticsReadout.Config | NCM.Config) for readout in config.readouts):
        raise ValueError("expected a run with a readout of statistics for --oracle, as with --readouts lda, got"
                         f" {', '.join(readout.name for readout in config.readouts)}")  # fmt: skip
    session, state = _load_finished(run, progress, config)
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


def to_json(run: Run, findings: Sequence[Finding], bounds: Mapping[str, tuple[float, float]] | None = None) -> str:
    """Return the findings of `run` and, if there are any, the bounds of `oracle` as a JSON text.

    Accuracies are in [0, 1], and null if they were not measured.
    """

    def known(value: float) -> float | None:
        return None if math.isnan(value) else value

    tree: dict[str, Any] = {
        "run": run.id,
        "checkpoint": str(run.latest_finished()),
        "data": list(run.data.fingerprints),
        "accuracy": [
            finding._asdict()
            | {
                "accuracy": known(finding.accuracy),
                "uses_task": finding.uses_task or run.config.setting == "til",
            }
            for finding in findings
        ],
    }
    if bounds is not None:
        tree["oracle"] = {
            name: {"accuracy": known(accuracy), "staleness": known(stale)} for name, (accuracy, stale) in bounds.items()
        }
    return json.dumps(tree, indent=2)


def read_findings(run: Run) -> list[Finding]:
    """Return the findings in the run's `audit.json`; empty if there is none, or if the run has changed since.

    Raises:
        RunError: If the file cannot be read.
    """
    path = run.folder / AUDIT
    if not storage.exists(path):
        return []
    tree = storage.read_json(path)
    with reading(path):
        findings = [Finding(**{name: row[name] for name in Finding._fields}) for row in tree["accuracy"]]
        findings = [one._replace(accuracy=math.nan) if one.accuracy is None else one for one in findings]
        found_of = [tree.get(name) for name in ("run", "checkpoint", "data")]
    plain = {
        finding.column: finding.accuracy for finding in findings if not finding.uses_task and finding.scope == "seen"
    }
    averages = {column: metrics.average_accuracy(matrix) for column, matrix in run.matrices().items()}
    is_current = all(column in averages and _same(value, averages[column]) for column, value in plain.items())
    is_same = found_of == [run.id, str(run.latest_finished()), list(run.data.fingerprints)]
    return findings if is_same and is_current else []


def _same(one: float, other: float) -> bool:
    """Return whether two accuracies are the same, or both were not measured."""
    return math.isclose(one, other, abs_tol=1e-6) or (math.isnan(one) and math.isnan(other))


def staleness(kept: StatisticsReadout, true: StatisticsReadout) -> float:
    """Return the distance of stored class means from the true ones, relative to the spread of the true ones.

    It is the norm of the difference, divided by the norm of the true means about their centre; NaN for a single class.
    """
    means, truth = kept.means[true.seen].cpu(), true.means[true.seen].cpu()
    return float((means - truth).norm() / (truth - truth.mean(0)).norm()) if len(truth) > 1 else math.nan


def _load_finished(run: Run, progress: Progress, config: Config) -> tuple[Session, TrainState]:
    """Return the run as its latest finished task left it, on the accelerator of this machine."""
    hardware = replace(config.hardware, accelerator="auto")
    return load_latest(run, replace(config, hardware=hardware, legacy_eval=False), progress)


def _features(session: Session, state: TrainState, size: int | None) -> Iterator[tuple[Task, FeatureBatch, Tensor]]:
    """Yield the features and labels of test batches, each of one task. If `size`, prompts are selected by its vote."""
    evaluator, tasks = session.evaluator, session.scenario.tasks[: state.task]
    batch_size = size or session.config.eval_batch_size
    plan = [(task, keys) for task in tasks for keys in sequential_batches(task.test, batch_size)]
    stream = batches(evaluator.test_split(), [keys for _, keys in plan], evaluator.loader_options)
    what = "per image" if size is None else f"by a vote of {size}"
    stream = track(session.progress, stream, len(plan), f"evaluating, prompts {what}")
    for (task, _), batch in zip(plan, stream, strict=True):
        if len(batch.indices):
            images = batch.images.to(session.fabric.device)
            frozen = evaluator.frozen(state.method, images, batch.indices)
            given = task if session.config.setting == "til" else None
            features = evaluator.features(state.method, images, frozen, by_vote=size is not None, task=given)
            yield task, FeatureBatch(batch.indices, features), batch.labels.to(images.device)


def _logits(session: Session, state: TrainState, batch: FeatureBatch, task: Task) -> Iterator[tuple[str, str, Tensor]]:
    """Yield readout, scope and logits `(B, C)`.

    In a task-incremental run, `seen` means the classes of `task`, and every scope uses its expert, if there are any.
    """
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
