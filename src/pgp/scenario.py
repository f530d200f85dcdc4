"""A stream of tasks: which classes come when, and where every random draw of a run comes from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pgp.rng import make_generator

Setting = Literal["cil", "til", "dil", "oil"]
"""What a task brings, and what is known at test: `cil` new classes, nothing; `til` new classes, each image's task;
`dil` the same classes in a new domain, nothing; `oil` new classes, nothing, and training sees each image once."""
Groups = Sequence[tuple[str, Sequence[int]]]
"""What each task is called ("" for nothing) and what it brings, in the order of learning."""


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
    name: str = ""
    """What it is called, if anything."""


@dataclass(frozen=True)
class Scenario:
    """Tasks in the order in which they are learned."""

    tasks: tuple[Task, ...]

    def __len__(self) -> int:
        return len(self.tasks)

    def joint(self) -> Scenario:
        """Return a scenario with one task that holds all of these."""
        classes = self.seen_classes(len(self) - 1)
        train, test = (torch.cat([getattr(task, part) for task in self.tasks]) for part in ("train", "test"))
        return Scenario((Task(0, classes, train, test),))

    def seen_classes(self, t: int) -> tuple[int, ...]:
        """Return the labels of tasks 0 to t, each once, in the order of their learning."""
        return tuple(dict.fromkeys(label for task in self.tasks[: t + 1] for label in task.classes))

    def describe(self, task: Task) -> str:
        """Return the name of a task for messages, such as `task 2 of 5 (birds)`."""
        return f"task {task.index + 1} of {len(self)}" + (f" ({task.name})" if task.name else "")


def class_order(classes: int, seed: int | None) -> list[int]:
    """Return labels 0 to classes - 1 in natural order, or shuffled by `seed`.

    >>> class_order(4, seed=None)
    [0, 1, 2, 3]
    >>> sorted(class_order(4, seed=1))
    [0, 1, 2, 3]
    """
    if seed is None:
        return list(range(classes))
    order: list[int] = torch.randperm(classes, generator=make_generator(seed, "class order")).tolist()
    return order


def split_by_class(train_labels: Tensor, test_labels: Tensor, tasks: int, order: Sequence[int]) -> Scenario:
    """Return a scenario in which each task brings new classes.

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
    groups, start = [], 0
    for index in range(tasks):
        stop = start + base + (index < extra)
        groups.append(("", order[start:stop]))
        start = stop
    return split_by_group(train_labels, test_labels, groups)


def split_by_group(train_labels: Tensor, test_labels: Tensor, groups: Groups) -> Scenario:
    """Return a scenario in which each task brings the classes that its group lists; sizes may differ.

    >>> labels = torch.tensor([0, 1, 2, 0, 1, 2])
    >>> scenario = split_by_group(labels, labels, [("birds", [2]), ("fish", [0, 1])])
    >>> [(scenario.describe(task), task.classes) for task in scenario.tasks]
    [('task 1 of 2 (birds)', (2,)), ('task 2 of 2 (fish)', (0, 1))]
    """
    return Scenario(
        tuple(
            Task(index, tuple(classes), _where(train_labels, classes), _where(test_labels, classes), name)
            for index, (name, classes) in enumerate(groups)
        )
    )


def split_by_domain(train_labels: Tensor, train_domains: Tensor, test_domains: Tensor, groups: Groups) -> Scenario:
    """Return a scenario in which each task brings the domains that its group lists, with all classes in them.

    Args:
        train_labels: label of every training image `(n,)`; a task's classes are those of its training images.
        train_domains: domain of every training image `(n,)`.
        test_domains: domain of every test image `(m,)`.
        groups: name and domains of each task.

    >>> labels, domains = torch.tensor([0, 1, 0, 1, 0]), torch.tensor([0, 0, 1, 1, 2])
    >>> scenario = split_by_domain(labels, domains, domains, [("photos", [0]), ("art", [1, 2])])
    >>> [(task.classes, task.train.tolist()) for task in scenario.tasks], scenario.seen_classes(1)
    ([((0, 1), [0, 1]), ((0, 1), [2, 3, 4])], (0, 1))
    """
    tasks = []
    for index, (name, domains) in enumerate(groups):
        train = _where(train_domains, domains)
        classes = tuple(train_labels[train].unique().tolist())
        tasks.append(Task(index, classes, train, _where(test_domains, domains), name))
    return Scenario(tuple(tasks))


def stratified_holdout(strata: Tensor, share: float, seed: int) -> Tensor:
    """Return which images are held out for the test, bool `(n,)`: `share` of each stratum, at least one and never all.

    Args:
        strata: what each image is, `(n,)`, such as its label; at least 2 images of each.
        share: in (0, 1).
        seed: decides which images these are.

    >>> stratified_holdout(torch.tensor([0, 0, 0, 0, 1, 1]), share=0.5, seed=0).tolist()
    [True, True, False, False, False, True]
    """
    chosen = torch.zeros(len(strata), dtype=torch.bool)
    for stratum in strata.unique().tolist():
        places = (strata == stratum).nonzero().flatten()
        order = torch.randperm(len(places), generator=make_generator(seed, "part", stratum))
        chosen[places[order[: min(len(places) - 1, max(1, round(share * len(places))))]]] = True
    return chosen


def _where(labels: Tensor, wanted: Sequence[int]) -> Tensor:
    return torch.isin(labels, torch.tensor(wanted)).nonzero().flatten()
