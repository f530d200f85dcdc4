"""What the command line shows: bars while it works, tables and figures when it is done."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

from pgp import audit, comparison, drift_report, metrics, report, sweep
from pgp.curriculum import idle
from pgp.processes import rank
from pgp.run import Run, free_folder
from pgp.scenario import Scenario

console = Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 120)  # a file has no width
progress_console = Console(stderr=True)


def progress(memory: float = 30) -> Progress:
    """Bars with the time that is left, on stderr, by the speed of the last `memory` seconds."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=progress_console, transient=True, speed_estimate_period=memory)


def warn(message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: object, **__: object) -> None:
    """Show a warning of ours in a line, one of a library as Python does; see `warnings.showwarning`."""
    text = warnings.formatwarning(message, category, filename, lineno)
    print(f"pgp: {message}\n" if category is UserWarning else text, file=sys.stderr, end="")


def draw(runs: list[Run], folder: Path) -> list[Path]:
    """The figures over runs, drawn to files in `folder`: accuracy and, where any run measured it, drift."""
    paths = [folder / ("accuracy.png" if len(runs) == 1 and folder == runs[0].folder else "report.png")]
    report.draw(report.lines(runs), paths[0])
    if courses := drift_report.courses(runs):
        paths.append(folder / "drift.png")
        drift_report.draw(courses, paths[1])
    return paths


def show(runs: list[Run], folder: Path | None = None) -> None:
    """Print the table over runs, and say where the figure and the runs lie; of several processes, the first does."""
    if rank() > 0:
        return
    lines = report.lines(runs)
    shown = report.figures(lines)
    rows = [(line.label, line.column, *report.cells(line, shown)) for line in lines]
    console.print(_table("accuracy in %", ("run", "readout"), tuple(shown.values()), rows))
    if folder is None:
        folder = runs[0].folder if len(runs) == 1 else free_folder(Path("runs"), f"{runs[0].config.name}-report")
    for path in draw(runs, folder):
        print(f"figure: {path}")
    for run in runs:
        done, tasks = run.progress()
        left = "" if done == tasks else f"  (unfinished: {done} of {tasks} tasks; pgp train --resume goes on)"
        print(f"run:    {run.folder}{left}")


def follow(outcomes: sweep.Outcomes, total: int) -> list[str]:
    """A line for each of `total` runs that failed; one is printed for each run that ends, under a bar over all."""
    failures = []
    with progress(memory=1e9) as bars, closing(outcomes):
        bar = bars.add_task("runs", total=total)
        for job, done in outcomes:
            if isinstance(done, Exception):
                failures.append(f"{job.name}, seed {job.seed}: {done}")
                told = "failed"
            else:
                told = f"{done.how} in {done.seconds:.0f} s, average accuracy {100 * done.accuracy:.1f} %"
            bars.console.print(f"{job.name}, seed {job.seed}: {told}", markup=False, highlight=False)
            bars.advance(bar)
    return failures


def show_comparison(members: Sequence[comparison.Member], folder: Path) -> None:
    """Print the table of the sweep in `folder`, and where it and its figure lie."""
    rows = comparison.table(members)
    console.print(_table("in %", comparison.HEAD[:2], comparison.HEAD[2:], rows))
    console.print(comparison.NOTE, highlight=False)
    print(f"table:  {folder / sweep.TABLE}")
    print(f"figure: {folder / sweep.FIGURE}")


def show_evaluation(run: Run, matrices: Mapping[str, Tensor]) -> None:
    """Print accuracies that were measured anew, `(T, T)` by readout, and whether they are those that `run` stores."""
    stored, tasks = run.matrices(), max(int(matrix.isfinite().sum(1).max()) for matrix in matrices.values())
    headings = (*(f"task {j + 1}" for j in range(tasks)), "average", "as stored")
    rows = []
    for column, matrix in matrices.items():
        for t in matrix.isfinite().any(1).nonzero().flatten().tolist():
            row = matrix[t, : t + 1]
            cells = [f"{100 * a:.2f}" for a in row] + [""] * (tasks - t - 1) + [f"{100 * row.mean():.2f}"]
            same = column in stored and bool((stored[column][t, : t + 1] - row).abs().max() < 1e-9)
            agrees = ("yes" if same else "no") if column in stored else ""
            rows.append((column, f"task {t + 1}", *cells, agrees))
    console.print(_table(f"{run.folder}: accuracy, %", ("readout", "after"), headings, rows))


def show_tasks(scenario: Scenario) -> None:
    """Print how large each task is, and what a user should know of them."""
    for task in scenario.tasks:
        print(f"{scenario.title(task)}: {len(task.classes)} classes, {len(task.train):,} training and"
              f" {len(task.test):,} test images")  # fmt: skip
    if concern := idle(scenario):
        print(f"warning: {concern}")


def show_audit(run: Run, findings: Sequence[audit.Finding]) -> None:
    """Print what each protocol says of `run`, and how much of the highest figure is real."""
    columns = list(dict.fromkeys(finding.column for finding in findings))
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for finding in findings:
        chosen = "each image" if finding.batch is None else f"a vote of {finding.batch}"
        cells = rows.setdefault((chosen, audit.SCOPES[finding.scope]), {})
        cells[finding.column] = f"{100 * finding.accuracy:.2f}"
    table = [(*key, *(cells[column] for column in columns)) for key, cells in rows.items()]
    console.print(_table(f"{run.folder}: average accuracy, %", ("prompts by", "scored over"), columns, table))
    for column in columns:
        own = [finding for finding in findings if finding.column == column]
        best, (real,) = max(own, key=lambda finding: finding.accuracy), [finding for finding in own if finding.honest]
        over = 100 * (best.accuracy - real.accuracy)
        print(f"{column}: {100 * real.accuracy:.2f} % is real; leaks add up to {over:.2f} points")


def show_oracle(run: Run, bounds: Mapping[str, tuple[float, float]]) -> None:
    """Print what readouts from statistics would read if none were stale, beside what they read."""
    stored, (_, tasks) = run.matrices(), run.classes()
    rows = []
    for name, (accuracy, stale) in bounds.items():
        own = metrics.average_accuracy(stored[name])
        rows.append((name, f"{100 * own:.2f}", f"{100 * accuracy:.2f}", f"{stale:.3f}"))
    title = f"{run.folder}: statistics of {len(tasks)} tasks"
    console.print(_table(title, ("readout",), ("as kept, %", "if none were stale, %", "staleness of means"), rows))


def _table(title: str, names: Sequence[str], figures: Sequence[str], rows: Sequence[tuple[str, ...]]) -> Table:
    """Rows of names and then figures; figures are never broken over two lines, and words only if they are long."""
    table = Table(title=title, box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    widths = [
        max(len(text) for text in (*heading.split(), *(row[place] for row in rows)))
        for place, heading in enumerate(figures, len(names))
    ]
    words = [max((len(word) for row in rows for word in row[place].split()), default=0) for place in range(len(names))]
    fits = sum(words) + sum(widths) + 2 * (len(words) + len(widths)) <= console.width
    for heading, longest in zip(names, words, strict=True):
        table.add_column(heading, overflow="fold", min_width=longest if fits else None)
    for heading, width in zip(figures, widths, strict=True):
        table.add_column(heading, justify="right", width=width)
    for row in rows:
        table.add_row(*row)
    return table
