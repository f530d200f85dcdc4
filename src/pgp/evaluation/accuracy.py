"""Accuracy on the tasks learned so far, per image, without task labels in the forward pass.

Nothing about an image's prediction depends on its batch.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from lightning_fabric import Fabric
from rich.progress import Progress
from torch import Tensor

from pgp.config import Config
from pgp.datasets.base import Dataset
from pgp.datasets.loader import Batch, LoaderOptions, SampleKey, TransformedSplit, batches, sequential_batches
from pgp.distributed import all_gather_rows, is_distributed
from pgp.evaluation import predictions
from pgp.evaluation.calibration import NUM_BINS, calibration_bins
from pgp.evaluation.predictions import Predictions, top_classes
from pgp.methods.base import Method, mask_logits
from pgp.progress import track
from pgp.readouts.base import Features, Readout
from pgp.scenario import Scenario, Task

Autocast = Callable[[], AbstractContextManager[None]]
"""What opens a block with the precision of a run."""
LEGACY = "/legacy"
"""Suffix of columns that follow the published protocol."""


class FeatureBatch(NamedTuple):
    """Features of some images of a split."""

    indices: Tensor
    """Indices of the images in their split, `(B,)`."""
    images: Features

    def rows(self, selected: Tensor) -> FeatureBatch:
        """Return the batch of the images `selected`: a mask `(B,)`, or indices into this batch."""
        return FeatureBatch(self.indices[selected], self.images.apply(lambda tensor: tensor[selected]))

    def cpu(self) -> FeatureBatch:
        """Return the same batch on the CPU."""
        return FeatureBatch(self.indices, self.images.apply(Tensor.cpu))

    @staticmethod
    def concat(batches: Sequence[FeatureBatch]) -> FeatureBatch:
        """Return the images of all `batches` as one batch."""
        indices = torch.cat([batch.indices for batch in batches])
        return FeatureBatch(indices, Features.concat([batch.images for batch in batches]))


class FrozenFeatures(NamedTuple):
    """Features of `B` images without prompts, which never change."""

    query: Tensor
    """CLS token, `(B, D)`."""
    patches: Tensor | None
    """Mean of the patch tokens, `(B, D)`, if a readout uses it."""

    def to(self, device: torch.device) -> FrozenFeatures:
        """Return the same features on another device."""
        return FrozenFeatures(self.query.to(device), None if self.patches is None else self.patches.to(device))


class FrozenCache:
    """Frozen features of some images of a split, on the CPU. They never change, so they are computed once."""

    def __init__(self) -> None:
        self._rows: dict[int, list[Tensor]] = {}  # by image, query and patches (D,)

    def holds(self, indices: Tensor) -> Tensor:
        """Return which of the images `indices (B,)` have features here, `(B,)` bool."""
        return torch.tensor([index in self._rows for index in indices.tolist()], dtype=torch.bool)

    def get(self, indices: Tensor) -> FrozenFeatures:
        """Return the features of the images `indices (B,)`, all of which must be here, and at least one."""
        columns = [torch.stack(column) for column in zip(*(self._rows[i] for i in indices.tolist()), strict=True)]
        return FrozenFeatures(columns[0], columns[1] if len(columns) > 1 else None)

    def put(self, indices: Tensor, frozen: FrozenFeatures) -> None:
        """Keep the features of the images `indices (B,)`."""
        rows = zip(*(tensor.cpu() for tensor in frozen if tensor is not None), strict=True)
        self._rows.update(zip(indices.tolist(), map(list, rows), strict=True))

    def gather(self) -> None:
        """Add the images of all processes.

        Collective: in a distributed run, every process must call it.
        """
        if is_distributed():
            indices = torch.tensor(list(self._rows))
            query, patches = self.get(indices)
            patches = None if patches is None else all_gather_rows(patches)
            self.put(all_gather_rows(indices), FrozenFeatures(all_gather_rows(query), patches))

    def clear(self) -> None:
        """Forget all images."""
        self._rows.clear()

    def __len__(self) -> int:
        return len(self._rows)


class TaskAccuracies(NamedTuple):
    """Accuracies of tasks 0 to t, `(t + 1)`, by readout (and by readout + `LEGACY`)."""

    accuracy: dict[str, Tensor]
    """Accuracy among all classes that an image may have."""
    within_task: dict[str, Tensor]
    """Accuracy among the classes of the image's own task."""
    task_id_accuracy: dict[str, Tensor]
    """Fraction of images whose predicted class belongs to their own task. Forgetting that shows here and not in
    `within_task` is competition between tasks in the classifier."""
    calibration: dict[str, Tensor]
    """Bins of confidence over the images of all tasks, `(NUM_BINS, 3)`; see `pgp.evaluation.calibration`. Empty unless
    all tasks are evaluated."""
    predictions: Predictions | None
    """What was predicted for each image, by readout; not for `LEGACY` columns. None unless all tasks are evaluated."""


def extract_frozen(method: Method, images: Tensor, autocast: Autocast, *, patches: bool) -> FrozenFeatures:
    """Return the query `(B, D)` of images `(B, 3, S, S)`, float32, and the mean of their patch tokens if `patches`."""
    with autocast():
        if patches:
            query, mean = method.query_and_patches(images)
            return FrozenFeatures(query.float(), mean.float())
        return FrozenFeatures(method.query(images).float(), None)


def extract_features(
    method: Method,
    images: Tensor,
    frozen: FrozenFeatures | None,
    autocast: Autocast,
    *,
    by_vote: bool = False,
    task: Task | None = None,
) -> Features:
    """Return the features of images `(B, 3, S, S)`, float32; see `Method.features`.

    If the method has experts, that of `task` is used, or those that the router chooses if `task` is None.
    """
    query, patches = frozen or (None, None)
    with autocast():
        found = None if by_vote else method.features_by_expert(images, query, patches, task)
        if found is None:
            return Features(method.features(images, query, by_vote=by_vote).float(), query, patches)
    features = found.features.float()
    return Features(features[:, 0], query, patches, found.experts, found.logits, features)


class Evaluator:
    """Evaluates a method on a data set again and again as it learns. Queries of test images are computed once."""

    def __init__(self, fabric: Fabric, config: Config, data: Dataset, scenario: Scenario) -> None:
        self.fabric, self.config, self.data, self.scenario = fabric, config, data, scenario
        self._test_cache = FrozenCache()
        self._test_weights = torch.ones(len(data.test), dtype=torch.float64)
        for task in scenario.tasks:
            if task.test_weights is not None:
                self._test_weights[task.test] = task.test_weights

    @torch.no_grad()
    def evaluate(
        self,
        method: Method,
        readouts: Sequence[Readout],
        t: int,
        progress: Progress,
        watch: Callable[[Task, FeatureBatch], None] | None = None,
        only: Collection[int] | None = None,
    ) -> TaskAccuracies:
        """Evaluate each task up to task t. The accuracy on a missing task is NaN.

        Collective: in a distributed run, every process must call it.

        Args:
            method: What computes the features.
            readouts: Each makes a column, and another for the published protocol if the configuration asks for it.
            t: Number of the last task that was learned, from 0.
            progress: Where to draw progress bars.
            watch: Called with the features of every batch.
            only: Indices of the tasks to evaluate. The accuracy on others is NaN. If None, all.

        Raises:
            ValueError: If a task has no test image that can be read.
        """
        tasks = [task for task in self.scenario.tasks[: t + 1] if only is None or task.index in only]
        columns, by_name = self._columns(readouts), {readout.name: readout for readout in readouts}
        zeros = torch.zeros(t + 1, dtype=torch.float64)
        hits = [{column: zeros.clone() for column in columns} for _ in range(3)]
        correct, correct_within, correct_task = hits
        bins = {readout.name: torch.zeros(NUM_BINS, 3, dtype=torch.float64) for readout in readouts}
        counts = torch.zeros(t + 1, dtype=torch.float64)  # of weights
        found: list[predictions.PredictedBatch] = []
        for task, batch in self._test_batches(method, tasks, progress):
            if not len(batch.indices):
                continue
            weights = self._test_weights[batch.indices]
            counts[task.index] += weights.sum()
            images, own_classes = batch.to(self.fabric.device).images, torch.tensor(task.classes)
            frozen = self.frozen(method, images, batch.indices)
            given_task = task if self.config.setting == "til" else None
            features = FeatureBatch(batch.indices, self.features(method, images, frozen, task=given_task))
            routed = (
                method.router is not None and given_task is None
            )  # so if the task is given, the expert may be another
            given = self.features(method, images, frozen, task=task) if routed else features.images
            if watch:
                watch(task, features)
            selected = self._selected_prompts(method, features)
            found.append(predictions.PredictedBatch(batch.indices, batch.labels, task.index, {}, {}, selected))
            for column, logits in self.logits(method, readouts, images, features, task, t):
                predicted = logits.argmax(1).cpu()
                within = by_name[column].logits(by_name[column].select_features(given)) if routed else logits
                within_task = mask_logits(within, task.classes).argmax(1).cpu()
                correct[column][task.index] += weights[predicted == batch.labels].sum()
                correct_within[column][task.index] += weights[within_task == batch.labels].sum()
                correct_task[column][task.index] += weights[torch.isin(predicted, own_classes)].sum()
                if column in bins:
                    probabilities = by_name[column].probabilities(logits).cpu()
                    bins[column] += calibration_bins(probabilities, batch.labels)
                    found[-1].top[column] = top_classes(logits, predicted)
                    found[-1].confidence[column] = probabilities.max(1).values
        counts = self._sum(counts)
        if empty := [task.index for task in tasks if task.is_tested and not counts[task.index]]:
            names = ", ".join(self.scenario.describe(self.scenario.tasks[index]) for index in empty)
            raise ValueError(f"expected test images that can be read in every task, got none in {names}: pgp data check"
                             " names the files")  # fmt: skip
        rates = [{column: self._sum(count) / counts for column, count in kind.items()} for kind in hits]
        if len(tasks) <= t:
            return TaskAccuracies(rates[0], rates[1], rates[2], {}, None)
        calibration = {name: self._sum(table) for name, table in bins.items()}
        gathered = predictions.gather(found, list(bins), t + 1, self.data.classes)
        return TaskAccuracies(rates[0], rates[1], rates[2], calibration, gathered)

    def _test_batches(self, method: Method, tasks: Sequence[Task], progress: Progress) -> Iterator[tuple[Task, Batch]]:
        """Yield the test images of `tasks` in batches. They are not loaded if their cached queries are all that counts.

        Images that are not loaded are empty tensors, `(B, 0)`.
        """
        labels = self.data.test.labels
        plan = [(task, keys) for task in tasks for keys in sequential_batches(task.test, self.config.eval_batch_size)]
        own = slice(self.fabric.global_rank, None, self.fabric.world_size)  # as the loader divides a batch
        cached = [not method.uses_image and self._is_cached(keys[own]) for _, keys in plan]
        to_load = [keys for (_, keys), known in zip(plan, cached, strict=True) if not known]
        loaded = iter(batches(self.test_split(), to_load, self.loader_options))
        title = f"evaluating on {len(tasks)} of {len(self.scenario)} tasks"
        for (task, keys), known in track(progress, zip(plan, cached, strict=True), len(plan), title):
            indices = torch.tensor([key.image for key in keys[own]], dtype=torch.long)
            yield task, Batch(torch.empty(len(indices), 0), labels[indices], indices) if known else next(loaded)

    def _is_cached(self, keys: Sequence[SampleKey]) -> bool:
        return bool(self._test_cache.holds(torch.tensor([key.image for key in keys], dtype=torch.long)).all())

    def test_split(self) -> TransformedSplit:
        """Return the test images as every evaluation sees them."""
        skip_bad = self.config.on_bad_image == "skip"
        return TransformedSplit(self.data.test, self.config.transforms.test(), 0, ("test",), skip_bad)

    def frozen(
        self, method: Method, images: Tensor, indices: Tensor | None = None, cache: FrozenCache | None = None
    ) -> FrozenFeatures | None:
        """Return the frozen features of images; None if neither the method nor a readout uses them.

        Args:
            method: What computes them.
            images: `(B, 3, S, S)`.
            indices: Indices of the images in their split, `(B,)`, if their frozen features are to be cached.
            cache: Where they are cached. If None, with those of the test images.
        """
        readouts = self.config.readouts
        patches = method.uses_patches or any(readout.uses_patches for readout in readouts)
        if not (method.uses_query or patches or any(readout.uses_query for readout in readouts)):
            return None
        if indices is None:
            return extract_frozen(method, images, self.fabric.autocast, patches=patches)
        cache = self._test_cache if cache is None else cache
        if not bool(cache.holds(indices).all()):
            cache.put(indices, extract_frozen(method, images, self.fabric.autocast, patches=patches))
        return cache.get(indices).to(images.device)

    def features(
        self,
        method: Method,
        images: Tensor,
        frozen: FrozenFeatures | None,
        *,
        by_vote: bool = False,
        task: Task | None = None,
    ) -> Features:
        """Return the features of images `(B, 3, S, S)`, with their frozen features.

        If `by_vote`, the prompts are selected by the published protocol, see `Method.features`. If the method has
        experts, that of `task` is used, or those that the router chooses if `task` is None.
        """
        return extract_features(method, images, frozen, self.fabric.autocast, by_vote=by_vote, task=task)

    def logits(
        self, method: Method, readouts: Sequence[Readout], images: Tensor, batch: FeatureBatch, task: Task, t: int
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield the masked logits `(B, C)` of each column, for test images of `task` after task t was learned."""
        allowed = task.classes if self.config.setting == "til" else self.scenario.seen_classes(t)
        voted = None
        if self.config.legacy_eval:
            frozen = None if batch.images.query is None else FrozenFeatures(batch.images.query, batch.images.patches)
            voted = self.features(method, images, frozen, by_vote=True)
        for readout in readouts:
            logits = readout.logits(readout.select_features(batch.images))
            yield readout.name, mask_logits(logits, allowed)
            if voted is not None:
                logits = readout.logits(readout.select_features(voted))
                yield readout.name + LEGACY, mask_logits(logits, self._legacy_classes(method, task))

    @property
    def loader_options(self) -> LoaderOptions:
        """How this process loads its part of the images."""
        hardware = self.config.hardware
        return LoaderOptions(
            hardware.workers,
            self.fabric.global_rank,
            self.fabric.world_size,
            hardware.pin_memory and self.fabric.device.type == "cuda",
            self.fabric.device,
        )

    def _selected_prompts(self, method: Method, batch: FeatureBatch) -> Tensor | None:
        """Return the prompts that images select, `(B, M)` bool, or None if the method does not select prompts."""
        query = batch.images.query
        if query is None or not method.selects_prompts:
            return None
        with self.fabric.autocast():
            selected = method.selected_prompts(query)
        return None if selected is None else selected.cpu()

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

        Collective: in a distributed run, every process must call it.
        """
        if self.fabric.world_size == 1:
            return value
        total = self.fabric.all_reduce(value.to(self.fabric.device), reduce_op="sum")
        assert isinstance(total, Tensor)
        return total.cpu()
