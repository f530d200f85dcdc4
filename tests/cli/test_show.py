"""Results stay readable as tasks and readouts grow, at 80 columns and in a pipe, and are left in files."""

from __future__ import annotations

import csv
import json

import pytest
import torch

import tiny
from pgp.analysis import audit
from pgp.analysis.audit import Finding
from pgp.cli import show
from pgp.reports import drift, figures, tables
from pgp.runs.run import Run
from pgp.system import platforms

READOUTS = ("head", "lda", "lda+query+linear", "logistic+query+linear", "ncm", "ncm+query")


def long_run(folder, tasks, readouts=READOUTS[:3], spaces=0):
    """A run folder as `tasks` tasks leave it, and its matrices."""
    titles = [f"what task {t + 1} is called" for t in range(tasks)]
    run = Run.create(folder, tiny.config(), tiny.described(map(str, range(tasks)), [[t] for t in range(tasks)], titles))
    draws = torch.Generator().manual_seed(0)
    matrices = {}
    for readout in readouts:
        matrix = torch.rand(tasks, tasks, dtype=torch.float64, generator=draws)
        matrices[readout] = matrix.where(torch.ones(tasks, tasks).tril().bool(), torch.nan)
    held = {f"space {number}": 0.5 for number in range(spaces)}
    for t in range(tasks if spaces else 0):
        old = [0.1] * t
        drift = {"tasks": old, "features": old, "logits": old, "responses": {"space 0": old}}
        drift |= dict.fromkeys(("removed", "held", "gradients", "updates", "leak"), held) | {"usage": [0.5] * 300}
        shares = {readout: [0.5] * (t + 1) for readout in readouts}
        forgetting = dict.fromkeys(readouts, 0.1)
        about = {"identified": shares, "forgetting": forgetting, "forgetting_within": forgetting}
        run.log("task", task=t, ranks=held, drift=drift, **about)
    run.save(f"task-{tasks:02d}", {"matrices": matrices})
    run.write_matrices(matrices)
    return run, matrices


@pytest.fixture(params=["terminal", "pipe"])
def width(request, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(show, "is_terminal", lambda _: request.param == "terminal")
    return 80 if request.param == "terminal" else 200


def only(matrix, t):
    """The same with nothing but the row after task `t`."""
    return torch.full_like(matrix, torch.nan).index_copy(0, torch.tensor([t]), matrix[t : t + 1])


@pytest.mark.parametrize("tasks", [3, 40])
def test_an_evaluation_shows_every_task_in_a_row(tmp_path, capsys, width, tasks):
    run, matrices = long_run(tmp_path, tasks)
    show.show_evaluation(run, {column: only(matrix, tasks - 1) for column, matrix in matrices.items()})
    _, *lines, _ = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= width
    for j in range(tasks):
        (line,) = (line for line in lines if f"task {j + 1} is called" in line)
        assert line.split()[-3:] == [f"{100 * float(matrix[-1, j]):.2f}" for matrix in matrices.values()]
    (average, stored) = lines[-3:-1]
    assert average.split()[1:] == [f"{100 * float(matrix[-1].mean()):.2f}" for matrix in matrices.values()]
    assert stored.split() == ["as", "stored", "yes", "yes", "yes"]


@pytest.mark.parametrize("tasks", [3, 40])
def test_a_whole_matrix_is_shown_in_short_and_kept_in_full(tmp_path, capsys, width, tasks):
    run, matrices = long_run(tmp_path, tasks)
    show.show_evaluation(run, matrices)
    *lines, file = capsys.readouterr().out.splitlines()
    assert max(map(len, lines[1:])) <= 80
    for column, matrix in matrices.items():
        for t in range(tasks):
            (line,) = (line for line in lines if line.split()[:3] == [column, "task", str(t + 1)])
            assert line.split()[-2:] == [f"{100 * float(matrix[t, : t + 1].mean()):.2f}", "yes"]
            assert f"{100 * float(matrix[t, : t + 1].min()):.2f}" in line
    assert file == f"file:   {tmp_path / 'evaluation.csv'}"
    with (tmp_path / "evaluation.csv").open(newline="") as rows:
        for row in csv.DictReader(rows):
            assert float(row["accuracy"]) == float(matrices[row["column"]][int(row["after_task"]), int(row["task"])])
    assert (tmp_path / "evaluation.csv").read_bytes() == (tmp_path / "accuracy.csv").read_bytes()


def test_many_readouts_go_to_several_tables(tmp_path, capsys, width):
    run, matrices = long_run(tmp_path, 2, READOUTS)
    show.show_evaluation(run, {column: only(matrix, 1) for column, matrix in matrices.items()})
    findings = [
        Finding(column, "image" if size is None else "vote", size, scope, 0.5 + 0.01 * place)
        for place, column in enumerate(READOUTS)
        for size in (None, 128)
        for scope in audit.SCOPES
    ]
    show.show_audit(run, findings)
    show.write_audit(run, findings, {"lda": (0.5, float("nan"))})
    lines = [line for line in capsys.readouterr().out.splitlines() if str(tmp_path) not in line]
    assert max(map(len, lines)) <= width
    text = "\n".join(lines)
    for place, (column, matrix) in enumerate(matrices.items()):
        assert column in text
        assert f"{100 * float(matrix[1, 0]):.2f}" in text
        assert text.count(f"{50 + place}.00") == 6 + 1
    kept = json.loads((tmp_path / "audit.json").read_text())
    assert [one["accuracy"] for one in kept["accuracy"]] == [finding.accuracy for finding in findings]
    assert [one["uses_task"] for one in kept["accuracy"]] == [finding.uses_task for finding in findings]
    assert kept["oracle"] == {"lda": {"accuracy": 0.5, "staleness": None}}


def test_a_run_folder_that_cannot_be_written_is_told_and_no_error(tmp_path, capsys, monkeypatch):
    run, matrices = long_run(tmp_path, 2)

    def refuse(*_):
        raise OSError(30, "Read-only file system", "evaluation.csv")

    monkeypatch.setattr(platforms, "sync_file", refuse)
    show.show_evaluation(run, matrices)
    out, err = capsys.readouterr()
    assert "average" in out
    assert "evaluation.csv is not written: " in err
    assert "Read-only file system" in err


@pytest.mark.looks_at_figures
@pytest.mark.parametrize("tasks", [2, 20, 100])
def test_figures_thin_out_what_would_be_a_blot(tmp_path, monkeypatch, tasks):
    run, _ = long_run(tmp_path, tasks, spaces=50)
    drawn = []
    monkeypatch.setattr(figures, "save_figure", lambda figure, path: drawn.append(figure))
    monkeypatch.setattr(drift, "save_figure", lambda figure, path: drawn.append(figure))
    figures.draw_accuracy(tables.result_rows([run]), tmp_path / "accuracy.png")
    drift.draw_drift(drift.drift_histories([run]), tmp_path / "drift.png")
    accuracy, history = drawn
    matrices = [part for part in accuracy.axes if part.images]
    assert sum(len(part.texts) for part in matrices) == (3 * tasks * (tasks + 1) // 2 if tasks <= 12 else 0)
    assert any(part.get_ylabel() == "accuracy (%)" for part in accuracy.axes) == (tasks > 12)  # a colour bar
    for part in (*accuracy.axes, *history.axes):
        low, high = part.get_xlim()
        assert sum(low <= tick <= high for tick in part.get_xticks()) <= 48
        assert len(part.get_yticks()) <= 48
    for part in [accuracy.axes[0], *(history.axes[:5] if tasks > 2 else [])]:
        assert sum(1 for tick in part.get_xticks() if 1 <= tick <= tasks) in range(1, 12)
        assert all(tick == int(tick) for tick in part.get_xticks())
        assert {line.get_marker() for line in part.lines} == ({"o"} if tasks <= 20 else {""})
