from __future__ import annotations

import json
import math

import pytest
import torch
from PIL import Image
from rich.progress import Progress

import tiny
from pgp import baselines, train
from pgp.analysis import audit
from pgp.cli import main, show
from pgp.datasets.folder import Folder
from pgp.datasets.synthetic import Synthetic
from pgp.evaluation import metrics
from pgp.methods.head_only import HeadOnly
from pgp.methods.lora import LoRA
from pgp.methods.vpt import VPT
from pgp.projections.base import NoProjection
from pgp.readouts.experts import ExpertLDA
from pgp.readouts.head import MethodHead
from pgp.readouts.lda import LDA, NCM
from pgp.runs.run import Run
from pgp.system.storage import RunError

QUIET = Progress(disable=True)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return train.train(tiny.config(legacy_eval=True), tmp_path_factory.mktemp("audit") / "run")


def found(findings, *key):
    (one,) = [f.accuracy for f in findings if (f.column, f.choice, f.batch, f.scope) == key]
    return one


def test_the_figure_without_task_information_is_the_runs_own_and_the_vote_that_of_its_legacy_column(run):
    findings = audit.audit_run(run, QUIET, sizes=(1, 32))
    matrices = run.matrices()
    for column in ("head", "lda"):
        assert found(findings, column, "image", None, "seen") == pytest.approx(
            metrics.average_accuracy(matrices[column]), abs=1e-12
        )
        legacy = metrics.average_accuracy(matrices[f"{column}/legacy"])  # batches of 32 images, over all classes
        assert found(findings, column, "vote", 32, "all") == pytest.approx(legacy, abs=1e-12)
        for scope in audit.SCOPES:  # one image votes alone
            assert found(findings, column, "vote", 1, scope) == found(findings, column, "image", None, scope)
    assert len(findings) == 3 * 3 * 2


def test_the_label_cut_flatters(run):
    findings = audit.audit_run(run, QUIET, sizes=())
    for column in ("head", "lda"):
        assert found(findings, column, "image", None, "cut") >= found(findings, column, "image", None, "seen")


@pytest.mark.parametrize("method", [HeadOnly.Config(), VPT.Config()])
def test_only_methods_that_select_prompts_vote(tmp_path, method):
    run = train.train(tiny.config(method=method, projection=NoProjection.Config()), tmp_path / "run")
    assert {finding.choice for finding in audit.audit_run(run, QUIET)} == {"image"}


def test_a_method_that_selects_no_prompts_has_no_rows_for_votes(tmp_path, capsys):
    config = tiny.config(method=VPT.Config(), projection=NoProjection.Config())
    run = train.train(config, tmp_path / "run")
    capsys.readouterr()
    main.main(["audit", str(run.folder)])
    said = capsys.readouterr().out
    assert said.count("per image") == len(audit.SCOPES)
    assert "vote" not in said


def test_til_is_told_the_task(tmp_path, capsys):
    run = train.train(tiny.config(setting="til", method=HeadOnly.Config(), projection=NoProjection.Config()), tmp_path)
    findings = audit.audit_run(run, QUIET, sizes=())
    own = metrics.average_accuracy(run.matrices()["lda"])
    assert found(findings, "lda", "image", None, "seen") == pytest.approx(own, abs=1e-12)
    show.show_audit(run, findings)
    said = capsys.readouterr().out
    assert "with the task of each image given (--setting til):\n" in said
    assert f"lda: {100 * own:.2f} %\n" in said
    assert "without task information" not in said


def test_the_given_task_chooses_the_expert_in_til(tmp_path):
    settings = {"method": LoRA.Config(rank=3), "experts": "task", "dataset": Synthetic(noise=0.6)}
    run = train.train(tiny.config(setting="til", readouts=(ExpertLDA.Config(), LDA.Config()), **settings), tmp_path)
    findings = audit.audit_run(run, QUIET, sizes=())
    for column, matrix in run.matrices().items():
        own = metrics.average_accuracy(matrix)
        assert found(findings, column, "image", None, "seen") == pytest.approx(own, abs=1e-12)
    (run.folder / audit.AUDIT).write_text(audit.to_json(run, findings), encoding="utf-8")
    assert audit.read_findings(run) == findings
    assert all(row["uses_task"] for row in json.loads(audit.to_json(run, findings))["accuracy"])


def test_a_single_class_has_nothing_to_be_stale_by():
    kept = LDA.Config().build(None, 2, seed=0)
    kept.observe(torch.tensor([[1.0, 2.0], [2.0, 3.0]]), torch.tensor([0, 0]))
    kept.end_task()
    assert math.isnan(audit.staleness(kept, kept))


def test_the_oracle_is_what_stays_where_nothing_moves_and_beats_what_is_stale(tmp_path):
    readouts = (MethodHead.Config(), LDA.Config(), LDA.Config(compensate="shift"))
    frozen = baselines.frozen(tiny.config(method=VPT.Config(), readouts=readouts))
    run = train.train(frozen, tmp_path / "frozen")
    bound = audit.oracle(run, QUIET)
    accuracy, stale = bound["lda"]
    assert bound["lda"] == bound["lda+shift"]
    assert accuracy == pytest.approx(metrics.average_accuracy(run.matrices()["lda"]), abs=1e-12)
    assert stale < 1e-5
    moving = tiny.config(method=VPT.Config(), projection=NoProjection.Config(), readouts=readouts)
    run = train.train(moving, tmp_path / "moving")
    (accuracy, stale), (_, followed) = (audit.oracle(run, QUIET)[name] for name in ("lda", "lda+shift"))
    assert stale > 0.01
    assert 0 < followed < stale
    assert accuracy >= metrics.average_accuracy(run.matrices()["lda"])


def test_the_nearest_mean_has_an_oracle(tmp_path):
    run = train.train(tiny.config(epochs=1, readouts=(NCM.Config(), MethodHead.Config())), tmp_path / "run")
    assert audit.oracle(run, QUIET).keys() == {"ncm"}


def test_an_oracle_needs_statistics(tmp_path):
    run = train.train(tiny.config(epochs=1, readouts=(MethodHead.Config(),)), tmp_path / "run")
    with pytest.raises(ValueError, match="a readout of statistics for --oracle, as with --readouts lda, got head"):
        audit.oracle(run, QUIET)


@pytest.mark.filterwarnings("ignore:no test images of")
def test_a_task_without_test_images_is_not_measured(tmp_path, capsys):
    data = Synthetic(per_class=4)
    run = train.train(tiny.config(epochs=1, dataset=data), tmp_path / "run")
    folder = tmp_path / "new" / "sea lion"
    folder.mkdir(parents=True)
    Image.new("RGB", (32, 32), "red").save(folder / "0.png")  # a single image is for training
    train.resume(run.folder, add=Folder(tmp_path / "new"))
    capsys.readouterr()
    main.main(["audit", str(run.folder), "--batch-sizes", "4"])
    said = capsys.readouterr().out
    assert "nan" not in said
    assert "head: not measured, because a task has no test images" in said
    tree = json.loads((run.folder / "audit.json").read_text(), parse_constant=pytest.fail)
    assert {row["accuracy"] for row in tree["accuracy"]} == {None}
    assert all(math.isnan(finding.accuracy) for finding in audit.read_findings(Run.open(run.folder)))


def test_a_run_without_a_finished_task_is_named(run, tmp_path):
    empty = Run.create(tmp_path / "run", run.config)
    with pytest.raises(RunError, match="is finished yet"):
        audit.audit_run(empty, QUIET)


def test_the_command(run, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    main.main(["audit", str(run.folder), "--batch-sizes", "4", "--oracle"])
    said = capsys.readouterr().out
    plain = found(audit.audit_run(run, QUIET, ()), "head", "image", None, "seen")
    assert f"head: {100 * plain:.2f} %, at most" in said
    assert "by vote of 4 images" in said
    assert "staleness" in said
    with pytest.raises(SystemExit):
        main.main(["audit", str(run.folder), "--batch-sizes", "0"])
    assert "expected --batch-sizes of at least 1" in capsys.readouterr().err


def test_findings_of_an_earlier_checkpoint_are_not_current(tmp_path):
    """Even if the accuracy is the same."""
    run = train.train(tiny.config(epochs=1, readouts=(MethodHead.Config(),)), tmp_path / "run")
    findings = audit.audit_run(run, QUIET, sizes=())
    text = audit.to_json(run, findings)
    (run.folder / audit.AUDIT).write_text(text, encoding="utf-8")
    assert audit.read_findings(run) == findings
    for now, then in (("task-03", "task-02"), (run.data.fingerprints[0], "other"), (run.id, "other")):
        (run.folder / audit.AUDIT).write_text(text.replace(f'"{now}"', f'"{then}"'), encoding="utf-8")
        assert audit.read_findings(run) == []
