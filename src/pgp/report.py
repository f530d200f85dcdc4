"""Tables and figures, from run folders only."""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import re
import statistics
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from pgp import metrics, storage
from pgp.checkpoint import understood
from pgp.escaping import markdown_cell, plot_text, printable
from pgp.run import Run, RunError


class Line(NamedTuple):
    """Figures of one column (a readout) over the runs that differ in nothing but their seed."""

    label: str
    column: str
    matrices: list[Tensor]
    """Accuracy matrix `(T, T)` of each run."""
    tasks: list[str]
    """What the tasks are called, "" for nothing."""
    streams: list[dict[int, float]]
    """Of each run, if it is online: accuracy over all images that had come, by their number; see `pgp.stream`."""

    def spread(self, figure: str) -> tuple[float, float | None]:
        """Mean and standard deviation (None for a single run) of a function of `pgp.metrics`, in [0, 1]."""
        if figure == STREAM:
            values = [stream[max(stream)] for stream in self.streams]
        else:
            values = [getattr(metrics, figure)(matrix) for matrix in self.matrices]
        return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None


FIGURES = {
    "average_accuracy": "average accuracy",
    "forgetting": "forgetting",
    "backward_transfer": "backward transfer",
    "average_incremental_accuracy": "average incremental accuracy",
}
"""What a table shows: functions of `pgp.metrics` and their headings."""
STREAM = "stream"
NUMBERED = 12
"""Tasks up to which an accuracy matrix is drawn with numbers; more tasks have a colour bar."""
DOTTED = 20
"""Points up to which a curve has dots."""


def figures(table: Sequence[Line]) -> dict[str, str]:
    """What `table` shows, with its headings: `FIGURES`, and the accuracy along the stream where a run is online."""
    return FIGURES | ({STREAM: "stream accuracy"} if any(line.streams for line in table) else {})


def groups(runs: Sequence[Run]) -> list[tuple[str, list[Run]]]:
    """Runs that differ in nothing but their seed, by a label: in a few words, what sets them apart from the others."""
    members: dict[str, list[Run]] = {}
    trees: dict[str, dict[str, Any]] = {}
    for run in {run.folder.resolve(): run for run in runs}.values():
        tree = flat(run.config.to_json())
        key = repr(_anywhere(tree, run))
        members.setdefault(key, []).append(run)
        trees.setdefault(key, tree)
    labels = _labels(_briefly(list(trees.values())))
    return [(label or own[0].config.name, own) for label, own in zip(labels, members.values(), strict=True)]


def lines(runs: Sequence[Run]) -> list[Line]:
    """One line per group of runs and per column.

    Raises:
        RunError: if the runs of a group have come to different tasks, so that their figures mean different things.
    """
    out = []
    for label, members in groups(runs):
        seeds = [run.config.seed for run in members]
        if len(set(seeds)) < len(seeds):
            raise RunError(f"expected runs of {label} with seeds of their own, got {sorted(seeds)}: a seed counts once")
        matrices = [run.matrices() for run in members]
        streams = [stream for run in members if (stream := _stream(run))]
        for column in matrices[0]:
            own = [m[column] for m in matrices if column in m]
            if len({metrics.learned(matrix) for matrix in own}) > 1:
                raise RunError(f"expected runs of {label} that have all come to the same task; finish them first, by"
                               " pgp train --resume")  # fmt: skip
            out.append(Line(label, column, own, members[0].task_names(), streams))
    return out


def markdown(table: Sequence[Line]) -> str:
    """A table in percent, mean ± standard deviation over seeds."""
    shown = figures(table)
    rows = [[line.label, line.column, str(len(line.matrices)), *cells(line, shown)] for line in table]
    return grid(["run", "readout", "seeds", *shown.values()], rows)


def grid(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    return "".join("| " + " | ".join(map(markdown_cell, row)) + " |\n" for row in (head, ["---"] * len(head), *rows))


def cells(line: Line, shown: Mapping[str, str] = FIGURES) -> list[str]:
    """The figures of a line, in percent; nothing for the stream of a run that is not online."""
    out = []
    for figure in shown:
        if figure == STREAM and not line.streams:
            out.append("")
            continue
        mean, deviation = line.spread(figure)
        out.append(f"{100 * mean:.2f}" + ("" if deviation is None else f" ± {100 * deviation:.2f}"))
    return out


def draw(table: Sequence[Line], path: Path) -> None:
    """Curves of the average accuracy over tasks, and each line's accuracy matrix (mean over seeds), as a PNG; and of
    the accuracy along the stream, where a run is online.
    """
    matrices = [torch.stack(line.matrices).mean(0) for line in table]
    wide = 2 if len(matrices) == 4 else min(3, len(matrices))
    tall = -(-len(matrices) // wide)
    online = any(line.streams for line in table)
    numbered = max(map(len, matrices)) <= NUMBERED
    figure = Figure(figsize=(4.6 + 3.1 * wide, max(6.2 if online else 3.6, 3.1 * tall)), layout="constrained")
    halves: Any = figure.subfigures(1, 2, width_ratios=(4.6, 3.1 * wide))
    left, right = halves
    columns: Any = left.subplots(1 + online, squeeze=False)
    axes = columns[0, 0]
    if online:
        _streams(columns[1, 0], table)
    for line in table:
        curves = 100 * torch.tensor([metrics.curve(matrix) for matrix in line.matrices])  # (seeds, t)
        x, mean = range(1, curves.shape[1] + 1), curves.mean(0).numpy()
        style = "-" if line.column == table[0].column else "--"
        axes.plot(x, mean, style, marker=marker(len(x)), markersize=3, label=plot_text(_name(line, table)))
        if len(curves) > 1:
            deviation = curves.std(0).numpy()
            axes.fill_between(x, mean - deviation, mean + deviation, alpha=0.15)
    axes.set(xlabel="tasks learned", ylabel="average accuracy, %", ylim=(0, 102))
    whole_numbers(axes)
    axes.legend(fontsize=7, loc="lower left")
    axes.grid(alpha=0.3)
    grid: Any = right.subplots(tall, wide, squeeze=False)
    for i, axis in enumerate(grid.flat):
        axis.axis("on" if i < len(matrices) else "off")
        if i < len(matrices):
            image = _matrix(axis, matrices[i], plot_text(_name(table[i], table)), table[i].tasks, numbered)
    if not numbered:
        right.colorbar(image, ax=list(grid.flat), label="accuracy, %", shrink=0.7)
    save(figure, path)


def save(figure: Figure, path: Path) -> None:
    """Write a figure as a PNG, whole or not at all."""
    content = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # it is drawn as a box
        FigureCanvasAgg(figure).print_png(content)
    storage.write(path, content.getvalue())


def marker(points: int) -> str:
    """Return the marker of a curve: a dot at each of its points, none if they would hide the line."""
    return "o" if points <= DOTTED else ""


def whole_numbers(axes: Any) -> None:
    """Let only whole numbers stand at the x-axis, and no more than there is room for."""
    axes.xaxis.set_major_locator(MaxNLocator(nbins=10, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))


def _streams(axes: Any, table: Sequence[Line]) -> None:
    """Accuracy along the stream, a curve for each run; the readouts of a run share it."""
    known: list[list[dict[int, float]]] = []
    for line in table:
        if line.streams in known:
            continue
        known.append(line.streams)
        for number, stream in enumerate(line.streams):
            label = plot_text(line.label) if number == 0 else None
            axes.plot(list(stream), [100 * value for value in stream.values()], color=f"C{len(known) - 1}", label=label)
    axes.set(xlabel="images that came", ylabel="accuracy along the stream, %", ylim=(0, 102))
    axes.legend(fontsize=7, loc="lower left")
    axes.grid(alpha=0.3)


def _matrix(axis: Any, matrix: Tensor, title: str, tasks: Sequence[str], numbered: bool) -> Any:
    """Draw an accuracy matrix with or without numbers, and return its image."""
    percent = 100 * matrix
    image = axis.imshow(percent.numpy(), cmap="viridis", vmin=0, vmax=100)
    for t, j in matrix.isfinite().nonzero().tolist() if numbered else []:
        value = float(percent[t, j])
        axis.text(
            j, t, f"{value:.0f}", ha="center", va="center", fontsize=8 if len(matrix) <= 5 else 6,
            color="white" if value < 60 else "black",
        )  # fmt: skip
    ticks = _ticks(len(matrix))
    axis.set_xticks(ticks, [str(i + 1) for i in ticks], fontsize=7)
    axis.set_yticks(ticks, [_short(tasks[i]) or str(i + 1) for i in ticks], fontsize=7)
    axis.set_xlabel("accuracy on task, %" if numbered else "task", fontsize=8)
    axis.set_ylabel("after task", fontsize=8)
    axis.set_title(title, fontsize=8)
    return image


def _ticks(tasks: int) -> list[int]:
    """Return the tasks that are named beside a matrix: all up to twelve, else so many that their names have room.

    >>> _ticks(3), _ticks(100)
    ([0, 1, 2], [0, 9, 19, 29, 39, 49, 59, 69, 79, 89, 99])
    """
    step = next(step for step in itertools.chain((1, 2, 5), itertools.count(10, 10)) if tasks <= 12 * step)
    return [0] * (step > 2) + list(range(step - 1, tasks, step))


def _short(name: str) -> str:
    """Return the beginning of a task's name."""
    name = printable(name)
    return plot_text(name if len(name) <= 14 else f"{name[:13]}…")


def _name(line: Line, table: Sequence[Line]) -> str:
    """Label and column, as far as they tell lines apart."""
    labels, columns = {one.label for one in table}, {one.column for one in table}
    parts = [line.label] * (len(labels) > 1) + [line.column] * (len(columns) > 1)
    return ", ".join(parts) or line.label


def _stream(run: Run) -> dict[int, float]:
    """Accuracy over all images that had come, by their number; nothing for a run that is not online."""
    with understood(run.log_file.path):
        looks = {int(event["images"]): float(event["accuracy"]) for event in run.events("stream")}
    return dict(sorted(looks.items()))


def _anywhere(tree: dict[str, Any], run: Run) -> dict[str, Any]:
    """The settings `tree` of a run with what its data and tasks are known by in place of where they lie."""
    known = {"data": run.data_fingerprint, "tasks of": None if tree["shuffle"] else run.classes()[1]}
    return {key: value for key, value in tree.items() if not PLACE.fullmatch(key)} | known


PLACE = re.compile(r"(dataset|added\.\d+)\.(root|file)")
"""Settings that say where data lie."""


def _briefly(trees: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same settings, with places that differ named from the folder on that holds them all."""
    out = [dict(tree) for tree in trees]
    for key in filter(PLACE.fullmatch, dict.fromkeys(key for tree in trees for key in tree)):
        placed = [tree for tree in out if tree.get(key)]
        if len({tree[key] for tree in placed}) > 1:
            with contextlib.suppress(ValueError):  # two drives share nothing
                shared = os.path.commonpath([Path(tree[key]).parent for tree in placed])
                for tree in placed:
                    tree[key] = str(Path(tree[key]).relative_to(shared))
    return out


def flat(tree: Any, path: str = "") -> dict[str, Any]:
    """A tree of JSON values by dotted path; leaves that cannot tell experiments apart are left out."""
    if isinstance(tree, list):
        tree = {str(i): item for i, item in enumerate(tree)}
    if not isinstance(tree, dict):
        return {path: tree}
    out: dict[str, Any] = {}
    for key, item in tree.items():
        if path != "hardware" and (path or key not in ("seed", "keep_checkpoints")):
            out |= flat(item, f"{path}.{key}" if path else key)
    return out


def _labels(trees: Sequence[dict[str, Any]]) -> list[str]:
    """What sets each tree apart from the others, in as few words as do: parts of another kind first, then settings."""
    keys = dict.fromkeys(key for tree in trees for key in tree)
    varying = [key for key in keys if len({repr(tree.get(key)) for tree in trees}) > 1]
    telling = [key for key in varying if not key.startswith("readouts.")] or varying  # readouts have their columns
    chosen = [key for key in telling if key.endswith(".tag")] or telling
    words = [", ".join(filter(None, (_words(key, tree[key]) for key in chosen if key in tree))) for tree in trees]
    for word in set(words):
        alike = [i for i, own in enumerate(words) if own == word]
        if 1 < len(alike) < len(trees):
            for i, more in zip(alike, _labels([trees[i] for i in alike]), strict=True):
                words[i] = ", ".join(filter(None, (word, more)))
    return words


def _words(key: str, value: Any) -> str:
    """Return `projection none` for `projection.tag`, the name of a switch that is on, nothing for one that is off, and
    else `key value`.
    """
    name = key.rpartition(".")[2]
    if key.endswith(".tag"):
        return f"{key.removesuffix('.tag')} {value}"
    if isinstance(value, bool):
        return name if value else ""
    return f"{name} {value}"
