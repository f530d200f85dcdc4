"""One process writes to a run; it tidies what is nobody's, starts over what had not begun, and says what stops it."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import tiny
from checkpoints import CLASSES, contents, made, state
from pgp import distributed, train
from pgp.cli import main
from pgp.evaluation import metrics
from pgp.runs import lock
from pgp.runs.checkpoint import CheckpointName, Checkpoints
from pgp.runs.lock import locked
from pgp.runs.run import Run
from pgp.system import locks, platforms, storage
from pgp.system.outputs import MARKER
from pgp.system.storage import RunError
from test_train import final, same

HOLD = "import sys, time; from pathlib import Path; from pgp.runs.lock import locked\n"
HOLD += "with locked(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"


@pytest.fixture
def holder(tmp_path):
    """Another process that writes to a run."""
    run = made(tmp_path / "run")
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(run.folder)], stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "held\n"
    yield run, other
    other.kill()
    other.wait()
    other.stdout.close()


def test_a_run_in_an_empty_folder_is_marked_as_output(tmp_path):
    folder = tmp_path / "images" / "run"
    folder.mkdir(parents=True)
    train.train(tiny.config(tasks=1), folder)
    assert (folder / MARKER).exists()
    (folder / MARKER).unlink()  # as before version 2
    with Run.open(folder).writing():
        assert (folder / MARKER).exists()


@pytest.mark.parametrize("devices", [1, 2])
def test_only_a_run_on_several_devices_has_child_processes(holder, monkeypatch, devices):
    monkeypatch.setenv("LOCAL_RANK", "1")  # as in a terminal that a distributed program left
    assert distributed.is_child_process(devices) == (devices == 2)
    if devices == 1:
        with pytest.raises(RunError, match="is being written to by process"):
            train.resume(holder[0].folder)


def test_the_second_is_told_who_writes_and_changes_nothing(holder, capsys):
    run, other = holder
    before = contents(run.folder)
    with pytest.raises(SystemExit) as stop:
        main.main(["train", "--resume", str(run.folder)])
    assert stop.value.code == 2
    told = capsys.readouterr().err.strip()
    assert f"is being written to by process {other.pid} on {platforms.HOST} since 2" in told
    assert "\n" not in told
    assert contents(run.folder) == before
    assert Run.open(run.folder).load()["task"] == 1  # reading is free
    if not platforms.WINDOWS:
        other.send_signal(signal.SIGKILL)
        other.wait()
        with run.writing():  # the system took the lock back
            assert contents(run.folder) != before


def test_what_a_dead_process_started_may_hold_its_lock_for_a_moment(tmp_path, monkeypatch):
    run = made(tmp_path / "run")
    with locked(run.folder):
        storage.write(
            run.folder / ".pgp-writer.json", f'{{"host": "{platforms.HOST}", "process": 4194999, "since": "x"}}'
        )
        monkeypatch.setattr(lock, "PATIENCE", 0.1)
        started = time.perf_counter()
        with pytest.raises(RunError, match="process 4194999"), run.writing():
            pass
        assert time.perf_counter() - started >= 0.1
        storage.write(run.folder / ".pgp-writer.json", '["who?"]')
        with pytest.raises(RunError, match="is being written to by another process: wait"), run.writing():
            pass


@pytest.mark.skipif(platforms.WINDOWS, reason="Windows locks by other means")
@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch, number):
    import fcntl

    run = made(tmp_path / "run")

    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.warns(UserWarning, match="has no locks: make sure that no other process writes there"), run.writing():
        assert (run.folder / ".pgp-writer.json").exists()
    with pytest.warns(UserWarning, match="has no locks"):
        assert locks.acquire(tmp_path / "any.lock", timeout=0) is None
    locks.release(None)


def test_a_lock_is_not_read(tmp_path, monkeypatch):
    """Windows refuses to read what another process has locked."""
    read, run = storage.read, made(tmp_path / "run")

    def refuse(path, *rest):
        assert path.name != ".pgp-lock"
        return read(path, *rest)

    monkeypatch.setattr(storage, "read", refuse)
    with locked(run.folder), pytest.raises(RunError, match="is being written to by process"), run.writing():
        pass


@pytest.mark.skipif(platforms.WINDOWS, reason="links take rights on Windows")
def test_a_lock_that_is_a_link_is_not_followed(tmp_path):
    run = made(tmp_path / "run")
    (tmp_path / "diary").write_text("dear diary\n")
    (run.folder / ".pgp-lock").symlink_to(tmp_path / "diary")
    with pytest.raises(RunError, match=r"expected a file at .*\.pgp-lock, got a link"), run.writing():
        pass
    assert (tmp_path / "diary").read_text() == "dear diary\n"


def test_two_new_runs_in_one_folder(tmp_path):
    (tmp_path / "run").mkdir()
    with locked(tmp_path / "run"), pytest.raises(RunError, match=f"by process {os.getpid()}"):
        train.train(tiny.config(), tmp_path / "run")


def stop_in_first_task(config, folder, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train, "end_task", stop)
        with pytest.raises(KeyboardInterrupt):
            train.train(config, folder)


def test_a_run_without_a_checkpoint_is_started_over_by_the_same_call_and_by_resume(tmp_path, monkeypatch):
    config = tiny.config(tasks=2, epochs=1)
    whole = train.train(config, tmp_path / "whole")
    for name in ("same", "resumed"):
        stop_in_first_task(config, tmp_path / name, monkeypatch)
        lines = (tmp_path / name / "metrics.jsonl").read_bytes()
        before = contents(tmp_path / name)
        with pytest.raises(RunError, match="not empty and nothing in it will be overwritten"):
            train.train(tiny.config(tasks=2, epochs=1, seed=1), tmp_path / name)
        assert contents(tmp_path / name) == before
        again = train.train(config, tmp_path / name) if name == "same" else train.resume(tmp_path / name)
        same(final(whole, "task-02"), final(again, "task-02"))
        assert (tmp_path / name / "metrics.jsonl").read_bytes().startswith(lines)
        assert len(list(again.events("train"))) == len(list(whole.events("train")))
        before = contents(tmp_path / name)
        with pytest.raises(RunError, match="not empty and nothing in it will be overwritten"):
            train.train(config, tmp_path / name)  # never again
        assert contents(tmp_path / name) == before


@pytest.mark.parametrize("first", [CheckpointName(1), CheckpointName(1, 3)])
def test_a_kill_before_the_first_checkpoint_is_the_latest_blocks_nothing(tmp_path, monkeypatch, first):
    run = Run.create(tmp_path / "run", tiny.config(), CLASSES)
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "_point", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run.save(first, state())
    again = Run.create(tmp_path / "run", tiny.config(), CLASSES)
    again.save(first, state(2))
    assert again.load()["task"] == 2


@pytest.mark.parametrize("crash", ["config.json", "classes.json", "environment.json"])
def test_a_kill_while_the_folder_is_made_blocks_nothing(tmp_path, monkeypatch, crash):
    write = storage.write

    def stop(path, content):
        if path.name == crash:
            raise KeyboardInterrupt
        write(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "write", stop)
        with pytest.raises(KeyboardInterrupt):
            Run.create(tmp_path / "run", tiny.config(), CLASSES)
    run = Run.create(tmp_path / "run", tiny.config(), CLASSES)
    run.save(CheckpointName(1), state())
    with pytest.raises(RunError, match="nothing in it will be overwritten"):
        Run.create(tmp_path / "run", tiny.config(), CLASSES)


@pytest.mark.parametrize("name", ["notes.txt", ".git/config", "checkpoints/model.pt", "checkpoints/task-01/state.json",
                                  "classes.json", "environment.json", "metrics.jsonl"])  # fmt: skip
def test_files_of_others_are_never_taken_for_a_run_that_begins(tmp_path, name):
    path = tmp_path / "run" / name
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    with pytest.raises(RunError, match="nothing in it will be overwritten"):
        train.train(tiny.config(), tmp_path / "run")
    assert contents(tmp_path / "run") == {Path(name): b"mine"}


def test_a_finished_run_whose_checkpoints_are_gone_is_not_started_over(tmp_path):
    run = made(tmp_path / "run")
    (run.folder / "checkpoints" / "latest").unlink()
    for name in ("task-01", "pieces"):
        (run.folder / "checkpoints" / name).rename(tmp_path / name)
    before = contents(run.folder)
    with pytest.raises(RunError, match="nothing in it will be overwritten"):
        train.train(tiny.config(), run.folder)
    with pytest.raises(RunError, match="latest is missing, and nothing of this run will be overwritten"):
        train.resume(run.folder)
    assert {path: data for path, data in contents(run.folder).items() if path.name != ".pgp-lock"} == before


def litter(run):
    """What a killed process leaves behind, and what is not ours."""
    dead, alive = "4194999", str(os.getpid())
    ours = [f"checkpoints/.task-02.{dead}@{platforms.HOST}/state.json", "checkpoints/task-02-step-000005/state.json",
            "checkpoints/task-02-replaced/state.json", "checkpoints/task-02-replaced-2/state.json",
            f"checkpoints/.latest.{dead}@{platforms.HOST}", f"checkpoints/pieces/{'0' * 64}.safetensors",
            f".accuracy.png.{dead}@{platforms.HOST}", f".config.json.{dead}@{platforms.HOST}",
            f"checkpoint/.task1_checkpoint.pth.{dead}@{platforms.HOST}"]  # fmt: skip
    others = ["notes.txt", "checkpoints/notes.txt", "checkpoints/pieces/notes.txt", "checkpoints/best/model.pt",
              "checkpoint/task1.pth", f".report.png.{alive}@{platforms.HOST}", ".report.png.77@elsewhere"]  # fmt: skip
    for name in (*ours, *others):
        (run.folder / name).parent.mkdir(exist_ok=True)
        (run.folder / name).write_text("x")
    return {Path(name) for name in ours}


@pytest.mark.skipif(platforms.WINDOWS, reason="Windows does not say whether a process lives")
def test_who_writes_tidies_what_no_living_process_owns(tmp_path):
    run = made(tmp_path / "run")
    ours = litter(run)
    before = contents(run.folder)
    run.load()
    run.matrices()
    assert contents(run.folder) == before  # reading deletes nothing
    with run.writing():
        assert before.keys() - contents(run.folder).keys() == ours
    assert run.load()["task"] == 1
    os.utime(run.folder / ".report.png.77@elsewhere", (0, 0))
    with run.writing():
        assert not (run.folder / ".report.png.77@elsewhere").exists()


@pytest.mark.skipif(platforms.WINDOWS, reason="links take rights on Windows")
def test_tidying_follows_no_links(tmp_path):
    run, precious = made(tmp_path / "run"), tmp_path / "precious"
    precious.mkdir()
    (precious / "data").write_text("x")
    (run.folder / "checkpoints" / "task-07-step-000001").symlink_to(precious)
    (run.folder / "checkpoint").symlink_to(precious)
    (precious / f".data.4194999@{platforms.HOST}").write_text("x")
    with run.writing():
        pass
    assert not (run.folder / "checkpoints" / "task-07-step-000001").is_symlink()
    assert len(list(precious.iterdir())) == 2


CAUSES = {
    errno.ENOSPC: "No space left on device: make room",
    errno.EDQUOT: "make room, your quota is used up",
    errno.EROFS: "Read-only file system: choose a folder that is not mounted read-only",
    errno.EACCES: "Permission denied: choose a folder in which you may write",
    errno.EIO: "look after the disk",
}


@pytest.mark.parametrize("number", CAUSES)
def test_errors_name_the_path_and_the_true_cause(tmp_path, monkeypatch, number):
    run = made(tmp_path / "run")

    def refuse(*_, **__):
        raise OSError(number, os.strerror(number))

    before = contents(run.folder)
    with monkeypatch.context() as patch:
        patch.setattr(platforms, "sync_file", refuse)
        for write, name in (
            (lambda: run.save(CheckpointName(2), state(2)), "metrics.jsonl"),
            (lambda: run.write_matrices({}), "accuracy.csv"),
            (lambda: storage.write(run.folder / "report.md", "x"), "report.md"),
            (
                lambda: run.checkpoints.save(CheckpointName(2), state(2), run.checkpoints.record(CheckpointName(1))),
                ".safetensors",
            ),
        ):
            with pytest.raises(RunError, match=rf"{name}: .*{CAUSES[number]}"):
                write()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", refuse)
        for write in (
            lambda: Run.create(tmp_path / "new", tiny.config()),
            lambda: run.save(CheckpointName(2), state(2)),
        ):
            with pytest.raises(RunError, match=CAUSES[number]):
                write()
    assert contents(run.folder) == before


def test_a_report_is_written_whole_or_not_at_all(tmp_path, monkeypatch, capsys):
    run = made(tmp_path / "run")
    (run.folder / "report.md").write_text("the report of before")

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(platforms, "sync_file", full)
    with pytest.raises(SystemExit):
        main.main(["report", str(run.folder)])
    assert "report.md: No space left on device: make room" in capsys.readouterr().err
    assert (run.folder / "report.md").read_text() == "the report of before"


def test_a_matrix_of_more_tasks_than_there_are_is_an_error():
    with pytest.raises(ValueError, match="expected the matrix of at most 1 tasks"):
        metrics.pad_matrix(torch.ones(2, 2), 1)
