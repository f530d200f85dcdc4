"""Runs on a CUDA GPU: `pytest -m gpu`. The other tests stand in for a GPU where there is none."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import tiny
from pgp import train
from pgp.analysis.checkpoints import evaluate_checkpoints
from pgp.config import Hardware
from pgp.methods.adapter import Adapter
from pgp.methods.coda_prompt import CODAPrompt
from pgp.methods.l2p import L2P
from pgp.methods.lora import LoRA
from pgp.methods.vpt import VPT
from pgp.predict import Predictor
from pgp.projections.orthogonal import Orthogonal
from pgp.projections.soft import Soft
from pgp.readouts.experts import ExpertLDA

pytestmark = pytest.mark.gpu

GPU, CPU = Hardware("gpu"), Hardware("cpu", micro_batch_size=8)
UPDATES = Orthogonal.Config(energy=0.9, apply_to="update")
METHODS = {
    "l2p": L2P.Config(top_k=2),
    "dualprompt": tiny.DUALPROMPT,
    "coda": CODAPrompt.Config(layers=(0,), pool_size=6, per_task=2),
    "vpt": VPT.Config(length=2),
    "lora": LoRA.Config(rank=2),
}


def losses(run):
    return [event["loss"] for event in run.events("train")]


def learned(run):
    return {name: tensor for name, tensor in run.load()["method"].items() if tensor.is_floating_point()}


@pytest.fixture
def deterministic(monkeypatch):
    """Let torch use deterministic algorithms only."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("method", METHODS)
def test_a_gpu_learns_what_a_cpu_learns(method, tmp_path):
    """Losses within a thousandth, and predictions of the CPU from what the GPU learned within 0.01."""
    config = tiny.config(method=METHODS[method], projection=UPDATES, epochs=1)
    gpu, cpu = (train.train(replace(config, hardware=each), tmp_path / each.accelerator) for each in (GPU, CPU))
    assert losses(gpu) == pytest.approx(losses(cpu), rel=1e-3, abs=1e-3)
    images = list(torch.randint(256, (6, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)))
    on_gpu, on_cpu = (Predictor(gpu, device=device).probabilities(images) for device in ("cuda", "cpu"))
    torch.testing.assert_close(on_gpu, on_cpu, rtol=0, atol=0.01)


@pytest.mark.parametrize(("precision", "tolerance"), [("tf32", 0.02), ("bf16-mixed", 0.1), ("16-mixed", 0.1)])
def test_every_precision_learns_what_float32_learns(precision, tolerance, tmp_path):
    """Losses differ by the relative tolerance at most, and evaluation on the GPU repeats what training measured."""
    if precision != "16-mixed" and torch.cuda.get_device_capability() < (8, 0):
        pytest.skip(f"{torch.cuda.get_device_name()} cannot compute in {precision}")
    config = tiny.config(hardware=GPU, epochs=2)
    full = train.train(config, tmp_path / "full")
    run = train.train(replace(config, precision=precision), tmp_path / "run")
    assert losses(run)[-1] == pytest.approx(losses(full)[-1], rel=tolerance)
    for column, matrix in evaluate_checkpoints(run, run.config).items():
        torch.testing.assert_close(matrix[-1], run.matrices()[column][-1], rtol=0, atol=0)


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"precision": "16-mixed"},
        {"projection": Soft.Config()},
        {"method": LoRA.Config(rank=3), "experts": "task", "readouts": (ExpertLDA.Config(),)},
        {"method": Adapter.Config(rank=3)},
    ],
    ids=["float32", "16-mixed", "soft", "experts", "adapters"],
)
def test_a_resumed_run_is_bitwise_the_same_on_the_same_gpu(changes, tmp_path):
    whole = train.train(tiny.config(hardware=GPU, **changes), tmp_path / "whole")
    half = Path(shutil.copytree(whole.folder, tmp_path / "half"))
    shutil.rmtree(half / "checkpoints" / "task-02")
    shutil.rmtree(half / "checkpoints" / "task-03")
    (half / "checkpoints" / "latest").write_text("task-01")
    one, other = learned(whole), learned(train.resume(half))
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def test_compiled_blocks_learn_the_same(tmp_path):
    config = tiny.config(epochs=1, tasks=2)
    plain = train.train(replace(config, hardware=GPU), tmp_path / "plain")
    compiled = train.train(replace(config, hardware=replace(GPU, compile=True)), tmp_path / "compiled")
    assert list(compiled.events("data")) == []  # no warning that the compiler failed
    assert losses(compiled) == pytest.approx(losses(plain), rel=1e-3)
    assert next(compiled.events("task"))["seconds"]["compile"] > 0


def test_a_step_does_not_wait_for_the_gpu(tmp_path, monkeypatch):
    """Torch's own detection of calls that wait, in place of the stand-in of `tests/training/test_waits.py`."""
    step, count = train.train_step, []

    def watched(*arguments):
        count.append(1)
        if len(count) % 6 == 1:  # the first of each task makes what later ones use
            return step(*arguments)
        torch.cuda.set_sync_debug_mode("error")
        try:
            return step(*arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(train, "train_step", watched)
    train.train(tiny.config(hardware=GPU, projection=UPDATES), tmp_path / "run")
    assert len(count) == 18


def test_too_little_memory_is_one_line_that_says_what_to_lower(tmp_path):
    """A process that may use a hundredth of a percent of the GPU's memory."""
    code = (
        "import sys, torch; torch.cuda.set_per_process_memory_fraction(1e-4); from pgp.cli import main;"
        " main.main(sys.argv[1:])"
    )
    words = ["train", "demo", "--accelerator", "gpu", "--batch-size", "256", "--output", str(tmp_path / "run")]
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, encoding="utf-8", env=dict(os.environ), check=False
    )
    assert done.returncode == 2, done.stderr
    assert "memory ran out: try a smaller --micro-batch-size" in done.stderr.splitlines()[-1]
