"""Ctrl-C, SIGTERM and SIGHUP save where training stands and say how to go on."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torchvision.transforms import v2

import tiny
from pgp import recipes, train
from pgp.cli import main
from pgp.datasets.base import ArraySplit
from pgp.datasets.loader import LoaderOptions, TransformedSplit, batches, sequential_batches
from pgp.runs.run import Run
from pgp.system import signals

FOLDER = "a run's folder"
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows sends no such signals")


def demo(**changes):
    return replace(tiny.config(epochs=1, batch_size=6), name="demo", **changes)


@pytest.fixture(autouse=True)
def _demo(monkeypatch, tmp_path):
    monkeypatch.setitem(recipes.RECIPES, "demo", demo)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def _signals():
    """Signals as a terminal hands them on, even if the tests run under nohup or in the background of a shell."""
    default = {signal.SIGHUP: signal.SIG_DFL, signal.SIGTERM: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}
    before = {number: signal.getsignal(number) for number in default}
    for number, handler in default.items():
        signal.signal(number, handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    torch.set_num_threads(1)
    return train.train(demo(), tmp_path_factory.mktemp("whole") / "run")


def interrupted(monkeypatch, where, count, *signals):
    """Let the `count`-th call of a function of `pgp.train` be met by signals."""
    known, calls = getattr(train, where), []

    def met(*args, **kwargs):
        calls.append(1)
        if len(calls) == count:
            for number in signals:
                os.kill(os.getpid(), number)
        return known(*args, **kwargs)

    monkeypatch.setattr(train, where, met)


def ends(capfd, *words):
    """Exit status of `pgp train` and its last word."""
    with pytest.raises(SystemExit) as stop:
        main.main(["train", *words])
    return stop.value.code, capfd.readouterr().err.splitlines()[-1]


def test_an_error_after_the_signal_is_told(monkeypatch, capfd):
    def broken(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(train, "train_step", broken)
    code, told = ends(capfd, "demo", "--output", FOLDER)
    assert code == 70
    assert "shapes do not match" in told


def test_saves_where_training_stands_and_goes_on_bitwise(whole, monkeypatch, capfd):
    how = f"resume with pgp train --resume {shlex.quote(FOLDER)}"
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    stops = [
        ("train_step", 6, signal.SIGTERM, "stopped by SIGTERM: step 2 of task 2 of 3 is saved"),
        ("train_step", 2, signal.SIGHUP, "stopped by SIGHUP: step 4 of task 2 of 3 is saved"),  # its last step
        ("end_task", 1, signal.SIGINT, "interrupted: task 2 of 3 is saved"),
        ("observe_before_training", 1, signal.SIGINT, "interrupted: nothing of task 3 of 3 is learned yet"),
    ]
    for number, (where, count, sign, told) in enumerate(stops):
        with monkeypatch.context() as patch:
            interrupted(patch, where, count, sign)
            words = ["--resume", FOLDER] if number else ["demo", "--output", FOLDER]
            assert ends(capfd, *words) == (128 + sign, f"pgp: {told}; {how}")
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before
    with monkeypatch.context() as patch:
        interrupted(patch, "end_task", 1, signal.SIGTERM)
        code, told = ends(capfd, "--resume", FOLDER)
    assert (code, told) == (143, f"pgp: stopped by SIGTERM: task 3 of 3 is saved; the run at {FOLDER} is finished")
    run = Run.open(Path(FOLDER))
    assert (run.folder / "accuracy.csv").read_bytes() == (whole.folder / "accuracy.csv").read_bytes()
    one, other = whole.load()["method"], run.load()["method"]
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_second_signal_ends_at_once(monkeypatch, capfd):
    interrupted(monkeypatch, "end_task", 2, signal.SIGTERM, signal.SIGTERM)
    code, told = ends(capfd, "demo", "--output", FOLDER)
    assert code == 143
    saved = Path(FOLDER) / "checkpoints" / "task-01"
    assert told.startswith(f"pgp: stopped by SIGTERM: what was learned since {saved} is lost; resume with")


def test_a_projection_that_cannot_be_saved_inside_a_task_says_so(monkeypatch, capfd):
    monkeypatch.setitem(recipes.RECIPES, "demo", lambda: demo(projection=recipes.published_basis(demo().method)))
    interrupted(monkeypatch, "train_step", 6, signal.SIGTERM)
    code, told = ends(capfd, "demo", "--output", FOLDER)
    assert code == 143
    assert "this projection cannot be saved inside a task, so that task 2 of 3 begins anew; resume with" in told
    assert Run.open(Path(FOLDER)).latest_checkpoint() == "task-01"


def test_a_sweep_goes_on_by_the_same_call(monkeypatch, capfd):
    words = ["sweep", "demo", "--workers", "1", "--no-baselines", "--seeds", "1"]
    with monkeypatch.context() as patch:
        interrupted(patch, "train_step", 6, signal.SIGTERM)
        with pytest.raises(SystemExit) as stop:
            main.main(words)
    assert stop.value.code == 143
    assert capfd.readouterr().err.endswith("pgp: stopped by SIGTERM; repeat the same call to resume the sweep\n")
    main.main(words)
    assert "demo, seed 0: resumed in" in capfd.readouterr().err


def test_what_is_ignored_or_taken_stays_so():
    heard = []
    before = {number: signal.getsignal(number) for number in (signal.SIGHUP, signal.SIGTERM)}
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
        signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))  # the program that pgp is part of
        with signals.handled_by(signals.end_at_once):
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGTERM)
            with pytest.raises(signals.Interrupted):
                os.kill(os.getpid(), signal.SIGINT)
        assert heard == [signal.SIGTERM]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Signalled(ArraySplit):
    def image(self, index):
        os.kill(os.getpid(), signal.SIGTERM if index else signal.SIGINT)
        return torch.full((3, 2, 2), float(index))


def test_processes_that_load_images_leave_signals_to_the_one_that_trains():
    split = Signalled(torch.zeros(2, 3, 2, 2), torch.zeros(2))
    viewed = TransformedSplit(split, v2.Identity(), 0, ("test",), skip_bad=False)
    (batch,) = batches(viewed, sequential_batches(torch.arange(2), 2), LoaderOptions(workers=1))
    assert batch.indices.tolist() == [0, 1]


def test_a_command_that_learns_nothing_ends_at_once(monkeypatch, capsys):
    def command(_):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        finally:
            raise OSError(5, "Input/output error")  # the terminal is gone as well

    monkeypatch.setitem(main.COMMANDS, "list", command)
    with pytest.raises(SystemExit) as stop:
        main.main(["list"])
    assert (stop.value.code, capsys.readouterr().err) == (143, "pgp: stopped by SIGTERM\n")


DRIVER = """
import sys, torch
from dataclasses import replace
import tiny
from pgp import recipes
from pgp.cli.main import main
recipes.RECIPES["demo"] = lambda: replace(tiny.config(epochs=400, batch_size=6, log_every_steps=5), name="demo")
if __name__ == "__main__":
    main(sys.argv[1:])
"""


@pytest.mark.slow
@pytest.mark.parametrize(("sign", "to_all"), [(signal.SIGTERM, False), (signal.SIGINT, True), (signal.SIGTERM, True)])
def test_several_processes_stop_together(tmp_path, sign, to_all):
    (tmp_path / "driver.py").write_text(DRIVER)
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    words = ["train", "demo", "--output", "run", "--accelerator", "cpu", "--devices", "2", "--workers", "1"]
    command = [sys.executable, "driver.py", *words]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    log = tmp_path / "run" / "metrics.jsonl"
    while not (log.is_file() and '"train"' in log.read_text()):
        assert process.poll() is None
        time.sleep(0.1)
    (os.killpg if to_all else os.kill)(process.pid, sign)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 128 + sign, err
    assert "Traceback" not in err
    assert err.count("of task 1 of 3 is saved; resume with pgp train --resume run") == 1
    assert "-step-" in Run.open(tmp_path / "run").latest_checkpoint()
