"""Tasks in the order of learning: splits of a data set by class, by group of classes and by domain."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pgp.rng import make_generator

Setting = Literal["cil", "til", "dil", "oil"]
"""The setting of continual learning.

- `cil`, class-incremental: each task brings new classes. At test, the task of an image is unknown.
- `til`, task-incremental: each task brings new classes. At test, the task of an image is given.
- `dil`, domain-incremental: each task brings the same classes in a new domain. At test, the domain is unknown.
- `oil`, online: as `cil`, and training sees each image once.
"""


Groups = Sequence[tuple[str, Sequence[int]]]
"""Name of each task ("" for none) and its classes or domains, in the order of learning."""


@dataclass(eq=False)  # not frozen: Fabric rebuilds what it passes to a model on several devices
class Task:
    """One stage of learning."""

    index: int
    """Position in the order of learning, from 0."""
    classes: tuple[int, ...]
    """Labels that appear in this task."""
    train: Tensor
    """Indices of its training images, `(n,)`."""
    test: Tensor
    """Indices of its test images, `(m,)`."""
    name: str = ""
    """Name of the task; empty if it has none."""
    test_weights: Tensor | None = None
    """Weight of each test image in the accuracy, `(m,)`; None if all are equal."""

    @property
    def is_missing(self) -> bool:
        """Whether the task was learned from images that are not available any more."""
        return not len(self.train) and not len(self.test)

    @property
    def is_tested(self) -> bool:
        """Whether it has test images. A learned task whose images are gone has none, nor a class of a single image."""
        return bool(len(self.test))


@dataclass(frozen=True)
class Scenario:
    """Tasks in the order in which they are learned."""

    tasks: tuple[Task, ...]

    def __len__(self) -> int:
        return len(self.tasks)

    def joint(self) -> Scenario:
        """Return a scenario with a single task that holds the images of all tasks.

        Its accuracy is the average over these tasks, each with the same weight.
        """
        classes = self.seen_classes(len(self) - 1)
        train = torch.cat([task.train for task in self.tasks])
        test = torch.cat([task.test for task in self.tasks])
        sizes = torch.tensor([len(task.test) for task in self.tasks])
        weights = torch.repeat_interleave(torch.ones(len(self), dtype=torch.float64) / sizes, sizes)
        return Scenario((Task(0, classes, train, test, test_weights=weights),))

    @property
    def shares_classes(self) -> bool:
        """Whether a class is in several tasks."""
        return len(self.seen_classes(len(self) - 1)) < sum(len(task.classes) for task in self.tasks)

    def seen_classes(self, t: int) -> tuple[int, ...]:
        """Return the labels of tasks 0 to t, each once, in the order of learning."""
        return tuple(dict.fromkeys(label for task in self.tasks[: t + 1] for label in task.classes))

    def describe(self, task: Task) -> str:
        """Return a text that names a task, such as `task 2 of 5 (birds)`."""
        return f"task {task.index + 1} of {len(self)}" + (f" ({task.name})" if task.name else "")


def class_order(classes: int, seed: int | None) -> list[int]:
    """Return the labels 0 to classes - 1 in natural order, or shuffled by `seed`.

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
        train_labels: Label of every training image, `(n,)`.
        test_labels: Label of every test image, `(m,)`.
        tasks: Number of tasks. If it does not divide the number of classes, the first tasks get one class more.
        order: Every label once, in the order of learning.

    Raises:
        ValueError: If there are fewer tasks than one, or more tasks than classes.

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


def split_by_increment(
    train_labels: Tensor, test_labels: Tensor, first: int, increment: int, order: Sequence[int]
) -> Scenario:
    """Return a scenario whose first task has `first` classes, and every later one `increment`, or what is left.

    Args:
        train_labels: Label of every training image, `(n,)`.
        test_labels: Label of every test image, `(m,)`.
        first: Number of classes of the first task.
        increment: Number of classes of each later task.
        order: Every label once, in the order of learning.

    Raises:
        ValueError: If there are fewer classes than in the first task.

    >>> labels = torch.arange(7)
    >>> [task.classes for task in split_by_increment(labels, labels, 4, 2, range(7)).tasks]
    [(0, 1, 2, 3), (4, 5), (6,)]
    """
    if not 1 <= first <= len(order):
        raise ValueError(f"expected at most {len(order)} classes in the first task (all classes), got {first}")
    starts = [0, *range(first, len(order), increment)]
    groups = [("", order[start:stop]) for start, stop in zip(starts, [*starts[1:], len(order)], strict=True)]
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
            Task(index, tuple(classes), _indices_of(train_labels, classes), _indices_of(test_labels, classes), name)
            for index, (name, classes) in enumerate(groups)
        )
    )


def split_by_domain(train_labels: Tensor, train_domains: Tensor, test_domains: Tensor, groups: Groups) -> Scenario:
    """Return a scenario in which each task brings the domains that its group lists.

    Args:
        train_labels: Label of every training image, `(n,)`. A task's classes are those of its training images.
        train_domains: Domain of every training image, `(n,)`.
        test_domains: Domain of every test image, `(m,)`.
        groups: Name and domains of each task.

    >>> labels, domains = torch.tensor([0, 1, 0, 1, 0]), torch.tensor([0, 0, 1, 1, 2])
    >>> scenario = split_by_domain(labels, domains, domains, [("photos", [0]), ("art", [1, 2])])
    >>> [(task.classes, task.train.tolist()) for task in scenario.tasks], scenario.seen_classes(1)
    ([((0, 1), [0, 1]), ((0, 1), [2, 3, 4])], (0, 1))
    """
    tasks = []
    for index, (name, domains) in enumerate(groups):
        train = _indices_of(train_domains, domains)
        classes = tuple(train_labels[train].unique().tolist())
        tasks.append(Task(index, classes, train, _indices_of(test_domains, domains), name))
    return Scenario(tuple(tasks))


def stratified_holdout(strata: Tensor, fraction: float, seed: int) -> Tensor:
    """Return which images are held out for testing, bool `(n,)`.

    Args:
        strata: Stratum of each image, `(n,)`, such as its label.
        fraction: Fraction of each stratum to hold out, in [0, 1). Unless it is 0, at least one image is held out, but
            never all of them, so that of a single image, none is.
        seed: Decides which images are held out.

    >>> stratified_holdout(torch.tensor([0, 0, 0, 0, 1, 1]), fraction=0.5, seed=0).tolist()
    [True, True, False, False, False, True]
    """
    held_out = torch.zeros(len(strata), dtype=torch.bool)
    for indices in _shuffled(strata, seed):
        count = min(len(indices) - 1, max(1, round(fraction * len(indices)))) if fraction else 0
        held_out[indices[:count]] = True
    return held_out


def stratified_folds(strata: Tensor, folds: int, seed: int) -> Tensor:
    """Return the fold of each image, `(n,)`: each stratum is divided as evenly as possible, the first folds first.

    Args:
        strata: Stratum of each image, `(n,)`, such as its label. The only image of a stratum is in no fold, -1.
        folds: Number of folds. If a stratum has fewer images, each is in a fold of its own.
        seed: Decides the fold of each image.

    >>> stratified_folds(torch.tensor([0, 0, 0, 0, 1, 1, 2]), folds=3, seed=0).tolist()
    [0, 1, 0, 2, 1, 0, -1]
    """
    fold = torch.full((len(strata),), -1)
    for indices in _shuffled(strata, seed):
        if len(indices) > 1:
            fold[indices] = torch.arange(len(indices)) % folds
    return fold


def _shuffled(strata: Tensor, seed: int) -> Iterator[Tensor]:
    """Yield the indices of each stratum, at random; another stratum changes none of the others."""
    for stratum in strata.unique().tolist():
        indices = (strata == stratum).nonzero().flatten()
        yield indices[torch.randperm(len(indices), generator=make_generator(seed, "part", stratum))]


def sample_in_proportion(indices: Tensor, labels: Tensor, count: int, seed: int) -> Tensor:
    """Return at most `count` of the images `indices (n,)` at random, of each label in proportion to its images.

    Every image is drawn with the same probability, so that the expected accuracy on the sample is that on all images.

    Args:
        indices: Images of a split.
        labels: Label of every image of the split.
        count: Number of images to draw.
        seed: Decides which ones are drawn.

    >>> sample_in_proportion(torch.tensor([4, 5, 6, 7, 8, 9]), torch.tensor([0] * 6 + [1] * 4), 3, seed=0).tolist()
    [5, 7, 9]
    """
    if count >= len(indices):
        return indices
    generator = make_generator(seed, "test sample")
    order = torch.randperm(len(indices), generator=generator)
    order = order[labels[indices[order]].argsort(stable=True)]  # label by label, at random within each
    start = torch.rand(1, generator=generator, dtype=torch.float64)
    drawn = ((torch.arange(count) + start) * len(indices) / count).long()  # at equal distances
    return indices[order[drawn]].sort().values


def _indices_of(labels: Tensor, selected: Sequence[int]) -> Tensor:
    """Return the indices of the images whose label is one of `selected`, `(n,)`."""
    return torch.isin(labels, torch.tensor(selected)).nonzero().flatten()
