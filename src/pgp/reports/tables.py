"""Tables of results, from run folders only."""

from __future__ import annotations

import math
import os
import re
import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pgp.config import experiment_settings
from pgp.evaluation import metrics
from pgp.evaluation.calibration import calibration_error_by_chance, expected_calibration_error, logged_bins
from pgp.runs.checkpoint import reading
from pgp.runs.run import Run
from pgp.system.escaping import markdown_cell
from pgp.system.storage import RunError

NOT_MEASURED = "not measured"
"""Text for an accuracy on images that were missing when it was to be measured."""


class ResultRow(NamedTuple):
    """Results of one column (a readout) over runs that differ only in their seed."""

    label: str
    column: str
    matrices: list[Tensor]
    """Accuracy matrix `(T, T)` of each run."""
    tasks: list[str]
    """Name of each task, "" for none."""
    online: list[dict[int, float]]
    """Online accuracy of each online run, by number of images so far; see `pgp.evaluation.online`."""
    calibration: Sequence[Tensor] = ()
    """Bins of confidence of each run that logged them, after its last finished task; see `evaluation.calibration`."""
    sampling_errors: Sequence[float] = ()
    """Standard error of the average accuracy of each run that evaluates a sample of its test images."""

    def has(self, figure: str) -> bool:
        """Return whether the runs measured `figure`."""
        bins = self.calibration
        measured = {ONLINE: self.online, SAMPLING: self.sampling_errors, CALIBRATION: bins, CHANCE: bins}
        return bool(measured.get(figure, True))

    @property
    def is_single_task(self) -> bool:
        """Whether everything was learned as a single task, so that nothing could be forgotten."""
        return all(len(matrix) == 1 for matrix in self.matrices)

    def spread(self, figure: str) -> tuple[float, float | None]:
        """Return mean and standard deviation over runs of a metric in `statistics`, in [0, 1].

        The deviation is None for a single run. The mean of an accuracy is NaN unless each run measured it; that of a
        calibration error, or of the accuracy of a stream, is over the runs that logged one.
        """
        if figure == ONLINE:
            values = [stream[max(stream)] for stream in self.online]
        elif figure == CALIBRATION:
            values = [expected_calibration_error(bins) for bins in self.calibration]
        elif figure == CHANCE:
            values = [calibration_error_by_chance(bins) for bins in self.calibration]
        elif figure == SAMPLING:
            values = list(self.sampling_errors)
        else:
            values = [getattr(metrics, figure)(matrix) for matrix in self.matrices]
        return mean_and_deviation(values)

    def reliability(self) -> Tensor:
        """Return the images, the mean confidence and the accuracy of each bin that has images, `(n, 3)`, over seeds."""
        bins = torch.stack(list(self.calibration)).sum(0)
        bins = bins[bins[:, 0] > 0]
        return torch.cat([bins[:, :1], bins[:, 1:] / bins[:, :1]], 1)


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float | None]:
    """Return mean and standard deviation, which is None for one value; NaN and None if a value is not finite.

    >>> mean_and_deviation([0.5, float("nan")])
    (nan, None)
    """
    if not all(map(math.isfinite, values)):
        return math.nan, None
    return mean(values), stdev(values) if len(values) > 1 else None


STATISTICS = {
    "average_accuracy": "average accuracy",
    "forgetting": "forgetting",
    "backward_transfer": "backward transfer",
    "average_incremental_accuracy": "average incremental accuracy",
}
"""Metrics in a table: functions of `pgp.evaluation.metrics` and their headings."""
NEED_TWO_TASKS = ("forgetting", "backward_transfer")
"""Metrics of at least two tasks, empty for a single one."""


ONLINE, CALIBRATION, CHANCE, SAMPLING = "stream", "calibration", "chance", "sampling"
"""Keys of metrics that only some runs have."""
SOMETIMES = {
    SAMPLING: "standard error from the sample of test images",
    CALIBRATION: "calibration error",
    CHANCE: "calibration error by chance",
    ONLINE: "stream accuracy",
}
"""Headings of metrics that only some runs have."""


def statistics(table: Sequence[ResultRow], *, without: Collection[str] = ()) -> dict[str, str]:
    """Return the metrics in `table` with their headings: `STATISTICS`, and those of `SOMETIMES` that a row has.

    Args:
        table: The rows.
        without: Metrics to leave out, so that a table is narrow.
    """
    measured = {figure: text for figure, text in SOMETIMES.items() if any(line.has(figure) for line in table)}
    return {figure: text for figure, text in (STATISTICS | measured).items() if figure not in without}


def group_runs(runs: Sequence[Run]) -> list[tuple[str, list[Run]]]:
    """Group runs that differ only in their seed. Each group gets a short label of what is special about it."""
    members: dict[str, list[Run]] = {}
    trees: dict[str, dict[str, Any]] = {}
    for run in {run.folder.resolve(): run for run in runs}.values():
        tree = experiment_settings(run.config)
        key = repr(_without_paths(tree, run))
        members.setdefault(key, []).append(run)
        trees.setdefault(key, tree)
    labels = [
        label or own[0].config.name
        for label, own in zip(_labels(_shorten_paths(list(trees.values()))), members.values(), strict=True)
    ]
    groups = list(zip(labels, members.values(), strict=True))
    for label in set(labels):  # groups of the same settings, whose data have changed in their place
        alike = [i for i, own in enumerate(labels) if own == label]
        if len(alike) > 1:
            folders = _relative([groups[i][1][0].folder.resolve() for i in alike])
            for i, folder in zip(alike, folders, strict=True):
                groups[i] = f"{label}, {folder}", groups[i][1]
    return groups


def result_rows(runs: Sequence[Run]) -> list[ResultRow]:
    """Return one row per group of runs and per column.

    Raises:
        RunError: If the runs of a group have come to different tasks, so that their figures mean different things.
    """
    out = []
    for label, members in group_runs(runs):
        seeds = [run.config.seed for run in members]
        if len(set(seeds)) < len(seeds):
            raise RunError(f"expected runs of {label} with seeds of their own, got {sorted(seeds)}: a seed counts once")
        matrices = [run.matrices() for run in members]
        streams = [stream for run in members if (stream := _online_accuracy(run))]
        for column in matrices[0]:
            own = [m[column] for m in matrices if column in m]
            if len({len(matrix) for matrix in own}) > 1:
                raise RunError(f"expected runs of {label} with the same number of finished tasks, got different ones:"
                               " finish them first, with pgp train --resume")  # fmt: skip
            bins = [
                found
                for run, measured in zip(members, matrices, strict=True)
                if (found := _calibration(run, column, measured.get(column))) is not None
            ]
            errors = [
                metrics.sampling_error(matrices[i][column], run.data.test_images, run.config.test_images)
                for i, run in enumerate(members)
                if column in matrices[i]
            ]
            known = [error for error in errors if error is not None]
            out.append(ResultRow(label, column, own, list(members[0].data.task_names), streams, bins, known))
    return out


def markdown(table: Sequence[ResultRow]) -> str:
    """Return a Markdown table in percent, mean ± standard deviation over seeds."""
    shown = statistics(table)
    rows = [[line.label, line.column, str(len(line.matrices)), *format_row(line, shown)] for line in table]
    return markdown_table(["run", "readout", "seeds", *shown.values()], rows)


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    return "".join("| " + " | ".join(map(markdown_cell, row)) + " |\n" for row in (head, ["---"] * len(head), *rows))


def format_row(line: ResultRow, shown: Mapping[str, str] = STATISTICS) -> list[str]:
    """Return the metrics of a row in percent; an empty cell for a metric that it does not have."""
    out = []
    for figure in shown:
        if not line.has(figure) or (figure in NEED_TWO_TASKS and line.is_single_task):
            out.append("")
            continue
        mean, deviation = line.spread(figure)
        if math.isnan(mean):
            out.append(NOT_MEASURED)
            continue
        out.append(f"{100 * mean:.2f}" + ("" if deviation is None else f" ± {100 * deviation:.2f}"))
    return out


def version_note(runs: Sequence[Run]) -> str:
    """Return a sentence about versions in which runs differ, and with which results may; "" if there are none.

    A run whose record of versions is damaged is left out, with a warning.
    """
    found: dict[str, set[str]] = {}
    for run in runs if len(runs) > 1 else ():
        try:
            versions = run.versions()
        except RunError as error:
            warnings.warn(f"{error}. Its versions are not compared with those of the other runs", stacklevel=2)
            continue
        for what, version in versions.items():
            found.setdefault(what, set()).add(version)
    differing = [f"{what} {', '.join(sorted(versions))}" for what, versions in found.items() if len(versions) > 1]
    return f"Trained with different versions, which can change results: {'; '.join(differing)}." if differing else ""


def row_name(line: ResultRow, table: Sequence[ResultRow]) -> str:
    """Return label and column of a row, each only if rows of the table differ in it."""
    labels, columns = {one.label for one in table}, {one.column for one in table}
    words = []
    if len(labels) > 1:
        words.append(line.label)
    if len(columns) > 1:
        words.append(line.column)
    return ", ".join(words) or line.label


def _online_accuracy(run: Run) -> dict[int, float]:
    """Return the online accuracy by number of images in finished tasks so far; empty for a run that is not online."""
    finished, _ = run.progress()
    with reading(run.log_file.path):
        events = [event for event in run.events("stream") if event["task"] < finished]
        looks = {int(event["images"]): float(event["accuracy"]) for event in events}
    return dict(sorted(looks.items()))


def _calibration(run: Run, column: str, matrix: Tensor | None) -> Tensor | None:
    """Return the bins of confidence `(NUM_BINS, 3)` after the last finished task.

    It is None unless all learned tasks that have test images were measured then, as the accuracy matrix tells.
    """
    if matrix is None:
        return None
    is_tested = torch.tensor(run.data.test_images[: len(matrix)]) > 0
    if not bool(matrix[-1][is_tested].isfinite().all()):
        return None
    with reading(run.log_file.path):
        found = [event["calibration"] for event in run.events("task") if "calibration" in event]
        if not found or column not in found[-1]:
            return None
        table = logged_bins(found[-1][column])
        return table if table[:, 0].any() else None


def _without_paths(tree: dict[str, Any], run: Run) -> dict[str, Any]:
    """Return the settings `tree` of a run, with fingerprints of its data and tasks instead of their paths."""
    data = run.data.to_json()
    fingerprints = {"data": data["fingerprint"], "tasks of": None if tree["shuffle"] else data["tasks"]}
    return {key: value for key, value in tree.items() if not PATH_SETTING.fullmatch(key)} | fingerprints


PATH_SETTING = re.compile(r"(dataset|added\.\d+)\.(root|file)")
"""Settings that are paths of data."""


def _shorten_paths(trees: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the same settings, with differing paths relative to the folder that contains them all."""
    out = [dict(tree) for tree in trees]
    for key in filter(PATH_SETTING.fullmatch, dict.fromkeys(key for tree in trees for key in tree)):
        with_path = [tree for tree in out if tree.get(key)]
        if len({tree[key] for tree in with_path}) > 1:
            for tree, short in zip(with_path, _relative([Path(tree[key]) for tree in with_path]), strict=True):
                tree[key] = short
    return out


def _relative(paths: Sequence[Path]) -> list[str]:
    """Return paths relative to the folder that contains them all, or as they are if there is none."""
    try:
        shared = os.path.commonpath([path.parent for path in paths])
    except ValueError:  # paths on two drives have nothing in common
        return list(map(str, paths))
    return [str(path.relative_to(shared)) for path in paths]


def _labels(trees: Sequence[dict[str, Any]]) -> list[str]:
    """Return a short label for each tree of what distinguishes it: components first, then settings."""
    keys = dict.fromkeys(key for tree in trees for key in tree)
    varying = [key for key in keys if len({repr(tree.get(key)) for tree in trees}) > 1]
    silent = ("readouts.", "tasks") if "joint" in varying else ("readouts.",)  # columns tell; joint means no tasks
    telling = [key for key in varying if not key.startswith(silent)] or varying
    chosen = [key for key in telling if key.endswith(".tag")] or telling
    words = [", ".join(filter(None, (_words(key, tree[key]) for key in chosen if key in tree))) for tree in trees]
    for word in set(words):
        alike = [i for i, own in enumerate(words) if own == word]
        if 1 < len(alike) < len(trees):
            for i, more in zip(alike, _labels([trees[i] for i in alike]), strict=True):
                words[i] = ", ".join(filter(None, (word, more)))
    return words


def _words(key: str, value: Any) -> str:
    """Return the label of a setting.

    It is `projection none` for `projection.tag`, the name of a switch that is on, nothing for one that is off, else
    `key value`.
    """
    name = key.rpartition(".")[2]
    if key.endswith(".tag"):
        return f"{key.removesuffix('.tag')} {value}"
    if isinstance(value, bool):
        return name if value else ""
    return f"{name} {value}"
