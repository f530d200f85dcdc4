"""Continual-learning metrics from the accuracy matrix. Pure functions; every accuracy is in [0, 1].

`matrix[t, j]` is the accuracy on task j after learning task t, NaN for j > t, and where it was not measured, such as
for a task without test images. Metrics take the matrix `(t, t)` of the t tasks learned so far. A metric of accuracies
that were not measured is NaN, too.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def _num_tasks(matrix: Tensor) -> int:
    if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"expected a square accuracy matrix (t, t), got {tuple(matrix.shape)}")
    return len(matrix)


def average_accuracy(matrix: Tensor) -> float:
    """Return the accuracy after the last task, averaged over all tasks with equal weight.

    >>> round(average_accuracy(torch.tensor([[0.9, float("nan")], [0.7, 0.8]])), 4)
    0.75
    """
    return float(matrix[-1].mean()) if _num_tasks(matrix) else math.nan


def forgetting(matrix: Tensor) -> float:
    """Return the best accuracy so far minus the final one, averaged over all tasks but the last; 0 for a single task.

    It is NaN if a task was not measured right after it was learned.

    >>> round(forgetting(torch.tensor([[0.9, float("nan")], [0.7, 0.8]])), 4)
    0.2
    """
    if _num_tasks(matrix) < 2:
        return 0.0 if matrix.isfinite().any() else math.nan
    best = matrix[:, :-1].nan_to_num(nan=-torch.inf).amax(0)
    best = best.where(matrix.diagonal()[:-1].isfinite(), torch.nan)
    return float((best - matrix[-1, :-1]).mean())


def sampling_error(matrix: Tensor, test_images: Sequence[int], sample: int | None) -> float | None:
    """Return the standard error of the average accuracy if the test images of a task are a random sample.

    It is None if no task has a sample: all are evaluated on all of their images.

    The variance of an accuracy p of n images is `p' (1 - p') / n`, with `p' = (n p + 1) / (n + 2)`: not 0 if all images
    of a small sample are classified correctly.

    Args:
        matrix: Accuracy matrix `(t, t)`.
        test_images: Number of test images of each task.
        sample: Size of a sample, or None. Tasks with fewer images are evaluated on all of them, and add no error.

    >>> round(sampling_error(torch.tensor([[0.9, float("nan")], [0.5, 0.5]]), [25, 25], sample=25), 4)
    0.0707
    >>> round(sampling_error(torch.tensor([[0.9, float("nan")], [0.5, 0.5]]), [25, 24], sample=25), 4)
    0.05
    """
    if sample is None or sample > max(test_images):
        return None
    t = _num_tasks(matrix)
    if not t:
        return math.nan
    accuracies, counts = matrix[-1], torch.tensor(test_images[:t])
    smoothed = (counts * accuracies + 1) / (counts + 2)
    variances = torch.where(counts < sample, 0.0, smoothed * (1 - smoothed) / counts)
    return float(variances.sum().sqrt() / t)


def backward_transfer(matrix: Tensor) -> float:
    """Return the final accuracy minus the one right after learning the task, averaged over all tasks but the last.

    It is negative if tasks were forgotten, and 0 for a single task.

    >>> round(backward_transfer(torch.tensor([[0.9, float("nan")], [0.7, 0.8]])), 4)
    -0.2
    """
    if _num_tasks(matrix) < 2:
        return 0.0 if matrix.isfinite().any() else math.nan
    return float((matrix[-1, :-1] - matrix.diagonal()[:-1]).mean())


def average_incremental_accuracy(matrix: Tensor) -> float:
    """Return the mean of the average accuracies after each learned task.

    >>> round(average_incremental_accuracy(torch.tensor([[0.9, float("nan")], [0.7, 0.8]])), 4)
    0.825
    """
    curve = accuracy_curve(matrix)
    return sum(curve) / len(curve) if curve else math.nan


def accuracy_curve(matrix: Tensor) -> list[float]:
    """Return the average accuracy after each learned task.

    >>> [round(value, 2) for value in accuracy_curve(torch.tensor([[0.9, float("nan")], [0.7, 0.8]]))]
    [0.9, 0.75]
    """
    return [float(matrix[t, : t + 1].mean()) for t in range(_num_tasks(matrix))]


def write_row(matrices: dict[str, Tensor], row: Mapping[str, Tensor], t: int, size: int) -> None:
    """Write the accuracies `(t + 1,)` after task t into the matrices `(size, size)`, by column.

    Missing matrices are created.

    >>> matrices = {}
    >>> write_row(matrices, {"lda": torch.tensor([0.5])}, t=0, size=2)
    >>> matrices["lda"][0]
    tensor([0.5000,    nan], dtype=torch.float64)
    """
    for column, accuracies in row.items():
        matrix = matrices.setdefault(column, torch.full((size, size), torch.nan, dtype=torch.float64))
        matrix[t, : t + 1] = accuracies


def trim(matrices: Mapping[str, Tensor], tasks: int) -> dict[str, Tensor]:
    """Return the accuracy matrices of the first tasks, `(tasks, tasks)`, by column."""
    return {column: matrix[:tasks, :tasks] for column, matrix in matrices.items()}


def pad_matrix(matrix: Tensor, size: int) -> Tensor:
    """Pad an accuracy matrix with NaN to `(size, size)`, for tasks that are added to a run.

    >>> pad_matrix(torch.tensor([[0.5]]), 2)
    tensor([[0.5000,    nan],
            [   nan,    nan]])
    """
    more = size - len(matrix)
    if more < 0:
        raise ValueError(f"expected the matrix of at most {size} tasks, got {tuple(matrix.shape)}")
    return torch.nn.functional.pad(matrix, (0, more, 0, more), value=float("nan"))


def to_csv(matrices: Mapping[str, Tensor]) -> str:
    r"""Return a table of the accuracy matrix `(T, T)` of each column; NaN entries are left out.

    >>> to_csv({"lda": torch.tensor([[0.5]])})
    'column,after_task,task,accuracy\nlda,0,0,0.5\n'
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["column", "after_task", "task", "accuracy"])
    for column, matrix in matrices.items():
        for t, j in matrix.isfinite().nonzero().tolist():
            writer.writerow([column, t, j, repr(float(matrix[t, j]))])
    return text.getvalue()


def from_csv(text: str, size: int) -> dict[str, Tensor]:
    """Return the accuracy matrices `(size, size)` by column from the table that `to_csv` wrote."""
    matrices: dict[str, Tensor] = {}
    for row in csv.DictReader(io.StringIO(text, newline="")):
        matrix = matrices.setdefault(row["column"], torch.full((size, size), torch.nan, dtype=torch.float64))
        matrix[int(row["after_task"]), int(row["task"])] = float(row["accuracy"])
    return matrices
