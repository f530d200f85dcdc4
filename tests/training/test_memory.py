"""Memory does not grow with the number of tasks, but for the few numbers that are kept of each."""

from __future__ import annotations

import ctypes
import gc
import sys
from pathlib import Path

import pytest
import torch

import tiny
from pgp import train
from pgp.datasets.synthetic import Synthetic
from pgp.methods.l2p import L2P
from pgp.methods.lora import LoRA

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")]
PAGE = 4096


def resident() -> int:
    """Bytes of this process in memory, after what is free was given back."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # only glibc has it
    if trim is not None:
        trim(0)
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * PAGE


def tensor_bytes() -> int:
    """Bytes of all tensors that Python holds, without those of torch.compile, which have no data."""
    kinds = (torch.Tensor, torch.nn.Parameter)
    found = [one for one in gc.get_objects() if type(one) in kinds and one.layout == torch.strided]
    storages = [one.untyped_storage() for one in found if one.device.type == "cpu"]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@pytest.mark.parametrize("method", [L2P.Config(top_k=2), LoRA.Config(rank=2)], ids=["l2p", "lora"])
def test_fifty_tasks(tmp_path, monkeypatch, method):
    end_task, sizes = train.end_task, {}

    def measured(session, state, task):
        end_task(session, state, task)
        if task.index + 1 in (10, 50):
            sizes[task.index + 1] = resident(), tensor_bytes()

    monkeypatch.setattr(train, "end_task", measured)
    data = Synthetic(classes=100, noise=0.5)
    train.train(tiny.config(dataset=data, method=method, tasks=50, epochs=1, keep_checkpoints="last"), tmp_path / "run")
    more_resident, more_tensors = (after - before for before, after in zip(sizes[10], sizes[50], strict=True))
    assert more_tensors < 1.5e6  # references of the drift meter and queries of test images, 30 kB a task
    assert more_resident < 12e6
