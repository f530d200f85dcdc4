"""Accuracy on the tasks learned so far, image by image; the only owner of evaluation masks.

Nothing about an image's prediction depends on its batch, and no task label enters the forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from lightning_fabric import Fabric
from rich.progress import Progress
from torch import Tensor

from pgp.config import Config
from pgp.datasets.base import Dataset
from pgp.datasets.loader import LoaderOptions, TransformedSplit, batches, sequential_batches
from pgp.methods.base import Method, mask_logits
from pgp.progress import track
from pgp.readouts.base import Readout
from pgp.scenario import Scenario, Task

Autocast = Callable[[], AbstractContextManager[None]]
"""What opens a block with the precision of a run."""
LEGACY = "/legacy"
"""Suffix of columns that follow the published protocol."""


class FeatureBatch(NamedTuple):
    """Some images as the model sees them."""

    indices: Tensor
    """Where they are in their split, `(B,)`."""
    features: Tensor
    """`(B, D)`."""
    queries: Tensor | None
    """`(B, Q)`, if the method or a readout needs them."""

    def cpu(self) -> FeatureBatch:
        """Return the same batch on the CPU."""
        queries = None if self.queries is None else self.queries.cpu()
        return FeatureBatch(self.indices, self.features.cpu(), queries)


class TaskAccuracies(NamedTuple):
    """What one evaluation measures of each task up to t, `(t + 1)` by column."""

    accuracy: dict[str, Tensor]
    """Accuracy among all classes that an image may have."""
    within_task: dict[str, Tensor]
    """Accuracy among the classes of the image's own task."""
    task_id_accuracy: dict[str, Tensor]
    """Share of images whose predicted class belongs to their own task. Forgetting that shows here and not in
    `within_task` is competition between tasks in the classifier."""


def extract_query(method: Method, images: Tensor, autocast: Autocast) -> Tensor:
    """Return the queries `(B, D)` of images `(B, 3, S, S)`, float32."""
    with autocast():
        return method.query(images).float()


def extract_features(
    method: Method, images: Tensor, query: Tensor | None, autocast: Autocast, *, by_vote: bool = False
) -> Tensor:
    """Return the features `(B, D)` of images `(B, 3, S, S)`, float32; see `Method.features`."""
    with autocast():
        return method.features(images, query, by_vote=by_vote).float()


class Evaluator:
    """Evaluates a method on a data set again and again as it learns. Queries of test images are computed once."""

    def __init__(self, fabric: Fabric, config: Config, data: Dataset, scenario: Scenario) -> None:
        self.fabric, self.config, self.data, self.scenario = fabric, config, data, scenario
        self._queries: dict[int, Tensor] = {}  # by test image, (D,)

    @torch.no_grad()
    def evaluate(
        self,
        method: Method,
        readouts: Sequence[Readout],
        t: int,
        progress: Progress,
        watch: Callable[[Task, FeatureBatch], None] | None = None,
    ) -> TaskAccuracies:
        """Evaluate each task up to task t.

        Collective: every process must call it.

        Args:
            method: What computes the features.
            readouts: Each makes a column, and another for the published protocol if the configuration asks for it.
            t: Number of the last task that was learned, from 0.
            progress: Where to draw progress bars.
            watch: Called with the features of every batch.

        Raises:
            ValueError: If a task has no test image that can be read.
        """
        tasks = self.scenario.tasks[: t + 1]
        columns = self._columns(readouts)
        hits = TaskAccuracies(
            *({column: torch.zeros(t + 1, dtype=torch.float64) for column in columns} for _ in range(3))
        )
        counts = torch.zeros(t + 1, dtype=torch.float64)
        plan = [(task, batch) for task in tasks for batch in sequential_batches(task.test, self.config.eval_batch_size)]
        stream = batches(self.test_split(), [batch for _, batch in plan], self.loader_options)
        stream = track(progress, stream, len(plan), f"evaluating on {t + 1} of {len(self.scenario)} tasks")
        for (task, _), batch in zip(plan, stream, strict=True):
            if not len(batch.indices):
                continue
            counts[task.index] += len(batch.indices)
            images, own_classes = batch.images.to(self.fabric.device), torch.tensor(task.classes)
            features = self.features(method, images, batch.indices, self.query(method, images, batch.indices))
            if watch:
                watch(task, features)
            for column, logits in self.logits(method, readouts, images, features, task, t):
                predicted = logits.argmax(1).cpu()
                within_task = mask_logits(logits, task.classes).argmax(1).cpu()
                hits.accuracy[column][task.index] += (predicted == batch.labels).sum()
                hits.within_task[column][task.index] += (within_task == batch.labels).sum()
                hits.task_id_accuracy[column][task.index] += torch.isin(predicted, own_classes).sum()
        counts = self._sum(counts)
        if not bool((counts > 0).all()):
            empty = (counts == 0).nonzero().flatten().tolist()
            raise ValueError(f"expected test images in every task, got none in {empty}")
        return TaskAccuracies(*({column: self._sum(count) / counts for column, count in kind.items()} for kind in hits))

    def test_split(self) -> TransformedSplit:
        """Return the test images as every evaluation sees them."""
        skip_bad = self.config.on_bad_image == "skip"
        return TransformedSplit(self.data.test, self.config.transforms.test(), 0, ("test",), skip_bad)

    def query(self, method: Method, images: Tensor, indices: Tensor | None = None) -> Tensor | None:
        """Return the queries `(B, D)` of images; None if neither the method nor a readout uses them.

        Args:
            method: What computes them.
            images: `(B, 3, S, S)`.
            indices: For test images, where they are in their split, `(B,)`: their queries are cached.
        """
        if not (method.uses_query or any(readout.uses_query for readout in self.config.readouts)):
            return None
        keys = [] if indices is None else indices.tolist()
        if not keys or not all(key in self._queries for key in keys):
            query = extract_query(method, images, self.fabric.autocast)
            if not keys:
                return query
            self._queries.update(zip(keys, query.cpu(), strict=True))
        return torch.stack([self._queries[key] for key in keys]).to(images.device)

    def features(
        self, method: Method, images: Tensor, indices: Tensor, query: Tensor | None, *, by_vote: bool = False
    ) -> FeatureBatch:
        """Return the features `(B, D)` of images `(B, 3, S, S)` with their queries, from `query`.

        If `by_vote`, the prompts are selected by the published protocol, see `Method.features`.
        """
        features = extract_features(method, images, query, self.fabric.autocast, by_vote=by_vote)
        return FeatureBatch(indices, features, query)

    def logits(
        self, method: Method, readouts: Sequence[Readout], images: Tensor, batch: FeatureBatch, task: Task, t: int
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield the masked logits `(B, C)` of each column, for test images of `task` after task t was learned."""
        allowed = task.classes if self.config.setting == "til" else self.scenario.seen_classes(t)
        voted = None
        if self.config.legacy_eval:
            voted = self.features(method, images, batch.indices, batch.queries, by_vote=True)
        for readout in readouts:
            logits = readout.logits(readout.select_features(batch.features, batch.queries))
            yield readout.name, mask_logits(logits, allowed)
            if voted is not None:
                logits = readout.logits(readout.select_features(voted.features, voted.queries))
                yield readout.name + LEGACY, mask_logits(logits, self._legacy_classes(method, task))

    @property
    def loader_options(self) -> LoaderOptions:
        """How this process loads its share of the images."""
        hardware = self.config.hardware
        return LoaderOptions(
            hardware.workers,
            self.config.on_bad_image,
            self.fabric.global_rank,
            self.fabric.world_size,
            hardware.pin_memory,
        )

    def _legacy_classes(self, method: Method, task: Task) -> Sequence[int]:
        """Return the classes among which the published evaluation scores images of `task`."""
        if self.config.setting == "til":
            return task.classes
        return range(self.data.classes) if method.legacy_scope == "all" else self.scenario.seen_classes(task.index)

    def _columns(self, readouts: Sequence[Readout]) -> list[str]:
        names = [readout.name for readout in readouts]
        return names + [name + LEGACY for name in names] if self.config.legacy_eval else names

    def _sum(self, value: Tensor) -> Tensor:
        """Return the sum over all processes.

        Collective: every process must call it.
        """
        if self.fabric.world_size == 1:
            return value
        total = self.fabric.all_reduce(value.to(self.fabric.device), reduce_op="sum")
        assert isinstance(total, Tensor)
        return total.cpu()
