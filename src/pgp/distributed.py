"""Collective operations for distributed training. In a single process they change nothing."""

from __future__ import annotations

import os
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def is_child_process(devices: int | None = None) -> bool:
    """Return whether this process was started by another process of the same run, with the same command.

    Args:
        devices: Number of devices of the run, if it is known. With one, there are no other processes, even if the
            environment is that of another distributed program.
    """
    return devices != 1 and os.environ.get("LOCAL_RANK", "0") != "0"


def is_distributed() -> bool:
    """Return whether this process is one of several."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def rank() -> int:
    """Return the number of this process, from 0."""
    return torch.distributed.get_rank() if is_distributed() else 0


def world_size() -> int:
    """Return the number of processes."""
    return torch.distributed.get_world_size() if is_distributed() else 1


def all_reduce_sum_(tensor: Tensor) -> Tensor:
    """Replace `tensor` in place by its sum over all processes, and return it.

    Collective: in a distributed run, every process must call it.
    """
    if is_distributed():
        torch.distributed.all_reduce(tensor)
    return tensor


def all_gather_rows(rows: Tensor) -> Tensor:
    """Return the rows of all processes in the order of their ranks, on the CPU.

    Collective: in a distributed run, every process must call it.
    """
    return torch.cat(all_gather_object(rows.cpu()))


def all_gather_object(value: T) -> list[T]:
    """Return the values of all processes in the order of their ranks.

    Collective: in a distributed run, every process must call it.
    """
    if not is_distributed():
        return [value]
    values: list[T] = [value] * world_size()
    torch.distributed.all_gather_object(values, value)
    return values
