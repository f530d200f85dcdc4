"""Output of the command line: progress bars, tables and figures.

Results go to standard output, everything else to standard error. Text from data or files is never interpreted as
markup, and control characters in it are escaped.
"""

from __future__ import annotations

import math
import sys
import textwrap
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

from pgp.analysis import audit
from pgp.config import Config
from pgp.distributed import rank
from pgp.evaluation import metrics
from pgp.progress import print_line
from pgp.reports import comparison, drift, figures, tables
from pgp.reports import html as page
from pgp.runs.run import Run
from pgp.scenario import Scenario
from pgp.sweeps import sweep
from pgp.system import storage
from pgp.system.escaping import json_line, printable, tsv_field
from pgp.system.outputs import make_unique_folder
from pgp.system.storage import RunError
from pgp.training.tasks import single_class_warning

NARROW = 80
"""Width of a terminal in characters in which results must be readable."""
REPORT = "report.md"
"""File of the tables of a report."""
REPORT_FILES = (REPORT, "report.png", "calibration.png", "drift.png", page.FILE)
"""All files of a report on several runs."""


UNLIMITED = 100_000
"""Width in characters if the output is not a terminal, so that nothing is wrapped."""


GAP = 2
"""Number of spaces between two columns of a table."""


class _Errors(Console):
    """A console for standard error."""

    def on_broken_pipe(self) -> None:
        """Raise the error that rich is handling, so that the program ends as for any other broken pipe."""
        raise


def is_terminal(stream: Any) -> bool:
    """Return whether a standard stream exists and is a terminal."""
    return stream is not None and stream.isatty()


def show_lines(*lines: object) -> None:
    """Print results on standard output, a line each."""
    for line in lines:
        print(printable(line))


def show_fields(*fields: object) -> None:
    """Print a line of tab-separated values on standard output."""
    print(*map(tsv_field, fields), sep="\t")


def show_json(value: Any) -> None:
    """Print a line of JSON on standard output."""
    encoding = getattr(sys.stdout, "encoding", None) or ""
    print(json_line(value, ascii_only=not encoding.lower().startswith("utf")))


def show_rich(renderable: RenderableType) -> None:
    """Print a rich renderable on standard output, wrapped only on a terminal. Markup in names is not interpreted."""
    console = _console()
    with console.capture() as captured:
        console.print(renderable)
    for line in captured.get().splitlines():
        print(line.rstrip())


def _console() -> Console:
    """Return a rich console for standard output."""
    width = None if is_terminal(sys.stdout) else UNLIMITED
    return Console(width=width, markup=False, emoji=False, highlight=False)


def print_note(text: object) -> None:
    """Print a line about the work on standard error."""
    print(f"pgp: {printable(text)}", file=sys.stderr)


def progress(memory: float = 30, *, hidden: bool = False) -> Progress:
    """Return progress bars on standard error, with the remaining time estimated from the last `memory` seconds.

    Standard output is not redirected. Results that are printed on the same terminal while bars are shown would be
    garbled, so hide the bars, or print results after they are gone.
    """
    console = _Errors(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    return Progress(
        *columns,
        console=console,
        transient=True,
        speed_estimate_period=memory,
        redirect_stdout=False,
        disable=hidden or not console.is_terminal,
    )


def warn(message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: object, **__: object) -> None:
    """Print a warning of pgp in one line, and other warnings as Python does; see `warnings.showwarning`."""
    if category is UserWarning:
        print_note(message)
    else:
        print_error(warnings.formatwarning(message, category, filename, lineno))


def print_error(text: str) -> None:
    """Print a message of a library, which may have several lines, on standard error."""
    for line in text.splitlines():
        print(printable(line), file=sys.stderr)


def draw(runs: Sequence[Run], folder: Path) -> list[Path]:
    """Draw the figures over runs to files in `folder`: accuracy; calibration and drift, if any run measured them."""
    return _draw(runs, folder, tables.result_rows(runs), drift.drift_histories(runs))


def _draw(
    runs: Sequence[Run], folder: Path, lines: Sequence[tables.ResultRow], courses: Sequence[drift.DriftHistory]
) -> list[Path]:
    own = len(runs) == 1 and folder == runs[0].folder
    paths = [folder / ("accuracy.png" if own else "report.png")]
    figures.draw_accuracy(lines, paths[0])
    if any(line.calibration for line in lines):
        paths.append(folder / "calibration.png")
        figures.draw_calibration(lines, paths[-1])
    if courses:
        paths.append(folder / "drift.png")
        drift.draw_drift(courses, paths[-1])
    if own:  # what is not drawn any more is of a task that was undone
        for path in {folder / "calibration.png", folder / "drift.png"}.difference(paths):
            path.unlink(missing_ok=True)
    return paths


def show_report(runs: Sequence[Run], folder: Path | None = None, *, html: bool = False) -> None:
    """Print the table of runs, and write it and the figures to `folder`; only the first process does so.

    If `html`, write the page, too.
    """
    if rank() > 0:
        return
    lines, courses = tables.result_rows(runs), drift.drift_histories(runs)
    shown = tables.statistics(lines, without=[tables.CHANCE])  # for a terminal of 80 columns; report.md has it
    rows = [(line.label, line.column, *tables.format_row(line, shown)) for line in lines]
    _show_table("accuracy in %", ("run", "readout"), tuple(shown.values()), rows)
    if folder is None:
        folder = runs[0].folder if len(runs) == 1 else make_unique_folder(Path("runs"), f"{runs[0].config.name}-report")
    texts = [tables.markdown(lines), drift.markdown(courses) if courses else "", tables.version_note(runs)]
    storage.write(folder / REPORT, "\n".join(filter(None, texts)))
    figures = _draw(runs, folder, lines, courses)
    show_lines(f"table:  {folder / REPORT}", *(f"figure: {path}" for path in figures))
    if html:
        storage.write(folder / page.FILE, page.render(runs))
        show_lines(f"page:   {folder / page.FILE}")
    for run in runs:
        done, tasks = run.progress()
        left = "" if done == tasks else f"  (unfinished: {done} of {tasks} tasks; resume with pgp train --resume)"
        show_lines(f"run:    {run.folder}{left}")


def follow_results(outcomes: sweep.Results, total: int) -> list[str]:
    """Print one line for each of `total` runs that ends, and return one line for each that failed."""
    failures = []
    with progress(memory=1e9) as bars, closing(outcomes):
        bar = bars.add_task("runs", total=total)
        for job, done in outcomes:
            if isinstance(done, Exception):
                failures.append(f"{job.name}, seed {job.seed}: {done}")
                result = "failed"
            else:
                accuracy = tables.NOT_MEASURED if math.isnan(done.accuracy) else f"{100 * done.accuracy:.1f} %"
                result = f"{done.status} in {done.seconds:.0f} s, average accuracy {accuracy}"
            print_line(bars, f"{job.name}, seed {job.seed}: {result}")
            bars.advance(bar)
    return failures


def show_comparison(members: Sequence[comparison.Entry], folder: Path) -> None:
    """Print the table of the sweep in `folder`, and the paths of the table and the figure."""
    rows = comparison.table(members)
    _show_table("in %", comparison.HEAD[:2], comparison.HEAD[2:], rows)
    notes = textwrap.wrap(f"{comparison.NOTE} {comparison.CHANCE_NOTE}", 80)
    show_lines(*notes, f"table:  {folder / sweep.TABLE}", f"figure: {folder / sweep.FIGURE}")


def show_evaluation(run: Run, matrices: Mapping[str, Tensor]) -> None:
    """Print new accuracy matrices `(T, T)` by readout, and whether they equal those that `run` stores.

    If one checkpoint was evaluated, there is a row for each task, else a row for each checkpoint. All accuracies are
    written to `evaluation.csv` in the run folder.
    """
    measured = next(iter(matrices.values())).isfinite().any(1).nonzero().flatten().tolist()
    if len(measured) == 1:
        _show_last(run, matrices, measured[0])
    else:
        _show_history(run, matrices, measured)
    _write_result(run, "evaluation.csv", lambda: storage.write(run.folder / "evaluation.csv", metrics.to_csv(matrices)))


def _show_last(run: Run, matrices: Mapping[str, Tensor], t: int) -> None:
    """Print the accuracy on each task after task `t`, a column for each readout."""
    agrees = _agreement(run, matrices)
    heads = [(f"{j + 1}", name) for j, name in enumerate(run.data.task_names[: t + 1])]
    rows: list[tuple[str, ...]] = [(*heads[j], *(_percent(m[t, j]) for m in matrices.values())) for j in range(t + 1)]
    rows.append(("average", "", *(_percent(matrix[t, : t + 1].mean()) for matrix in matrices.values())))
    rows.append(("as stored", "", *(agrees[column, t] for column in matrices)))
    names: tuple[str, ...] = ("task", "name")
    if not any(name for _, name in heads):
        names, rows = names[:1], [(row[0], *row[2:]) for row in rows]
    _show_table(f"{run.folder}: accuracy after task {t + 1}, %", names, list(matrices), rows)


def _show_history(run: Run, matrices: Mapping[str, Tensor], measured: Sequence[int]) -> None:
    """Print a row for each readout and each of the tasks `measured`.

    It has the accuracy on every task if that fits the width, else on the first, the last and the worst task.
    """
    agrees = _agreement(run, matrices)
    names, last = ("readout", "after"), measured[-1] + 1
    headings = [*(f"task {j + 1}" for j in range(last)), "average", "as stored"]
    full: list[tuple[str, ...]] = []
    brief: list[tuple[str, ...]] = []
    for column, matrix in matrices.items():
        for t in measured:
            row = matrix[t, : t + 1]
            worst = int(row.nan_to_num(nan=torch.inf).argmin())
            head, tail = (column, f"task {t + 1}"), (_percent(row.mean()), agrees[column, t])
            full.append((*head, *map(_percent, row.tolist()), *[""] * (last - t - 1), *tail))
            brief.append((*head, _percent(row[0]), _percent(row[t]), _percent(row[worst]), f"{worst + 1}", *tail))
    width = _console().width if is_terminal(sys.stdout) else NARROW
    if sum(map(sum, _column_widths(names, headings, full))) <= width:
        _show_table(f"{run.folder}: accuracy, %", names, headings, full)
    else:
        headings = ["first task", "last task", "worst", "of task", "average", "as stored"]
        _show_table(f"{run.folder}: accuracy, %", names, headings, brief)


def _percent(accuracy: float | Tensor) -> str:
    return tables.NOT_MEASURED if math.isnan(float(accuracy)) else f"{100 * float(accuracy):.2f}"


def _agreement(run: Run, matrices: Mapping[str, Tensor]) -> dict[tuple[str, int], str]:
    """Return by readout and task whether the accuracies equal those that `run` stores; "" if it stores none."""
    stored, out = run.matrices(), {}
    for column, matrix in matrices.items():
        old = stored.get(column, torch.full_like(matrix, torch.nan))
        same = (torch.isclose(old, matrix[: len(old), : len(old)], rtol=0, atol=1e-9) | old.isnan()).all(1)
        for t, known in enumerate(old.isfinite().any(1).tolist()):
            out[column, t] = ("yes" if same[t] else "no") if known else ""
    return out


def _write_result(run: Run, name: str, write: Callable[[], object]) -> None:
    """Write a result to the file `name` of a run folder and say where, or why it cannot be written."""
    try:
        write()
    except (OSError, RunError) as error:
        print_note(f"{name} is not written: {error}")
    else:
        show_lines(f"file:   {run.folder / name}")


def show_tasks(config: Config, scenario: Scenario) -> None:
    """Print the size of each task, and a warning if the tasks are unusual."""
    for task in scenario.tasks:
        show_lines(f"{scenario.describe(task)}: {len(task.classes)} classes, {len(task.train):,} training and"
                   f" {len(task.test):,} test images")  # fmt: skip
    if concern := single_class_warning(config, scenario):
        print_note(f"warning: {concern}")


def show_audit(run: Run, findings: Sequence[audit.Finding]) -> None:
    """Print the accuracy of `run` under each protocol, and how much task information adds to it."""
    columns = list(dict.fromkeys(finding.column for finding in findings))
    is_til = run.config.setting == "til"
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for finding in findings:
        if finding.batch is None:
            selected = "per image"
        else:
            selected = f"by vote of {finding.batch} image{'s' if finding.batch > 1 else ''}"
        is_given = is_til and finding.scope == "seen"
        cells = rows.setdefault((selected, "of the image's task" if is_given else audit.SCOPES[finding.scope]), {})
        cells[finding.column] = _percent(finding.accuracy)
    table = [(*key, *(cells[column] for column in columns)) for key, cells in rows.items()]
    _show_table(f"{run.folder}: average accuracy, %", ("prompts selected", "classes"), columns, table)
    if is_til:
        show_lines("accuracy with the task of each image given (--setting til):")
    else:
        show_lines("accuracy without task information, and the most that task information adds:")
    for column in columns:
        own = [finding for finding in findings if finding.column == column]
        (plain,) = (finding for finding in own if finding.choice == "image" and finding.scope == "seen")
        if math.isnan(plain.accuracy):
            show_lines(f"{column}: {tables.NOT_MEASURED}, because a task has no test images")
            continue
        gain = 100 * (max(finding.accuracy for finding in own) - plain.accuracy)
        more = "" if is_til else f", at most {gain:.2f} points more"
        show_lines(f"{column}: {100 * plain.accuracy:.2f} %{more}")


def show_oracle(run: Run, bounds: Mapping[str, tuple[float, float]]) -> None:
    """Print the accuracy of statistics readouts without drift, next to their accuracy in the run."""
    stored, (tasks, _) = run.matrices(), run.progress()
    rows = []
    for name, (accuracy, stale) in bounds.items():
        own = metrics.average_accuracy(stored[name])
        rows.append((name, _percent(own), _percent(accuracy), f"{stale:.3f}"))
    title = f"{run.folder}: accuracy with stored and with fresh statistics of {tasks} tasks"
    _show_table(title, ("readout",), ("stored, %", "fresh, %", "staleness of means"), rows)


def write_audit(
    run: Run, findings: Sequence[audit.Finding], bounds: Mapping[str, tuple[float, float]] | None = None
) -> None:
    """Write the findings to `audit.json` in the run folder, and print its path."""
    path = run.folder / audit.AUDIT
    _write_result(run, path.name, lambda: storage.write(path, audit.to_json(run, findings, bounds)))


def _show_table(title: str, labels: Sequence[str], numbers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows of labels and numbers under these headings: one table, or several where a terminal is too narrow.

    Numbers are never broken over two lines, labels only if they take more than half of the width.
    """
    width = _console().width
    words, widths = _column_widths(labels, numbers, rows)
    room = width - min(sum(words), width // 2)
    show_lines(title)
    start = 0
    while start < len(numbers):
        stop = start + 1
        while stop < len(numbers) and sum(widths[start : stop + 1]) <= room:
            stop += 1
        table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
        for heading in labels:
            table.add_column(printable(heading), overflow="fold")
        for column in range(start, stop):
            table.add_column(printable(numbers[column]), justify="right", width=widths[column] - GAP)
        for row in rows:
            table.add_row(*map(printable, (*row[: len(labels)], *row[len(labels) + start : len(labels) + stop])))
        show_rich(table)
        start = stop


def _column_widths(
    labels: Sequence[str], numbers: Sequence[str], rows: Sequence[Sequence[str]]
) -> tuple[list[int], list[int]]:
    """Return the width of each column of a table, including the gap after it; headings break at spaces."""
    cells = [
        max((cell_len(printable(row[column])) for row in rows), default=0)
        for column in range(len(labels) + len(numbers))
    ]
    words = [max(cell_len(printable(heading)), cells[column]) + GAP for column, heading in enumerate(labels)]
    widths = [
        max(cells[column], *(cell_len(printable(word)) for word in heading.split())) + GAP
        for column, heading in enumerate(numbers, len(labels))
    ]
    return words, widths
