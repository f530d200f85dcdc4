"""Comparison of runs with the same seeds: paired differences to baselines, and accuracy against forgetting."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from pgp.evaluation import metrics
from pgp.evaluation.accuracy import LEGACY
from pgp.reports import style, tables
from pgp.reports.style import DIRECT, Look
from pgp.reports.tables import ResultRow
from pgp.runs.run import Run

STATISTICS = {name: tables.STATISTICS[name] for name in ("average_accuracy", "forgetting")}
HEAD = ("run", "readout", "seeds", *STATISTICS.values())
NOTE = (
    "In percent, mean ± standard deviation over seeds. Rows that begin with `minus` are differences to a baseline with"
    " the same seed, mean ± standard error of that mean."
)
CHANCE_NOTE = (
    "A difference below 4.3, 2.8 or 2.3 standard errors, with 3, 5 or 10 seeds, can be chance (Student's t, 95 %)."
)
FEW = 3
"""Maximum number of entries for which panels are small, and have the values of each entry beside its name."""
MARKS = "sD^vP*Xh"
"""Markers of baselines in the figure, by kind."""


@dataclass(frozen=True, eq=False)
class Entry:
    """One configuration in a comparison: its finished runs, by seed."""

    label: str
    runs: Mapping[int, Run]
    baselines: Mapping[str, Entry] = field(default_factory=dict)
    """Entries that this one is compared with, by name; empty for an entry that is only a baseline."""

    @functools.cached_property
    def matrices(self) -> dict[int, dict[str, Tensor]]:
        """Accuracy matrices of each run by readout, by seed."""
        return {seed: run.matrices() for seed, run in self.runs.items()}


class PairedDifference(NamedTuple):
    """Mean difference over the seeds that two entries have in common, and its standard error (None for one seed)."""

    seeds: int
    mean: float
    error: float | None


def paired(one: Mapping[int, float], other: Mapping[int, float]) -> PairedDifference | None:
    """Return the mean difference `one - other` over common seeds that measured both, or None if there are none.

    >>> difference = paired({0: 0.5, 1: 0.7, 2: 0.9}, {0: 0.4, 1: 0.4, 3: 0.1})
    >>> difference.seeds, round(difference.mean, 4), round(difference.error, 4)
    (2, 0.2, 0.1)
    """
    differences = [one[seed] - other[seed] for seed in sorted(one.keys() & other.keys())]
    differences = [difference for difference in differences if math.isfinite(difference)]
    if not differences:
        return None
    average, deviation = tables.mean_and_deviation(differences)
    n = len(differences)
    return PairedDifference(n, average, None if deviation is None else deviation / math.sqrt(n))


def frontier(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the Pareto-optimal points (forgetting, accuracy), from the least forgetting to the most.

    >>> frontier([(0.3, 0.8), (0.1, 0.5), (0.2, 0.4), (0.2, 0.7), (0.4, 0.8)])
    [(0.1, 0.5), (0.2, 0.7), (0.3, 0.8)]
    """
    best: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda point: (point[0], -point[1])):
        if not best or y > best[-1][1]:
            best.append((x, y))
    return best


def table(members: Sequence[Entry]) -> list[tuple[str, ...]]:
    """Return the rows under `HEAD`: each entry and readout, followed by its differences to its baselines."""
    return [row for member in members for column in columns(member) for row in _rows(member, column)]


def markdown(members: Sequence[Entry]) -> str:
    """Return the table as Markdown, with a note on how to read it."""
    versions = tables.version_note([run for member in members for run in member.runs.values()])
    notes = filter(None, [f"{NOTE} {CHANCE_NOTE}", versions])
    return "\n".join([tables.markdown_table(HEAD, table(members)), *(f"{note}\n" for note in notes)])


def columns(member: Entry) -> list[str]:
    """Return the readouts of an entry's runs, the headline first."""
    return list(next(iter(member.matrices.values()))) if member.runs else []


class Difference(NamedTuple):
    """Differences of a readout of an entry to one of its baselines."""

    baseline: str
    column: str
    """The readout."""
    other: str
    """The readout of the baseline: the same one, or its best."""
    values: dict[str, PairedDifference | None]
    """By metric; None if nothing can be compared."""

    @property
    def seeds(self) -> int:
        """Number of seeds that both have."""
        return max((one.seeds for one in self.values.values() if one), default=0)


def differences(member: Entry, column: str) -> list[Difference]:
    """Return the differences of a readout of an entry to each baseline that has a seed in common with it."""
    found = []
    for name, baseline in member.baselines.items():
        other = _comparable_column(baseline, column)
        if other is None:
            continue
        pairs = {figure: (_values(member, column, figure), _values(baseline, other, figure)) for figure in STATISTICS}
        one = Difference(name, column, other, {figure: paired(*values) for figure, values in pairs.items()})
        if one.seeds:
            found.append(one)
    return found


def _rows(member: Entry, column: str) -> Iterator[tuple[str, ...]]:
    line = _result_row(member, column)
    yield member.label, column, str(len(line.matrices)), *tables.format_row(line, STATISTICS)
    for one in differences(member, column):
        cells = [signed(difference) if difference else "" for difference in one.values.values()]
        readouts = column if one.other == column else f"{column}, {one.other}"
        yield f"minus {one.baseline}", readouts, str(one.seeds), *cells


def _comparable_column(baseline: Entry, column: str) -> str | None:
    """Return the readout of a baseline to compare with `column`: the same one, else the best of the same protocol."""
    own = columns(baseline)
    if column in own:
        return column
    means = {name: _result_row(baseline, name).spread("average_accuracy")[0] for name in own}
    measured = [name for name in own if name.endswith(LEGACY) == column.endswith(LEGACY) and math.isfinite(means[name])]
    return max(measured, key=lambda name: means[name], default=None)


def _result_row(member: Entry, column: str) -> ResultRow:
    matrices = [of_run[column] for _, of_run in sorted(member.matrices.items())]
    return ResultRow(member.label, column, matrices, [], [])


def _has_forgetting(line: ResultRow) -> bool:
    """Return whether forgetting was measured in several tasks."""
    return not line.is_single_task and math.isfinite(line.spread("forgetting")[0])


def _values(member: Entry, column: str, figure: str) -> dict[int, float]:
    """Return a metric of `pgp.evaluation.metrics` by seed; empty for the forgetting of a single task."""
    if figure == "forgetting" and _result_row(member, column).is_single_task:
        return {}
    return {seed: getattr(metrics, figure)(of_run[column]) for seed, of_run in member.matrices.items()}


def signed(difference: PairedDifference) -> str:
    """Return a difference in points with its sign, and its standard error if there are several seeds."""
    error = "" if difference.error is None else f" ± {100 * difference.error:.2f}"
    return f"{100 * difference.mean:+.2f}{error}"


@style.styled()
def draw_comparison(members: Sequence[Entry], path: Path) -> None:
    """Draw accuracy against forgetting as a PNG, with a panel for each readout.

    Entries are drawn with their standard deviation over seeds, baselines with open markers. An entry to the right of
    and below the frontier of baselines is worse than a baseline.
    """
    members = [member for member in members if member.runs]
    used_as_baseline = {baseline for member in members for baseline in member.baselines.values()}
    points = [member for member in members if member not in used_as_baseline] or members
    baselines = [member for member in members if member not in points]
    readouts = list(dict.fromkeys(column for member in points for column in columns(member)))
    looks = {member: style.look(number)._replace(dash="") for number, member in enumerate(points)}
    looks |= _baseline_looks(points, looks)
    for member in looks:
        if not _has_forgetting(_result_row(member, columns(member)[0])):
            looks[member] = Look(looks[member].colour, ":", "")
    key = {member.label: own for member, own in looks.items()} if len(looks) > DIRECT else {}
    wide = min(3, len(readouts))
    tall = -(-len(readouts) // wide)
    size = 0.75 if len(looks) <= FEW else 1.0
    width = max(5.2, (4.4 * size) * wide)
    height = 3.8 * size * tall + 0.3 + (style.legend_height(list(key), width) if key else 0)
    figure = style.new_figure(width, height)
    grid: Any = figure.subplots(tall, wide, squeeze=False)
    for axes in grid.flat[len(readouts) :]:
        axes.remove()
    for axes, column in zip(grid.flat, readouts, strict=False):
        _draw_panel(axes, column, looks, baselines, named=not key)
    if key:
        style.legend(figure, key, width)
    style.note(figure, _explanation(members, baselines), width)
    style.save_figure(figure, path)


def _baseline_looks(points: Sequence[Entry], looks: Mapping[Entry, Look]) -> dict[Entry, Look]:
    """Return an open marker for each baseline, by its kind, in the colour of its point.

    It is black if points share the baseline, or there is only one.
    """
    kinds = list(dict.fromkeys(kind for point in points for kind in point.baselines))
    found: dict[Entry, Look] = {}
    for point in points:
        for kind, baseline in point.baselines.items():
            is_shared = baseline in found or len(points) == 1
            colour = style.INK if is_shared else looks[point].colour
            found[baseline] = Look(colour, "", MARKS[kinds.index(kind) % len(MARKS)], is_open=True)
    return {baseline: own for baseline, own in found.items() if baseline.runs and baseline not in points}


def _explanation(members: Sequence[Entry], baselines: Sequence[Entry]) -> str:
    """Describe what markers and lines mean."""
    words = []
    if baselines:
        words.append(
            "Open markers: baselines, in the colour of their point, or black. Grey steps: their frontier; below and"
            " to the right of it, a baseline is better."
        )
    rows = [_result_row(member, column) for member in members for column in columns(member)]
    if any(line.is_single_task for line in rows):
        words.append("Dotted: learned as one task, which cannot be forgotten.")
    if not all(_has_forgetting(line) or line.is_single_task for line in rows):
        words.append("Dotted: forgetting was not measured.")
    if max(len(member.runs) for member in members) > 1:
        words.append("Means over seeds; error bars: ± 1 standard deviation.")
    return " ".join(words)


def _draw_panel(
    axes: Any, column: str, looks: Mapping[Entry, Look], baselines: Sequence[Entry], *, named: bool
) -> None:
    """Draw one readout: points, baselines with open markers, and the frontier of these."""
    names = style.short_names([member.label for member in looks])
    baseline_points, levels = [], []
    for (member, own), name in zip(looks.items(), names, strict=True):
        other = _comparable_column(member, column) if member in baselines else column
        if other is None or other not in columns(member):
            continue
        line = _result_row(member, other)
        if not math.isfinite(line.spread("average_accuracy")[0]):
            continue
        if not _has_forgetting(line):
            levels.append((100 * line.spread("average_accuracy")[0], name, own))
            continue
        x, y = _draw_point(axes, line, own)
        if named:
            values = f"\n{y:.1f} %, {x:.1f} points" if len(looks) <= FEW else ""
            style.name_point(axes, x, y, f"{name}{values}", own)
        if member in baselines:
            baseline_points.append((x, y))
    axes.margins(0.15)
    for y, _, own in levels:
        axes.axhline(y, color=own.colour, linestyle=":", linewidth=1)
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    left, high = max(left, -0.05 * right), min(high, 101)
    if best := frontier(baseline_points):
        corners = [(best[0][0], low)]
        for x, y in best:
            corners += [(x, corners[-1][1]), (x, y)]
        corners.append((right, best[-1][1]))
        axes.plot(*zip(*corners, strict=True), color=style.FAINT, linewidth=0.8)
    axes.set(xlim=(left, right), ylim=(low, high), xlabel="forgetting (points)", ylabel="average accuracy (%)")
    for y, name, own in levels if named else []:
        style.name_line(axes, right, y, name, own)
    axes.set_title(column)
    axes.grid()


def _draw_point(axes: Any, line: ResultRow, own: Look) -> tuple[float, float]:
    """Draw a point with its standard deviations, and return its (forgetting, accuracy) in percent."""
    accuracy, accuracy_std = line.spread("average_accuracy")
    forgotten, forgotten_std = line.spread("forgetting")
    x, y = 100 * forgotten, 100 * accuracy
    axes.errorbar(
        x, y, xerr=100 * (forgotten_std or 0), yerr=100 * (accuracy_std or 0), linestyle="", elinewidth=0.8,
        color=own.colour, marker=own.marker, markersize=5, markerfacecolor=own.fill, zorder=3,
    )  # fmt: skip
    return x, y
