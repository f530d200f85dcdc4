"""Results of the drift meter over the tasks of runs, as a table and a figure. Only run folders are read."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from pgp.reports import style
from pgp.reports.style import DIRECT, Bars, Look, save_figure, short_names, whole_numbers
from pgp.reports.tables import group_runs, markdown_table
from pgp.runs.checkpoint import reading
from pgp.runs.run import Run

Event = dict[str, Any]
"""The event that is logged at the end of a task."""


class DriftHistory(NamedTuple):
    """Results of runs that differ only in their seed, by task."""

    label: str
    runs: list[dict[int, Event]]
    """Events of each run, by task."""

    @property
    def end(self) -> int:
        """The last task that any of the runs has finished."""
        return max(task for events in self.runs for task in events)

    @property
    def finals(self) -> list[Event]:
        """The events of the last task, of all runs that have finished it."""
        return [events[self.end] for events in self.runs if self.end in events]

    def curve(self, figure: Callable[[Event], float | None]) -> dict[int, float]:
        """Return the mean of a statistic over the runs, by number of tasks learned.

        Tasks without a value are left out.
        """
        return {task: statistics.mean(of_runs) for task, of_runs in self._values(figure).items()}

    def deviations(self, figure: Callable[[Event], float | None]) -> dict[int, float]:
        """Return the standard deviation of a statistic over at least two runs, by number of tasks learned."""
        return {task: statistics.stdev(runs) for task, runs in self._values(figure).items() if len(runs) > 1}

    def _values(self, figure: Callable[[Event], float | None]) -> dict[int, list[float]]:
        """Return the values of the runs that have one, by number of tasks learned."""
        tasks = sorted({task for events in self.runs for task in events})
        values = {task + 1: [figure(events[task]) for events in self.runs if task in events] for task in tasks}
        measured = {task: [value for value in of_runs if value is not None] for task, of_runs in values.items()}
        return {task: of_runs for task, of_runs in measured.items() if of_runs}

    def last(self, figure: Callable[[Event], float | None]) -> float | None:
        """Return the mean of a statistic after the last task, or None if no run has a value."""
        return self.curve(figure).get(self.end + 1)


def drift_histories(runs: Sequence[Run]) -> list[DriftHistory]:
    """Return the history of each group of runs that measured drift."""
    out = []
    for label, members in group_runs(runs):
        events = [_events(run) for run in members]
        history = DriftHistory(label, [of_run for of_run in events if of_run])
        if any(percent_curve(history, heading) for heading in PANELS):  # without test images, nothing is measured
            out.append(history)
    return out


def _events(run: Run) -> dict[int, Event]:
    """Return the event at the end of each task, by task; empty if the run did not measure drift.

    Raises:
        RunError: If the log does not hold what pgp writes there.
    """
    events = {event["task"]: event for event in run.events("task") if "drift" in event}
    if events:
        with reading(run.log_file.path):  # compute every statistic once, so that an error names the file of this run
            history = DriftHistory("", [events])
            for statistic in STATISTICS.values():
                history.curve(statistic)
            for key in PARAMETERS:
                by_parameter(history, key)
            _usage(history)
    return events


def mean_of(values: Sequence[float | None] | Mapping[str, float | None]) -> float | None:
    """Return the mean of the values that were measured; None if none was."""
    measured = [v for v in (values.values() if isinstance(values, Mapping) else values) if v is not None]
    return statistics.mean(measured) if measured else None


def complete_mean(values: Sequence[float | None]) -> float | None:
    """Return the mean of the values; None if one of them was not measured."""
    return None if None in values else mean_of(values)


def _responses(event: Event) -> float | None:
    return mean_of([mean_of(changes) for changes in event["drift"]["responses"].values()])


def _headline(figure: str) -> Callable[[Event], float | None]:
    """Return a function for a statistic of the first readout, averaged over tasks if it has a value for each."""

    def of(event: Event) -> float | None:
        value: Any = next(iter(event.get(figure, {}).values()), None)  # some are not logged in every setting
        return complete_mean(value) if isinstance(value, list) else value

    return of


STATISTICS: dict[str, Callable[[Event], float | None]] = {
    "features": lambda event: mean_of(event["drift"]["features"]),
    "logits": lambda event: mean_of(event["drift"]["logits"]),
    "protected responses": _responses,
    "other prompts": lambda event: mean_of(event["drift"].get("changed", [])),
    "energy held": lambda event: mean_of(event["drift"]["held"]),
    "removed": lambda event: mean_of(event["drift"]["removed"]),
    "leak": lambda event: mean_of(event["drift"]["leak"]),
    "forgetting": _headline("forgetting"),
    "forgetting, task known": _headline("forgetting_within"),
    "task identified": _headline("identified"),
}
"""Statistics at the end of a task, by heading.

First come changes since the end of each old task, averaged over old tasks (and protected parameters). Then comes what
the projection did, averaged over protected parameters, and then the accuracy of the first readout.
"""

PANELS = {
    "features": ("change of old features", "relative change (%)"),
    "logits": ("change of old logits", "relative change (%)"),
    "protected responses": ("change of old protected responses", "relative change (%)"),
    "other prompts": ("old images that select other prompts", "images (%)"),
    "forgetting": ("forgetting", "forgetting (points)"),
    "forgetting, task known": ("forgetting if the task is given", "forgetting (points)"),
    "task identified": ("images with correctly predicted task", "images (%)"),
}
"""Title and axis of each statistic that is drawn over tasks, by heading."""

NEED_TWO_TASKS = ("forgetting", "forgetting, task known", "task identified")
"""Statistics of at least two tasks, left out after the first one."""

SUMMARIES = {
    "energy held": ("old inputs in the protected subspace", "energy (%)"),
    "removed": ("removed by the projection", "energy (%)"),
    "leak": ("leak: a task's change in the protected subspace", "energy (%)"),
}
"""Title and axis of each other statistic, of which drift.png shows every protected parameter instead of the mean."""

PARAMETERS = {
    "rank": ("rank of the protected subspace", "directions"),
    "held": ("old inputs in the subspace", "energy (%)"),
    "gradients": ("gradients in the subspace", "energy (%)"),
    "updates": ("updates in the subspace", "energy (%)"),
    "leak": ("leak: a task's change in the subspace", "energy (%)"),
}
"""Title and axis of each statistic of protected parameters, by key in the log; see `pgp.analysis.drift`."""

FEW = 2
"""Maximum number of tasks for which statistics are drawn as bars: a curve would have a single point."""


def markdown(table: Sequence[DriftHistory]) -> str:
    """Return a table of all statistics after the last task, in percent."""
    rows = []
    for history in table:
        values = [history.last(figure) for figure in STATISTICS.values()]
        rows.append([history.label, str(len(history.finals)), *("" if v is None else f"{100 * v:.2f}" for v in values)])
    return markdown_table(["run", "seeds", *STATISTICS], rows)


@style.styled()
def draw_drift(table: Sequence[DriftHistory], path: Path) -> None:
    """Draw every statistic over tasks, and each protected parameter and prompt after the last task, as a PNG.

    Statistics that no run has are left out. For two tasks, all statistics are bars in one panel.
    """
    looks = [style.look(number) for number in range(len(table))]
    labels = [history.label for history in table]
    headings = [heading for heading in PANELS if any(percent_curve(history, heading) for history in table)]
    keys = [key for key in PARAMETERS if any(by_parameter(history, key) for history in table)]
    spaces = list(dict.fromkeys(space for history in table for key in keys for space in by_parameter(history, key)))
    few = max(history.end for history in table) < FEW
    names = short_names(labels, columns=14) if len(table) > 1 else [""]
    direct = not few and len(table) <= DIRECT and sum(name.count("\n") + 2 for name in names) <= 12
    legend = {} if direct or len(table) == 1 else dict(zip(labels, looks, strict=True))

    width = 10.5
    wide = min(4, len(headings))
    heights = [0.17 * max(1, len(table) * 0.75) * len(headings) + 0.8 if few else 2.1 * -(-len(headings) // wide)]
    if keys:
        heights.append(0.15 * min(len(spaces) * max(1, 0.8 * len(table)), style.NAMED) + 0.9)
    if usage := any(_usage(history) for history in table):
        heights.append(1.6)
    heights[0] += style.legend_height(labels, width) if legend else 0
    heights[-1] += 0.25
    figure = style.new_figure(width, sum(heights))
    parts: Any = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    if legend:
        style.legend(parts[0], legend, width)
    if few:
        _draw_summary(parts[0].subplots(), table, looks, headings)
    else:
        _draw_curves(parts[0], table, looks, headings, wide, names if direct else [])
    if keys:
        _draw_parameters(parts[1], table, looks, keys, spaces)
    if usage:
        _draw_prompts(parts[-1].subplots(), table, looks)
    style.note(parts[-1], _explanation(table, few), width)
    save_figure(figure, path)


def _explanation(table: Sequence[DriftHistory], few: bool) -> str:
    """Describe what colours, curves and bars mean."""
    words = [] if len(table) == 1 else ["Colour: run."]
    if len(table) > len(style.COLOURS):
        words.append("Bars in the order of the legend.")
    words.append("Statistics of old tasks are means over these tasks; bars show the state after the last task.")
    if max(len(history.runs) for history in table) > 1:
        words.append(f"Means over seeds; {'whiskers' if few else 'bands'}: ± 1 standard deviation.")
    return " ".join(words)


def percent_curve(history: DriftHistory, heading: str) -> dict[int, float]:
    """Return a statistic of `STATISTICS` in percent by number of tasks learned; without those that need two tasks."""
    curve = history.curve(STATISTICS[heading])
    return {task: 100 * value for task, value in curve.items() if task > 1 or heading not in NEED_TWO_TASKS}


def _deviations(history: DriftHistory, heading: str) -> dict[int, float]:
    curve, deviations = percent_curve(history, heading), history.deviations(STATISTICS[heading])
    return {task: 100 * deviation for task, deviation in deviations.items() if task in curve}


def _wrapped(title: str) -> str:
    return textwrap.fill(title, 28)


def _unit(heading: str) -> str:
    return " points" if "points" in PANELS[heading][1] else " %"


def _draw_summary(axes: Any, table: Sequence[DriftHistory], looks: Sequence[Look], headings: Sequence[str]) -> None:
    """Draw every statistic after the last task as a bar."""
    series = []
    for history, own in zip(table, looks, strict=True):
        values = [percent_curve(history, heading).get(history.end + 1) for heading in headings]
        deviations = [_deviations(history, heading).get(history.end + 1) for heading in headings]
        series.append(Bars(values, deviations, own))
    style.draw_bars(
        axes, [PANELS[heading][0] for heading in headings], series, [_unit(heading) for heading in headings]
    )
    units = {PANELS[heading][1] for heading in headings}
    axes.set(xlabel=units.pop() if len(units) == 1 else "%, forgetting in points")


def _draw_curves(
    part: Any,
    table: Sequence[DriftHistory],
    looks: Sequence[Look],
    headings: Sequence[str],
    wide: int,
    names: Sequence[str],
) -> None:
    """Draw every statistic over tasks in a panel of its own, `names` at the ends of its curves."""
    grid: Any = part.subplots(-(-len(headings) // wide), wide, squeeze=False)
    for axes in grid.flat[len(headings) :]:
        axes.remove()
    highest: dict[str, float] = {}
    for axes, heading in zip(grid.flat, headings, strict=False):
        title, unit = PANELS[heading]
        for number, (history, own) in enumerate(zip(table, looks, strict=True)):
            curve = percent_curve(history, heading)
            style.draw_curve(axes, curve, _deviations(history, heading), own)
            if names and curve:
                x = max(curve)
                value = f"{curve[x]:.1f}{_unit(heading)}"
                style.name_line(axes, x, curve[x], f"{names[number]}\n{value}".strip(), own)
        axes.set(xlabel="tasks learned", ylabel=unit)
        axes.set_title(_wrapped(title))
        whole_numbers(axes)
        axes.grid(axis="y")
        highest[unit] = max(highest.get(unit, 1.0), axes.get_ylim()[1])
    for axes, heading in zip(grid.flat, headings, strict=False):
        together = PANELS[heading][1] == "forgetting (points)"
        axes.set_ylim(0, highest["forgetting (points)"] if together else max(1.0, axes.get_ylim()[1]))


def _draw_parameters(
    part: Any, table: Sequence[DriftHistory], looks: Sequence[Look], keys: Sequence[str], spaces: Sequence[str]
) -> None:
    """Draw the statistics of each protected parameter as bars, side by side."""
    panels: Any = part.subplots(1, len(keys), sharey=True, squeeze=False)[0]
    for axes, key in zip(panels, keys, strict=True):
        title, unit = PARAMETERS[key]
        series = []
        for history, own in zip(table, looks, strict=True):
            values = by_parameter(history, key)
            if any(by_parameter(history, one) for one in keys):
                series.append(Bars([values.get(space) for space in spaces], [None] * len(spaces), own))
        style.draw_bars(axes, spaces, series, ["" if key == "rank" else " %"] * len(spaces))
        axes.set_title(_wrapped(title))
        axes.set(xlabel=unit)


def _draw_prompts(axes: Any, table: Sequence[DriftHistory], looks: Sequence[Look]) -> None:
    """Draw the fraction of images that select each prompt: as bars, or as dots if there are many."""
    prompts = max(len(_usage(history)) for history in table)
    thick = 0.8 / len(table)
    for number, (history, own) in enumerate(zip(table, looks, strict=True)):
        usage = [100 * fraction for fraction in _usage(history)]
        x = range(1, len(usage) + 1)
        if prompts * len(table) <= 2 * style.NAMED:
            axes.bar([i - 0.4 + thick * (number + 0.5) for i in x], usage, 0.9 * thick, color=own.colour)
        else:
            axes.plot(x, usage, linestyle="", marker=own.marker, markersize=2.5, color=own.colour)
    axes.set_title("images that select each prompt")
    axes.set(xlabel="prompt", ylabel="images (%)", xlim=(0.5, prompts + 0.5))
    axes.set_ylim(bottom=0)
    whole_numbers(axes)
    if prompts <= 12:
        axes.set_xticks(range(1, prompts + 1))
    axes.grid(axis="y")


def by_parameter(history: DriftHistory, key: str) -> dict[str, float]:
    """Return a rank, or a fraction in percent, of each protected parameter after the last task: the mean over runs."""

    def values_of(event: Event) -> dict[str, float | None]:
        values: dict[str, float | None] = event["ranks"] if key == "rank" else event["drift"].get(key, {})
        return values

    means = {}
    for space in dict.fromkeys(space for event in history.finals for space in values_of(event)):
        mean = history.last(partial(lambda space, event: values_of(event).get(space), space))
        if mean is not None:
            means[space] = mean if key == "rank" else 100 * mean
    return means


def _usage(history: DriftHistory) -> list[float]:
    """Return the fraction of images that select each prompt after the last task, averaged over runs.

    It is empty for methods that do not select prompts.
    """
    of_runs = [event["drift"].get("usage", []) for event in history.finals]
    return [statistics.mean(fractions) for fractions in zip(*of_runs, strict=True)]
