"""Every image can be for training: then nothing is held out, and the tables say that accuracy was not measured."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_added import config, photos
from test_missing import quick

from pgp import train
from pgp.cli import main
from pgp.datasets.folder import Folder
from pgp.datasets.manifest import Manifest
from pgp.evaluation import metrics
from pgp.predict import Predictor
from pgp.reports import tables
from pgp.runs.run import Run

quietly = pytest.mark.filterwarnings("ignore:no test images of")


def untested(make, folder, **changes):
    """A run of `make` whose images are all for training."""
    base = make(folder, **changes)
    return replace(base, dataset=replace(base.dataset, test_share=0))


@quietly
@pytest.mark.parametrize("make", [config, quick])
def test_what_is_learned_does_not_depend_on_the_test_images(tmp_path, make):
    both = photos(tmp_path / "both" / "train", "bee", "cat", "dog")
    photos(tmp_path / "both" / "test", "bee", "cat", "dog")
    one = train.train(make(tmp_path / "both", drift_images=4), tmp_path / "one")
    other = train.train(untested(make, both, drift_images=4), tmp_path / "other")
    for part in ("method", "readouts"):
        torch.testing.assert_close(one.load()[part], other.load()[part], rtol=0, atol=0)
    assert sum(other.data.train_images) == sum(one.data.train_images)
    assert other.data.test_images == (0, 0)
    assert not any(matrix.isfinite().any() for matrix in other.matrices().values())
    assert other.matrices().keys() == one.matrices().keys()


@pytest.mark.filterwarnings("always:no test images of")
def test_the_command_line_says_that_accuracy_is_not_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    photos(tmp_path / "photos", "bee", "cat", "dog")
    words = ["--data", "photos", "--dataset.test-share", "0"]
    small = ["--backbone", "demo-vit", "--transforms.size", "32", "--transforms.resize", "32", "--tasks", "1"]
    main.main(["data", "check", "own", *words, "--tasks", "1"])
    assert "15 training and 0 test images of 3 classes" in capsys.readouterr().out
    main.main(["train", "quick", *words, *small, "--output", "run"])
    told = capsys.readouterr()
    assert "no test images of ['bee', 'cat', 'dog'] (3 in all), so their accuracy is not measured" in told.err
    assert "task 1 of 1: average accuracy not measured" in told.err
    assert "not measured" in told.out
    assert "nan" not in (tmp_path / "run" / "report.md").read_text()
    assert Predictor("run")([next((tmp_path / "photos" / "cat").iterdir())])[0].names == ("cat",)
    for command in ("eval", "audit"):
        with pytest.raises(SystemExit):
            main.main([command, "run"])
        assert "expected test images to measure accuracy on, got none: run holds none out" in capsys.readouterr().err


@quietly
@pytest.mark.filterwarnings("default:the old images")
@pytest.mark.parametrize("make", [config, quick])
def test_a_task_that_is_not_measured_has_not_the_accuracy_of_the_tasks_before_it(tmp_path, monkeypatch, make, capsys):
    monkeypatch.chdir(tmp_path)
    old = photos(tmp_path / "old", "bee", "cat", "dog")
    run = train.train(make(old), tmp_path / "run")
    main.main(["report", "run"])
    assert "not measured" not in Path("run/report.md").read_text()
    shutil.rmtree(old)
    new = photos(tmp_path / "new", "ant")
    for image in sorted((new / "ant").iterdir())[1:]:
        image.unlink()
    capsys.readouterr()
    main.main(["add", "run", "new"])
    told = capsys.readouterr()
    assert "task 3 of 3 (new): average accuracy not measured" in told.err
    assert "not measured" in told.out
    run = Run.open(run.folder)
    assert all(math.isnan(metrics.average_accuracy(matrix)) for matrix in run.matrices().values())
    assert not any(run.events("task")[-1]["average_accuracy"].values())
    assert not any(row.calibration for row in tables.result_rows([run]))
    main.main(["report", "run", "--html"])
    assert Path("run/report.md").read_text().count("not measured") >= len(run.matrices())


@quietly
def test_a_report_of_prompts_without_any_test_image(tmp_path, capsys):
    """There is no drift to draw."""
    run = train.train(untested(config, photos(tmp_path / "old", "bee", "cat", "dog")), tmp_path / "run")
    capsys.readouterr()
    main.main(["report", str(run.folder), "--html"])
    told = capsys.readouterr().out
    assert ("accuracy.png" in told, "drift.png" in told) == (True, False)
    assert (run.folder / "report.html").is_file()


@quietly
def test_a_page_without_any_test_image(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train.train(untested(quick, photos(tmp_path / "old", "bee", "cat", "dog")), tmp_path / "run")
    main.main(["report", "run", "--html"])
    assert "there were no test images" in Path("run/report.html").read_text(encoding="utf-8")


@quietly
@pytest.mark.parametrize("make", [config, quick])
def test_classes_are_added_without_a_word_about_old_test_images(tmp_path, make, capsys):
    old = photos(tmp_path / "old", "bee", "cat", "dog")
    run = train.train(untested(make, old, drift_images=4), tmp_path / "run")
    shutil.rmtree(old)
    for name in ("ant", "eel"):  # the second finds a run of two data sets without test images
        run = train.resume(run.folder, add=Folder(photos(tmp_path / name, name), test_share=0))
    run = train.resume(run.folder, add=Folder(photos(tmp_path / "ape", "ape")))
    matrix = next(iter(run.matrices().values()))
    assert matrix.isfinite().nonzero().tolist() == [[4, 4]]
    assert Predictor(run).classes == ("bee", "cat", "dog", "ant", "eel", "ape")
    assert Run.open(run.folder).data.train_images[:4] == (10, 5, 5, 5)
    main.main(["eval", str(run.folder), "--data", str(photos(tmp_path / "old", "bee", "cat", "dog"))])
    assert "yes" in capsys.readouterr().out.rpartition("as stored")[2]


@quietly
def test_a_table_may_have_no_test_images_and_domains_neither(tmp_path):
    root = photos(tmp_path / "photos", "bee", "cat")
    rows = [f"{path.relative_to(tmp_path)},{path.parent.name}" for path in sorted(root.rglob("*.png"))]
    (tmp_path / "table.csv").write_text("path,label\n" + "\n".join(rows))
    data = Manifest(tmp_path / "table.csv", test_share=0).build()
    assert (len(data.train), len(data.test)) == (10, 0)
    for domain in ("day", "night"):
        photos(tmp_path / "domains" / domain, "bee", "cat")
    run = train.train(untested(config, tmp_path / "domains", setting="dil", tasks=None), tmp_path / "run")
    assert run.data.train_images == (10, 10)
    assert run.data.test_images == (0, 0)


@pytest.mark.parametrize("share", [-0.1, 1, float("nan")])
def test_a_share_is_below_one(share):
    with pytest.raises(ValueError, match=r"expected dataset\.test_share between 0 and 1, got .*: 0 holds out no image"):
        Folder(test_share=share)
