"""Predictions image by image: accuracy per class, top-k accuracy, and what is confused with what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pgp.distributed import all_gather_object
from pgp.subspace import to_float64

TOP = 5
"""Number of classes that are stored for each image, the most probable first."""


class Predictions(NamedTuple):
    """What was predicted for each of `n` test images, in the order of their split.

    It takes 8 bytes for each image and 12 more for each readout, or twice that if there are more than 32,767 classes or
    tasks.
    """

    images: Tensor
    """Indices of the images in the test split, `(n,)`, ascending."""
    labels: Tensor
    """`(n,)`."""
    tasks: Tensor
    """Number of each image's task, from 0, `(n,)`."""
    top: dict[str, Tensor]
    """By readout, the most probable classes of each image, `(n, TOP)`; -1 where fewer classes can be predicted."""
    confidence: dict[str, Tensor]
    """By readout, the probability of each image's predicted class, `(n,)`, float16."""
    usage: Tensor | None
    """Fraction of the images of each task that select each prompt, `(T, M)`, NaN for a task without images; None for a
    method that does not select prompts."""

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Predictions:
        """Return the predictions whose `_asdict()` is in a checkpoint."""
        found = cls(**state)
        n = len(found.images)
        for tensor in (found.labels, found.tasks, *found.top.values(), *found.confidence.values()):
            if len(tensor) != n:
                raise ValueError(f"expected a value for each of {n} images, got {len(tensor)}")
        return found._replace(
            images=found.images.long(),
            labels=found.labels.long(),
            tasks=found.tasks.long(),
            top={name: top.long() for name, top in found.top.items()},
            confidence={name: confidence.float() for name, confidence in found.confidence.items()},
        )


class PredictedBatch(NamedTuple):
    """Predictions for the images of an evaluation batch, which are all of one task."""

    images: Tensor
    labels: Tensor
    task: int
    top: dict[str, Tensor]
    confidence: dict[str, Tensor]
    selected: Tensor | None
    """Prompts that the images select, `(B, M)` bool."""


def top_classes(logits: Tensor, predicted: Tensor, k: int = TOP) -> Tensor:
    """Return the `k` classes of the highest logits, `(B, k)`, highest first; -1 for a class that is masked by -inf.

    Of equal logits, that of `predicted (B,)` is the first.

    >>> top_classes(torch.tensor([[0.5, 0.9, -torch.inf]]), torch.tensor([1]), k=4)
    tensor([[ 1,  0, -1, -1]])
    """
    k_possible = min(k, logits.shape[1])
    best = logits.scatter(1, predicted[:, None].to(logits.device), torch.inf).topk(k_possible)
    classes = best.indices.masked_fill(best.values.isneginf(), -1).cpu()
    return torch.nn.functional.pad(classes, (0, k - k_possible), value=-1)


def gather(batches: Sequence[PredictedBatch], columns: Sequence[str], tasks: int, classes: int) -> Predictions:
    """Return the predictions of all batches of all processes.

    Collective: every process must call it.

    Args:
        batches: Those of this process.
        columns: Names of the readouts.
        tasks: Number of tasks so far, T.
        classes: Number of classes.
    """
    found = [batch for of_process in all_gather_object(list(batches)) for batch in of_process]
    small = torch.int16 if max(classes, tasks) < 2**15 else torch.int32
    none = torch.zeros(0, dtype=torch.long)
    images = torch.cat([none, *(batch.images.cpu() for batch in found)])
    order = images.argsort()
    labels = torch.cat([none, *(batch.labels.cpu() for batch in found)])
    numbers = torch.cat([none, *(torch.full_like(batch.images.cpu(), batch.task) for batch in found)])
    top = {name: torch.cat([none.new_zeros(0, TOP), *(batch.top[name] for batch in found)]) for name in columns}
    confidence = {name: torch.cat([torch.zeros(0), *(batch.confidence[name] for batch in found)]) for name in columns}
    return Predictions(
        images[order].int(),
        labels[order].to(small),
        numbers[order].to(small),
        {name: rows[order].to(small) for name, rows in top.items()},
        {name: values[order].half() for name, values in confidence.items()},
        _usage(found, tasks),
    )


def _usage(batches: Sequence[PredictedBatch], tasks: int) -> Tensor | None:
    """Return the fraction of each task's images that select each prompt, `(T, M)`."""
    selections = [(batch.task, batch.selected) for batch in batches if batch.selected is not None]
    if not selections:
        return None
    sums = torch.zeros(tasks, selections[0][1].shape[1], dtype=torch.float64)
    counts = torch.zeros(tasks, 1, dtype=torch.float64)
    for task, selected in selections:
        sums[task] += selected.cpu().sum(0)
        counts[task] += len(selected)
    return (sums / counts).float()


def class_accuracy(predictions: Predictions, column: str, classes: int, k: int = 1) -> Tensor:
    """Return the fraction of each class's images whose class is among the `k` most probable, `(C,)`.

    It is NaN for a class without images.
    """
    hits = (predictions.top[column][:, :k] == predictions.labels[:, None]).any(1)
    return _mean_by(predictions.labels, hits, classes)


def task_accuracy(predictions: Predictions, column: str, tasks: int, k: int = 1) -> Tensor:
    """Return the fraction of each task's images whose class is among the `k` most probable, `(T,)`.

    It is NaN for a task without images.
    """
    hits = (predictions.top[column][:, :k] == predictions.labels[:, None]).any(1)
    return _mean_by(predictions.tasks, hits, tasks)


def class_confusion(predictions: Predictions, column: str, classes: int) -> Tensor:
    """Return how many images of each class (row) were predicted as each class (column), `(C, C)`."""
    return _pair_counts(predictions.labels, predictions.top[column][:, 0], classes)


def task_confusion(predictions: Predictions, column: str, task_of: Tensor, tasks: int) -> Tensor:
    """Return how many images of each task (row) were predicted as a class of each task (column), `(T, T)`.

    Args:
        predictions: The predictions.
        column: The readout.
        task_of: Number of the task of each class, `(C,)`; no two tasks share a class.
        tasks: Number of tasks, T.
    """
    return _pair_counts(predictions.tasks, task_of[predictions.top[column][:, 0]], tasks)


def _pair_counts(rows: Tensor, columns: Tensor, size: int) -> Tensor:
    return torch.bincount(rows * size + columns, minlength=size * size).view(size, size)


def _mean_by(groups: Tensor, values: Tensor, size: int) -> Tensor:
    """Return the mean of `values (n,)` in each of `size` groups."""
    sums = torch.zeros(size, dtype=torch.float64).index_add(0, groups, to_float64(values))
    return sums / torch.bincount(groups, minlength=size)
