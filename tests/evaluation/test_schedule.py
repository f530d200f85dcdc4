"""Which tasks are evaluated after a task, and on how many images. Neither changes what is learned."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from rich.progress import Progress

import tiny
from pgp import train
from pgp.cli.main import main
from pgp.datasets.synthetic import Synthetic
from pgp.evaluation import metrics
from pgp.methods.head_only import HeadOnly
from pgp.projections.base import NoProjection
from pgp.readouts.lda import LDA
from pgp.reports import html, tables
from pgp.runs.checkpoint import CheckpointName
from pgp.runs.run import Run
from pgp.scenario import sample_in_proportion

CHOICES = ("every", "2", "last")
MEASURED = {
    "every": [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]],
    "2": [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [1, 1, 1, 1]],
    "last": [[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]],
}


def config(**changes):
    return tiny.config(dataset=Synthetic(classes=8, noise=0.5), tasks=4, epochs=1, **changes)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Run]:
    folder = tmp_path_factory.mktemp("schedule")
    return {evaluate: train.train(config(evaluate=evaluate), folder / evaluate) for evaluate in CHOICES}


@pytest.mark.parametrize("evaluate", CHOICES)
def test_what_is_measured_is_the_same_and_so_is_what_is_learned(runs, evaluate):
    run, full = runs[evaluate], runs["every"]
    for column, matrix in run.matrices().items():
        measured = torch.tensor(MEASURED[evaluate], dtype=torch.bool)
        assert torch.equal(matrix.isfinite(), measured)
        assert torch.equal(matrix[measured], full.matrices()[column][measured])
    for part in ("method", "projection", "readouts"):
        torch.testing.assert_close(run.load()[part], full.load()[part], rtol=0, atol=0)
    assert torch.equal(run.predictions().top["lda"], full.predictions().top["lda"])
    for name in ("average_accuracy", "calibration", "identified"):
        assert run.events("task")[-1][name] == full.events("task")[-1][name]


def test_forgetting_needs_the_accuracy_right_after_a_task(runs):
    for column, full in runs["every"].matrices().items():
        seldom, last = (metrics.forgetting(runs[evaluate].matrices()[column]) for evaluate in ("2", "last"))
        assert math.isnan(last)
        assert 0 <= metrics.forgetting(full) - seldom < 0.2  # the best accuracy may have been in between
    assert runs["last"].events("task")[-1]["forgetting"] == {"head": None, "lda": None}
    rows = {row.column: row for row in tables.result_rows([runs["last"]])}
    accuracy, *others = tables.format_row(rows["lda"])
    assert accuracy == f"{100 * metrics.average_accuracy(runs['every'].matrices()['lda']):.2f}"
    assert others == ["not measured"] * 3


def test_drift_is_measured_of_evaluated_tasks(runs):
    full, seldom = ([event["drift"] for event in runs[evaluate].events("task")] for evaluate in ("every", "2"))
    assert [drift["tasks"] for drift in seldom] == [[], [0], [], [0, 1, 2]]
    assert seldom[3] == full[3]
    assert (seldom[2]["held"], seldom[2]["leak"]) == (full[2]["held"], full[2]["leak"])
    assert not any("drift" in event for event in runs["last"].events("task"))


@pytest.mark.parametrize("evaluate", CHOICES)
def test_it_is_reported(runs, evaluate, tmp_path, capsys):
    main(["report", str(runs[evaluate].folder), "--output", str(tmp_path / "report"), "--html"])
    assert {path.name for path in (tmp_path / "report").iterdir()} >= {"report.png", "report.html"}
    assert ("not measured" in capsys.readouterr().out) == (evaluate != "every")


@pytest.mark.parametrize("evaluate", CHOICES)
def test_a_run_that_was_stopped_before_its_last_task(tmp_path, evaluate, capsys):
    run = train.train(config(evaluate=evaluate), tmp_path / "run")
    whole = run.matrices()["lda"]
    with run.writing():
        run.checkpoints.go_back(CheckpointName(3))
    html.render([Run.open(run.folder)])
    assert math.isfinite(metrics.average_accuracy(run.matrices()["lda"])) == (evaluate == "every")
    capsys.readouterr()
    with Progress() as progress:
        resumed = train.resume(run.folder, progress=progress)
    assert torch.equal(resumed.matrices()["lda"].nan_to_num(nan=-1), whole.nan_to_num(nan=-1))
    assert f"task 4 of 4: average accuracy {100 * float(resumed.matrices()['head'][3].mean()):.1f} % (head)" in (
        capsys.readouterr().out
    )


def test_what_is_printed_after_a_task(tmp_path, capsys):
    printed = {}
    for evaluate in CHOICES:
        with Progress() as progress:
            train.train(config(evaluate=evaluate, test_images=6), tmp_path / evaluate, progress)
        lines = capsys.readouterr().out.splitlines()
        printed[evaluate] = next(line for line in lines if line.startswith("task 3 of 4: "))
    error = 100 * metrics.sampling_error(Run.open(tmp_path / "every").matrices()["head"][:3, :3], [6, 6, 6], 6)
    assert printed["every"].endswith(f" % (lda), ± {error:.1f} from the sample of test images")
    assert printed["2"].startswith("task 3 of 4: accuracy on this task ")
    assert printed["last"] == "task 3 of 4: learned"


@pytest.mark.parametrize(("evaluate", "as_stored"), [("2", ["yes"] * 4), ("last", [None, None, None, "yes"])])
def test_it_can_be_evaluated_again(runs, capsys, evaluate, as_stored):
    """Of a row of which something is stored, that is compared."""
    main(["eval", str(runs[evaluate].folder), "--every-task"])
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if " lda " in line]
    assert [row[-1] if row[-1] in ("yes", "no") else None for row in rows] == as_stored


def test_a_hundred_tasks_are_evaluated_in_a_hundred_passes():
    def images(evaluate: str) -> int:
        own = tiny.config(evaluate=evaluate)
        return sum(len(own.evaluated_tasks(index, 100)) for index in range(100))

    assert [images(evaluate) for evaluate in ("every", "10", "last")] == [5050, 90 + 550, 100]


def test_a_sample_of_the_test_images(tmp_path, runs, capsys):
    base = config(test_images=5)
    run = train.train(base, tmp_path / "run")
    assert run.data.test_images == (5, 5, 5, 5)
    found = run.predictions()
    assert all(count in (2, 3) for count in found.labels.bincount().tolist())
    assert set(found.images.tolist()) < set(runs["every"].predictions().images.tolist())
    other = train.train(replace(base, projection=NoProjection.Config()), tmp_path / "other")
    assert torch.equal(other.predictions().images, found.images)
    torch.testing.assert_close(run.load()["method"], runs["every"].load()["method"], rtol=0, atol=0)

    accuracies = run.matrices()["lda"][3]
    smoothed = [(5 * a + 1) / 7 for a in accuracies.tolist()]
    error = float(sum(p * (1 - p) / 5 for p in smoothed) ** 0.5 / 4)
    row = next(row for row in tables.result_rows([run]) if row.column == "lda")
    assert row.spread(tables.SAMPLING) == (pytest.approx(error), None)
    assert "standard error from the sample of test images" in tables.markdown([row])
    assert "standard error" not in tables.markdown(tables.result_rows([runs["every"]]))


def test_samples_are_in_proportion_and_depend_on_the_seed():
    labels = torch.arange(4).repeat(25)
    indices = torch.arange(100)
    drawn = [sample_in_proportion(indices, labels, 10, seed) for seed in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert sorted(labels[drawn[0]].bincount().tolist()) == [2, 2, 3, 3]
    assert torch.equal(sample_in_proportion(indices, labels, 1000, 0), indices)


def test_the_accuracy_on_a_sample_is_unbiased_if_classes_differ_in_size():
    labels = torch.tensor([0] * 900 + [1] * 100)
    correct = (torch.arange(1000) % 2 == 0) | (labels == 1)  # half of the large class, and all of the small one
    drawn = [sample_in_proportion(torch.arange(1000), labels, 50, seed) for seed in range(200)]
    assert all((labels[sample] == 1).sum() == 5 for sample in drawn)
    estimates = torch.stack([correct[sample].double().mean() for sample in drawn])
    assert abs(estimates.mean() - correct.double().mean()) < 4 * estimates.std() / len(drawn) ** 0.5
    every = torch.cat(drawn).bincount(minlength=1000)  # 10 each, with a standard deviation of 3
    assert every.max() < 25
    assert abs(every[labels == 1].double().mean() - 10) < 1


def test_no_class_is_more_likely_in_a_small_sample():
    labels = torch.arange(20).repeat_interleave(10)
    drawn = torch.stack([labels[sample_in_proportion(torch.arange(200), labels, 5, seed)] for seed in range(200)])
    assert all(len(sample.unique()) == 5 for sample in drawn)
    counts = drawn.flatten().bincount(minlength=20)  # 50 each, with a standard deviation of 6
    assert 25 < int(counts.min()) <= int(counts.max()) < 75


def test_images_whose_queries_are_known_are_not_loaded_again(tmp_path, monkeypatch):
    frozen = {"method": HeadOnly.Config(learns=False), "projection": NoProjection.Config(), "readouts": (LDA.Config(),)}
    loaded = []
    inner = train.Session.new_state

    def counted(session):
        split = session.data.test
        image = split.image
        monkeypatch.setattr(split, "image", lambda index: loaded.append(index) or image(index))
        return inner(session)

    monkeypatch.setattr(train.Session, "new_state", counted)
    run = train.train(config(**frozen, drift_images=0), tmp_path / "run")
    assert run.matrices()["lda"].isfinite().sum() == 10
    assert max(loaded.count(index) for index in set(loaded)) <= 2


@pytest.mark.parametrize(("setting", "value"), [("evaluate", "never"), ("evaluate", "0"), ("test_images", 0)])
def test_settings_that_make_no_sense(setting, value):
    with pytest.raises(ValueError, match=f"expected {setting} .*got {value}"):
        tiny.config(**{setting: value})
