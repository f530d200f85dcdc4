"""Compiled blocks. A compiler that is quick stands in for torch's own, which a slow test calls."""

from __future__ import annotations

import functools

import pytest
import torch

import tiny
from conftest import golden_clip
from pgp import train
from pgp.backbones import base
from pgp.backbones.clip import CLIP
from pgp.config import Hardware
from pgp.methods.adapter import Adapter
from pgp.methods.clip_prompt import CLIPPrompt
from pgp.methods.coda_prompt import CODAPrompt
from pgp.methods.head_only import HeadOnly
from pgp.methods.l2p import L2P
from pgp.methods.lora import LoRA
from pgp.methods.vpt import VPT

COMPILED = Hardware("cpu", compile=True)


class Compiler:
    """Traces as torch.compile does, and runs the graphs as they are; counts graphs and their runs."""

    def __init__(self):
        self.graphs, self.runs, self.fails = 0, 0, False

    def __call__(self, graph, inputs):
        if self.fails:
            raise RuntimeError("no C++ compiler\nand a long story")
        self.graphs += 1

        def run(*arguments):
            self.runs += 1
            return graph.forward(*arguments)

        return run


@pytest.fixture
def compiler(monkeypatch):
    compiler = Compiler()
    compiled = functools.cache(functools.partial(torch.compile, dynamic=True, backend=compiler))
    monkeypatch.setattr(base, "_compiled", compiled)
    torch.compiler.reset()
    yield compiler
    torch.compiler.reset()


METHODS = {
    "l2p": (L2P.Config(top_k=2), "task"),
    "dualprompt": (tiny.DUALPROMPT, "none"),
    "coda": (CODAPrompt.Config(layers=(0,), pool_size=6, per_task=2), "none"),
    "vpt": (VPT.Config(length=2), "1"),  # the second task has no expert of its own
    "lora": (LoRA.Config(rank=2), "none"),
    "adapter": (Adapter.Config(rank=2, layers=(1,)), "none"),
    "head-only": (HeadOnly.Config(), "none"),
    "features": (HeadOnly.Config(learns=False), "none"),
}


def both(config, tmp_path):
    """The learned tensors of a run without compiled blocks, and the run with them."""
    plain = train.train(config, tmp_path / "plain").load()["method"]
    return plain, train.train(config.__class__(**{**vars(config), "hardware": COMPILED}), tmp_path / "compiled")


@pytest.mark.parametrize(
    "method", ["dualprompt", *(pytest.param(name, marks=pytest.mark.slow) for name in METHODS if name != "dualprompt")]
)
def test_every_method_learns_the_same_with_compiled_blocks(method, tmp_path, compiler, monkeypatch):
    step, graphs = train.fit_task, []

    def watched(*arguments):
        graphs.append(compiler.graphs)
        step(*arguments)

    monkeypatch.setattr(train, "fit_task", watched)
    settings, experts = METHODS[method]
    config = tiny.config(method=settings, epochs=1, tasks=2, experts=experts, drift_images=0)
    plain, run = both(config, tmp_path)
    for name, tensor in run.load()["method"].items():
        torch.testing.assert_close(tensor, plain[name], rtol=1e-4, atol=1e-4)
    first, second = run.events("task")
    assert first["seconds"]["compile"] > 0
    assert "compile" not in second["seconds"]
    idle = ["--projection orthogonal protects nothing: with --experts, tasks share no parameters but the head"]
    assert [event["warning"] for event in run.events("data")] == (idle if experts != "none" else [])
    assert graphs[2] > 0  # of the compiled run, before its first task
    assert compiler.runs > 10
    assert compiler.graphs <= 8  # of two functions: torch gives up on one that it has compiled eight times


@pytest.mark.slow
def test_clip_learns_the_same_with_compiled_blocks(tmp_path, compiler, monkeypatch):
    monkeypatch.setattr(CLIP.Config, "build", lambda self, size: golden_clip(torch.float32))
    config = tiny.config(backbone=CLIP.Config(), method=CLIPPrompt.Config(context=4), epochs=1, tasks=2)
    plain, run = both(config, tmp_path)
    for name, tensor in run.load()["method"].items():
        torch.testing.assert_close(tensor, plain[name], rtol=1e-3, atol=1e-3)
    assert compiler.runs > 20


def test_a_compiler_that_fails_is_a_warning_and_changes_nothing(tmp_path, compiler, capsys):
    compiler.fails = True
    plain, run = both(tiny.config(epochs=1, tasks=2), tmp_path)
    for name, tensor in run.load()["method"].items():
        assert torch.equal(tensor, plain[name]), name
    (event,) = run.events("data")
    assert event["warning"].startswith("torch.compile failed, so the encoder's blocks run uncompiled: ")
    assert "no C++ compiler" in event["warning"]
    assert "\n" not in event["warning"]


def test_time_of_the_compiler_is_not_time_of_training(tmp_path):
    (first, *_) = train.train(tiny.config(epochs=1, tasks=2), tmp_path / "run").events("task")
    assert "compile" not in first["seconds"]


@pytest.mark.slow
def test_torch_compiles_the_blocks(tmp_path):
    torch.compiler.reset()
    plain, run = both(tiny.config(epochs=1, tasks=2), tmp_path)
    assert list(run.events("data")) == []
    for name, tensor in run.load()["method"].items():
        torch.testing.assert_close(tensor, plain[name], rtol=1e-3, atol=1e-3)
