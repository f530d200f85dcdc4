"""How every figure looks: colours and line styles, names beside lines and points, notes, and writing as a PNG."""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import re
import textwrap
import unicodedata
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.style
import numpy as np
from matplotlib import font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Annotation, Text
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Bbox

from pgp.system import storage
from pgp.system.escaping import printable

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Colours that the colour-blind tell apart (Okabe and Ito, 2008), without yellow, too light, and black."""
INK, FAINT = "#222222", "#767676"
"""Colours of text and baselines, and of what only guides the eye."""
MARKERS = "osD^vP"
"""Markers: the next one when the colours are used up."""
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (7, 2, 1, 2)), (0, (3, 1, 1, 1, 1, 1)))
"""Line styles."""

DIRECT = 8
"""Maximum number of names written beside lines or points; if there are more, there is a legend."""
DOTTED = 20
"""Maximum number of points for which a curve is drawn with dots."""
NAMED = 48
"""Maximum number of names at an axis; if there are more, only every second or third is written."""
COLUMNS, LINES = 28, 3
"""A name is broken into lines of this many columns, and cut in the middle if it is longer than this many lines."""

BREAKS = (r",\s", r"\s", r"[,/_+-]")
"""Where a name may be broken into lines, the best first."""

MARK = "\u200e"
"""The left-to-right mark of Unicode."""

TEXT, SMALL = 8, 7
"""Sizes of text in points."""
DPI = 160
STYLE = {
    "font.size": TEXT, "axes.titlesize": TEXT, "axes.labelsize": TEXT, "xtick.labelsize": SMALL,
    "ytick.labelsize": SMALL, "legend.fontsize": SMALL, "text.color": INK, "axes.labelcolor": INK,
    "axes.edgecolor": FAINT, "axes.linewidth": 0.6, "xtick.color": FAINT, "ytick.color": FAINT,
    "xtick.labelcolor": INK, "ytick.labelcolor": INK, "xtick.major.width": 0.6, "ytick.major.width": 0.6,
    "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True, "grid.color": "#DDDDDD",
    "grid.linewidth": 0.5, "lines.linewidth": 1.4, "lines.markersize": 3.5, "axes.titlelocation": "left",
    "legend.frameon": False, "text.parse_math": False,
}  # fmt: skip
"""Settings of matplotlib. A dollar sign in a name never begins a formula."""
FONTS = (
    "DejaVu Sans", "Noto Sans CJK JP", "Noto Sans CJK SC", "Noto Sans JP", "Noto Sans SC", "Source Han Sans",
    "WenQuanYi Zen Hei", "IPAGothic", "Hiragino Sans", "PingFang SC", "Yu Gothic", "Microsoft YaHei", "Malgun Gothic",
    "Apple SD Gothic Neo", "Noto Sans Devanagari", "Noto Sans Thai", "Nirmala UI", "Arial Unicode MS",
)  # fmt: skip
"""Typefaces, in the order in which they are asked for a character; those that are not installed are passed over."""


class Look(NamedTuple):
    """How a run is drawn."""

    colour: str
    dash: Any = "-"
    marker: str = "o"
    is_open: bool = False
    """Whether the marker is only an outline."""

    @property
    def fill(self) -> str:
        """The colour inside the marker."""
        return "white" if self.is_open else self.colour


def look(number: int, dash: int = 0) -> Look:
    """Return the look of the run `number`, with the line style `dash`; the marker changes after the last colour."""
    marker = MARKERS[number // len(COLOURS) % len(MARKERS)]
    return Look(COLOURS[number % len(COLOURS)], DASHES[dash % len(DASHES)], marker)


@contextlib.contextmanager
def styled() -> Iterator[None]:
    """Draw in the style of this module, whatever the settings of matplotlib are; also a decorator."""
    with matplotlib.style.context(["default", {**STYLE, "font.family": list(_installed())}]):
        yield


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of this size in inches."""
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Arrange the names in a figure and write it as a PNG, atomically."""
    arrange(figure)
    content = io.BytesIO()
    FigureCanvasAgg(figure).print_png(content)
    storage.write(path, content.getvalue())


# text


@functools.cache
def _installed() -> tuple[str, ...]:
    installed = set(font_manager.get_font_names())
    return tuple(name for name in FONTS if name in installed)


@functools.cache
def _has_glyph(char: str) -> bool:
    return any(
        font_manager.get_font(font_manager.findfont(name)).get_char_index(ord(char)) > 0 for name in _installed()
    )


def readable(text: object) -> str:
    r"""Return `text` as one line of a figure; characters that no typeface has become escapes.

    >>> print(readable("5$ caf\u00e9\n"))
    5$ café\n
    """
    text = printable(text)
    return "".join(c if _has_glyph(c) else c.encode("unicode_escape").decode() for c in text)


def short_names(names: Sequence[object], columns: int = COLUMNS, lines: int = LINES) -> list[str]:
    r"""Return names in at most `lines` lines of `columns` columns, with all that distinguishes them.

    If they are too long for two lines, the beginning that they share is left out up to a few words, and then the
    middle. Different names stay different, if need be in more lines.

    >>> short_names(["energy 0.9", "joint"])
    ['energy 0.9', 'joint']
    >>> short_names(["projection.energy 0.9, space union", "projection.energy 0.9, space sum"], columns=15)
    ['…space union', '…space sum']
    """
    texts = [readable(name) for name in names]
    long = {text for text in texts if _columns(text) > columns * min(2, lines)}
    shared = _shared_beginning(long) if len(long) > 1 else ""
    longest = min((len(text) for text in long), default=0) - columns // 2  # some of the words that follow stay
    ends = (match.end() for match in re.finditer(r"[\s,/_-]", shared))
    shared = shared[: max((end for end in ends if end <= longest), default=0)]
    rest = {text: f"…{text.removeprefix(shared)}" if shared and text in long else text for text in dict.fromkeys(texts)}
    for limit in itertools.count(columns * lines, columns):
        short = {text: _cut_middle(part, limit) for text, part in rest.items()}
        if len(set(short.values())) == len(short):
            return [_left_to_right(_broken(short[text], columns)) for text in texts]
    raise AssertionError


def _shared_beginning(texts: Collection[str]) -> str:
    pairs = zip(min(texts), max(texts), strict=False)
    return "".join(one for one, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def _left_to_right(text: str) -> str:
    """Mark the lines of a text with Hebrew or Arabic, so that what follows a name is drawn to its right."""
    if any(unicodedata.bidirectional(char) in ("R", "AL") for char in text) and _has_glyph(MARK):
        return "\n".join(f"{MARK}{line}{MARK}" for line in text.split("\n"))
    return text


def name_width(names: Sequence[str]) -> float:
    """Return the width in inches of the widest of these names, broken into lines as `short_names` does."""
    return 0.065 * max((_columns(line) for name in names for line in name.split("\n")), default=0)


def _columns(text: str) -> int:
    """Return the width of a text, in columns of a Latin letter."""
    return sum(_width(char) for char in text)


def _width(char: str) -> int:
    return 0 if unicodedata.combining(char) or char == MARK else 1 + (unicodedata.east_asian_width(char) in "WF")


def _cut_middle(text: str, limit: int) -> str:
    while _columns(text) > limit:
        half = len(text) // 2
        text = f"{text[: half - 1].rstrip('…')}…{text[half + 1 :].lstrip('…')}"
    return text


def _broken(text: str, columns: int) -> str:
    """Break a text into lines: after a comma if it is in their second half, else a space, else a sign."""
    lines, line = [], ""
    for char in text:
        if _columns(line + char) > columns:
            ends = [max((match.end() for match in re.finditer(sign, line)), default=0) for sign in BREAKS]
            cut = next((end for end in ends if end > len(line) // 2), len(line))
            lines.append(line[:cut].rstrip())
            line = line[cut:]
        line += char
    return "\n".join([*lines, line])


# curves and bars


def whole_numbers(axes: Any) -> None:
    """Put ticks of the x-axis at whole numbers only, at most ten of them."""
    axes.xaxis.set_major_locator(MaxNLocator(nbins=10, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))


def draw_curve(axes: Any, means: Mapping[int, float], deviations: Mapping[int, float | None], own: Look) -> None:
    """Draw a curve, with a band of one standard deviation where there is one."""
    x = list(means)
    style: dict[str, Any] = {"color": own.colour, "linestyle": own.dash, "marker": own.marker}
    if len(x) > DOTTED:  # dots would hide the line
        style |= {"marker": "", "linewidth": 1} if own.marker == MARKERS[0] else {"markevery": len(x) // 8}
    axes.plot(x, list(means.values()), **style)
    spread = {x: deviation for x, deviation in deviations.items() if deviation is not None}
    if spread:
        low, high = ([means[x] + sign * deviation for x, deviation in spread.items()] for sign in (-1, 1))
        axes.fill_between(list(spread), low, high, color=own.colour, alpha=0.15, linewidth=0)


class Bars(NamedTuple):
    """One bar for each row of a chart, and the length of its whisker."""

    values: Sequence[float | None]
    deviations: Sequence[float | None]
    own: Look


def draw_bars(axes: Any, rows: Sequence[str], series: Sequence[Bars], units: Sequence[str]) -> None:
    """Draw horizontal bars from the top down, with their values and `units` if they are few."""
    thick = 0.8 / len(series)
    for place, bars in enumerate(series):
        shown = [(i, value, bars.deviations[i] or 0) for i, value in enumerate(bars.values) if value is not None]
        ys = [i - 0.4 + thick * (place + 0.5) for i, _, _ in shown]
        widths, spread = [value for _, value, _ in shown], [deviation for _, _, deviation in shown]
        whiskers = {"xerr": spread, "error_kw": {"elinewidth": 0.8, "ecolor": INK}} if any(spread) else {}
        axes.barh(ys, widths, 0.9 * thick, color=bars.own.colour, **whiskers)
        for (i, value, deviation), y in zip(shown, ys, strict=True) if len(rows) * len(series) <= NAMED else []:
            number = f"{value:.1f}" if units[i] else f"{value:.1f}".removesuffix(".0")
            axes.annotate(
                f"{number}{units[i]}", (value + deviation, y), (3, 0), textcoords="offset points", va="center",
                fontsize=SMALL, annotation_clip=False,
            )  # fmt: skip
    named = range(0, len(rows), -(-len(rows) // NAMED))
    names = short_names(rows, columns=40, lines=1)
    axes.set_yticks(named, [names[i] for i in named])
    axes.set(ylim=(len(rows) - 0.5, -0.5), xlim=(0, None))
    axes.set_xlim(0, 1.02 * axes.get_xlim()[1])
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")


# names beside lines and points


def name_line(axes: Any, x: float, y: float, text: str, own: Look, side: str = "right") -> None:
    """Write `text` beside the axes, joined to the end of a line at `x`, `y`; `arrange` moves it up or down."""
    at, align = (1.02, "left") if side == "right" else (-0.02, "right")
    line = {"arrowstyle": "-", "color": own.colour, "linewidth": 0.6, "shrinkA": 1, "shrinkB": 3}
    line["relpos"] = (0 if side == "right" else 1, 0.5)
    axes.annotate(
        text, (x, y), (at, y), xycoords="data", textcoords=("axes fraction", "data"), ha=align, va="center",
        fontsize=TEXT, linespacing=1, arrowprops=line, annotation_clip=False, gid=side,
    )  # fmt: skip


def name_point(axes: Any, x: float, y: float, text: str, own: Look) -> None:
    """Write `text` near the point `x`, `y`; `arrange` finds a free place for it."""
    line = {"arrowstyle": "-", "color": own.colour, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 4}
    axes.annotate(
        text, (x, y), (x, y), xycoords="data", textcoords="figure pixels", ha="left", va="bottom", fontsize=SMALL,
        linespacing=1, arrowprops=line, annotation_clip=False, gid="point", in_layout=False,
    )  # fmt: skip


def legend(figure: Any, looks: Mapping[str, Look], width: float) -> None:
    """Put a legend above a figure or subfigure that is `width` inches wide."""
    names = short_names(list(looks))
    handles = [
        Line2D([], [], color=own.colour, linestyle=own.dash, marker=own.marker, markerfacecolor=own.fill)
        for own in looks.values()
    ]
    drawn = figure.legend(
        handles, [""] * len(names), loc="outside upper left", ncols=_legend_grid(names, width)[1], handlelength=3
    )
    for text, name in zip(drawn.get_texts(), names, strict=True):
        text.set_text(name)  # matplotlib leaves out a label that begins with an underscore


def legend_height(names: Sequence[str], width: float) -> float:
    """Return the height in inches of a legend that is `width` inches wide."""
    short = short_names(names)
    return 0.2 + 0.13 * _legend_grid(short, width)[0] * max(name.count("\n") + 1 for name in short)


def _legend_grid(names: Sequence[str], width: float) -> tuple[int, int]:
    """Return the rows and columns of a legend."""
    columns = max(1, int(width / (0.8 + name_width(names))))
    return -(-len(names) // columns), columns


def note(figure: Any, text: str, width: float) -> None:
    """Write a note under a figure or subfigure that is `width` inches wide."""
    wrapped = textwrap.fill(text, max(20, int(width / 0.056)))
    figure.supxlabel(wrapped, x=0.01, ha="left", fontsize=SMALL, color=FAINT)


def arrange(figure: Figure) -> None:
    """Lay out a figure, and move names so that they do not overlap."""
    engine: Any = figure.get_layout_engine()
    for _ in range(2):  # a layout depends on the size of what it lays out
        engine.execute(figure)
    figure.set_layout_engine("none")
    renderer: Any = FigureCanvasAgg(figure).get_renderer()
    for axes in figure.axes:
        axes.apply_aspect()
        named: dict[str | None, list[Any]] = {}
        for text in axes.texts:
            named.setdefault(text.get_gid(), []).append(text)
        for side in ("left", "right"):
            if texts := named.get(side):
                _spread_names(axes, texts, renderer)
        if texts := named.get("point"):
            _place_names(axes, texts, renderer)


def _spread_names(axes: Any, texts: Sequence[Any], renderer: Any) -> None:
    centers = [axes.transData.transform(text.xy)[1] for text in texts]
    heights = [_extent(text, renderer).height + 0.04 * DPI for text in texts]
    box = axes.get_window_extent(renderer)
    for text, center in zip(texts, spread(centers, heights, box.y0, box.y1), strict=True):
        text.xyann = (text.xyann[0], axes.transData.inverted().transform((0, center))[1])


def spread(centers: Sequence[float], heights: Sequence[float], low: float, high: float) -> list[float]:
    """Return new centres of boxes, as near to the old ones as possible, so that the boxes do not overlap.

    The boxes lie between `low` and `high` if they fit.

    >>> spread([5, 5, 9], [2, 2, 2], 0, 10)
    [4.0, 6.0, 9.0]
    >>> spread([0, 0], [2, 2], 0, 10)
    [1.0, 3.0]
    """
    order = sorted(range(len(centers)), key=lambda i: centers[i])
    groups: list[tuple[list[int], float, float]] = []  # boxes that touch, their bottom and their height
    for i in order:
        members, height = [i], heights[i]
        bottom = _clamp(centers[i] - height / 2, low, high - height)
        while groups and groups[-1][1] + groups[-1][2] > bottom:
            below, _, more = groups.pop()
            members, height = below + members, more + height
            bottoms = itertools.accumulate([0.0, *(heights[j] for j in members[:-1])])
            wanted = [centers[j] - heights[j] / 2 - at for j, at in zip(members, bottoms, strict=True)]
            bottom = _clamp(sum(wanted) / len(wanted), low, high - height)
        groups.append((members, bottom, height))
    out = [0.0] * len(centers)
    for members, bottom, _ in groups:
        for j in members:
            out[j] = bottom + heights[j] / 2
            bottom += heights[j]
    return out


def _clamp(value: float, low: float, high: float) -> float:
    return max(low, min(value, high))


def _extent(name: Annotation, renderer: Any) -> Bbox:
    """Return the box of a name, without the line to its point."""
    return Text.get_window_extent(name, renderer)


def _place_names(axes: Any, texts: Sequence[Any], renderer: Any) -> None:
    """Move each name to the free place inside the axes that is nearest to its point."""
    inside = axes.get_window_extent(renderer)
    drawn = _drawn_points(axes)
    points = [axes.transData.transform(text.xy) for text in texts]
    radius = 5 * DPI / 72
    taken = [Bbox.from_extents(x - radius, y - radius, x + radius, y + radius) for x, y in points]
    names: list[Bbox] = []
    for text, (x, y) in zip(texts, points, strict=True):
        extent = _extent(text, renderer)
        width, height = extent.width + radius / 2, extent.height + radius / 2
        places = [(x + radius, y - height / 2), (x - radius - width, y - height / 2)]
        places += itertools.product(
            np.linspace(inside.x0, inside.x1 - width, 41), np.linspace(inside.y0, inside.y1 - height, 61)
        )
        places.sort(key=partial(_gap, width=width, height=height, x=x, y=y))
        boxes = [Bbox.from_bounds(*place, width, height) for place in places]
        free = [box for box in boxes if inside.x0 <= box.x0 and box.x1 <= inside.x1 and not box.count_overlaps(taken)]
        clear = [box for box in free if not box.count_contains(drawn)]
        direct = (box for box in clear if not _crosses(box, (x, y), names))
        box = next(direct, (clear or free or boxes)[0])
        taken.append(box)
        names.append(box)
        drawn = np.concatenate([drawn, _line_to(box, (x, y))])
        text.xyann = (box.x0 + radius / 4, box.y0 + radius / 4)


def _crosses(box: Bbox, point: tuple[float, float], names: Sequence[Bbox]) -> bool:
    """Return whether the line from a name's box to its point crosses another name."""
    line = _line_to(box, point)
    return any(other.count_contains(line) for other in names)


def _line_to(box: Bbox, point: tuple[float, float]) -> Any:
    return np.linspace(((box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2), point, 50)


def _drawn_points(axes: Any) -> Any:
    """Return points along every line and error bar, in pixels, `(N, 2)`."""
    lines = [line.get_transform().transform(line.get_xydata()) for line in axes.lines]
    for collection in axes.collections:
        if isinstance(collection, LineCollection):  # error bars
            lines += [axes.transData.transform(segment) for segment in collection.get_segments()]
    out = [np.zeros((0, 2))]
    for corners in lines:
        for start, end in itertools.pairwise(corners):
            out.append(np.linspace(start, end, 2 + int(np.hypot(*(end - start)) / 4)))
    return np.concatenate(out)


def _gap(place: tuple[float, float], *, width: float, height: float, x: float, y: float) -> float:
    """Return the squared distance of a point from a box whose lower left corner is `place`."""
    dx = max(place[0] - x, x - place[0] - width, 0)
    dy = max(place[1] - y, y - place[1] - height, 0)
    return dx * dx + dy * dy
