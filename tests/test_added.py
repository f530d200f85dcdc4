"""More tasks for a finished run: train --resume RUN --add FOLDER."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch
from PIL import Image

import tiny
from pgp import cli, recipes, report, train
from pgp.datasets import BadImageError
from pgp.datasets.folder import Folder
from pgp.methods.clip_prompt import CLIPPrompt
from pgp.predict import Predictor
from pgp.readouts.lda import LDA
from pgp.readouts.ncm import NCM
from pgp.readouts.sequential import Sequential
from pgp.run import Run, RunError

COLOURS = {
    "ant": (200, 30, 30),
    "bee": (30, 200, 30),
    "cat": (30, 30, 200),
    "dog": (200, 200, 30),
    "eel": (30, 200, 200),
    "dim": (60, 60, 60),
}


def photos(folder, *names, shade=0):
    for name in names:
        (folder / name).mkdir(parents=True)
        for number in range(5):
            colour = tuple(value + 6 * number - shade for value in COLOURS[name])
            Image.new("RGB", (40, 36), colour).save(folder / name / f"{number}.png")
    return folder


def config(folder, **changes):
    readouts = (Sequential.Config(), LDA.Config(), NCM.Config())
    return tiny.config(**{"dataset": Folder(folder), "tasks": 2, "epochs": 1, "readouts": readouts, **changes})


@pytest.fixture
def run(tmp_path):
    return train.train(config(photos(tmp_path / "old", "bee", "cat", "dog")), tmp_path / "run")


def test_a_finished_run_learns_a_folder(run, tmp_path):
    old_head = run.load()["method"]["head.weight"]
    old = run.matrices()
    new = photos(tmp_path / "new classes", "ant", "eel")
    again = train.resume(run.folder, add=Folder(new))
    assert again.config.added == (Folder(new),)
    assert again.classes() == (["bee", "cat", "dog", "ant", "eel"], [[0, 1], [2], [3, 4]])
    assert again.task_names() == ["", "", "new classes"]
    for column, matrix in again.matrices().items():
        assert matrix.shape == (3, 3)
        torch.testing.assert_close(matrix[:2, :2], old[column], rtol=0, atol=0, equal_nan=True)
        assert matrix[2].isfinite().all()
    assert again.matrices()["lda"][2].mean() > 0.5
    state = again.load()["method"]
    assert state["head.weight"].shape[0] == 5
    assert torch.equal(state["head.weight"][:3], old_head)  # the loss is over the task's own classes
    predictor = Predictor(again, "lda")
    assert predictor.classes == ("bee", "cat", "dog", "ant", "eel")
    assert [p.names[0] for p in predictor([new / "ant" / "1.png", tmp_path / "old" / "cat" / "2.png"])] == [
        "ant",
        "cat",
    ]


def test_a_task_of_one_class_is_told(run, tmp_path):
    def told(of):
        return [event["warning"] for event in of.events("data") if "warning" in event]

    before = told(run)
    again = train.resume(run.folder, add=Folder(photos(tmp_path / "eels", "eel")))
    assert len(told(again)) == len(before) + 1
    assert "single class in" in told(again)[-1]
    assert "eels" in told(again)[-1]


def test_a_report_names_what_was_added_briefly(run, tmp_path):
    both = [shutil.copytree(run.folder, tmp_path / name) for name in ("one", "two")]
    for folder, names in zip(both, (("ant", "eel"), ("dim", "eel")), strict=True):
        train.resume(folder, add=Folder(photos(tmp_path / "more" / names[0], *names)))
    labels = [label for label, _ in report.groups([Run.open(folder) for folder in both])]
    assert labels == ["root ant", "root dim"]


def test_more_than_once_and_over_a_crash_bitwise(run, tmp_path, monkeypatch):
    shutil.copytree(run.folder, tmp_path / "whole")
    first, second = Folder(photos(tmp_path / "a", "ant")), Folder(photos(tmp_path / "e", "eel"))
    whole = train.resume(tmp_path / "whole", add=first)
    whole = train.resume(tmp_path / "whole", add=second)
    assert len(whole.matrices()["lda"]) == 4

    fit_task = train.fit_task
    monkeypatch.setattr(train, "fit_task", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        train.resume(run.folder, add=first)
    assert Predictor(run).classes == ("bee", "cat", "dog")  # what it has learned so far
    with pytest.raises(RunError, match="expected a run whose tasks are all finished"):
        train.resume(run.folder, add=second)
    monkeypatch.setattr(train, "fit_task", fit_task)
    train.resume(run.folder)
    resumed = train.resume(run.folder, add=second)
    for column, matrix in whole.matrices().items():
        torch.testing.assert_close(resumed.matrices()[column], matrix, rtol=0, atol=0, equal_nan=True)
    one, other = (r.load()["method"] for r in (whole, resumed))
    assert all(torch.equal(one[name], other[name]) for name in one)
    every = train.reevaluate(resumed, resumed.config, every_task=True)
    torch.testing.assert_close(every["lda"], whole.matrices()["lda"], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("per_class", [False, True])
def test_clip_learns_new_names(tmp_path, per_class):
    settings = {"backbone": recipes.BACKBONES["demo-clip"], "method": CLIPPrompt.Config(per_class=per_class)}
    run = train.train(config(photos(tmp_path / "old", "bee", "cat", "dog"), **settings), tmp_path / "run")
    text = run.load()["method"]["head.text"]
    again = train.resume(run.folder, add=Folder(photos(tmp_path / "new", "ant")))
    grown = again.load()["method"]["head.text"]
    assert torch.equal(grown[:3], text)
    assert float(grown[3].norm()) == pytest.approx(1)


def test_an_online_run_and_a_new_domain(tmp_path):
    online = train.train(config(photos(tmp_path / "old", "bee", "cat"), setting="oil"), tmp_path / "oil")
    online = train.resume(online.folder, add=Folder(photos(tmp_path / "new", "ant")))
    assert [event["stream_accuracy"] is not None for event in online.events("task")] == [True] * 3

    root = tmp_path / "domains"
    photos(root / "day", "bee", "cat")
    photos(root / "dusk", "bee", "cat", shade=20)
    run = train.train(config(root, setting="dil", tasks=None), tmp_path / "dil")
    again = train.resume(run.folder, add=Folder(photos(tmp_path / "night", "bee", "cat", shade=25)))
    assert again.classes() == (["bee", "cat"], [[0, 1]] * 3)
    assert again.task_names() == ["day", "dusk", "night"]
    assert again.matrices()["lda"][2].isfinite().all()


def test_what_does_not_fit_changes_nothing(run, tmp_path):
    files = {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()}
    photos(tmp_path / "known", "cat", "eel")
    with pytest.raises(ValueError, match=r"expected new classes in .*known, got \['cat'\], which this run has learned"):
        train.resume(run.folder, add=Folder(tmp_path / "known"))
    with pytest.raises(ValueError, match="no data folder at"):
        train.resume(run.folder, add=Folder(tmp_path / "nowhere"))
    (run.folder / "checkpoints" / "latest").write_text("task-01")
    with pytest.raises(RunError, match=r"tasks are all finished, got .*: go on with it first"):
        train.resume(run.folder, add=Folder(photos(tmp_path / "new", "ant")))
    (run.folder / "checkpoints" / "latest").write_text("task-02")
    assert {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()} == files
    photos(tmp_path / "old" / "later", "ant")
    shutil.move(tmp_path / "old" / "later" / "ant", tmp_path / "old" / "zebra")
    (tmp_path / "old" / "later").rmdir()
    for add in (None, Folder(photos(tmp_path / "more", "eel"))):
        with pytest.raises(RunError, match=r"expected the data that .* began with"):
            train.resume(run.folder, add=add)
    (tmp_path / "old" / "zebra").rename(tmp_path / "zebra")
    train.resume(run.folder)


def test_what_was_added_can_be_mended(run, tmp_path):
    new = photos(tmp_path / "new", "ant")
    (new / "ant" / "broken.png").write_bytes(b"not an image")
    with pytest.raises(BadImageError, match=r"broken\.png"):
        train.resume(run.folder, add=Folder(new))
    (new / "ant" / "broken.png").unlink()
    with pytest.raises(RunError, match="expected the data"):
        train.resume(run.folder)
    with pytest.raises(RunError, match="what was added last can be given again by --add"):
        train.resume(run.folder, add=Folder(photos(tmp_path / "other", "eel")))
    again = train.resume(run.folder, add=Folder(new))
    assert again.classes() == (["bee", "cat", "dog", "ant"], [[0, 1], [2], [3]])
    assert again.latest_name() == "task-03"


def test_a_crash_between_its_two_files(run, tmp_path):
    new = Folder(photos(tmp_path / "new", "ant"))
    known = (run.folder / "classes.json").read_bytes()
    shutil.copytree(run.folder, tmp_path / "whole")
    whole = train.resume(tmp_path / "whole", add=new)
    shutil.copy(tmp_path / "whole" / "config.json", run.folder / "config.json")
    assert (run.folder / "classes.json").read_bytes() == known
    resumed = train.resume(run.folder)
    torch.testing.assert_close(resumed.matrices()["lda"], whole.matrices()["lda"], rtol=0, atol=0, equal_nan=True)


def test_a_new_domain_has_the_same_classes(tmp_path):
    root = tmp_path / "domains"
    photos(root / "day", "bee", "cat")
    photos(root / "dusk", "bee", "cat", shade=20)
    run = train.train(config(root, setting="dil", tasks=None), tmp_path / "dil")
    photos(tmp_path / "night", "cat").joinpath("cat").rename(tmp_path / "night" / "catt")
    with pytest.raises(ValueError, match=r"unknown class 'catt' in .*night: perhaps you meant 'cat'"):
        train.resume(run.folder, add=Folder(tmp_path / "night"))


def test_from_the_command_line(run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    photos(tmp_path / "new classes", "ant")
    cli.main(["train", "--resume", "run", "--add", "new classes"])
    assert "task 3 of 3 (new classes)" in capsys.readouterr().err
    cli.main(["predict", "run", "new classes"])
    assert capsys.readouterr().out.count("\n") == 5
    assert Run.open(tmp_path / "run").config.added[0].root.is_absolute()
    assert replace(run.config, added=()).tasks == 2
