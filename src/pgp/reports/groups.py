"""What the HTML report shows of runs: a group for each configuration, and in it a row for each readout."""

from __future__ import annotations

import functools
import itertools
import math
import statistics
import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from markupsafe import Markup
from torch import Tensor

from pgp.analysis.confusion import Pair, top_pairs
from pgp.evaluation import predictions as per_image
from pgp.evaluation.accuracy import LEGACY
from pgp.evaluation.predictions import TOP, Predictions
from pgp.reports import drift, svg, tables
from pgp.reports.comparison import Entry
from pgp.reports.drift import DriftHistory, complete_mean, mean_of
from pgp.reports.tables import ResultRow
from pgp.runs.checkpoint import reading
from pgp.runs.identity import DataDescription
from pgp.runs.log import Event
from pgp.runs.run import ENVIRONMENT, Run
from pgp.subspace import to_float64
from pgp.system import storage
from pgp.system.storage import RunError

PAIRS = 10
"""Maximum number of confused pairs of classes that are listed for a readout."""
LITTLE = 0.01
"""Forgetting below this is called little."""
MOST = 0.75
"""Fraction that is called most of it."""


class Recorded(NamedTuple):
    """What a run recorded of each test image."""

    run: Run
    data: DataDescription
    predictions: Predictions


class Pool(NamedTuple):
    """Predictions of runs that differ only in their seed, of those that recorded them."""

    members: list[Recorded]

    def has(self, column: str) -> bool:
        """Return whether the predictions of a readout are recorded."""
        return bool(self.members) and all(column in one.predictions.top for one in self.members)

    def class_accuracy(self, column: str, k: int = 1) -> Tensor:
        """Return the top-k accuracy of each class, `(C,)`, the mean over seeds; NaN for a class without images."""
        accuracies = [
            per_image.class_accuracy(one.predictions, column, len(one.data.class_names), k) for one in self.members
        ]
        return torch.stack(accuracies).nanmean(0)

    def top_accuracy(self, column: str) -> float:
        """Return the top-`TOP` accuracy, averaged with equal weight over the tasks that have test images."""
        accuracies = [
            per_image.task_accuracy(one.predictions, column, len(one.data.tasks), TOP) for one in self.members
        ]
        return float(torch.stack(accuracies).nanmean())

    def class_confusion(self, column: str) -> Tensor:
        """Return how many images of each class were predicted as each class, `(C, C)`, over all seeds."""
        counts = [per_image.class_confusion(one.predictions, column, len(one.data.class_names)) for one in self.members]
        return torch.stack(counts).sum(0)

    def task_confusion(self, column: str, learned: int) -> Tensor | None:
        """Return the fraction of each learned task's images that are predicted as a class of each one, `(t, t)`.

        It is None if tasks share classes, or there were no test images.
        """
        if not any(len(one.predictions.tasks) for one in self.members):
            return None
        counts = []
        for _, data, found in self.members:
            task_of = torch.full((len(data.class_names),), -1)
            for number, labels in enumerate(data.tasks):
                if bool((task_of[list(labels)] >= 0).any()):
                    return None
                task_of[list(labels)] = number
            counts.append(per_image.task_confusion(found, column, task_of, len(data.tasks)))
        total = to_float64(torch.stack(counts).sum(0))
        return (total / total.sum(1, keepdim=True))[:learned, :learned]  # NaN for a task without images


class ClassResult(NamedTuple):
    """One class in the table of classes."""

    name: str
    task: str
    """Number of its task; "" if it is in several, or if seeds differ in it."""
    images: int
    """Number of test images of a seed."""
    confused_with: str
    """What most of its wrongly predicted images are predicted as by the first readout; "" for none."""
    accuracy: list[tuple[float | None, float | None]]
    """Accuracy and top-k accuracy, by readout."""


@dataclass(frozen=True, eq=False)
class Row:
    """A readout of a configuration."""

    key: str
    """Its short name in the page, such as `1a`; "" if it is the only one."""
    name: str
    color: int
    dash: int
    line: ResultRow
    pool: Pool
    finals: list[Event]
    """The event at the end of the last finished task, of each seed with a log."""

    @functools.cached_property
    def matrix(self) -> Tensor:
        """Accuracy matrix of the tasks learned so far, `(t, t)`, the mean over seeds."""
        return torch.stack(self.line.matrices).mean(0)

    @property
    def accuracy(self) -> float | None:
        """Average accuracy; None if it was not measured."""
        return _finite(self.line.spread("average_accuracy")[0])

    @property
    def forgetting(self) -> float | None:
        """Forgetting; None if it was not measured, or if only one task is learned."""
        return _finite(self.line.spread("forgetting")[0]) if len(self.matrix) > 1 else None

    @property
    def forgetting_within(self) -> float | None:
        """Forgetting if the task of each image is known; None if it was not logged."""
        return self._logged("forgetting_within") if len(self.matrix) > 1 else None

    @property
    def identified(self) -> float | None:
        """Fraction of images that are predicted as a class of their own task, averaged over tasks."""
        return self._logged("identified")

    def _logged(self, key: str) -> float | None:
        values = [event.get(key, {}).get(self.line.column) for event in self.finals]
        return mean_of([complete_mean(value) if isinstance(value, list) else value for value in values])

    @property
    def is_legacy(self) -> bool:
        """Whether it follows the published protocol, whose predictions are not recorded image by image."""
        return self.line.column.endswith(LEGACY)

    @property
    def top_accuracy(self) -> float | None:
        """Top-`TOP` accuracy; None if it was not recorded, or not measured in every task."""
        return self.pool.top_accuracy(self.line.column) if self.is_recorded and self.accuracy is not None else None

    @property
    def is_recorded(self) -> bool:
        """Whether its predictions were recorded image by image."""
        return self.pool.has(self.line.column)

    @property
    def task_confusion(self) -> Tensor | None:
        """See `Pool.task_confusion`."""
        return self.pool.task_confusion(self.line.column, len(self.matrix)) if self.is_recorded else None

    @functools.cached_property
    def pairs(self) -> list[Pair]:
        """The most confused pairs of classes; empty if nothing was recorded."""
        return top_pairs(self.pool.class_confusion(self.line.column), PAIRS) if self.is_recorded else []

    def class_accuracy(self, k: int) -> Tensor | None:
        """Return the top-k accuracy of each class, `(C,)`; None if it was not recorded."""
        return self.pool.class_accuracy(self.line.column, k) if self.is_recorded else None

    @property
    def verdict(self) -> str:
        """What is forgotten, and by what, in a sentence or two."""
        forgotten, within = self.forgetting, self.forgetting_within
        if len(self.matrix) == 1:
            return "One task is learned so far, so there is nothing to forget."
        if forgotten is None:
            return (
                "Forgetting was not measured: that needs the test images of each task, after the task and at the end."
            )
        if forgotten < LITTLE:
            return "Little is forgotten of what was learned."
        if within is None:
            return "The cause is not known: it is measured only if tasks have their own classes and are not given."
        if within <= (1 - MOST) * forgotten:
            return Markup("Mostly by competition between tasks. ") + self._advice
        if within >= MOST * forgotten:
            return (
                "Mostly because features, or the classifier of old classes, changed. If it was features, a stronger"
                " projection can help."
            )
        return "Partly because features or the classifier of old classes changed, partly by competition between tasks."

    @property
    def _advice(self) -> Markup:
        """What helps against competition between tasks."""
        if self.line.column.removesuffix(LEGACY) == "head":
            return Markup("Projection cannot help, but a readout fitted to class statistics can.")
        return Markup("<code>pgp audit --oracle</code> tells whether outdated class statistics are the reason.")


@dataclass(frozen=True, eq=False)
class Group:
    """Runs of one configuration, which differ only in their seed."""

    key: str
    """Its number in the page; "" if it is the only one."""
    label: str
    color: int
    runs: list[Run]
    data: DataDescription
    rows: list[Row]
    pool: Pool
    logs: list[list[Event]]
    """Events at the ends of tasks, of each run."""
    history: DriftHistory | None

    @property
    def entry(self) -> Entry:
        """The runs by seed."""
        return Entry(self.label, {run.config.seed: run for run in self.runs})

    @property
    def classes(self) -> list[ClassResult]:
        """The classes learned so far, those with the lowest accuracy of the first readout first."""
        if not self.pool.members:
            return []
        found = [(row.class_accuracy(1), row.class_accuracy(TOP)) for row in self.rows]
        labels = self.pool.members[0].predictions.labels
        counts = torch.bincount(labels, minlength=len(self.data.class_names)).tolist()
        wrong = self.pool.class_confusion(self.rows[0].line.column).fill_diagonal_(0).max(1)
        same_tasks = len({one.data.tasks for one in self.pool.members}) == 1
        out = []
        for label, tasks in self._tasks_of_classes().items():
            accuracy = [(_at(first, label), _at(top, label)) for first, top in found]
            other = self.data.class_names[int(wrong.indices[label])] if wrong.values[label] else ""
            task = str(tasks[0]) if len(tasks) == 1 and same_tasks else ""
            out.append(ClassResult(self.data.class_names[label], task, counts[label], other, accuracy))
        return sorted(out, key=lambda one: math.inf if one.accuracy[0][0] is None else one.accuracy[0][0])

    def _tasks_of_classes(self) -> dict[int, list[int]]:
        """Return the numbers of the tasks of each class that was learned, from 1, by label."""
        found: dict[int, list[int]] = {}
        for number, labels in enumerate(self.data.tasks[: len(self.rows[0].matrix)], start=1):
            for label in labels:
                found.setdefault(label, []).append(number)
        return found

    @property
    def usage(self) -> Tensor | None:
        """Fraction of each task's images that select each prompt, `(t, M)`, of the first seed."""
        return next((one.predictions.usage for one in self.pool.members), None)

    @property
    def parameters(self) -> list[tuple[str, list[str]]]:
        """What the projection did to each protected parameter: its name, and the values of `drift.PARAMETERS`."""
        if self.history is None:
            return []
        columns = [drift.by_parameter(self.history, key) for key in drift.PARAMETERS]
        names = dict.fromkeys(name for column in columns for name in column)
        return [(name, [f"{column[name]:.4g}" if name in column else "" for column in columns]) for name in names]

    @property
    def costs(self) -> dict[str, str]:
        """Time, memory and storage, the mean over seeds.

        Raises:
            RunError: If the log does not hold what pgp writes there.
        """
        with reading(self.runs[0].log_file.path):
            return self._costs()

    def _costs(self) -> dict[str, str]:
        seconds: dict[str, list[float]] = {}
        for log in self.logs:
            spent = [event.get("seconds", {}) for event in log]
            for part in PARTS:
                if any(part in one for one in spent):
                    seconds.setdefault(part, []).append(sum(one.get(part, 0.0) for one in spent))
        out = {PARTS[part]: _duration(statistics.mean(values)) for part, values in seconds.items()}
        for kind, text in (("ram", "peak memory of the process"), ("gpu", "peak memory of the GPU")):
            peaks = [max(event.get("memory", {}).get(kind, 0) for event in log) for log in self.logs if log]
            out[text] = _size(max(peaks)) if any(peaks) else NOT_RECORDED
        if not any(event.get("memory", {}).get("gpu") for log in self.logs for event in log):
            del out["peak memory of the GPU"]
        for name, fit in (self.logs[0][-1].get("readouts", {}) if self.logs[0] else {}).items():
            out[f"stored by {name}"] = _size(fit["bytes"])
        out["checkpoints on disk"] = _size(statistics.mean(_bytes_below(run) for run in self.runs))
        out["machine"] = "; ".join(dict.fromkeys(_machine(run) for run in self.runs)) or NOT_RECORDED
        return out


PARTS = {
    "train": "training",
    "boundary": "projection and readouts, after each task",
    "evaluation": "evaluation",
    "drift": "measuring drift",
    "compile": "compiling",
}
"""Parts of the time of a run, by key in the log."""
NOT_RECORDED = "not recorded"


def read_groups(runs: Sequence[Run]) -> list[Group]:
    """Return what the page shows of runs.

    Raises:
        RunError: If the runs of a group have come to different tasks, or a file of a run was changed.
    """
    lines = tables.result_rows(runs)
    left = iter(lines)
    grouped = tables.group_runs(runs)
    out = []
    for number, (label, members) in enumerate(grouped):
        found = [(run, run.data, run.predictions()) for run in members]
        pool = Pool([Recorded(run, data, predictions) for run, data, predictions in found if predictions is not None])
        logs = [run.events("task") for run in members]
        several, rows = len(grouped) > 1, list[Row]()
        columns = len(members[0].matrices())
        for letter, line in zip(_letters(columns), itertools.islice(left, columns), strict=True):
            key = (f"{number + 1}" if several else "") + (letter if columns > 1 else "")
            color, dash = (number, len(rows)) if several else (len(rows), len(rows) // svg.COLORS)
            finals = [log[-1] for log in logs if log]
            rows.append(Row(key, tables.row_name(line, lines), color, dash, line, pool, finals))
        histories = drift.drift_histories(members)
        history = histories[0] if histories else None
        key = str(number + 1) if several else ""
        out.append(Group(key, label, number, members, members[0].data, rows, pool, logs, history))
    return out


def _letters(count: int) -> list[str]:
    return [string.ascii_lowercase[i % 26] + (str(i // 26) if i >= 26 else "") for i in range(count)]


def _bytes_below(run: Run) -> int:
    folder = run.checkpoints.folder
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def _machine(run: Run) -> str:
    """Return the hardware and the version of torch that a run was started with; "" if that is not recorded."""
    try:
        tree = storage.read_json(run.folder / ENVIRONMENT)
        with reading(run.folder / ENVIRONMENT):
            gpus = ", ".join(dict.fromkeys(map(str, tree["gpus"])))
            parts = [gpus or tree["processor"], f"{tree['cores']} cores", f"torch {tree['versions']['torch']}"]
            return ", ".join(map(str, parts))
    except RunError:
        return ""


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _at(values: Tensor | None, index: int) -> float | None:
    return None if values is None else _finite(float(values[index]))


def _duration(seconds: float) -> str:
    """Return a duration as text.

    >>> _duration(3.21), _duration(75), _duration(7300)
    ('3.2 s', '1 min 15 s', '2 h 1 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _size(count: float) -> str:
    """Return a number of bytes as text.

    >>> _size(512), _size(547664)
    ('512 B', '548 kB')
    """
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} B"
