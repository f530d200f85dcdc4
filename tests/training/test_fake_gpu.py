"""Whole runs on a device that is not the CPU: no tensor is left behind. `tests/test_gpu.py` asks a real one."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

import tiny
from conftest import golden_clip
from fake_gpu import fake_gpu
from pgp import distributed, train
from pgp.analysis.audit import audit_run, oracle
from pgp.analysis.checkpoints import evaluate_checkpoints
from pgp.backbones.clip import CLIP
from pgp.config import Hardware, Optimizer
from pgp.datasets.folder import Folder
from pgp.methods.adapter import Adapter
from pgp.methods.clip_prompt import CLIPPrompt
from pgp.methods.coda_prompt import CODAPrompt
from pgp.methods.head_only import HeadOnly
from pgp.methods.l2p import L2P
from pgp.methods.lora import LoRA
from pgp.methods.vpt import VPT
from pgp.predict import Predictor
from pgp.progress import no_progress
from pgp.projections.orthogonal import Orthogonal
from pgp.projections.random import RandomBasis
from pgp.projections.released import ReleasedBasis
from pgp.projections.soft import Soft
from pgp.readouts.experts import ExpertLDA
from pgp.readouts.lda import LDA, NCM
from pgp.readouts.logistic import Logistic
from pgp.readouts.ranpac import RanPAC

UPDATES = Orthogonal.Config(energy=0.9, apply_to="update")
LOGISTIC = Logistic.Config(draws=4)
WIDE = LDA.Config(query=True, patches=True, normalize=True)
DRIFTING = (replace(WIDE, compensate="linear"), LDA.Config(compensate="shift"), LOGISTIC)
FROZEN = (LDA.Config(patches=True, shrinkage=None), NCM.Config(), RanPAC.Config(dimensions=32), LOGISTIC)
EXPERTS = {"experts": "task", "readouts": (ExpertLDA.Config(normalize=True),)}
RUNS = {
    "l2p": {"method": L2P.Config(top_k=2), "query": "clean"},
    "l2p aggregation": {"method": L2P.Config(top_k=2, protect="affinity+aggregation", selection="batch")},
    "l2p observed before": {"projection": ReleasedBasis.Config(when="before")},
    "dualprompt": {"method": replace(tiny.DUALPROMPT, protect="keys+values"), "projection": UPDATES},
    "dualprompt experts": {"method": tiny.DUALPROMPT, **EXPERTS},
    "coda": {"method": CODAPrompt.Config(layers=(0,), pool_size=6, per_task=2, protect="keys+values")},
    "vpt": {"method": VPT.Config(length=2, norm_penalty=0.1), "projection": Soft.Config(), "readouts": DRIFTING},
    "lora": {"method": LoRA.Config(rank=2), "projection": UPDATES, "readouts": DRIFTING[:1], "views": 1},
    "lora experts": {"method": LoRA.Config(rank=2), **EXPERTS, "expert_candidates": 2},
    "adapter": {"method": Adapter.Config(rank=2), "projection": RandomBasis.Config(energy=0.9)},
    "first task": {"method": LoRA.Config(rank=2), "adapt": "first-task", "readouts": FROZEN},
    "head only": {"method": HeadOnly.Config()},
    "quick": {"method": HeadOnly.Config(learns=False), "readouts": FROZEN, "views": 2},
    "online": {"setting": "oil", "save_every_steps": 3},
    "task-incremental": {"setting": "til", "legacy_eval": True},
    "sgd": {"optimizer": Optimizer("sgd", lr=0.1, momentum=0.9, later_prompt_lr_scale=0.1)},
    "clip": {"backbone": CLIP.Config(), "method": CLIPPrompt.Config(context=4)},
    "clip by class": {"backbone": CLIP.Config(), "method": CLIPPrompt.Config(context=4, per_class=True)},
}  # fmt: skip
"""Settings that differ from those of `tiny.config`."""
LEARNING_MORE = ("lora", "lora experts", "quick", "online")
KINDS = ("cuda", "mps")
QUICKLY = {"lora"}
"""Runs that are not marked as slow."""
SOME = [pytest.param(name, marks=() if name in QUICKLY else pytest.mark.slow) for name in RUNS]


@pytest.fixture(autouse=True)
def small_clip(monkeypatch):
    monkeypatch.setattr(CLIP.Config, "build", lambda self, size: golden_clip(torch.float32))


@pytest.fixture
def photos(tmp_path):
    """A folder with two more classes."""
    for label, colour in {"ant": (200, 30, 30), "bee": (30, 200, 30)}.items():
        (tmp_path / "photos" / label).mkdir(parents=True)
        for shade in range(5):
            shaded = tuple(value + 5 * shade for value in colour)
            Image.new("RGB", (40, 36), shaded).save(tmp_path / "photos" / label / f"{shade}.png")
    return tmp_path / "photos"


def config(name):
    epochs = {} if RUNS[name].get("setting") == "oil" else {"epochs": 1}
    return tiny.config(hardware=Hardware("cpu", micro_batch_size=8), **epochs, **RUNS[name])


def random_images():
    return list(torch.randint(256, (6, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)))


def assert_same(found, expected):
    """The same numbers to rounding, in a tree of containers."""
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SOME)
def test_a_run_learns_and_predicts_what_it_does_on_the_cpu(name, kind, tmp_path):
    on_cpu = train.train(config(name), tmp_path / "cpu")
    expected = Predictor(on_cpu, device="cpu")
    with fake_gpu(kind) as gpu:
        run = train.train(config(name), tmp_path / "gpu")
        predictor = Predictor(run, device=kind)
        probabilities, rejected = predictor.probabilities(random_images()), []
        if predictor.detects_unknown:
            rejected = [prediction.unknown for prediction in predictor.predict(random_images(), reject=0.5)]
        assert gpu.functions > 1000
    assert_same(run.load()["method"], on_cpu.load()["method"])
    for column, matrix in on_cpu.matrices().items():
        torch.testing.assert_close(run.matrices()[column], matrix, equal_nan=True, atol=0.05, rtol=0)
    assert_same(probabilities.cpu(), expected.probabilities(random_images()))
    if rejected:
        assert rejected == [found.unknown for found in expected.predict(random_images(), reject=0.5)]


@pytest.mark.parametrize(
    "name", [name if name in QUICKLY else pytest.param(name, marks=pytest.mark.slow) for name in LEARNING_MORE]
)
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_resumes_is_evaluated_again_and_learns_more(name, kind, photos, tmp_path):
    whole = train.train(config(name), tmp_path / "whole")
    half = Path(shutil.copytree(whole.folder, tmp_path / "half"))
    for task in ("task-02", "task-03"):
        shutil.rmtree(half / "checkpoints" / task)
    (half / "checkpoints" / "latest").write_text("task-01", encoding="utf-8")
    with fake_gpu(kind):
        assert_same(train.resume(half).load()["method"], whole.load()["method"])
        evaluate_checkpoints(whole, whole.config, every_task=True)
        audit_run(whole, no_progress())
        if any(isinstance(readout, LDA.Config) for readout in whole.config.readouts):
            oracle(whole, no_progress())
        if name != "online":
            more = train.resume(half, add=Folder(photos))
            assert len(more.matrices()[next(iter(more.matrices()))]) == 4


@pytest.mark.parametrize("kind", KINDS)
def test_functions_refuse_tensors_of_the_cpu(kind):
    """What the stand-in refuses, and what it does not, are what a GPU does."""
    with fake_gpu(kind) as gpu:
        rows, number = torch.ones(3, 2, device=kind), torch.tensor(2.0)
        assert rows.device == gpu.device
        assert (rows * number).device == gpu.device  # a number of the CPU may meet a GPU
        assert rows[torch.tensor([0, 2])].shape == (2, 2)  # and so may indices
        assert rows.cpu().device == torch.device("cpu")
        for fails in (
            lambda: rows + torch.ones(3, 2),
            lambda: torch.nn.functional.linear(rows, torch.ones(4, 2)),
            lambda: torch.cat([rows, torch.ones(1, 2)]),
            lambda: rows.index_add(0, torch.tensor([0]), rows[:1]),
            lambda: torch.stack([rows, rows.cpu()]),
        ):
            with pytest.raises(RuntimeError, match="expected all tensors on the same device"):
                fails()
        with pytest.raises(RuntimeError, match="device type for generator"):
            torch.rand(2, device=kind, generator=torch.Generator())
        with pytest.raises(TypeError, match="numpy"):
            rows.numpy()
        model = torch.nn.Linear(2, 1).to(kind)
        model(rows).sum().backward()
        assert model.weight.grad.device == gpu.device
        if kind == "mps":
            with pytest.raises(TypeError, match="float64"):
                rows.double()
        else:
            assert distributed.all_reduce_sum_(rows) is rows
            with pytest.raises(RuntimeError, match="expected a tensor of the GPU to add up"):
                distributed.all_reduce_sum_(torch.ones(1))
            assert distributed.all_gather_object([rows.cpu()])[0][0].shape == rows.shape
            with pytest.raises(RuntimeError, match="whose tensors are on the CPU"):
                distributed.all_gather_object([{"rows": rows}])
    assert rows.device == torch.device("cpu")
