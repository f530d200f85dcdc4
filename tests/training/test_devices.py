"""Devices and precisions. Where a GPU is needed, stand-ins answer for it; `tests/test_gpu.py` asks a real one."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import pytest
import torch

import tiny
from pgp import train
from pgp.config import Hardware, Optimizer
from pgp.methods.l2p import L2P
from pgp.predict import Predictor
from pgp.projections.orthogonal import Orthogonal
from pgp.runs.run import Run
from pgp.system.storage import RunError
from pgp.training.devices import Float32, build_fabric


@pytest.fixture
def gpus(monkeypatch):
    """Pretend that there are CUDA GPUs."""

    def pretend(count=1, capability=(9, 0), name="a GPU"):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda number: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: name)
        monkeypatch.setattr(torch.version, "hip", None)

    return pretend


def test_more_gpus_than_there_are(gpus):
    gpus(1)
    with pytest.raises(ValueError, match=r"expected --devices of at most 1, the number of CUDA GPUs .* got 4"):
        build_fabric(tiny.config(hardware=Hardware(devices=4)))


@pytest.mark.parametrize(
    ("precision", "other"), [("bf16-mixed", "16-mixed or 32-true"), ("tf32", "32-true")], ids=["bf16", "tf32"]
)
def test_a_gpu_without_bfloat16_or_tf32(gpus, precision, other):
    gpus(1, (7, 5), "Tesla T4")
    with pytest.raises(ValueError, match=rf"8\.0 or newer for --precision {precision}, got Tesla T4 with 7\.5: choose"
                       f" --precision {other}"):  # fmt: skip
        build_fabric(tiny.config(precision=precision))


def test_a_driver_that_is_too_old(gpus, monkeypatch):
    def fail():
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 9000).\nPlease update it.")

    gpus(0)
    monkeypatch.setattr(torch.cuda, "init", fail)
    with pytest.raises(ValueError, match=r"--accelerator gpu: The NVIDIA driver on your system is too old \(found"
                       r" version 9000\)\. --accelerator auto takes the CPU"):  # fmt: skip
        build_fabric(tiny.config(hardware=Hardware("gpu")))
    assert build_fabric(tiny.config()).device.type == "cpu"


@pytest.mark.parametrize("precision", ["tf32", "16-mixed"])
def test_mps_has_two_precisions(precision):
    with pytest.raises(ValueError, match=f"32-true or bf16-mixed with --accelerator mps, got {precision}"):
        build_fabric(tiny.config(hardware=Hardware("mps"), precision=precision))


def test_mps_where_there_is_none():
    if torch.backends.mps.is_available():
        pytest.skip("this machine has MPS")
    with pytest.raises(ValueError, match="this machine cannot compute with --accelerator mps"):
        build_fabric(tiny.config(hardware=Hardware("mps")))


@pytest.mark.parametrize("tf32", [False, True])
def test_products_of_float32_are_what_the_precision_says_forward_and_backward(tf32):
    def now():
        return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32

    class Watch(torch.autograd.Function):
        @staticmethod
        def forward(context, x):
            seen.append(now())
            return x.clone()

        @staticmethod
        def backward(context, gradient):
            seen.append(now())
            return gradient

    before, seen = now(), []
    plugin = Float32("cuda", tf32=tf32)
    with plugin.forward_context():
        loss = Watch.apply(torch.ones(1, requires_grad=True)).sum()
    plugin.backward(loss, None)
    assert seen == [("high" if tf32 else "highest", tf32)] * 2
    assert now() == before
    with Float32("cpu", tf32=True).forward_context():
        assert now() == before


def test_tf32_on_a_cpu_is_float32(tmp_path):
    matrices = [
        train.train(tiny.config(epochs=1, tasks=2, precision=precision), tmp_path / precision).load()["method"]
        for precision in ("32-true", "tf32")
    ]
    for name, tensor in matrices[0].items():
        assert torch.equal(tensor, matrices[1][name]), name


class Overflow(torch.autograd.Function):
    """Makes gradients infinite, as a scale of the loss does that is too large for float16."""

    @staticmethod
    def forward(context, x):
        return x.clone()

    @staticmethod
    def backward(context, gradient):
        return gradient * torch.inf


@pytest.fixture
def overflowing(monkeypatch):
    """Make the gradients of some steps infinite, by their number over all tasks."""

    def overflow(steps):
        loss, count = L2P.loss, itertools.count()

        def poisoned(self, images, labels, task, prepared):
            value = loss(self, images, labels, task, prepared)
            return Overflow.apply(value) if steps(next(count)) else value

        monkeypatch.setattr(L2P, "loss", poisoned)

    return overflow


HALF = {"precision": "16-mixed", "hardware": Hardware("cpu", micro_batch_size=8), "log_every_steps": 1}


def test_float16_learns_what_float32_learns(tmp_path):
    half, full = (
        [
            event["loss"]
            for event in train.train(tiny.config(**HALF | {"precision": precision}), tmp_path / precision).events(
                "train"
            )
        ]
        for precision in ("16-mixed", "32-true")
    )
    assert half[0] != full[0]
    assert half == pytest.approx(full, rel=0.2)


@pytest.mark.parametrize("clip", [0.0, 1.0])
@pytest.mark.parametrize("apply_to", ["gradient", "update"])
def test_a_step_whose_scaled_gradients_overflow_is_skipped(tmp_path, overflowing, apply_to, clip):
    """The projection, the meter of drift, the clipping and the log take it as no step."""
    overflowing(lambda step: step == 8)  # the third step of the second task
    config = tiny.config(
        **HALF, tasks=2, projection=Orthogonal.Config(apply_to=apply_to), optimizer=Optimizer(lr=0.1, clip=clip)
    )
    seen, step = [], train.train_step

    def watched(session, state, optimizer, *arguments):
        before = {name: tensor.clone() for name, tensor in state.method.trainable_state_dict().items()}
        health = step(session, state, optimizer, *arguments)
        after = state.method.trainable_state_dict()
        seen.append(all(torch.equal(before[name], after[name]) for name in before))
        return health

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "train_step", watched)
        run = train.train(config, tmp_path / "run")
    assert [number for number, unchanged in enumerate(seen) if unchanged] == [8]
    events = list(run.events("train"))
    assert [event["skipped"] for event in events] == [int(number == 8) for number in range(len(seen))]
    assert events[8]["gradient_norm"] is None
    assert (events[7]["loss_scale"], events[8]["loss_scale"]) == (65536, 32768)
    *_, last = run.events("task")
    assert all(value is not None for kind in ("gradients", "updates") for value in last["drift"][kind].values())
    assert run.load()["scaler"]["scale"] == 32768


def test_gradients_that_are_never_finite_stop_a_float16_run(tmp_path, overflowing):
    overflowing(lambda step: step >= 6)
    with pytest.raises(RunError, match=r"the norm of the gradients is (inf|nan) at step 2\d of task 1: start a new run"
                       r" with a lower --optimizer\.lr, or with --precision bf16-mixed or 32-true"):  # fmt: skip
        train.train(tiny.config(**HALF, epochs=8, tasks=2), tmp_path / "run")


def test_a_float16_run_resumes_bitwise_with_its_loss_scale(tmp_path, overflowing):
    config = tiny.config(**HALF, save_every_steps=2)
    steps = itertools.count()
    overflowing(lambda _: next(steps) == 3)
    whole = train.train(config, tmp_path / "whole")
    assert whole.load()["scaler"]["scale"] == 32768
    half = Path(shutil.copytree(whole.folder, tmp_path / "half"))
    shutil.rmtree(half / "checkpoints" / "task-02")
    shutil.rmtree(half / "checkpoints" / "task-03")
    (half / "checkpoints" / "latest").write_text("task-01")
    resumed = train.resume(half)
    one, other = whole.load(), resumed.load()
    assert one["scaler"] == other["scaler"]
    for name, tensor in one["method"].items():
        assert torch.equal(tensor, other["method"][name]), name


@pytest.mark.parametrize("precision", ["tf32", "16-mixed"])
def test_runs_of_each_precision_are_used_on_a_cpu(tmp_path, precision):
    run = train.train(tiny.config(epochs=1, tasks=2, precision=precision), tmp_path / "run")
    images = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    own, full = (Predictor(run, device="cpu", precision=each).probabilities(list(images)) for each in (None, "32-true"))
    torch.testing.assert_close(own, full, rtol=0, atol=0 if precision == "tf32" else 0.02)
    assert Run.open(run.folder).config.precision == precision
