"""A training step never makes the CPU wait for a GPU.

A tensor on torch's device `meta` has a shape, but no values: whatever needs its values raises an error, as `.item()`
and `nonzero` do. So the device stands in for a GPU. Copies from the CPU are noticed by `CopiesFromCPU`.
"""

from __future__ import annotations

import traceback
from dataclasses import replace

import pytest
import torch
from lightning_fabric import Fabric
from torch.overrides import TorchFunctionMode

import tiny
from conftest import golden_clip
from pgp import progress
from pgp.backbones.clip import CLIP
from pgp.config import Optimizer
from pgp.datasets.loader import Batch
from pgp.methods.adapter import Adapter
from pgp.methods.clip_prompt import CLIPPrompt
from pgp.methods.coda_prompt import CODAPrompt
from pgp.methods.head_only import HeadOnly
from pgp.methods.l2p import L2P
from pgp.methods.lora import LoRA
from pgp.methods.vpt import VPT
from pgp.projections.orthogonal import Orthogonal
from pgp.projections.random import RandomBasis
from pgp.projections.released import ReleasedBasis
from pgp.projections.soft import Soft
from pgp.train import train_step
from pgp.training.devices import build_fabric
from pgp.training.session import Session

META = torch.device("meta")


class CopiesFromCPU(TorchFunctionMode):
    """Notes every call that copies from the CPU to the stand-in device, or back, and waits for it."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        name = getattr(function, "__name__", str(function))
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        onto = isinstance(result, torch.Tensor) and result.is_meta
        if name in ("tensor", "as_tensor") and onto:
            self._note(name)
        copies = name in ("to", "copy_") and onto and any(not tensor.is_meta for tensor in tensors)
        if copies and not kwargs.get("non_blocking"):
            self._note(name)
        if name in ("__getitem__", "__setitem__") and args[0].is_meta and _is_on_cpu(args[1]):
            self._note(name)
        return result

    def _note(self, name):
        here = [frame for frame in traceback.extract_stack() if "/pgp/" in frame.filename][-1]
        self.found.append(f"{name} in {here.filename}:{here.lineno} {here.line}")


def _is_on_cpu(index):
    """Whether an index has to be copied to the device: a list, or a tensor of the CPU."""
    parts = index if isinstance(index, tuple) else (index,)
    return any(isinstance(part, list) or (isinstance(part, torch.Tensor) and not part.is_meta) for part in parts)


def waits(config, monkeypatch, steps=2):
    """Make training steps of the second task on the stand-in device, and return what made the CPU wait."""
    fabric = build_fabric(config)
    session = Session(fabric, config, progress.no_progress())
    session.micro_batch_size = None  # as on a GPU
    state = session.new_state()
    task = session.scenario.tasks[1]
    state.method.begin_task(task)
    plain = config.optimizer.build(state.method, config.batch_size)
    optimizer = fabric.setup_optimizers(plain)
    shapes = {space: target.parameter.shape for space, target in state.projection.protected.items()}
    monkeypatch.setattr(Fabric, "device", property(lambda _: META))
    state.method.to(META)  # makes new parameters, so that everything that holds old ones is told
    (group,) = plain.param_groups
    group["params"] = [parameter for parameter in state.method.parameters() if parameter.requires_grad]
    state.projection = projection = config.projection.build(state.method.protected(), config.seed)
    for space, target in projection.protected.items():
        heads = shapes[space][1] if isinstance(projection, ReleasedBasis) and len(shapes[space]) == 4 else 1
        width = shapes[space][target.axis] * heads
        columns = width if isinstance(projection, Soft) else max(1, width // 2)
        projection.bases[space] = torch.ones(width, columns, dtype=torch.float64, device=META)
    if state.meter:
        state.meter.projection = projection
        monkeypatch.setattr(projection, "rank", lambda space: 1.0)  # is asked once for each task, not at each step
        state.meter.attach(plain)
    projection.attach(plain)
    batch = Batch(torch.zeros(8, 3, 32, 32, device=META), torch.full((8,), 2, device=META), torch.arange(8))
    train_step(session, state, optimizer, batch, task, 8)  # bases are moved to the device, and drawn, at the first
    with CopiesFromCPU() as copies:
        for _ in range(steps):
            health = train_step(session, state, optimizer, batch, task, 8)
    assert health.is_meta
    return copies.found


METHODS = {
    "l2p": L2P.Config(top_k=2),
    "l2p by vote": L2P.Config(top_k=2, selection="batch"),
    "l2p aggregation": L2P.Config(top_k=2, protect="affinity+aggregation"),
    "dualprompt": tiny.DUALPROMPT,
    "dualprompt values": replace(tiny.DUALPROMPT, protect="keys+values"),
    "coda": CODAPrompt.Config(layers=(0,), pool_size=6, per_task=2),
    "vpt": VPT.Config(length=2, norm_penalty=0.1, protect="affinity+aggregation"),
    "lora": LoRA.Config(rank=2),
    "adapter": Adapter.Config(rank=2),
    "head-only": HeadOnly.Config(),
}
PROJECTIONS = {
    "orthogonal": Orthogonal.Config(),
    "orthogonal updates": Orthogonal.Config(apply_to="update", preserve_key_norms=True),
    "random": RandomBasis.Config(),
    "soft": Soft.Config(),
}


@pytest.mark.parametrize("method", METHODS)
def test_no_method_waits(method, monkeypatch):
    assert waits(tiny.config(method=METHODS[method]), monkeypatch) == []


@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize("method", ["l2p", "dualprompt"])
def test_no_projection_waits(method, projection, monkeypatch):
    assert waits(tiny.config(method=METHODS[method], projection=PROJECTIONS[projection]), monkeypatch) == []


def test_the_released_projection_does_not_wait(monkeypatch):
    assert waits(tiny.config(projection=ReleasedBasis.Config()), monkeypatch) == []


@pytest.mark.parametrize("per_class", [False, True])
def test_clip_does_not_wait(per_class, monkeypatch):
    monkeypatch.setattr(CLIP.Config, "build", lambda self, size: golden_clip(torch.float32))
    method = CLIPPrompt.Config(context=4, per_class=per_class)
    assert waits(tiny.config(backbone=CLIP.Config(), method=method), monkeypatch) == []


@pytest.mark.parametrize("optimizer", [Optimizer(clip=0), Optimizer(name="sgd", schedule="cosine")])
def test_no_optimizer_waits(optimizer, monkeypatch):
    assert waits(tiny.config(optimizer=optimizer), monkeypatch) == []


def test_a_few_experts_do_not_wait(monkeypatch):
    assert waits(tiny.config(experts="task"), monkeypatch) == []


@pytest.mark.parametrize(
    "wait",
    [
        lambda loss: loss * float(loss.detach()),
        lambda loss: loss + len(loss.reshape(1).nonzero()),
        lambda loss: loss if loss > 0 else -loss,
        lambda loss: loss * loss.detach().cpu().to(loss.device),
    ],
)
def test_waiting_for_values_is_noticed(wait, monkeypatch):
    loss = L2P.loss
    monkeypatch.setattr(L2P, "loss", lambda *arguments: wait(loss(*arguments)))
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        waits(tiny.config(method=L2P.Config(top_k=2)), monkeypatch)


@pytest.mark.parametrize(
    "wait",
    [
        lambda loss: loss * torch.tensor([2.0], device=loss.device).sum(),
        lambda loss: loss * torch.ones(1).to(loss.device).sum(),
        lambda loss: loss.reshape(1)[[0]].sum(),
    ],
)
def test_waiting_for_copies_is_noticed(wait, monkeypatch):
    loss = L2P.loss
    monkeypatch.setattr(L2P, "loss", lambda *arguments: wait(loss(*arguments)))
    assert len(waits(tiny.config(method=L2P.Config(top_k=2)), monkeypatch)) == 2
