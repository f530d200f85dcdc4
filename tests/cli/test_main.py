from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
from PIL import Image

import tiny
from pgp import recipes, train
from pgp.baselines import BASELINES
from pgp.cli import main
from pgp.methods import head_only
from pgp.projections.base import NoProjection
from pgp.projections.orthogonal import Orthogonal
from pgp.readouts import lda
from pgp.runs.run import Run
from photos import tree


@pytest.fixture(autouse=True)
def _tiny_demo(monkeypatch, tmp_path):
    def demo():
        """A tiny demo."""
        return replace(tiny.config(epochs=1), name="demo")

    monkeypatch.setitem(recipes.RECIPES, "demo", demo)
    monkeypatch.chdir(tmp_path)


def fails(capsys, *words):
    with pytest.raises(SystemExit) as stop:
        main.main(list(words))
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_train_eval_report_and_resume(tmp_path, capsys):
    for seed in ("1", "2"):
        main.main(["train", "demo", "--seed", seed, "--output", seed, "--optimizer.lr", "0.2"])
        assert (tmp_path / seed / "accuracy.png").stat().st_size > 1_000
    assert Run.open(tmp_path / "1").config.optimizer.lr == 0.2
    main.main(["eval", "1"])
    assert capsys.readouterr().out.count("yes") == 2
    main.main(["report", "1", "2", "--output", "out"])
    text = (tmp_path / "out" / "report.md").read_text()
    assert text.count("±") == 2 * 6
    assert (tmp_path / "out" / "report.png").is_file()
    assert not (tmp_path / "out" / "report.html").exists()
    main.main(["report", "1", "2", "--output", "out", "--html"])
    assert "page:   out/report.html" in capsys.readouterr().out
    assert (tmp_path / "out" / "report.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    (tmp_path / "1" / "checkpoints" / "latest").write_text("task-02")
    main.main(["train", "--resume", "1", "--workers", "0"])
    assert Run.open(tmp_path / "1").latest_checkpoint() == "task-03"


@pytest.mark.parametrize("flag", ["--no-pgp", "--no_pgp"])
def test_base_method(flag, tmp_path):
    main.main(["train", "demo", flag, "--output", "run"])
    assert Run.open(tmp_path / "run").config.projection == NoProjection.Config()


@pytest.mark.slow
def test_twin(tmp_path, capsys):
    main.main(["train", "demo", "--twin", "--output", "both"])
    out = capsys.readouterr().out
    assert "figure: both/report.png" in out
    kinds = {type(Run.open(path).config.projection) for path in (tmp_path / "both").iterdir() if path.is_dir()}
    assert kinds == {NoProjection.Config, Orthogonal.Config}


def test_several_runs_are_not_made_in_the_folder_of_one(tmp_path, capsys):
    run = train.train(tiny.config(epochs=1, tasks=1), tmp_path / "run")
    before = {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()}
    for flag in ("--twin", "--baselines"):
        with pytest.raises(SystemExit):
            main.main(["train", "demo", flag, "--output", "run"])
        assert "expected a folder for several runs, got the run run: name another --output" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()} == before


def test_files_of_the_user_are_not_overwritten_by_reports(tmp_path, capsys):
    run = train.train(tiny.config(epochs=1, tasks=1), tmp_path / "run")
    thesis = tmp_path / "thesis"
    thesis.mkdir()
    (thesis / "report.md").write_text("my thesis\n")
    for words in (["report", "run", "--output", "thesis"], ["train", "demo", "--twin", "--output", "thesis"]):
        with pytest.raises(SystemExit):
            main.main(words)
        told = capsys.readouterr().err
        assert "expected an output folder without report.md" in told or "a new or empty folder for several runs" in told
        assert [path.name for path in thesis.iterdir()] == ["report.md"]
        assert (thesis / "report.md").read_text() == "my thesis\n"
    for _ in range(2):  # its own files are replaced
        main.main(["report", "run", "--output", "new"])
        main.main(["report", "run", "--output", str(run.folder)])
    assert (tmp_path / "new" / "report.md").is_file()


def test_two_kinds_of_data_are_an_error(tmp_path, capsys):
    tree(tmp_path / "photos", "train", "test")
    with pytest.raises(SystemExit):
        main.main(["data", "check", "own", "--data", "photos", "--dataset", "digits"])
    assert (
        "expected --data or --dataset, got both: --data photos is a data set of kind folder" in capsys.readouterr().err
    )
    main.main(["data", "check", "own", "--data", "photos", "--dataset", "folder", "--tasks", "1"])


def test_no_batch_is_an_error(tmp_path, capsys):
    train.train(tiny.config(epochs=1, tasks=1), tmp_path / "run")
    with pytest.raises(SystemExit):
        main.main(["eval", "run", "--batch-size", "0"])
    assert "expected eval_batch_size of at least 1, got 0" in capsys.readouterr().err


@pytest.mark.slow
def test_baselines(tmp_path, capsys):
    main.main(["train", "demo", "--baselines", "--output", "all"])
    out = capsys.readouterr().out
    runs = {path.name: Run.open(path) for path in (tmp_path / "all").iterdir() if path.is_dir()}
    assert runs.keys() == {"orthogonal", *BASELINES}
    assert out.count("run:    all/") == 8
    assert {name: list(run.matrices()) for name, run in runs.items()} == {
        "orthogonal": ["head", "lda"],
        **{name: ["head", "lda"] for name in ("unprojected", "random", "reduced-lr", "frozen")},
        "linear-probe": ["head", "lda"],
        "ncm": ["ncm"],
        "joint": ["head", "lda"],
    }
    steps = {name: sum(1 for _ in run.events("train")) for name, run in runs.items()}
    assert steps["ncm"] == 0
    assert steps["orthogonal"] == steps["linear-probe"] == 3
    assert runs["joint"].matrices()["lda"].shape == (1, 1)
    assert float(runs["joint"].matrices()["lda"]) >= float(runs["unprojected"].matrices()["lda"][-1].mean()) - 0.1
    for name in ("linear-probe", "joint"):
        main.main(["train", "demo", "--method", name, "--output", name])
        assert Run.open(tmp_path / name).config == runs[name].config
    main.main(["eval", "linear-probe", "--every-task"])
    assert capsys.readouterr().out.count("yes") == 6


def test_parts_can_be_replaced(tmp_path):
    words = (
        "--projection orthogonal --projection.basis union --readouts lda --readouts.0.shrinkage 0.5 --method head-only"
    )
    main.main(["train", "demo", *words.split()])
    config = Run.open(tmp_path / "runs" / "demo-seed42").config
    assert config.projection.basis == "union"
    assert config.readouts == (lda.LDA.Config(0.5),)
    assert config.method == head_only.HeadOnly.Config()


def test_list_and_help(capsys):
    main.main(["list"])
    out = capsys.readouterr().out
    assert all(name in out for name in [*recipes.RECIPES, *recipes.METHODS, *recipes.PROJECTIONS, *recipes.DATASETS])
    for words in ([], ["--help"], ["train", "--help"]):
        main.main(words)
        assert "usage: pgp" in capsys.readouterr().out
    for words in (["train", "demo", "--help"], ["train", "--resume", "--help"]):
        with pytest.raises(SystemExit) as stop:
            main.main(words)
        assert stop.value.code == 0
        assert "--devices" in capsys.readouterr().out


def test_an_empty_folder_is_no_data_set(tmp_path, capsys):
    for name, shown in (("cifar-100-python", "searched for at"), ("cifar-100-python/train", "found at")):
        (tmp_path / "data" / name).mkdir(parents=True)
        main.main(["list"])
        assert f"{shown} {tmp_path / 'data' / 'cifar-100-python'}" in capsys.readouterr().out


def test_data_get_and_check(tmp_path, capsys):
    for label in "ab":
        (tmp_path / "photos" / label).mkdir(parents=True)
        for number in range(3):
            Image.new("RGB", (9, 9), (80 * number, 0, 0)).save(tmp_path / "photos" / label / f"{number}.png")
    words = ["own", "--data", "photos", "--tasks", "2"]
    main.main(["data", "get", *words])
    assert f"found 4 training and 2 test images of 2 classes, at {'photos'}" in capsys.readouterr().out
    main.main(["data", "check", *words])
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        "4 training and 2 test images of 2 classes",
        "task 1 of 2: 1 classes, 2 training and 1 test images",
        "task 2 of 2: 1 classes, 2 training and 1 test images",
        "complete: every image can be read",
    ]
    assert err.splitlines() == [
        "pgp: warning: a single class in task 1 of 2, task 2 of 2: prompts and head learn nothing there, only readouts"
        " from statistics (lda, logistic, ncm) do; give each task two classes at least",
    ]
    main.main(["data", "get", "demo"])
    assert "found 72 training and 24 test images of 6 classes" in capsys.readouterr().out
    (tmp_path / "photos" / "a" / "1.png").write_bytes(b"")
    with pytest.raises(SystemExit):
        main.main(["data", "check", *words])
    told = capsys.readouterr()
    assert "cannot read the image" in told.out
    assert "1.png" in told.out
    assert "the data are not complete" in told.err
    assert "no data folder at" in fails(capsys, "data", "get", "own", "--data", "nowhere")
    assert "perhaps you meant 'check'" in fails(capsys, "data", "chek", "demo")
    assert "expected pgp data get RECIPE" in fails(capsys, "data")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tarin"], "unknown command 'tarin': perhaps you meant 'train'"),
        (["train", "10cifar100_l2p"], "perhaps you meant '10cifar100_l2p_pgp'; see pgp list"),
        (["train"], "expected a recipe, as in pgp train demo, or --resume RUN, got none"),
        (["train", "demo", "--tasks", "7"], "between 1 and 6 tasks"),
        (["train", "demo", "--dataset", "folder", "--dataset.root", "nowhere"], "no data folder at"),
        (["eval", "nowhere"], "no run at nowhere"),
        (["train", "--resume", "nowhere"], "no run at nowhere"),
        (["report"], "expected run folders"),
        (["list", "x"], "takes no arguments"),
        (["train", "demo", "--accelerator", "gpu"], "this machine cannot compute with --accelerator gpu"),
        (["train", "demo", "--twin", "--no-pgp"], "expected a projection with --twin"),
        (["train", "demo", "--twin", "--projection", "none"], "expected a projection with --twin"),
        (["train", "demo", "--twin", "--baselines"], "expected --twin or --baselines, got both"),
        (["train", "demo", "--readouts", "lda", "lda"], "readouts with different names"),
    ],
)
def test_errors_are_one_line(capsys, words, message):
    error = fails(capsys, *words)
    assert message in error
    assert "\n" not in error.strip()


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--method.topk", "2"], "--method.top-k"), (["--method.top-k", "99"], "pool_size 10, got 99")],
)
def test_flags_that_do_not_fit(capsys, words, message):
    assert message in " ".join(fails(capsys, "train", "demo", *words).split())


@pytest.mark.slow
def test_reports_average_over_seeds_and_nothing_else(tmp_path, capsys):
    energies = {"low": "0.5", "high": "0.9"}
    for name, energy in energies.items():
        main.main(["train", "demo", "--projection.energy", energy, "--output", name])
    main.main(["train", "demo", "--no-pgp", "--output", "none"])
    main.main(["train", "demo", "--no-pgp", "--seed", "7", "--output", "[/none] 7"])
    capsys.readouterr()
    main.main(["report", "low", "high", "none", "[/none] 7", "none", "--output", "out"])
    accuracy, _drift = (tmp_path / "out" / "report.md").read_text().split("\n\n")
    lines = [line.split(" | ") for line in accuracy.splitlines()[2:]]
    assert {(line[0], line[2]) for line in lines} == {
        ("| projection orthogonal, energy 0.5", "1"),
        ("| projection orthogonal, energy 0.9", "1"),
        ("| projection none", "2"),
    }
    assert "run:    [/none] 7" in capsys.readouterr().out
    shutil.copytree("none", "copy")
    assert "seeds of their own, got [42, 42]: a seed counts once" in fails(capsys, "report", "none", "copy")


def test_another_run_is_kept(tmp_path, capsys):
    main.main(["train", "demo", "--output", "run"])
    before = (tmp_path / "run" / "accuracy.csv").read_bytes()
    assert "nothing in it will be overwritten" in fails(capsys, "train", "demo", "--seed", "5", "--output", "run")
    assert (tmp_path / "run" / "accuracy.csv").read_bytes() == before


@pytest.mark.slow
def test_as_a_module():
    out = subprocess.run([sys.executable, "-m", "pgp", "--version"], capture_output=True, text=True, check=True).stdout
    assert out.startswith("pgp 0.")


def test_words_in_the_wrong_place_are_told_where_they_belong(capsys):
    assert "for images, use --data PHOTOS" in fails(capsys, "train", "own", "PHOTOS")
    assert "expected --add with --resume" in fails(capsys, "train", "own", "--add", "NEW")
    assert "expected a run folder after --resume" in fails(capsys, "train", "--resume")
    for words in (["list", "--help"], ["data", "--help"], ["data", "check", "-h"]):
        main.main(words)
        assert capsys.readouterr().out.startswith("usage: pgp COMMAND")


def test_a_run_that_stopped_says_so(tmp_path, capsys, monkeypatch):
    evaluated = train.end_task

    def stop(session, state, task, *args, **kwargs):
        if task.index == 1:
            raise KeyboardInterrupt
        evaluated(session, state, task, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(train, "end_task", stop)
        with pytest.raises(SystemExit):
            main.main(["train", "demo", "--output", "run"])
    main.main(["report", "run"])
    assert "(unfinished: 1 of 3 tasks; resume with pgp train --resume)" in capsys.readouterr().out
    main.main(["train", "--resume", "run", "--on-bad-image", "skip"])
    assert "unfinished" not in capsys.readouterr().out


@pytest.mark.parametrize("flag", ["--max-megabytes", "--max-megapixels", "--max-files", "--timeout", "--batch-size"])
def test_limits_of_a_service_are_above_zero(flag, capsys):
    assert f"expected {flag} above 0, got -1" in fails(capsys, "serve", "none", flag, "-1")


@pytest.mark.parametrize("flag", ["--max-megabytes", "--max-megapixels"])
@pytest.mark.parametrize("value", ["inf", "nan", "1e308"])
def test_limits_of_a_service_are_finite(flag, value, capsys):
    message = f"expected a finite size with {flag}, got {float(value):g}: name a number, such as 1e6"
    assert message in fails(capsys, "serve", "none", flag, value)
