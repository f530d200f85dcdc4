"""A report as one HTML page, which loads nothing from elsewhere. Its figures come from run folders only.

The page has a group for each configuration, and in it a row for each readout. Pictures of confused images are read from
the data, if they are still there.
"""

from __future__ import annotations

import functools
import itertools
import math
import statistics
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple

import jinja2
import torch
from markupsafe import Markup
from torch import Tensor

from pgp.analysis.confusion import ConfusedImage, Pair, confused_images, read_test_images, top_pairs
from pgp.evaluation import metrics
from pgp.evaluation import predictions as per_image
from pgp.evaluation.accuracy import LEGACY
from pgp.evaluation.predictions import TOP, Predictions
from pgp.reports import comparison, drift, svg, tables
from pgp.reports.comparison import Entry
from pgp.reports.drift import DriftHistory, mean_of
from pgp.reports.figures import NUMBERED
from pgp.reports.svg import Series
from pgp.reports.tables import CALIBRATION, ONLINE, ResultRow
from pgp.runs.checkpoint import reading
from pgp.runs.identity import DataDescription
from pgp.runs.run import Run
from pgp.subspace import to_float64
from pgp.system import storage
from pgp.system.escaping import printable
from pgp.system.storage import RunError

FILE = "report.html"
PICTURES = 24
"""Maximum number of pictures in a page."""
PAIRS = 10
"""Maximum number of confused pairs of classes that are listed for a readout."""
LISTED = 20
"""Number of rows of a long table that are shown; the others can be unfolded."""
LITTLE = 0.01
"""Forgetting below this is called little."""
MOST = 0.75
"""Fraction that is called most of it."""

Event = dict[str, Any]


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

    def task_confusion(self, column: str) -> Tensor | None:
        """Return the fraction of each task's images that are predicted as a class of each task, `(t, t)`.

        It is None if tasks share classes.
        """
        counts = []
        for _, data, found in self.members:
            task_of = torch.full((len(data.class_names),), -1)
            for number, labels in enumerate(data.tasks):
                if bool((task_of[list(labels)] >= 0).any()):
                    return None
                task_of[list(labels)] = number
            counts.append(per_image.task_confusion(found, column, task_of, len(data.tasks)))
        total = to_float64(torch.stack(counts).sum(0))
        learned = 1 + max(int(one.predictions.tasks.max()) for one in self.members)
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
        learned = metrics.tasks_learned(self.line.matrices[0])
        return torch.stack(self.line.matrices).mean(0)[:learned, :learned]

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
        return mean_of([mean_of(value) if isinstance(value, list) else value for value in values])

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
        return self.pool.task_confusion(self.line.column) if self.is_recorded else None

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
            return "Forgetting was not measured, because old test images were missing."
        if forgotten < LITTLE:
            return "Little is forgotten of what was learned."
        if within is None:
            return "The log does not say what it is forgotten by."
        if within <= (1 - MOST) * forgotten:
            return Markup("Mostly by competition between tasks. ") + self._advice
        if within >= MOST * forgotten:
            return "Mostly because features changed. A stronger projection can help."
        return "Partly because features changed, partly by competition between tasks."

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
}
"""Parts of the time of a run, by key in the log."""
NOT_RECORDED = "not recorded"


class Figure(NamedTuple):
    """A chart with what it means."""

    title: str
    meaning: str
    chart: Markup


CHANGES = {
    "features": ("change of old features", "Norm of the change of features, relative to the features right after"
                 " their task. 0: nothing moved."),
    "logits": ("change of old logits", "The same for the logits of the method's own head, on the classes known then."),
    "protected responses": ("change of protected responses", "The same for products of protected parameters with their"
                            " old inputs, which the projection preserves. 0 up to rounding if updates are projected and"
                            " all energy is captured."),
    "other prompts": ("old images that select other prompts", "Fraction of old images that select other prompts than"
                      " right after their task."),
    "energy held": ("old inputs in the protected subspace", "Fraction of the energy of all old inputs that the"
                    " projection protects."),
    "removed": ("removed by the projection", "Fraction of the energy of gradients (or of updates, if these are"
                " projected) that the projection removes."),
    "leak": ("leak", "Fraction of a task's change of parameters that lies in the protected subspace. 0 up to rounding"
             " for projected updates."),
    "forgetting": ("forgetting", "Forgetting of the first readout after each task."),
    "forgetting, task known": ("forgetting if the task is known", "The same among the classes of an image's own task:"
                               " what is left is not competition between tasks."),
    "task identified": ("images whose task is identified", "Fraction of images that the first readout predicts as a"
                        " class of their own task."),
}  # fmt: skip
"""Title and meaning of each statistic of `drift.STATISTICS`."""


def render(runs: Sequence[Run]) -> str:
    """Return the page about runs as HTML. Runs that differ only in their seed share their rows.

    Raises:
        RunError: If the runs of a group have come to different tasks, or a file of a run was changed.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pgp.reports", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value,
    )
    environment.filters |= {"percent": _percent, "level": _level}
    groups = read_groups(runs)
    rows = [row for group in groups for row in group.rows]
    pictures, notes = _pictures(groups)
    page = environment.get_template("report.html.jinja").render(
        title=", ".join(dict.fromkeys(run.config.name for run in runs)),
        facts=_facts(groups),
        groups=groups,
        rows=rows,
        protocol=_protocol(runs),
        most_forgotten=max([row.forgetting or 0.0 for row in rows]),
        statistics=tables.statistics([row.line for row in rows]),
        format_row=tables.format_row,
        differences=_differences(groups),
        settings=_settings(groups),
        accuracy=_accuracy_chart(rows),
        online=_online_chart(groups),
        task_curves=_task_curves,
        matrix_map=_matrix_map,
        confusion_map=_confusion_map,
        usage_map=_usage_map,
        calibration=_calibration_charts(rows),
        drift=_drift_figures(groups),
        parameters=list(drift.PARAMETERS.values()),
        pictures=pictures,
        picture_notes=notes,
        numbered=NUMBERED,
        listed=LISTED,
        top=TOP,
        not_recorded=NOT_RECORDED,
        style=Markup(environment.get_template("report.css").render()),
    )
    return page


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
            color, dash = (number, len(rows)) if several else (len(rows), 0)
            finals = [log[-1] for log in logs if log]
            rows.append(Row(key, tables.row_name(line, lines), color, dash, line, pool, finals))
        histories = drift.drift_histories(members)
        history = histories[0] if histories else None
        key = str(number + 1) if several else ""
        out.append(Group(key, label, number, members, members[0].data, rows, pool, logs, history))
    return out


def _letters(count: int) -> list[str]:
    return [string.ascii_lowercase[i % 26] + (str(i // 26) if i >= 26 else "") for i in range(count)]


def _facts(groups: Sequence[Group]) -> list[tuple[str, str]]:
    """Return what the runs have in common, by heading; each value once."""
    runs = [run for group in groups for run in group.runs]
    learned = dict.fromkeys(f"{len(group.rows[0].matrix)} of {len(group.data.tasks)}" for group in groups)
    facts = {
        "data": [type(run.config.dataset).tag for run in runs],
        "encoder": [str(run.config.to_json()["backbone"].get("model", "")) for run in runs],
        "method": [type(run.config.method).tag for run in runs],
        "tasks learned": list(learned),
        "classes": [f"{len(group.data.class_names):,}" for group in groups],
        "test images": [f"{sum(group.data.test_images):,}" for group in groups],
        "seeds": [str(seed) for seed in sorted({run.config.seed for run in runs})],
        "written": [datetime.now().astimezone().strftime("%Y-%m-%d %H:%M")],
    }
    return [(heading, ", ".join(filter(None, dict.fromkeys(values)))) for heading, values in facts.items()]


def _protocol(runs: Sequence[Run]) -> str:
    """Return how test images are predicted, in a sentence."""
    given = {run.config.setting == "til" for run in runs}
    if given == {True}:
        return "Each image is predicted among the classes of its own task, which is given."
    if given == {False}:
        return "Each image is predicted among all classes learned so far; its task is not given."
    return (
        "Runs with setting til are given the task of each image; the others predict among all classes learned so far."
    )


def _differences(groups: Sequence[Group]) -> list[tuple[Row, comparison.Difference, list[str]]]:
    """Return the differences of each row of the later groups to the first group, with their texts."""
    out = []
    for group in groups[1:]:
        entry = Entry(group.label, group.entry.runs, {groups[0].label: groups[0].entry})
        for row in group.rows:
            out += [
                (row, one, [comparison.signed(value) if value else "" for value in one.values.values()])
                for one in comparison.differences(entry, row.line.column)
            ]
    return out


def _settings(groups: Sequence[Group]) -> list[tuple[str, list[str], bool]]:
    """Return every setting: its path, its value in each group, and whether the values differ."""
    trees = [tables.flatten(group.runs[0].config.to_json()) for group in groups]
    keys = dict.fromkeys(key for tree in trees for key in tree)
    out = []
    for key in keys:
        values = ["" if key not in tree else _word(tree[key]) for tree in trees]
        out.append((key, values, len(set(values)) > 1))
    return out


def _word(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)


def _accuracy_chart(rows: Sequence[Row]) -> Markup:
    series = []
    for row in rows:
        curves = 100 * torch.tensor([metrics.accuracy_curve(matrix) for matrix in row.line.matrices])  # (seeds, t)
        bands = curves.std(0).tolist() if len(curves) > 1 else []
        mean = [(t, y) for t, y in enumerate(curves.mean(0).tolist(), start=1) if math.isfinite(y)]
        bands = bands if len(bands) == len(mean) else []
        series.append(Series(row.key, row.name, mean, row.color, row.dash, band=bands))
    return svg.line_chart("average accuracy after each task", series, "tasks learned", "average accuracy, %", y_max=100)


def _online_chart(groups: Sequence[Group]) -> Markup | None:
    series = []
    for group in groups:
        for stream in group.rows[0].line.online:
            points = [(images, 100 * value) for images, value in stream.items()]
            series.append(Series(group.key, group.label, points, group.color))
    if not series:
        return None
    ends = 0, max(x for one in series for x, _ in one.points)
    return svg.line_chart(tables.SOMETIMES[ONLINE], series, "images so far", "accuracy, %", y_max=100, x_range=ends)


def _task_curves(row: Row) -> Markup:
    """Return the accuracy on each task over the tasks learned since, a curve for each task."""
    matrix, last = 100 * row.matrix, len(row.matrix)
    series = []
    for j in range(last):
        points = [(t + 1, float(matrix[t, j])) for t in range(j, last) if matrix[t, j].isfinite()]
        if last <= NUMBERED:
            series.append(Series(str(j + 1), f"task {j + 1}", points, j, j // svg.COLORS))
        else:
            series.append(Series("", f"task {j + 1}", points, row.color, thin=True))
    return svg.line_chart(
        f"accuracy on each task, {row.name}", series, "tasks learned", "accuracy on a task, %", y_max=100,
        x_range=None if last > 1 else (0, 2),
    )  # fmt: skip


def _matrix_map(row: Row) -> Markup:
    return svg.heat_map(
        f"accuracy matrix, {row.name}", row.matrix, "after task", "task",
        lambda t, j, value: f"after task {t + 1}, on task {j + 1}: {100 * value:.1f} %",
    )  # fmt: skip


def _confusion_map(row: Row) -> Markup:
    confusion = row.task_confusion
    assert confusion is not None
    return svg.heat_map(
        f"confusion between tasks, {row.name}", confusion.where(confusion > 0, torch.nan), "task of the image",
        "task of the predicted class",
        lambda i, j, value: f"images of task {i + 1} predicted as task {j + 1}: {100 * value:.1f} %",
    )  # fmt: skip


def _usage_map(group: Group) -> Markup:
    assert group.usage is not None
    return svg.heat_map(
        f"prompts selected by the images of each task, {group.label}", group.usage, "task", "prompt",
        lambda i, j, value: f"images of task {i + 1} that select prompt {j + 1}: {100 * value:.1f} %",
    )  # fmt: skip


def _calibration_charts(rows: Sequence[Row]) -> list[tuple[Row, float, Markup]]:
    """Return the calibration error and a reliability diagram of each row that has one."""
    out = []
    for row in rows:
        if not row.line.has(CALIBRATION):
            continue
        images, confidence, accuracy = row.line.reliability().T.tolist()
        points = [(100 * x, 100 * y) for x, y in zip(confidence, accuracy, strict=True)]
        series = Series("", row.name, points, row.color, weights=[count / sum(images) for count in images])
        chart = svg.line_chart(
            f"accuracy by confidence, {row.name}", [series], "confidence, %", "accuracy, %",
            y_max=100, x_range=(0, 100), diagonal=True,
        )  # fmt: skip
        out.append((row, row.line.spread(CALIBRATION)[0], chart))
    return out


def _drift_figures(groups: Sequence[Group]) -> list[Figure]:
    figures = []
    measured = [(group, group.history) for group in groups if group.history]
    for heading, statistic in drift.STATISTICS.items():
        series = []
        for group, history in measured:
            points = [(t, 100 * value) for t, value in history.curve(statistic).items()]
            if points:
                series.append(Series(group.key, group.label, points, group.color))
        if series:
            title, meaning = CHANGES[heading]
            figures.append(Figure(title, meaning, svg.line_chart(title, series, "tasks learned", "%")))
    return figures


def _pictures(groups: Sequence[Group]) -> tuple[Mapping[str, list[ConfusedImage]], list[str]]:
    """Return the images of the most confused pairs by row, and notes on images that could not be read."""
    rows = [(group, row) for group in groups for row in group.rows if row.pairs][:PICTURES]
    most = PICTURES // max(1, len(rows))
    out: dict[str, list[ConfusedImage]] = {}
    notes: dict[str, None] = {}
    splits: dict[str, Any] = {}
    for group, row in rows:
        run, _, predictions = group.pool.members[0]
        try:
            if group.key not in splits:
                splits[group.key] = read_test_images(run, predictions)
            split = splits[group.key]
        except ValueError as error:
            notes[str(error)] = None
            continue
        out[row.key] = confused_images(split, predictions, row.line.column, row.pairs, most)
    return out, list(notes)


def _bytes_below(run: Run) -> int:
    folder = run.checkpoints.folder
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def _machine(run: Run) -> str:
    """Return the hardware and the version of torch that a run was started with; "" if that is not recorded."""
    try:
        tree = storage.read_json(run.folder / "environment.json")
        with reading(run.folder / "environment.json"):
            gpus = ", ".join(dict.fromkeys(map(str, tree["gpus"])))
            parts = [gpus or tree["processor"], f"{tree['cores']} cores", f"torch {tree['versions']['torch']}"]
            return ", ".join(map(str, parts))
    except RunError:
        return ""


def _finite(value: float | Tensor) -> float | None:
    value = float(value.mean()) if isinstance(value, Tensor) else value
    return value if math.isfinite(value) else None


def _at(values: Tensor | None, index: int) -> float | None:
    return None if values is None else _finite(float(values[index]))


def _percent(value: float | None, digits: int = 1) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{100 * value:.{digits}f}"


def _level(value: float) -> int:
    return svg.level(value)


def _duration(seconds: float) -> str:
    """Return a duration in words.

    >>> _duration(3.21), _duration(75), _duration(7300)
    ('3.2 s', '1 min 15 s', '2 h 1 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _size(count: float) -> str:
    """Return a number of bytes in words.

    >>> _size(512), _size(547664)
    ('512 B', '548 kB')
    """
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} B"
