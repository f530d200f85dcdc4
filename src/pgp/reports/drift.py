"""Results of the drift meter over the tasks of runs, as a table and a figure. Only run folders are read."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from pgp.reports.figures import marker, save_figure, whole_numbers
from pgp.reports.tables import group_runs, markdown_table
from pgp.runs.checkpoint import reading
from pgp.runs.run import Run
from pgp.system.escaping import plot_text

NAMED = 48
"""Maximum number of parameter names at an axis; if there are more, only every second or third is written."""


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
        tasks = sorted({task for events in self.runs for task in events})
        values = {task + 1: [figure(events[task]) for events in self.runs if task in events] for task in tasks}
        measured = {task: [value for value in of_runs if value is not None] for task, of_runs in values.items()}
        return {task: statistics.mean(of_runs) for task, of_runs in measured.items() if of_runs}

    def last(self, figure: Callable[[Event], float | None]) -> float | None:
        """Return the mean of a statistic after the last task, or None if no run has a value."""
        return self.curve(figure).get(self.end + 1)


def drift_histories(runs: Sequence[Run]) -> list[DriftHistory]:
    """Return the history of each group of runs that measured drift."""
    out = []
    for label, members in group_runs(runs):
        events = [_events(run) for run in members]
        if any(events):
            out.append(DriftHistory(label, [of_run for of_run in events if of_run]))
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


def _responses(event: Event) -> float | None:
    return mean_of([mean_of(changes) for changes in event["drift"]["responses"].values()])


def _headline(figure: str) -> Callable[[Event], float | None]:
    """Return a function for a statistic of the first readout, averaged over tasks if it has a value for each."""

    def of(event: Event) -> float | None:
        value: Any = next(iter(event[figure].values()))
        return mean_of(value) if isinstance(value, list) else value

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

PARAMETERS = {
    "rank": "rank of each protected subspace",
    "held": "energy of old inputs in the subspace, %",
    "gradients": "energy of gradients in the subspace, %",
    "updates": "energy of updates in the subspace, %",
    "leak": "leak: energy of a task's change in the subspace, %",
}
"""Statistics of each protected parameter by key in the log, with titles; see `pgp.analysis.drift`."""


def markdown(table: Sequence[DriftHistory]) -> str:
    """Return a table of all statistics after the last task, in percent."""
    rows = []
    for history in table:
        values = [history.last(figure) for figure in STATISTICS.values()]
        rows.append([history.label, str(len(history.finals)), *("" if v is None else f"{100 * v:.2f}" for v in values)])
    return markdown_table(["run", "seeds", *STATISTICS], rows)


def draw_drift(table: Sequence[DriftHistory], path: Path) -> None:
    """Draw every statistic over tasks, and each protected parameter and prompt after the last task, as a PNG.

    Statistics that no run has are left out.
    """
    panels: list[Callable[[Any], None]] = []
    changes = {heading: f"change of old {heading}, %" for heading in ("features", "logits", "protected responses")}
    for heading, what in {**changes, "other prompts": "old images that select other prompts, %"}.items():
        if any(len(history.curve(STATISTICS[heading])) for history in table):
            panels.append(_curves(table, {heading: "-"}, what))
    forgetting = {"forgetting": "-", "forgetting, task known": "--"}
    panels.append(_curves(table, forgetting, "forgetting, %; dashed: if the task is given"))
    panels.append(_curves(table, {"task identified": "-"}, "images with correctly predicted task, %"))
    for key, what in PARAMETERS.items():
        if any(by_parameter(history, key) for history in table):
            panels.append(_draw_parameters(table, key, what))
    if any(_usage(history) for history in table):
        panels.append(_prompts(table))
    wide = min(3, len(panels))
    tall = -(-len(panels) // wide)
    figure = Figure(figsize=(4.2 * wide, 3.1 * tall), layout="constrained")
    axes: Any = figure.subplots(tall, wide, squeeze=False)
    for number, axis in enumerate(axes.flat):
        axis.axis("on" if number < len(panels) else "off")
        if number < len(panels):
            panels[number](axis)
            axis.grid(alpha=0.3)
            axis.set_ylim(bottom=0)
    if len(table) > 1:
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", fontsize=8, ncols=2)
    save_figure(figure, path)


def _curves(table: Sequence[DriftHistory], styles: Mapping[str, str], what: str) -> Callable[[Any], None]:
    def onto(axes: Any) -> None:
        for number, history in enumerate(table):
            for line, (heading, style) in enumerate(styles.items()):
                curve = history.curve(STATISTICS[heading])
                label = plot_text(history.label) if line == 0 else None
                heights = [100 * value for value in curve.values()]
                style_of = {"marker": marker(len(curve)), "markersize": 3, "color": f"C{number}", "label": label}
                axes.plot(list(curve), heights, style, **style_of)
        axes.set(xlabel="tasks learned")
        axes.set_title(what, fontsize=9)
        whole_numbers(axes)

    return onto


def _draw_parameters(table: Sequence[DriftHistory], key: str, what: str) -> Callable[[Any], None]:
    names = list(dict.fromkeys(space for history in table for space in by_parameter(history, key)))

    def onto(axes: Any) -> None:
        for number, history in enumerate(table):
            fractions = by_parameter(history, key)
            heights = [fractions.get(space, float("nan")) for space in names]
            axes.plot(range(len(names)), heights, ".", color=f"C{number}", label=plot_text(history.label))
        named = range(0, len(names), -(-len(names) // NAMED))
        axes.set_xticks(named, [names[i] for i in named], rotation=90, fontsize=8 if len(names) <= 12 else 5)
        axes.set_title(what, fontsize=9)
        axes.set(xlim=(-0.5, len(names) - 0.5), ylim=(0, None if key == "rank" else 103))

    return onto


def _prompts(table: Sequence[DriftHistory]) -> Callable[[Any], None]:
    def onto(axes: Any) -> None:
        for number, history in enumerate(table):
            usage = _usage(history)
            axes.plot(range(1, len(usage) + 1), [100 * fraction for fraction in usage], ".", color=f"C{number}")
        axes.set_title("images that select a prompt, %", fontsize=9)
        axes.set(xlabel="prompt", ylim=(0, 103))
        whole_numbers(axes)

    return onto


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
