"""Figures of accuracy and calibration."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.colors import ListedColormap
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from pgp.evaluation import metrics
from pgp.reports import style
from pgp.reports.style import DIRECT, Look, save_figure, short_names, whole_numbers
from pgp.reports.tables import CALIBRATION, CHANCE, ONLINE, ResultRow, row_name

NUMBERED = 12
"""Maximum number of tasks for which an accuracy matrix is drawn with numbers; larger ones have a colour bar."""
MANY = 12
"""Maximum number of accuracy matrices of full size."""
FEW = 2
"""Maximum number of tasks for which the average accuracy is drawn as a slope, with its values."""


@style.styled()
def draw_accuracy(table: Sequence[ResultRow], path: Path) -> None:
    """Draw average accuracy over tasks and each row's accuracy matrix (mean over seeds) as a PNG.

    For online runs, the online accuracy is drawn too. A single task has no matrix.
    """
    looks = _looks(table)
    tasks = max(len(matrix) for line in table for matrix in line.matrices)
    shown = [line for line in table if len(line.matrices[0]) > 1 and line.matrices[0].isfinite().any()]
    online = any(line.online for line in table)
    narrow = tasks <= FEW
    names = [_labelled(name, 100) for name in short_names([row_name(line, table) for line in table])]
    direct = len(table) <= DIRECT and "\n".join(names).count("\n") < (10 if narrow else 18)
    key = {} if direct else _key(table, looks)
    side = 1.5 if len(shown) > MANY else min(2.3, max(1.1, 0.4 * tasks))
    wide = _side_by_side(shown, 2 if narrow else 4 if len(shown) <= MANY else 6)
    tall = -(-len(shown) // wide)
    titles = _titles(shown, side)
    matrix_width = (max(side, style.name_width(titles)) + 0.25) * wide + (1.7 if tasks > NUMBERED else 1.0)
    matrix_height = (side + 0.3 + 0.14 * max((title.count("\n") + 1 for title in titles), default=0)) * tall + 0.8
    curve_width = (2.2 if narrow else 5.4) + (0.3 if key else style.name_width(names)) + 3.4 * online
    curve_height = (2.1 if narrow else 3.1) + (style.legend_height(list(key), curve_width) if key else 0) + 0.3
    beside = narrow and bool(shown)
    width = curve_width + matrix_width if beside else max(curve_width, matrix_width if shown else 0)
    height = max(curve_height, matrix_height) if beside else curve_height + (matrix_height if shown else 0)
    figure = style.new_figure(width, height)
    parts: Any
    if not shown:
        parts = [figure.subfigures()]
    elif beside:
        parts = figure.subfigures(1, 2, width_ratios=(curve_width, matrix_width))
    else:
        parts = figure.subfigures(2, 1, height_ratios=(curve_height, matrix_height))
    panels: Any = parts[0].subplots(1, 1 + online, squeeze=False)[0]
    _draw_averages(panels[0], table, looks, tasks, named=not key)
    if online:
        _draw_online(panels[1], table, looks, named=not key)
    if key:
        style.legend(parts[0], key, curve_width)
    style.note(parts[0], _explanation(table), curve_width if beside else width)
    if shown:
        _draw_matrices(parts[1], shown, titles, wide, few_ticks=len(shown) > MANY)
    save_figure(figure, path)


def _looks(table: Sequence[ResultRow]) -> list[Look]:
    """Return the look of each row: the colour says which run, and the line style which readout.

    If there is only one run, colour and line style both say which readout.
    """
    labels, columns = (list(dict.fromkeys(names)) for names in zip(*((r.label, r.column) for r in table), strict=True))
    return [
        style.look(labels.index(row.label) if len(labels) > 1 else dash, dash)
        for row in table
        for dash in [columns.index(row.column)]
    ]


def _key(table: Sequence[ResultRow], looks: Sequence[Look]) -> dict[str, Look]:
    """Return the entries of a legend: each run with its colour, and each readout with its line style."""
    if len({line.label for line in table}) == 1 or len({line.column for line in table}) == 1:
        return {row_name(line, table): own for line, own in zip(table, looks, strict=True)}
    runs = {line.label: Look(own.colour, "-", own.marker) for line, own in zip(table, looks, strict=True)}
    readouts = {line.column: Look(style.INK, own.dash, "") for line, own in zip(table, looks, strict=True)}
    return {**runs, **readouts}


def _explanation(table: Sequence[ResultRow]) -> str:
    """Describe what colours, line styles and bands mean."""
    words = []
    runs, readouts = len({line.label for line in table}), len({line.column for line in table})
    if runs > 1:
        words.append("Colour: run.")
    if readouts > 1:
        words.append("Line style: readout." if runs > 1 else "Colour and line style: readout.")
    if seeds := sorted({len(line.matrices) for line in table} - {1}):
        many = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
        words.append(f"Lines: mean over {many} seeds; bands: ± 1 standard deviation.")
    if any(len(line.online) > 1 for line in table):
        words.append("Online accuracy: a line for each seed.")
    return " ".join(words)


def _draw_averages(axes: Any, table: Sequence[ResultRow], looks: Sequence[Look], tasks: int, *, named: bool) -> None:
    """Draw the average accuracy after each task. Few tasks become a slope with its values at both ends."""
    names = short_names([row_name(line, table) for line in table]) if len(table) > 1 else [""]
    lowest = 100.0
    for line, own, name in zip(table, looks, names, strict=True):
        curves = 100 * torch.tensor([metrics.accuracy_curve(matrix) for matrix in line.matrices])  # (seeds, t)
        means = dict(enumerate(curves.mean(0).tolist(), start=1))
        deviations = dict(enumerate(curves.std(0).tolist(), start=1)) if len(curves) > 1 else {}
        means = {x: value for x, value in means.items() if math.isfinite(value)}
        deviations = {x: deviations[x] for x in means if x in deviations}
        if not means:
            continue
        lowest = min([lowest, *(value - deviations.get(x, 0) for x, value in means.items())])
        last = max(means)
        if len(curves[0]) == 1 < tasks:
            axes.axhline(means[1], color=own.colour, linestyle=own.dash, linewidth=1)
            name = f"{name} (one task)"
        else:
            style.draw_curve(axes, means, deviations, own)
        if named:
            style.name_line(
                axes, tasks if len(curves[0]) == 1 else last, means[last], _labelled(name, means[last]), own
            )
        if named and tasks == FEW == last and 1 in means:
            style.name_line(axes, 1, means[1], f"{means[1]:.1f} %", own, side="left")
    low = 10 * max(0, int(min(lowest - 2, 89) // 10))
    axes.set(xlabel="tasks learned", ylabel="average accuracy (%)", ylim=(low, 100 + 0.03 * (100 - low)))
    whole_numbers(axes)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10]))
    axes.grid(axis="y")
    if tasks <= FEW:
        axes.set(xticks=range(1, tasks + 1), xlim=(0.9, tasks + 0.1))
    else:
        axes.set_xlim(1 - 0.01 * tasks, tasks + 0.01 * tasks)
    if tasks == FEW and named:  # the values take the place of the axis
        axes.set(yticks=[], ylabel="")
        axes.set_title("average accuracy (%)")
        axes.spines["left"].set_visible(False)


def _labelled(name: str, value: float) -> str:
    return f"{name}: {value:.1f} %" if name else f"{value:.1f} %"


def _draw_online(axes: Any, table: Sequence[ResultRow], looks: Sequence[Look], *, named: bool) -> None:
    """Draw the online accuracy of each run. The readouts of a run share one curve."""
    drawn: list[list[dict[int, float]]] = []
    names = short_names([line.label for line in table])
    several = len({line.label for line in table if line.online}) > 1
    for line, own, name in zip(table, looks, names, strict=True):
        if not line.online or line.online in drawn:
            continue
        drawn.append(line.online)
        for stream in line.online:
            style.draw_curve(axes, {x: 100 * value for x, value in stream.items()}, {}, own._replace(dash="-"))
        if named:
            last, end = max(line.online[0]), 100 * line.spread(ONLINE)[0]
            style.name_line(axes, last, end, _labelled(name if several else "", end), own)
    axes.set(xlabel="images so far", ylabel="online accuracy (%)", ylim=(0, 103))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    axes.grid(axis="y")


def _side_by_side(shown: Sequence[ResultRow], most: int) -> int:
    """Return the number of matrices side by side, at most `most`; the readouts of a run stay together."""
    readouts = len({line.column for line in shown})
    if len(shown) <= most:
        return max(1, len(shown))
    return most - most % readouts if readouts <= most and len(shown) % readouts == 0 else most


def _titles(table: Sequence[ResultRow], width: float) -> list[str]:
    """Return the titles of matrices that are `width` inches wide."""
    names = [row_name(line, table) for line in table]
    return short_names(names, columns=max(18, int(width / 0.065))) if len(table) > 1 else [""] * len(table)


def _draw_matrices(part: Any, table: Sequence[ResultRow], titles: Sequence[str], wide: int, *, few_ticks: bool) -> None:
    """Draw the accuracy matrices, `wide` of them side by side."""
    matrices = [torch.stack(line.matrices).mean(0) for line in table]
    numbered = max(map(len, matrices)) <= NUMBERED
    tall = -(-len(table) // wide)
    grid: Any = part.subplots(tall, wide, squeeze=False)
    missing = False
    for i, axes in enumerate(grid.flat):
        if i >= len(table):
            axes.remove()
            continue
        matrix, named = matrices[i], table[i].tasks[: len(matrices[i])]
        missing |= bool(matrix.tril().isnan().any())
        image = _draw_matrix(axes, matrix, named, numbered, 6 if few_ticks else 12)
        axes.set_title(titles[i])
        if i % wide == 0:
            axes.set_ylabel("after task")
        elif named == table[i - 1].tasks[: len(matrices[i - 1])]:
            axes.tick_params(labelleft=False)
        if i + wide >= len(table):
            axes.set_xlabel("on task")
    if not numbered:
        every: Any = [axes for axes in grid.flat if axes.figure]
        part.colorbar(image, ax=every, label="accuracy (%)", shrink=0.9 / tall, anchor=(0, 1), aspect=25)
    seeds = ", mean over seeds" if max(len(line.matrices) for line in table) > 1 else ""
    part.suptitle(f"Accuracy (%) on each task after each task{seeds}", x=0.01, ha="left", fontsize=style.TEXT)
    if missing:
        part.supxlabel("grey: not measured", x=0.01, ha="left", fontsize=style.SMALL, color=style.FAINT)


def _draw_matrix(axes: Any, matrix: Tensor, tasks: Sequence[str], numbered: bool, names: int) -> Any:
    """Draw an accuracy matrix with or without numbers, and at most about `names` names of tasks; return its image."""
    percent = 100 * matrix
    unmeasured = torch.where(matrix.isnan() & torch.ones_like(matrix).tril().bool(), 1.0, torch.nan)
    axes.imshow(unmeasured.numpy(), cmap=ListedColormap(["#CCCCCC"]))
    image = axes.imshow(percent.numpy(), cmap="viridis", vmin=0, vmax=100)
    for t, j in matrix.isfinite().nonzero().tolist() if numbered else []:
        value = float(percent[t, j])
        axes.text(
            j, t, f"{value:.0f}", ha="center", va="center", fontsize=style.TEXT if len(matrix) <= 6 else 5.5,
            color="white" if value < 60 else "black",
        )  # fmt: skip
    ticks = ticks_of(len(matrix), names)
    axes.set_xticks(ticks, [str(i + 1) for i in ticks])
    axes.set_yticks(ticks, short_names([tasks[i] or i + 1 for i in ticks], columns=14, lines=1))
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    return image


def ticks_of(tasks: int, most: int = 12) -> list[int]:
    """Return the tasks that are labelled beside a matrix: all up to `most`, else every second, fifth, tenth, ....

    >>> ticks_of(3), ticks_of(100)
    ([0, 1, 2], [0, 9, 19, 29, 39, 49, 59, 69, 79, 89, 99])
    """
    step = next(step for step in itertools.chain((1, 2, 5), itertools.count(10, 10)) if tasks <= most * step)
    ticks = list(range(step - 1, tasks, step))
    return [0, *ticks] if step > 2 else ticks


@style.styled()
def draw_calibration(table: Sequence[ResultRow], path: Path) -> None:
    """Draw accuracy over confidence for each row (a reliability diagram) as a PNG. On the diagonal they are equal.

    The area of a dot is proportional to the number of images in its bin.
    """
    shown = [line for line in table if line.calibration]
    looks = [own for line, own in zip(table, _looks(table), strict=True) if line.calibration]
    names = [row_name(line, shown) for line in shown] if len(shown) > 1 else ["calibration"]
    errors = [f": error {100 * line.spread(CALIBRATION)[0]:.1f} %" for line in shown]
    key = {name + error: own for name, error, own in zip(names, errors, looks, strict=True)}
    direct = len(shown) <= DIRECT
    labels = [name + error for name, error in zip(short_names(names, columns=20), errors, strict=True)]
    width = 5.0
    figure = style.new_figure(width, 5.2 + (0 if direct else style.legend_height(list(key), width)))
    axes: Any = figure.subplots()
    axes.plot((0, 100), (0, 100), color=style.FAINT, linewidth=0.8)
    bins = [line.reliability() for line in shown]
    curves = [100 * own[:, 1:] for own in bins]  # confidence and accuracy in percent
    for i, (curve, own) in enumerate(zip(curves, looks, strict=True)):
        (x, y), share = curve.T, bins[i][:, 0] / bins[i][:, 0].sum()
        axes.plot(x, y, color=own.colour, linestyle=own.dash, linewidth=1)
        axes.scatter(x, y, 200 * share + 4, color=own.colour, marker=own.marker, alpha=0.8, linewidth=0)
        if direct:
            others = torch.cat([*curves[:i], *curves[i + 1 :]] or [END])
            apart = torch.cdist(curve, others).amin(1) * share.sqrt()
            at = int(apart.argmax())  # many images, and far from the other curves
            style.name_point(axes, float(x[at]), float(y[at]), labels[i], own)
    axes.set(xlabel="confidence (%)", ylabel="accuracy (%)", xlim=(0, 103), ylim=(0, 103), aspect="equal")
    axes.grid()
    if not direct:
        style.legend(figure, key, width)
    words = _explanation([line._replace(matrices=line.matrices[:1]) for line in shown])
    chances = sorted(round(100 * line.spread(CHANCE)[0], 1) for line in shown)
    chance = " to ".join(map(str, dict.fromkeys((chances[0], chances[-1]))))
    seeds = " of all seeds" if max(len(line.calibration) for line in shown) > 1 else ""
    style.note(
        figure,
        f"{words} Grey diagonal: confidence equals accuracy. Area of a dot: share of the images{seeds}. Error: expected"
        f" calibration error; by chance alone, it would be {chance} %.".strip(),
        width,
    )
    save_figure(figure, path)


END = torch.tensor([[100.0, 100.0]], dtype=torch.float64)
"""The end of the diagonal."""
