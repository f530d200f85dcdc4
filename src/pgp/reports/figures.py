"""Figures of accuracy, and helper functions for all figures."""

from __future__ import annotations

import io
import itertools
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from pgp.evaluation import metrics
from pgp.reports.tables import CALIBRATION, ResultRow, row_name
from pgp.system import storage
from pgp.system.escaping import plot_text, printable

NUMBERED = 12
"""Maximum number of tasks for which an accuracy matrix is drawn with numbers; larger ones have a colour bar."""


DOTTED = 20
"""Maximum number of points for which a curve is drawn with dots."""


def draw_accuracy(table: Sequence[ResultRow], path: Path) -> None:
    """Draw average accuracy over tasks and each row's accuracy matrix (mean over seeds) as a PNG.

    For online runs, the online accuracy is drawn too.
    """
    matrices = [torch.stack(line.matrices).mean(0) for line in table]
    wide = 2 if len(matrices) == 4 else min(3, len(matrices))
    tall = -(-len(matrices) // wide)
    online = any(line.online for line in table)
    numbered = max(map(len, matrices)) <= NUMBERED
    figure = Figure(figsize=(4.6 + 3.1 * wide, max(6.2 if online else 3.6, 3.1 * tall)), layout="constrained")
    halves: Any = figure.subfigures(1, 2, width_ratios=(4.6, 3.1 * wide))
    left, right = halves
    columns: Any = left.subplots(1 + online, squeeze=False)
    axes = columns[0, 0]
    if online:
        _draw_online(columns[1, 0], table)
    for line in table:
        curves = 100 * torch.tensor([metrics.accuracy_curve(matrix) for matrix in line.matrices])  # (seeds, t)
        x, mean = range(1, curves.shape[1] + 1), curves.mean(0).numpy()
        style = "-" if line.column == table[0].column else "--"
        axes.plot(x, mean, style, marker=marker(len(x)), markersize=3, label=plot_text(row_name(line, table)))
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
            image = _draw_matrix(axis, matrices[i], plot_text(row_name(table[i], table)), table[i].tasks, numbered)
    if not numbered:
        right.colorbar(image, ax=list(grid.flat), label="accuracy, %", shrink=0.7)
    save_figure(figure, path)


def draw_calibration(table: Sequence[ResultRow], path: Path) -> None:
    """Draw accuracy over confidence for each row (a reliability diagram) as a PNG. On the diagonal they are equal.

    The area of a dot is proportional to the number of images in its bin.
    """
    figure = Figure(figsize=(5.2, 5.2), layout="constrained")
    axes: Any = figure.subplots()
    axes.plot((0, 100), (0, 100), color="0.6", linewidth=1, label="calibrated")
    for line in table:
        if not line.calibration:
            continue
        images, confidence, accuracy = line.reliability().T
        x, y = 100 * confidence, 100 * accuracy
        error, _ = line.spread(CALIBRATION)
        label = f"{plot_text(row_name(line, table))}: error {100 * error:.1f} %"
        (curve,) = axes.plot(x.numpy(), y.numpy(), linewidth=1, label=label)
        axes.scatter(x.numpy(), y.numpy(), 200 * (images / images.sum()).numpy() + 4, color=curve.get_color())
    axes.set(xlabel="confidence, %", ylabel="accuracy, %", xlim=(0, 102), ylim=(0, 102))
    figure.legend(fontsize=7, loc="outside lower center", ncols=2)
    axes.grid(alpha=0.3)
    save_figure(figure, path)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as a PNG, atomically."""
    content = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # a missing glyph is drawn as a box
        FigureCanvasAgg(figure).print_png(content)
    storage.write(path, content.getvalue())


def marker(points: int) -> str:
    """Return the marker of a curve: a dot, or none if there are so many points that dots would hide the line."""
    return "o" if points <= DOTTED else ""


def whole_numbers(axes: Any) -> None:
    """Put ticks of the x-axis at whole numbers only, at most ten of them."""
    axes.xaxis.set_major_locator(MaxNLocator(nbins=10, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))


def _draw_online(axes: Any, table: Sequence[ResultRow]) -> None:
    """Draw the online accuracy of each run. The readouts of a run share one curve."""
    drawn: list[list[dict[int, float]]] = []
    for line in table:
        if line.online in drawn:
            continue
        drawn.append(line.online)
        for number, stream in enumerate(line.online):
            label = plot_text(line.label) if number == 0 else None
            axes.plot(list(stream), [100 * value for value in stream.values()], color=f"C{len(drawn) - 1}", label=label)
    axes.set(xlabel="images so far", ylabel="online accuracy, %", ylim=(0, 102))
    axes.legend(fontsize=7, loc="lower left")
    axes.grid(alpha=0.3)


def _draw_matrix(axis: Any, matrix: Tensor, title: str, tasks: Sequence[str], numbered: bool) -> Any:
    """Draw an accuracy matrix with or without numbers, and return its image."""
    percent = 100 * matrix
    image = axis.imshow(percent.numpy(), cmap="viridis", vmin=0, vmax=100)
    for t, j in matrix.isfinite().nonzero().tolist() if numbered else []:
        value = float(percent[t, j])
        axis.text(
            j, t, f"{value:.0f}", ha="center", va="center", fontsize=8 if len(matrix) <= 5 else 6,
            color="white" if value < 60 else "black",
        )  # fmt: skip
    ticks = ticks_of(len(matrix))
    axis.set_xticks(ticks, [str(i + 1) for i in ticks], fontsize=7)
    axis.set_yticks(ticks, [_shorten(tasks[i]) or str(i + 1) for i in ticks], fontsize=7)
    axis.set_xlabel("accuracy on task, %" if numbered else "task", fontsize=8)
    axis.set_ylabel("after task", fontsize=8)
    axis.set_title(title, fontsize=8)
    return image


def ticks_of(tasks: int) -> list[int]:
    """Return the tasks that are labelled beside a matrix: all up to twelve, else every second, fifth, tenth, ....

    >>> ticks_of(3), ticks_of(100)
    ([0, 1, 2], [0, 9, 19, 29, 39, 49, 59, 69, 79, 89, 99])
    """
    step = next(step for step in itertools.chain((1, 2, 5), itertools.count(10, 10)) if tasks <= 12 * step)
    ticks = list(range(step - 1, tasks, step))
    return [0, *ticks] if step > 2 else ticks


def _shorten(name: str) -> str:
    """Return the beginning of a task's name."""
    name = printable(name)
    return plot_text(name if len(name) <= 14 else f"{name[:13]}…")
