"""Charts as SVG inside a page. Their colours are variables of the page's style sheet; all text is escaped."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from markupsafe import Markup
from torch import Tensor

from pgp.reports.figures import ticks_of
from pgp.reports.style import DOTTED
from pgp.system.escaping import printable

WIDTH, HEIGHT = 440, 270
"""Size of a chart in its own units, of which a page shows one as a pixel or a little more."""
LEFT, RIGHT, TOP, BOTTOM = 44, 34, 12, 40
"""Margins of a chart's plotting area."""
GAP = 13
"""Smallest vertical distance of labels at the ends of curves."""
DASHES = ("", "6 3", "2 3", "8 3 2 3")
"""Patterns of lines of one colour."""
COLORS = 8
"""Number of colours of the style sheet, `--c0` to `--c7`."""
CELL = 14.0
"""Largest side of a cell of a heat map."""
LEVELS = 10
"""Colours of a heat map differ by a tenth of its range."""


class Series(NamedTuple):
    """A curve."""

    label: str
    """Short label at its end."""
    name: str
    """What it is, for its tooltip."""
    points: Sequence[tuple[float, float]]
    color: int = 0
    dash: int = 0
    weights: Sequence[float] = ()
    """Areas of its dots relative to the largest, in [0, 1]; if empty, all dots are small."""
    band: Sequence[float] = ()
    """Half the height of a band around it, by point."""
    thin: bool = False
    """Whether it is one of very many, which are drawn thin and without dots."""


def line_chart(
    title: str,
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    *,
    y_max: float | None = None,
    x_range: tuple[float, float] | None = None,
    diagonal: bool = False,
) -> Markup:
    """Return a chart of curves, each with its label at its end, if there is room for all.

    Args:
        title: What the chart shows, for readers who cannot see it.
        series: The curves.
        x_label: Title of the horizontal axis, with its unit.
        y_label: Title of the vertical axis, with its unit.
        y_max: Upper end of the vertical axis, which begins at 0. If None, a round number above all points.
        x_range: Ends of the horizontal axis. If None, whole numbers from the first point to the last.
        diagonal: Whether to draw the line on which both axes are equal.
    """
    xs = [x for one in series for x, _ in one.points]
    top = y_max or _round_up(max((y for one in series for _, y in one.points), default=0.0))
    first, last = x_range or (min(xs, default=1), max(xs, default=1))
    if first == last:
        first, last = first - 1, last + 1

    def place(x: float, y: float) -> tuple[float, float]:
        right = LEFT + (WIDTH - LEFT - RIGHT) * (x - first) / (last - first)
        return round(right, 1), round(TOP + (HEIGHT - TOP - BOTTOM) * (1 - min(max(y, 0.0), top) / top), 1)

    parts = [_grid(place, top, first, last, x_range is None, x_label, y_label)]
    if diagonal:
        (x1, y1), (x2, y2) = place(first, first), place(last, last)
        parts.append(Markup('<path class="diagonal" d="M{} {}L{} {}"/>').format(x1, y1, x2, y2))
    parts += [_curve(one, place) for one in series if one.points]
    parts += _end_labels([(one, *place(*one.points[-1])) for one in series if one.points and one.label])
    return _svg(title, WIDTH, HEIGHT, parts)


def heat_map(
    title: str,
    values: Tensor,
    row_label: str,
    column_label: str,
    tooltip: Callable[[int, int, float], str],
) -> Markup:
    """Return a heat map of `values (R, C)` in [0, 1] without numbers; cells that are NaN stay empty.

    Args:
        title: What it shows, for readers who cannot see it.
        values: The values.
        row_label: What a row is, from the top.
        column_label: What a column is.
        tooltip: Returns the text of a cell from its row, its column and its value.
    """
    rows, columns = values.shape
    across, down = min(CELL, (WIDTH - LEFT - 8) / columns), min(CELL, (WIDTH - LEFT - 8) / rows)  # size of a cell
    right, bottom = LEFT + across * columns, TOP + down * rows
    cells = []
    for r, c in values.isfinite().nonzero().tolist():
        value = float(values[r, c])
        text = printable(tooltip(r, c, value))
        cell = '<path class="q{}" d="M{} {}h1v1h-1z"><title>{}</title></path>'
        cells.append(Markup(cell).format(level(value), c, r, text))
    ground = '<rect class="ground" x="{}" y="{}" width="{:.1f}" height="{:.1f}"/>'
    group = '<g transform="translate({} {}) scale({:.4f} {:.4f})" shape-rendering="crispEdges">{}</g>'
    parts = [
        Markup(ground).format(LEFT, TOP, right - LEFT, bottom - TOP),
        Markup(group).format(LEFT, TOP, across, down, Markup("").join(cells)),
    ]
    parts += [_text(LEFT - 6, TOP + down * (i + 0.5) + 4, i + 1, "end") for i in ticks_of(rows)]
    parts += [_text(LEFT + across * (i + 0.5), bottom + 15, i + 1, "middle") for i in ticks_of(columns)]
    parts.append(_text((LEFT + right) / 2, bottom + 34, column_label, "middle", "label"))
    parts.append(_vertical((TOP + bottom) / 2, row_label))
    return _svg(title, right + 8, max(bottom + BOTTOM, 90), parts)


def level(value: float) -> int:
    """Return the number of the colour of a value in [0, 1], 0 to `LEVELS`."""
    return round(LEVELS * min(max(value, 0.0), 1.0))


def _svg(title: str, width: float, height: float, parts: Iterable[Markup]) -> Markup:
    svg = '<svg viewBox="0 0 {:.0f} {:.0f}" style="max-width:{:.0f}px" role="img" aria-label="{}">{}</svg>'
    return Markup(svg).format(width, height, 1.2 * width, printable(title), Markup("").join(parts))


def _grid(
    place: Callable[[float, float], tuple[float, float]],
    top: float,
    first: float,
    last: float,
    whole: bool,
    x_label: str,
    y_label: str,
) -> Markup:
    """Return the axes: horizontal lines with their values, and values below."""
    parts = []
    for i in range(5):
        x, y = place(first, top * i / 4)
        parts.append(Markup('<path class="grid" d="M{} {}H{}"/>').format(LEFT, y, WIDTH - RIGHT))
        parts.append(_text(LEFT - 7, y + 4, f"{top * i / 4:g}", "end"))
    if whole:
        marks = [1.0 + i for i in ticks_of(int(last)) if first <= 1 + i <= last]
    else:
        marks = [first + (last - first) * i / 4 for i in range(5)]
    for mark in marks:
        x, y = place(mark, 0)
        parts.append(_text(x, y + 16, f"{mark:g}", "middle"))
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, x_label, "middle", "label"))
    parts.append(_vertical((TOP + HEIGHT - BOTTOM) / 2, y_label))
    return Markup("").join(parts)


def _curve(one: Series, place: Callable[[float, float], tuple[float, float]]) -> Markup:
    points = [place(x, y) for x, y in one.points]
    style = f"--c:var(--c{one.color % COLORS})"
    parts = []
    if any(one.band):
        upper = [place(x, y + half) for (x, y), half in zip(one.points, one.band, strict=True)]
        lower = [place(x, y - half) for (x, y), half in zip(one.points, one.band, strict=True)]
        parts.append(Markup('<path class="band" d="{}z"/>').format(_path([*upper, *reversed(lower)])))
    if one.thin:
        title = Markup("<title>{}</title>").format(printable(one.name))
        parts.append(Markup('<path class="curve thin" d="{}">{}</path>').format(_path(points), title))
    else:
        dash = DASHES[one.dash % len(DASHES)]
        parts.append(Markup('<path class="curve" d="{}" stroke-dasharray="{}"/>').format(_path(points), dash or "none"))
    if one.weights or (len(points) <= DOTTED and not one.thin):
        radii = [max(1.0, 10 * math.sqrt(weight)) for weight in one.weights] or [3.0] * len(points)
        for (x, y), (raw_x, raw_y), radius in zip(points, one.points, radii, strict=True):
            tooltip = printable(f"{one.name}: {raw_y:.1f} at {raw_x:.4g}")
            parts.append(
                Markup('<circle cx="{}" cy="{}" r="{:.1f}"><title>{}</title></circle>').format(x, y, radius, tooltip)
            )
    return Markup('<g class="series" style="{}">{}</g>').format(style, Markup("").join(parts))


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x} {y}" for x, y in points)


def _end_labels(ends: Sequence[tuple[Series, float, float]]) -> list[Markup]:
    """Return the labels at the ends of curves, moved apart where they would overlap; none if there is no room."""
    if len(ends) * GAP > HEIGHT - TOP - BOTTOM:
        return []
    ordered = sorted(ends, key=lambda end: end[2])
    heights = [y for _, _, y in ordered]
    for i in range(1, len(heights)):
        heights[i] = max(heights[i], heights[i - 1] + GAP)
    overflow = max(0.0, heights[-1] - (HEIGHT - BOTTOM)) if heights else 0.0
    for i in range(len(heights) - 1, -1, -1):
        limit = heights[i] - overflow if i == len(heights) - 1 else min(heights[i], heights[i + 1] - GAP)
        heights[i] = limit
    return [
        Markup('<text class="end" style="fill:var(--c{})" x="{}" y="{:.1f}">{}</text>').format(
            one.color % COLORS, x + 8, y + 4, printable(one.label)
        )
        for (one, x, _), y in zip(ordered, heights, strict=True)
    ]


def _text(x: float, y: float, text: object, anchor: str, kind: str = "tick") -> Markup:
    return Markup('<text class="{}" x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(
        kind, x, y, anchor, printable(text)
    )


def _vertical(y: float, text: str) -> Markup:
    return Markup(
        '<text class="label" transform="translate(11 {:.1f}) rotate(-90)" text-anchor="middle">{}</text>'
    ).format(y, printable(text))


def _round_up(value: float) -> float:
    """Return the first of 1, 2, 4, 6, 8, 10, 20, … that is at least `value`: the end of an axis with four intervals.

    >>> _round_up(0), _round_up(17), _round_up(61)
    (1.0, 20.0, 80.0)
    """
    if value <= 0:
        return 1.0
    steps = (factor * 10.0**power for power in itertools.count(-6) for factor in (1, 2, 4, 6, 8))
    return next(step for step in steps if step >= value)
