"""What is learned of a task around its training, by several processes, too, and from images that come and go."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tiny
from pgp import progress, scenario, train
from pgp.config import Hardware
from pgp.datasets.base import BadImageError
from pgp.methods.lora import LoRA
from pgp.readouts.experts import ExpertLDA
from pgp.readouts.lda import LDA
from pgp.runs.run import Run
from pgp.training import observe
from pgp.training.devices import build_fabric
from pgp.training.session import Session
from test_train import final

LINEAR = LDA.Config(query=True, compensate="linear")
EXPERTS = {"method": LoRA.Config(rank=3), "experts": "2", "expert_candidates": 2, "readouts": (ExpertLDA.Config(),)}

SCRIPT = """
import sys, tiny, torch
from pathlib import Path
from pgp import train
from pgp.config import Hardware
from pgp.datasets.synthetic import Synthetic
from pgp.training.devices import build_fabric
from pgp.training.session import Session
from test_observe import EXPERTS, LINEAR

torch.set_num_threads(1)
save = Session.save

def stop(session, state):
    save(session, state)
    if state.task == 1 and state.step:
        sys.exit()

if __name__ == "__main__":
    what, devices, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    hardware = Hardware("cpu", devices=devices, micro_batch_size=1)
    if what == "start":
        Session.save = stop
        train.train(tiny.config(hardware=hardware, readouts=(LINEAR,), save_every_steps=4), folder)
    elif what == "resume":
        train.resume(folder, hardware)
    elif what == "experts":
        train.train(tiny.config(hardware=hardware, **EXPERTS), folder)
    elif what == "clean":
        train.train(tiny.config(hardware=hardware, query="clean", readouts=(LINEAR,)), folder)
    else:
        train.train(tiny.config(hardware=hardware, dataset=Synthetic(per_class=1), tasks=6), folder)
"""


@pytest.fixture
def processes(tmp_path):
    """Starts a run, or goes on with it, in as many processes as asked for."""
    (tmp_path / "several.py").write_text(SCRIPT)

    def run(what: str, devices: int, folder: Path) -> subprocess.CompletedProcess[str]:
        path = os.pathsep.join(
            [str(Path(__file__).parents[1]), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
        )
        command = [sys.executable, str(tmp_path / "several.py"), what, str(devices), str(folder)]
        environment = {**os.environ, "PYTHONPATH": path}
        return subprocess.run(command, env=environment, timeout=300, capture_output=True, text=True, check=False)

    return run


@pytest.mark.slow
def test_resuming_inside_a_task_pairs_images_whatever_the_number_of_processes(tmp_path, processes):
    hardware = Hardware("cpu", micro_batch_size=1)
    whole = final(train.train(tiny.config(hardware=hardware, readouts=(LINEAR,), save_every_steps=4), tmp_path / "w"))
    for before in (1, 2):
        stopped = tmp_path / str(before)
        assert processes("start", before, stopped).returncode == 0
        assert "step" in Run.open(stopped).latest_checkpoint()
        for after in (1, 2):
            folder = Path(shutil.copytree(stopped, tmp_path / f"{before}-{after}"))
            done = processes("resume", after, folder)
            assert done.returncode == 0, done.stderr
            found = final(Run.open(folder))
            for name in whole:
                if name.startswith("/readouts"):
                    scale = float(whole[name].abs().max())
                    torch.testing.assert_close(found[name], whole[name], rtol=0, atol=1e-3 * scale, msg=f"{folder}")


@pytest.mark.slow
def test_two_processes_train_the_same_experts_as_one(tmp_path, processes):
    ends = []
    for devices in (1, 2):
        done = processes("experts", devices, tmp_path / str(devices))
        assert done.returncode == 0, done.stderr
        ends.append(final(Run.open(tmp_path / str(devices))))
    learned = [name for name in ends[0] if name.startswith("/method")]
    assert learned == [name for name in ends[1] if name.startswith("/method")]
    for name, tensor in ends[0].items():
        if name in learned:
            scale = float(tensor.double().abs().max())
            torch.testing.assert_close(ends[1][name], tensor, rtol=0, atol=2e-3 * scale, msg=name)


@pytest.mark.slow
def test_two_processes_learn_from_the_same_clean_queries_as_one(tmp_path, processes):
    ends = []
    for devices in (1, 2):
        done = processes("clean", devices, tmp_path / str(devices))
        assert done.returncode == 0, done.stderr
        ends.append(final(Run.open(tmp_path / str(devices))))
    for name, tensor in ends[0].items():
        if name.startswith(("/method", "/readouts")):
            scale = float(tensor.double().abs().max())
            torch.testing.assert_close(ends[1][name], tensor, rtol=0, atol=2e-3 * scale, msg=name)


@pytest.mark.slow
def test_a_task_with_fewer_images_than_processes_says_so(tmp_path, processes):
    done = processes("few", 2, tmp_path / "run")
    assert done.returncode != 0
    assert "for each of 2 processes, got 1 that can be read: train on at most 1, by --devices" in done.stderr


def test_who_has_seen_nothing_is_told_why():
    task = scenario.Task(0, (0,), torch.tensor([0]), torch.tensor([0]))
    observe._check_seen([1, 2], task)
    with pytest.raises(ValueError, match="every single one is unreadable"):
        observe._check_seen([0, 0], task)
    with pytest.raises(ValueError, match="got 3 that can be read: train on at most 2, by --devices"):
        observe._check_seen([2, 1, 0], task)


def test_images_that_can_be_read_only_once_tell_nothing_about_movement(tmp_path):
    config = tiny.config(readouts=(LINEAR,), on_bad_image="skip")
    session = Session(build_fabric(config), config, progress.no_progress())
    state = session.new_state()
    task, split = session.scenario.tasks[1], session.data.train
    lost, found = task.train[0], task.train[-1]
    read, told, broken = split.image, [], [int(found)]

    def image(index):
        if index in broken:
            raise BadImageError(f"{index}")
        return read(index)

    split.image = image
    (readout,) = state.readouts
    readout.compensate = lambda before, after: told.append((before, after))
    with pytest.warns(UserWarning, match="skipped"):
        observe.observe_before_training(session, state, task)
    assert len(state.features_before["indices"]) == len(task.train) - 1
    broken[:] = [int(lost)]
    with pytest.warns(UserWarning, match="skipped"):
        observe.observe_after_training(session, state, task)
    ((before, after),) = told
    assert len(before) == len(task.train) - 2
    torch.testing.assert_close(before, after)  # nothing was learned in between, so that each stands beside itself
