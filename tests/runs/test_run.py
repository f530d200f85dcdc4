from __future__ import annotations

import errno

import pytest
import torch

import tiny
from pgp.runs.run import Run
from pgp.system import platforms
from pgp.system.outputs import make_unique_folder
from pgp.system.storage import RunError

STATE = {
    "task": 1,
    "none": None,
    "names": ["a", 2.5, [True]],
    "tensors": {
        "double": torch.rand(2, 3, dtype=torch.float64),
        "half": torch.rand(2).bfloat16(),
        "flag": torch.tensor([True, False]),
        "empty": torch.empty(0, 4),
        "scalar": torch.tensor(3),
    },
    "by number": {0: {"step": torch.tensor(1.0)}, 7: {}},
}


@pytest.fixture
def run(tmp_path):
    return Run.create(tmp_path / "run", tiny.config())


def alike(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other) and one.dtype == other.dtype
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(alike(one[key], other[key]) for key in one)
    return one == other


def test_state_goes_round(run):
    run.save("task-01", STATE)
    assert alike(run.load(), STATE)
    assert run.config == tiny.config()


def test_another_run_is_never_overwritten(run):
    before = {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()}
    with pytest.raises(RunError, match="not empty and nothing in it will be overwritten"):
        Run.create(run.folder, tiny.config(seed=1))
    assert before == {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()}


def test_a_full_disk_loses_nothing(run, monkeypatch):
    run.save("task-01", STATE)

    def full(path):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(platforms, "sync_file", full)
    with pytest.raises(RunError, match=r"task-02 was not saved, the last good state is .*task-01: .*No space left"):
        run.save("task-02", STATE)
    monkeypatch.undo()
    assert {path.name for path in (run.folder / "checkpoints").iterdir()} == {"task-01", "latest"}
    assert alike(run.load(), STATE)


@pytest.mark.parametrize("name", ["state.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["truncate", "remove"])
def test_damaged_checkpoints_are_named(run, name, damage):
    run.save("task-01", STATE)
    path = run.folder / "checkpoints" / "task-01" / name
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(RunError, match=rf"task-01.{name}.*another checkpoint to .*latest, and pgp train --resume"):
        run.load()


def test_a_checkpoint_inside_a_task_goes_when_a_newer_one_stands(run):
    for name in ("task-01", "task-02-step-000005", "task-02-step-000010", "task-02"):
        run.save(name, STATE)
    assert {path.name for path in (run.folder / "checkpoints").iterdir()} == {"task-01", "task-02", "latest"}


def test_what_is_no_run(tmp_path, run):
    with pytest.raises(RunError, match=r"no run at .*nowhere"):
        Run.open(tmp_path / "nowhere")
    with pytest.raises(RunError, match="no checkpoint yet"):
        run.load()
    with pytest.raises(RunError, match=r"no accuracy\.csv yet"):
        run.matrices()
    for text in ('{"name": 1', "[]", "null", "[" * 100_000, "1" * 10_000, '{"name": "x"}'):
        (run.folder / "config.json").write_text(text)
        with pytest.raises(RunError, match=r"config\.json (is damaged|carries no digest)"):
            _ = run.config


def test_a_log_survives_a_crash(run):
    run.log("train", task=0)
    with (run.folder / "metrics.jsonl").open("a") as file:
        file.write('{"event": "train", "ta')
    assert [event["task"] for event in run.events("train")] == [0]
    run.log("train", task=1)  # the torn line swallows none
    assert [event["task"] for event in run.events("train")] == [0, 1]


@pytest.mark.parametrize("write", [lambda run: run.log("task", task=1), lambda run: run.write_matrices({})])
def test_a_full_disk_is_said_for_every_file(run, monkeypatch, write):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("builtins.open", full)
    with pytest.raises(RunError, match=r"cannot write .*No space left on device: make room. Then resume with"):
        write(run)


def test_free_folders_differ(tmp_path):
    assert [make_unique_folder(tmp_path / "runs", "demo").name for _ in range(3)] == ["demo", "demo-2", "demo-3"]
    outside = make_unique_folder(tmp_path / "runs", "../../x/demo")  # the name of a stranger's run
    assert outside.parent == tmp_path / "runs"


def test_matrices_go_round(run):
    matrix = torch.tensor([[0.1, torch.nan, torch.nan], [1 / 3, 0.2, torch.nan], [torch.nan] * 3], dtype=torch.float64)
    run = Run.create(run.folder.parent / "three", tiny.config(), tiny.described("abc", [[0], [1], [2]]))
    run.save("task-02", {"matrices": {"lda": matrix}})
    for kept in (True, False):  # the table, and the checkpoint if the table is gone or not as it was
        torch.testing.assert_close(run.matrices()["lda"], matrix[:2, :2], rtol=0, atol=0, equal_nan=True)
        run.write_matrices({"lda": matrix if kept else matrix + 1})
