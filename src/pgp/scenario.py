"""A stream of tasks: which classes come when, and where every random draw of a run comes from."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Setting = Literal["cil", "til", "oil"]
"""What is known at test: `cil` nothing, `til` each image's task, `oil` nothing, and training sees each image once."""


def generator(seed: int, *address: str | int) -> torch.Generator:
    """A random generator for one purpose, named by its address, such as `(seed, "order", task, epoch)`.

    Draws are addressed, not streamed: what one draw returns never depends on how many came before it, so a resumed run,
    another number of workers and another number of processes all see the same data.

    >>> one, same, other = (torch.rand(2, generator=generator(7, "init", n)) for n in (0, 0, 1))
    >>> bool((one == same).all()), bool((one == other).all())
    (True, False)
    """
    return torch.Generator().manual_seed(seed_of(seed, *address))


def seed_of(seed: int, *address: str | int) -> int:
    """A 63-bit seed for one address; see `generator`.

    >>> seed_of(7, "init") == seed_of(7, "init") != seed_of(8, "init")
    True
    """
    digest = hashlib.blake2b(repr((seed, *address)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@dataclass(eq=False)  # not frozen: Fabric rebuilds what it passes to a model on several devices
class Task:
    """One stage of learning."""

    index: int
    """Position in the stream, from 0."""
    classes: tuple[int, ...]
    """Labels that appear in this task."""
    train: Tensor
    """Indices of its training images `(n,)`."""
    test: Tensor
    """Indices of its test images `(m,)`."""


@dataclass(frozen=True)
class Scenario:
    """Tasks in the order in which they are learned."""

    tasks: tuple[Task, ...]

    def __len__(self) -> int:
        return len(self.tasks)

    def joint(self) -> Scenario:
        """One task that holds all of these."""
        classes = self.seen(len(self) - 1)
        train, test = (torch.cat([getattr(task, part) for task in self.tasks]) for part in ("train", "test"))
        return Scenario((Task(0, classes, train, test),))

    def seen(self, t: int) -> tuple[int, ...]:
        """Labels of tasks 0 to t, in the order of their learning."""
        return tuple(label for task in self.tasks[: t + 1] for label in task.classes)


def class_order(classes: int, seed: int | None) -> list[int]:
    """Labels 0 to classes - 1 in natural order, or shuffled by `seed`.

    >>> class_order(4, seed=None)
    [0, 1, 2, 3]
    >>> sorted(class_order(4, seed=1))
    [0, 1, 2, 3]
    """
    if seed is None:
        return list(range(classes))
    order: list[int] = torch.randperm(classes, generator=generator(seed, "class order")).tolist()
    return order


def split_by_class(train_labels: Tensor, test_labels: Tensor, tasks: int, order: list[int]) -> Scenario:
    """A scenario in which each task brings new classes.

    Args:
        train_labels: label of every training image `(n,)`.
        test_labels: label of every test image `(m,)`.
        tasks: number of tasks. Where they do not divide the classes, the first tasks get one class more.
        order: every label once, in the order of learning.

    >>> labels = torch.tensor([0, 1, 2, 0, 1, 2])
    >>> [task.classes for task in split_by_class(labels, labels, tasks=2, order=[2, 0, 1]).tasks]
    [(2, 0), (1,)]
    """
    if not 1 <= tasks <= len(order):
        raise ValueError(f"expected between 1 and {len(order)} tasks (the number of classes), got {tasks}")
    base, extra = divmod(len(order), tasks)
    stages, start = [], 0
    for index in range(tasks):
        stop = start + base + (index < extra)
        classes = tuple(order[start:stop])
        wanted = torch.tensor(classes)
        stages.append(Task(index, classes, _where(train_labels, wanted), _where(test_labels, wanted)))
        start = stop
    return Scenario(tuple(stages))


def _where(labels: Tensor, wanted: Tensor) -> Tensor:
    return torch.isin(labels, wanted).nonzero().flatten()
