"""What several processes that train together tell each other; all of it is nothing for a process that is alone."""

from __future__ import annotations

import os
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def started() -> bool:
    """Whether another process of the same run started this one, which it does by the same command."""
    return os.environ.get("LOCAL_RANK", "0") != "0"


def together() -> bool:
    """Whether this process is one of several."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def rank() -> int:
    """The number of this process, from 0."""
    return torch.distributed.get_rank() if together() else 0


def world() -> int:
    """How many processes there are."""
    return torch.distributed.get_world_size() if together() else 1


def add_up(tensor: Tensor) -> Tensor:
    """`tensor`, now the sum over all processes, in place."""
    if together():
        torch.distributed.all_reduce(tensor)
    return tensor


def gathered(rows: Tensor) -> Tensor:
    """Rows of all processes, on the CPU."""
    return torch.cat(told(rows.cpu()))


def told(value: T) -> list[T]:
    """What each process says, in the order of their numbers; all have to say something."""
    if not together():
        return [value]
    values: list[T] = [value] * world()
    torch.distributed.all_gather_object(values, value)
    return values
