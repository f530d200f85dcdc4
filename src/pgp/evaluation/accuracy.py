"""Accuracy on the tasks learned so far, image by image; the only owner of evaluation masks.

Nothing about an image's prediction depends on its batch, and no task label enters the forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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


class TaskAccuracies(NamedTuple):
    """What one evaluation says of each task up to t, `(t + 1)` by column."""

    accuracy: dict[str, Tensor]
    within_task: dict[str, Tensor]
    """Accuracy among the classes of the image's own task: what is left of it once the task is known."""
    task_id_accuracy: dict[str, Tensor]
    """Share of images that are given a class of their own task. Forgetting that comes with it, and not with `within`,
    is competition between tasks in the classifier."""


class Evaluator:
    """Evaluates a method on a data set again and again as it learns; queries of test images are computed once."""

    def __init__(self, fabric: Fabric, config: Config, data: Dataset, scenario: Scenario) -> None:
        self.fabric, self.config, self.data, self.scenario = fabric, config, data, scenario
        self._queries: dict[int, Tensor] = {}  # by test image, (D)

    @torch.no_grad()
    def evaluate(
        self,
        method: Method,
        readouts: Sequence[Readout],
        t: int,
        progress: Progress,
        watch: Callable[[Task, FeatureBatch], None] | None = None,
    ) -> TaskAccuracies:
        """Evaluate each task up to t, by column: one per readout, and its legacy twin if the configuration asks for it.

        `watch` is given the features of every batch.
        """
        tasks = self.scenario.tasks[: t + 1]
        hits = TaskAccuracies(
            *({c: torch.zeros(t + 1, dtype=torch.float64) for c in self._columns(readouts)} for _ in range(3))
        )
        counts = torch.zeros(t + 1, dtype=torch.float64)
        plan = [(task, batch) for task in tasks for batch in sequential_batches(task.test, self.config.eval_batch_size)]
        viewed = TransformedSplit(
            self.data.test, self.config.transforms.test(), 0, ("test",), self.config.on_bad_image == "skip"
        )
        stream = batches(viewed, [batch for _, batch in plan], self.loader_options)
        stream = track(progress, stream, len(plan), f"evaluating on {t + 1} of {len(self.scenario)} tasks")
        for (task, _), batch in zip(plan, stream, strict=True):
            if len(batch.indices):
                counts[task.index] += len(batch.indices)
                images = batch.images.to(self.fabric.device)
                seen = self.features(method, images, batch.indices)
                if watch:
                    watch(task, seen)
                for column, logits in self.logits(method, readouts, images, seen, task, t):
                    predicted, among_own = logits.argmax(1).cpu(), mask_logits(logits, task.classes).argmax(1).cpu()
                    hits.accuracy[column][task.index] += (predicted == batch.labels).sum()
                    hits.within_task[column][task.index] += (among_own == batch.labels).sum()
                    hits.task_id_accuracy[column][task.index] += torch.isin(predicted, torch.tensor(task.classes)).sum()
        counts = self._sum(counts)
        if not bool((counts > 0).all()):
            raise ValueError(
                f"expected test images in every task, got none in {(counts == 0).nonzero().flatten().tolist()}"
            )
        return TaskAccuracies(*({column: self._sum(found) / counts for column, found in each.items()} for each in hits))

    def features(self, method: Method, images: Tensor, indices: Tensor, *, by_vote: bool = False) -> FeatureBatch:
        """Return what the model makes of test images, whose queries are computed once."""
        query = self.query(method, images, indices)
        with self.fabric.autocast():
            features = method.features(images, query, by_vote=by_vote).float()
        return FeatureBatch(indices, features, query)

    def logits(
        self, method: Method, readouts: Sequence[Readout], images: Tensor, seen: FeatureBatch, task: Task, t: int
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield masked logits `(B, C)`, column by column, of test images of `task` after learning task t."""
        allowed = task.classes if self.config.setting == "til" else self.scenario.seen_classes(t)
        legacy = self.config.legacy_eval
        voted = self.features(method, images, seen.indices, by_vote=True) if legacy else None
        for readout in readouts:
            yield (
                readout.name,
                mask_logits(readout.logits(readout.select_features(seen.features, seen.queries)), allowed),
            )
            if voted is not None:
                logits = readout.logits(readout.select_features(voted.features, voted.queries))
                yield readout.name + LEGACY, mask_logits(logits, self._published(method, task))

    def _published(self, method: Method, task: Task) -> Sequence[int]:
        """What the published evaluation scores a batch of `task` over."""
        if self.config.setting == "til":
            return task.classes
        return range(self.data.classes) if method.legacy_scope == "all" else self.scenario.seen_classes(task.index)

    def query(self, method: Method, images: Tensor, indices: Tensor | None = None) -> Tensor | None:
        """Queries `(B, D)` of images, from memory where they are known by their `indices` in the test split; None where
        neither the method nor a readout asks for them.
        """
        if not (method.uses_query or any(readout.uses_query for readout in self.config.readouts)):
            return None
        if indices is None:
            with self.fabric.autocast():
                return method.query(images).float()
        keys: list[int] = indices.tolist()
        if not all(key in self._queries for key in keys):
            with self.fabric.autocast():
                self._queries.update(zip(keys, method.query(images).float().cpu(), strict=True))
        return torch.stack([self._queries[key] for key in keys]).to(images.device)

    @property
    def loader_options(self) -> LoaderOptions:
        """How this process loads its share."""
        hardware = self.config.hardware
        return LoaderOptions(
            hardware.workers,
            self.config.on_bad_image,
            self.fabric.global_rank,
            self.fabric.world_size,
            hardware.pin_memory,
        )

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
