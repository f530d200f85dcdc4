"""A report as one HTML page, which loads nothing from elsewhere. Its figures come from run folders only.

What it shows of runs is in `pgp.reports.groups`. Pictures of confused images are read from the data, if they are still
there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple

import jinja2
import torch
from markupsafe import Markup

from pgp.analysis.confusion import ConfusedImage, confused_images, read_test_images
from pgp.config import experiment_settings
from pgp.evaluation import metrics
from pgp.evaluation.predictions import TOP
from pgp.reports import comparison, drift, svg, tables
from pgp.reports.comparison import Entry
from pgp.reports.figures import NUMBERED
from pgp.reports.groups import NOT_RECORDED, Group, Row, read_groups
from pgp.reports.svg import Series
from pgp.reports.tables import CALIBRATION, CHANCE, ONLINE
from pgp.runs.run import Run
from pgp.system.escaping import printable

FILE = "report.html"
PICTURES = 24
"""Maximum number of pictures in a page."""
LISTED = 20
"""Number of rows of a long table that are shown; the others can be unfolded."""


class Figure(NamedTuple):
    """A chart with what it means."""

    title: str
    meaning: str
    chart: Markup


MEANINGS = {
    "features": "Norm of the change of features, relative to the features right after their task. 0: nothing moved.",
    "logits": "The same for the logits of the method's own head, on the classes known then.",
    "protected responses": "The same for products of protected parameters with their old inputs, which the projection"
    " preserves. 0 up to rounding if updates are projected and all energy is captured.",
    "other prompts": "Fraction of old images that select other prompts than right after their task.",
    "energy held": "Fraction of the energy of all old inputs that the projection protects.",
    "removed": "Fraction of the energy of gradients (or of updates, if these are projected) that the projection"
    " removes.",
    "leak": "Fraction of a task's change of parameters that lies in the protected subspace. 0 up to rounding for"
    " projected updates.",
    "forgetting": "Forgetting of the first readout after each task.",
    "forgetting, task known": "The same among the classes of an image's own task: what is left is not competition"
    " between tasks.",
    "task identified": "Fraction of images that the first readout predicts as a class of their own task.",
}
"""Meaning of each statistic of `drift.STATISTICS`."""


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
    environment.filters |= {"percent": _percent, "level": svg.level}
    groups = read_groups(runs)
    rows = [row for group in groups for row in group.rows]
    pictures, notes = _pictures(groups)
    comparable = _comparable(groups)
    page = environment.get_template("report.html.jinja").render(
        title=", ".join(dict.fromkeys(run.config.name for run in runs)),
        facts=_facts(groups),
        groups=groups,
        rows=rows,
        protocol=_protocol(runs),
        most_forgotten=max([row.forgetting or 0.0 for row in rows]),
        statistics=tables.statistics([row.line for row in rows], without=[CHANCE]),
        format_row=tables.format_row,
        differences=_differences(groups[0], comparable),
        chance_note=comparison.CHANCE_NOTE,
        version_note=tables.version_note(runs),
        others=[group for group in groups[1:] if group not in comparable],
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


def _facts(groups: Sequence[Group]) -> list[tuple[str, str]]:
    """Return what the runs have in common, by heading; each value once."""
    runs = [run for group in groups for run in group.runs]
    learned = dict.fromkeys("{} of {}".format(*group.runs[0].progress()) for group in groups)
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


def _differences(first: Group, others: Sequence[Group]) -> list[tuple[Row, comparison.Difference, list[str]]]:
    """Return the differences of each row of other groups to the first group, with their texts."""
    out = []
    for group in others:
        entry = Entry(group.label, group.entry.runs, {first.label: first.entry})
        for row in group.rows:
            out += [
                (row, one, [comparison.signed(value) if value else "" for value in one.values.values()])
                for one in comparison.differences(entry, row.line.column)
            ]
    return out


def _comparable(groups: Sequence[Group]) -> list[Group]:
    """Return the later groups that were measured on the images and classes of the first group, and by its protocol."""

    def measured(group: Group) -> tuple[Any, ...]:
        finished, _ = group.runs[0].progress()
        learned = {label for task in group.data.tasks[:finished] for label in task}
        settings = experiment_settings(group.runs[0].config).items()
        decisive = {name: value for name, value in settings if _decides_what_is_measured(name)}
        return group.data.fingerprints, learned, decisive

    return [group for group in groups[1:] if measured(group) == measured(groups[0])]


def _decides_what_is_measured(setting: str) -> bool:
    """Return whether a setting decides which images are evaluated, and when. Paths of equal data may differ."""
    of_data = setting.startswith(("dataset.", "added.")) and not tables.PATH_SETTING.fullmatch(setting)
    return of_data or setting in ("setting", "test_images", "evaluate")


def _settings(groups: Sequence[Group]) -> list[tuple[str, list[str], bool]]:
    """Return every setting: its path, its value in each group, and whether the values differ."""
    trees = [experiment_settings(group.runs[0].config) for group in groups]
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
        means, deviations = curves.mean(0).tolist(), curves.std(0).tolist() if len(curves) > 1 else []
        mean = [(t, y) for t, y in enumerate(means, start=1) if math.isfinite(y)]
        bands = [deviation for deviation, y in zip(deviations, means, strict=False) if math.isfinite(y)]
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
        f"accuracy on each task, {row.name}", series, "tasks learned", "accuracy on a task, %", y_max=100
    )


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


def _calibration_charts(rows: Sequence[Row]) -> list[tuple[Row, float, float, Markup]]:
    """Return the calibration error, that by chance, and a reliability diagram of each row that has one."""
    out = []
    for row in rows:
        if not row.line.has(CALIBRATION):
            continue
        images, confidence, accuracy = row.line.reliability().T.tolist()
        points = [(100 * x, 100 * y) for x, y in zip(confidence, accuracy, strict=True)]
        series = Series("", row.name, points, row.color, weights=[count / max(images) for count in images])
        chart = svg.line_chart(
            f"accuracy by confidence, {row.name}", [series], "confidence, %", "accuracy, %",
            y_max=100, x_range=(0, 100), diagonal=True,
        )  # fmt: skip
        error, chance = (row.line.spread(figure)[0] for figure in (CALIBRATION, CHANCE))
        out.append((row, error, chance, chart))
    return out


def _drift_figures(groups: Sequence[Group]) -> list[Figure]:
    figures = []
    measured = [(group, group.history) for group in groups if group.history]
    titles = drift.PANELS | drift.SUMMARIES
    for heading in drift.STATISTICS:
        series = []
        for group, history in measured:
            points = list(drift.percent_curve(history, heading).items())
            if points:
                series.append(Series(group.key, group.label, points, group.color))
        if series:
            title, axis = titles[heading]
            figures.append(Figure(title, MEANINGS[heading], svg.line_chart(title, series, "tasks learned", axis)))
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


def _percent(value: float | None, digits: int = 1) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{100 * value:.{digits}f}"
