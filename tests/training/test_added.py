"""More tasks for a finished run: train --resume RUN --add FOLDER."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

import tiny
from pgp import recipes, train
from pgp.analysis.checkpoints import evaluate_checkpoints
from pgp.cli import main
from pgp.datasets.base import BadImageError
from pgp.datasets.folder import Folder
from pgp.methods.adapter import Adapter
from pgp.methods.clip_prompt import CLIPPrompt
from pgp.methods.coda_prompt import CODAPrompt
from pgp.methods.lora import LoRA
from pgp.predict import Predictor
from pgp.readouts.head import MethodHead
from pgp.readouts.lda import LDA, NCM
from pgp.reports import tables
from pgp.runs.run import Run
from pgp.system import storage
from pgp.system.storage import RunError

COLOURS = {
    "ant": (200, 30, 30),
    "bee": (30, 200, 30),
    "cat": (30, 30, 200),
    "dog": (200, 200, 30),
    "eel": (30, 200, 200),
    "dim": (60, 60, 60),
    "ape": (200, 30, 200),
}


def names_and_tasks(run):
    return list(run.data.class_names), [list(labels) for labels in run.data.tasks]


def photos(folder, *names, shade=0):
    for name in names:
        (folder / name).mkdir(parents=True)
        for number in range(5):
            colour = tuple(value + 6 * number - shade for value in COLOURS[name])
            Image.new("RGB", (40, 36), colour).save(folder / name / f"{number}.png")
    return folder


def config(folder, **changes):
    readouts = (MethodHead.Config(), LDA.Config(), NCM.Config())
    return tiny.config(**{"dataset": Folder(folder), "tasks": 2, "epochs": 1, "readouts": readouts, **changes})


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def interrupt(*_, **__):
    raise KeyboardInterrupt


@pytest.fixture
def run(tmp_path):
    return train.train(config(photos(tmp_path / "old", "bee", "cat", "dog")), tmp_path / "run")


def test_a_finished_run_learns_a_folder(run, tmp_path):
    old_head = run.load()["method"]["head.weight"]
    old = run.matrices()
    new = photos(tmp_path / "new classes", "ant", "eel")
    again = train.resume(run.folder, add=Folder(new))
    assert again.config.added == (Folder(new),)
    assert names_and_tasks(again) == (["bee", "cat", "dog", "ant", "eel"], [[0, 1], [2], [3, 4]])
    assert list(again.data.task_names) == ["", "", "new classes"]
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


@pytest.mark.parametrize(
    "method",
    [LoRA.Config(rank=2), Adapter.Config(rank=2), CODAPrompt.Config(layers=(0,), pool_size=12, per_task=4)],
    ids=lambda method: method.tag,
)
def test_weight_updates_and_components_learn_a_folder_too(method, tmp_path):
    """Two tasks were learned, so what is stored of them has to be there when the third begins."""
    run = train.train(config(photos(tmp_path / "old", "bee", "cat", "dog", "ant"), method=method), tmp_path / "run")
    before = run.matrices()["lda"]
    again = train.resume(run.folder, add=Folder(photos(tmp_path / "new", "eel", "dim")))
    torch.testing.assert_close(again.matrices()["lda"][:2, :2], before, rtol=0, atol=0, equal_nan=True)
    assert float(again.matrices()["lda"][2].mean()) > 0.5
    assert len(Predictor(again, "lda").classes) == 6


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
    labels = [label for label, _ in tables.group_runs([Run.open(folder) for folder in both])]
    assert labels == ["root ant", "root dim"]


def test_more_than_once_and_over_a_crash_bitwise(run, tmp_path, monkeypatch):
    shutil.copytree(run.folder, tmp_path / "whole")
    first, second = Folder(photos(tmp_path / "a", "ant")), Folder(photos(tmp_path / "e", "eel"))
    whole = train.resume(tmp_path / "whole", add=first)
    whole = train.resume(tmp_path / "whole", add=second)
    assert len(whole.matrices()["lda"]) == 4

    with monkeypatch.context() as patch:
        patch.setattr(train, "end_task", interrupt)
        for new in (second, first):  # of which nothing is left
            before = contents(run.folder)
            with pytest.raises(KeyboardInterrupt):
                train.resume(run.folder, add=new)
            assert contents(run.folder) == before
    train.resume(run.folder, add=first)
    resumed = train.resume(run.folder, add=second)
    for column, matrix in whole.matrices().items():
        torch.testing.assert_close(resumed.matrices()[column], matrix, rtol=0, atol=0, equal_nan=True)
    one, other = (r.load()["method"] for r in (whole, resumed))
    assert all(torch.equal(one[name], other[name]) for name in one)
    every = evaluate_checkpoints(resumed, resumed.config, every_task=True)
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
    assert names_and_tasks(again) == (["bee", "cat"], [[0, 1]] * 3)
    assert list(again.data.task_names) == ["day", "dusk", "night"]
    assert again.matrices()["lda"][2].isfinite().all()


def test_what_does_not_fit_changes_nothing(run, tmp_path):
    files = {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()}
    photos(tmp_path / "known", "cat", "eel")
    with pytest.raises(ValueError, match=r"expected new classes in .*known, got \['cat'\], which this run has learned"):
        train.resume(run.folder, add=Folder(tmp_path / "known"))
    with pytest.raises(ValueError, match="no data folder at"):
        train.resume(run.folder, add=Folder(tmp_path / "nowhere"))
    latest = run.folder / "checkpoints" / "latest"
    was = latest.read_text()
    latest.write_text("task-01")
    with pytest.raises(RunError, match=r"tasks are all finished, got .*: first resume with"):
        train.resume(run.folder, add=Folder(photos(tmp_path / "new", "ant")))
    latest.write_text(was)
    assert {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()} == files
    photos(tmp_path / "old" / "later", "ant")
    shutil.move(tmp_path / "old" / "later" / "ant", tmp_path / "old" / "zebra")
    (tmp_path / "old" / "later").rmdir()
    with pytest.raises(RunError, match=r"expected the data that .* began with"):
        train.resume(run.folder)
    (tmp_path / "old" / "zebra").rename(tmp_path / "zebra")
    train.resume(run.folder)


def test_what_was_added_can_be_mended(run, tmp_path):
    new = photos(tmp_path / "new", "ant")
    (new / "ant" / "broken.png").write_bytes(b"not an image")
    with pytest.raises(BadImageError, match=r"broken\.png"):
        train.resume(run.folder, add=Folder(new))
    (new / "ant" / "broken.png").unlink()
    assert train.resume(run.folder).progress() == (2, 2)
    again = train.resume(run.folder, add=Folder(new))
    assert names_and_tasks(again) == (["bee", "cat", "dog", "ant"], [[0, 1], [2], [3]])
    assert again.latest_checkpoint() == "task-03"


@pytest.mark.parametrize("crash", ["config.json", "classes.json"])
def test_a_crash_between_the_checkpoint_and_its_files_changes_nothing(run, tmp_path, monkeypatch, crash):
    new, write = Folder(photos(tmp_path / "new", "ant")), storage.write

    def stop(path, content):
        if path.name == crash:
            raise KeyboardInterrupt
        write(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "write", stop)
        with pytest.raises(KeyboardInterrupt):
            train.resume(run.folder, add=new)
    assert run.config.added == (new,)
    assert Predictor(run).classes == ("bee", "cat", "dog", "ant")
    again = train.resume(run.folder)
    assert again.matrices()["lda"].isfinite().sum() == 6
    assert [json.loads((run.folder / name).read_text())[key][-1] for name, key in (("classes.json", "names"),)] == [
        "ant"
    ]
    assert len(json.loads((run.folder / "config.json").read_text())["added"]) == 1


def test_what_was_begun_of_a_task_is_gone_on_with_dropped_or_given_again(run, tmp_path, monkeypatch):
    stepwise = train.train(replace(run.config, batch_size=2, save_every_steps=1), tmp_path / "steps")
    before = contents(stepwise.folder)
    ant, eel = Folder(photos(tmp_path / "a", "ant")), Folder(photos(tmp_path / "e", "eel"))
    fresh = train.resume(shutil.copytree(stepwise.folder, tmp_path / "fresh"), add=ant)
    with monkeypatch.context() as patch:
        patch.setattr(train, "end_task", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train.resume(stepwise.folder, add=ant)
    assert stepwise.latest_checkpoint().startswith("task-03-step-")
    assert (stepwise.config.added, stepwise.progress(), Predictor(stepwise).classes[-1]) == ((), (2, 2), "dog")
    left = {path: data for path, data in contents(stepwise.folder).items() if "checkpoints" not in path.parts}
    assert left.items() <= before.items()  # nothing is written outside checkpoints/ before the task is finished

    def copied(name):
        return Path(shutil.copytree(stepwise.folder, tmp_path / name))

    with pytest.raises(RunError, match=r"has begun to learn .*a: resume with .*or drop the unfinished task"):
        train.resume(stepwise.folder, add=eel)
    assert train.resume(copied("other"), add=eel, drop=True).data.class_names[-1] == "eel"
    dropped = train.resume(copied("dropped"), drop=True)
    left = {path: data for path, data in contents(dropped.folder).items() if path.name != "metrics.jsonl"}
    assert left == {path: data for path, data in before.items() if path.name != "metrics.jsonl"}
    for gone_on in (train.resume(copied("on")), train.resume(copied("again"), add=ant)):
        same(gone_on.load()["method"], fresh.load()["method"])
        assert next(iter(gone_on.events("resumed")))["task"] == 2
        assert [event["task"] for event in gone_on.events("task")] == [0, 1, 2]
    Image.new("RGB", (40, 36), COLOURS["ant"]).save(tmp_path / "a" / "ant" / "9.png")
    with pytest.raises(RunError, match="numbers of training images differ"):
        train.resume(copied("changed"))
    assert train.resume(copied("mended"), add=ant).progress() == (3, 3)


def same(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


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
    main.main(["train", "--resume", "run", "--add", "new classes"])
    assert "task 3 of 3 (new classes)" in capsys.readouterr().err
    main.main(["predict", "run", "new classes"])
    assert capsys.readouterr().out.count("\n") == 5
    assert Run.open(tmp_path / "run").config.added[0].root.is_absolute()
    assert replace(run.config, added=()).tasks == 2


def test_a_class_that_looks_like_one_that_was_learned_is_a_warning(tmp_path, capsys):
    train.train(config(photos(tmp_path / "old", "bee", "cat", "dog")), tmp_path / "run")
    photos(tmp_path / "new", "bee", "eel")
    (tmp_path / "new" / "bee").rename(tmp_path / "new" / "wasp")
    main.main(["add", str(tmp_path / "run"), str(tmp_path / "new")])
    told = " ".join(capsys.readouterr().err.split())
    assert "images of wasp look like those of bee, which was learned before" in told
    assert "images of eel" not in told
    (warning,) = [
        line["warning"] for line in Run.open(tmp_path / "run").events("data") if "wasp" in line.get("warning", "")
    ]
    assert warning.endswith("is it the same class under another name?")


def test_undo_forgets_the_task_that_was_added_last(run, tmp_path, capsys):
    before = contents(run.folder)
    train.resume(run.folder, add=photos(tmp_path / "one", "ant"))
    once, accuracy = Run.open(run.folder), Run.open(run.folder).matrices()
    kept, events = names_and_tasks(once), once.events("task")
    train.resume(run.folder, add=photos(tmp_path / "two", "eel"))
    main.main(["undo", str(run.folder)])
    again = Run.open(run.folder)
    assert capsys.readouterr().out == f"forgot task two: {run.folder} is as it was before\n"
    assert (names_and_tasks(again), again.events("task"), again.progress()) == (kept, events, (3, 3))
    for column, matrix in accuracy.items():
        torch.testing.assert_close(again.matrices()[column], matrix, equal_nan=True)
    assert [event["task"] for event in again.events("undone")] == [3]
    main.main(["undo", str(run.folder)])
    after, log = contents(run.folder), Path("metrics.jsonl")
    assert after[log].startswith(before[log])
    assert {path: data for path, data in after.items() if path != log} == {
        path: data for path, data in before.items() if path != log
    }
    with pytest.raises(SystemExit):
        main.main(["undo", str(run.folder)])
    assert "expected a run to which pgp add has added a task, got" in capsys.readouterr().err


def test_undo_writes_the_report_again(run, tmp_path):
    main.main(["report", str(run.folder)])
    before = (run.folder / "report.md").read_text()
    main.main(["add", str(run.folder), str(photos(tmp_path / "one", "ant"))])
    main.main(["report", str(run.folder), "--html"])
    assert (run.folder / "report.md").read_text() != before
    assert re.search(r"\bant\b", (run.folder / "report.html").read_text(encoding="utf-8"))
    figures = [run.folder / name for name in ("drift.png", "calibration.png")]
    for path in figures:
        path.write_bytes(b"of a task that is forgotten")
    main.main(["undo", str(run.folder)])
    assert (run.folder / "report.md").read_text() == before
    assert not re.search(r"\bant\b", (run.folder / "report.html").read_text(encoding="utf-8"))
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in figures)


def test_undo_that_is_killed_is_complete_or_has_not_begun(run, tmp_path, monkeypatch):
    train.resume(run.folder, add=photos(tmp_path / "one", "ant"))
    monkeypatch.setattr(Run, "_write_identity", interrupt)
    with pytest.raises(KeyboardInterrupt), run.writing():
        run.undo_add()
    monkeypatch.undo()
    again = train.resume(run.folder, add=photos(tmp_path / "two", "eel"))
    assert names_and_tasks(again) == (["bee", "cat", "dog", "eel"], [[0, 1], [2], [3]])
    assert json.loads((run.folder / "classes.json").read_text(encoding="utf-8"))["names"][-1] == "eel"
    assert len(again.events("task")) == 3


def test_undo_needs_the_checkpoint_of_before(tmp_path):
    old = photos(tmp_path / "old", "bee", "cat", "dog")
    run = train.train(config(old, keep_checkpoints="last"), tmp_path / "run")
    train.resume(run.folder, add=photos(tmp_path / "one", "ant"))
    before = contents(run.folder)
    with pytest.raises(RunError, match=r"undoing a task needs the checkpoint before it, but .* keeps only the newest"):
        run.undo_add()
    assert contents(run.folder) == before


@pytest.mark.parametrize("damaged", ["state.safetensors", "state.json"])
def test_undo_and_drop_leave_the_run_as_it_is_if_the_checkpoint_before_is_damaged(run, tmp_path, damaged):
    train.resume(run.folder, add=photos(tmp_path / "one", "ant"))
    file = run.checkpoints.folder / "task-02" / damaged
    whole = file.read_bytes()
    file.write_bytes(whole[:-10])
    before = contents(run.folder)
    with pytest.raises(RunError, match="task-02"):
        run.undo_add()
    assert contents(run.folder) == before
    file.write_bytes(whole)
    run.undo_add()
    run.save("task-03-step-000001", run.load())
    file.write_bytes(whole[:-10])
    before = contents(run.folder)
    with pytest.raises(RunError, match="task-02"):
        run.checkpoints.drop_step()
    assert contents(run.folder) == before


def test_undo_leaves_an_unfinished_task_alone(run, tmp_path, monkeypatch):
    train.resume(run.folder, add=photos(tmp_path / "one", "ant"))
    state = run.load()
    run.save("task-04-step-000001", state)
    with pytest.raises(RunError, match=r"is inside a task: drop it with pgp train --resume .* --drop"):
        run.undo_add()


@pytest.mark.filterwarnings("always:.*is missing. its record")
def test_undo_works_after_the_log_was_moved_away_and_keeps_new_data_paths(run, tmp_path, capsys):
    train.resume(run.folder, add=photos(tmp_path / "one", "ant"))
    (run.folder / "metrics.jsonl").rename(tmp_path / "metrics.jsonl")
    (tmp_path / "old").rename(tmp_path / "moved")
    main.main(["eval", str(run.folder), "--data", str(tmp_path / "moved")])
    main.main(["undo", str(run.folder)])
    assert "is missing: its record of training is left out" in capsys.readouterr().err
    again = Run.open(run.folder)
    assert again.config.dataset.root == tmp_path / "moved"
    assert [event["task"] for event in again.events("undone")] == [2]
    main.main(["add", str(run.folder), str(photos(tmp_path / "two", "eel"))])
    assert Run.open(run.folder).progress() == (3, 3)
