"""The drift meter: how far responses to old images change during training, and what the projection removes.

After each task, evaluation processes the test images of all tasks so far. The meter compares the features of a few of
them with their features right after their own task. Of the inputs of a protected parameter, it stores random sketches
only: up to a common factor and on average, a step changes its responses to a sketch as much as its responses to all
inputs.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import torch
from rich.progress import Progress
from torch import Tensor

from pgp.datasets.loader import LoaderOptions, batches, sequential_batches
from pgp.distributed import all_gather_object
from pgp.evaluation.accuracy import Evaluator, FeatureBatch
from pgp.methods.base import Method
from pgp.progress import track
from pgp.projections.base import HookHandle, Projection
from pgp.rng import make_generator
from pgp.runs.statetree import Piece
from pgp.scenario import Task
from pgp.subspace import ProtectedParameter, to_float64

SKETCH_SIZE = 16
"""Number of random sketches of the inputs of each task and protected parameter (space), K."""


class Drift(NamedTuple):
    """Measurements on the images of one task."""

    indices: Tensor
    """Indices of the images among the test images of the task, `(B,)`, ascending."""
    features: Tensor
    """Features, `(B, D)`."""
    logits: Tensor
    """Logits of the method's own head for the classes seen up to the task, centred per image, `(B, c)`."""
    selected: Tensor | None
    """Prompts that the images select, `(B, M)` bool; None for a method that does not select."""

    def at(self, indices: Tensor) -> Drift:
        """Return the rows of those of the images `indices` that were measured, in ascending order."""
        present = torch.isin(self.indices, indices)
        return Drift(*(None if each is None else each[present] for each in self))  # type: ignore[arg-type]


class DriftMeter:
    """Measures drift on a few test images of each task. It changes nothing that is learned.

    Use: `start_task`, `attach` to the task's optimizer before the projection is attached, `projection_stats` once the
    task is trained, `watch` during evaluation, `end_task`.
    """

    def __init__(self, evaluation: Evaluator, projection: Projection, micro_batch_size: int | None) -> None:
        """Measure what `projection` protects, on the images that `evaluation` sees.

        `micro_batch_size` of them have activations in memory at once, an evaluation batch if None.
        """
        self.evaluation, self.config, self.projection = evaluation, evaluation.config, projection
        self.micro_batch_size = micro_batch_size or self.config.eval_batch_size
        self.params_at_task_start: dict[str, Tensor] = {}
        """The protected parameters at the start of the current task, by space."""
        self.energies: dict[str, Tensor] = {}
        """Sums of `explained_energy` over this task's gradients (row 0) and updates (row 1), `(2, 2)`, by space."""
        self.references: dict[int, dict[str, Any]] = {}
        """Measurements right after each task, by task."""
        self._watched: dict[int, list[FeatureBatch]] = {}

    def start_task(self) -> None:
        """Snapshot the protected parameters at the start of a task."""
        protected = self.projection.protected
        self.params_at_task_start = {space: target.parameter.detach().clone() for space, target in protected.items()}
        self.energies = {}

    def attach(self, optimizer: torch.optim.Optimizer) -> HookHandle:
        """Measure the gradients and the updates of every step, until the returned handle is removed."""
        projection = self.projection
        measured = {space: target for space, target in projection.protected.items() if projection.rank(space)}
        before: dict[str, Tensor] = {}

        @torch.no_grad()
        def before_step(*_: Any) -> None:
            for space, (parameter, axis, _role) in measured.items():
                before[space] = to_float64(parameter.detach().clone())
                if parameter.grad is not None:
                    self._add(0, space, explained_energy(projection, space, parameter.grad.transpose(axis, -1)))

        @torch.no_grad()
        def after_step(*_: Any) -> None:
            for space, (parameter, axis, _role) in measured.items():
                update = to_float64(parameter) - before.pop(space)
                self._add(1, space, explained_energy(projection, space, update.transpose(axis, -1)))

        if not measured:
            return HookHandle()
        return HookHandle(optimizer.register_step_pre_hook(before_step), optimizer.register_step_post_hook(after_step))

    def _add(self, row: int, space: str, values: Tensor) -> None:
        total = self.energies.setdefault(space, values.new_zeros(2, 2))
        self.energies[space] = total = total.to(values.device)
        total[row] += values

    def projection_stats(self) -> dict[str, dict[str, float | None]]:
        """Return what the projection did in the task just trained, by space.

        Call it before the projection's `end_task`.

        Returns:
            A dictionary.

            - `gradients`, `updates`: Fraction of the energy of all gradients, and of all updates, in the protected
              subspace before the projection.
            - `removed`: The same fraction for whichever of the two is projected: what the projection removes.
            - `leak`: Fraction in the protected subspace of the energy of the total change over the task: what the
              projection did not prevent.
        """
        gradients = {space: _ratio(*energy[0]) for space, energy in self.energies.items()}
        updates = {space: _ratio(*energy[1]) for space, energy in self.energies.items()}
        removed = updates if self.projection.apply_to == "update" else gradients
        leaks = {}
        for space, target in self.projection.protected.items():
            if space in self.params_at_task_start and self.projection.rank(space):
                end = to_float64(target.parameter.detach())
                change = end - self.params_at_task_start[space].to(end)
                leaks[space] = _ratio(*explained_energy(self.projection, space, change.transpose(target.axis, -1)))
        self.params_at_task_start, self.energies = {}, {}
        return {"gradients": gradients, "updates": updates, "removed": removed, "leak": leaks}

    def sample(self, task: Task) -> Tensor:
        """Return the indices of the test images of `task` on which drift is measured, evenly spaced, `(n,)`."""
        return task.test[torch.linspace(0, len(task.test) - 1, min(self.config.drift_images, len(task.test))).long()]

    def watch(self, task: Task, batch: FeatureBatch) -> None:
        """Store the features of those images of an evaluation batch that are in the sample."""
        in_sample = torch.isin(batch.indices, self.sample(task)).nonzero().flatten()
        if len(in_sample):
            self._watched.setdefault(task.index, []).append(batch.rows(in_sample).cpu())

    @torch.no_grad()
    def end_task(
        self, method: Method, task: Task, progress: Progress, evaluated: Collection[int] | None = None
    ) -> dict[str, Any]:
        """Compare images of earlier tasks with their references, and store references for those of `task`.

        Collective: in a distributed run, every process must call it.

        Args:
            method: The method after `task`.
            task: The task that was learned last.
            progress: Where to draw progress bars.
            evaluated: Indices of the tasks whose images `watch` has seen, among them `task`. If None, all so far.

        Returns:
            A dictionary.

            - `features`, `logits`: Relative change by earlier task: the norm of the difference, divided by the old
              norm. Logits are those of the method's own head for the classes seen up to that task, centred per image.
            - `responses`: Relative change of a protected parameter's responses to old inputs, by space.
            - `changed`: Fraction of images that select other prompts, for methods that select.
            - `held`: Fraction of the energy of all inputs so far in the protected subspace, by space.
            - `usage`: Fraction of the images of all tasks that select each prompt, for methods that select.
        """
        fabric, scenario = self.evaluation.fabric, self.evaluation.scenario
        protected, watched = self.projection.protected, all_gather_object(self._watched)
        self._watched = {}
        current: dict[int, Drift] = {}
        for seen_task in scenario.tasks[: task.index + 1]:
            index = seen_task.index
            if not seen_task.is_tested or not (evaluated is None or index in evaluated):
                continue
            batches_of_all = [batch for process in watched for batch in process.get(index, [])]
            is_comparable = index == task.index or index in self.references
            if not (batches_of_all and is_comparable):
                continue  # no image of the sample can be read, or none could be read after its task
            with fabric.autocast():
                current[index] = _measured(method, batches_of_all, scenario.seen_classes(index), seen_task)
        if task.index in current:
            sketch = self._sketch(method, task, progress)
            responses = {space: _responses(rows, protected[space]) for space, rows in sketch.items()}
            self.references[task.index] = {**current[task.index]._asdict(), "sketch": sketch, "responses": responses}

        old_tasks = [index for index in current if index != task.index]
        pairs = []
        for index in old_tasks:
            reference = Drift(*(self.references[index][name] for name in Drift._fields))
            # an image may be unreadable, and skipped, at one of the two times
            new, old = current[index].at(reference.indices), reference.at(current[index].indices)
            pairs.append((new, old))
        out: dict[str, Any] = {"tasks": old_tasks}
        out["features"] = [_change(new.features, old.features) for new, old in pairs]
        out["logits"] = [_change(new.logits, old.logits) for new, old in pairs]
        out["responses"] = {
            space: [
                _change(_responses(self.references[i]["sketch"][space], target), self.references[i]["responses"][space])
                for i in old_tasks
            ]
            for space, target in protected.items()
        }
        selected = [measured.selected for measured in current.values() if measured.selected is not None]
        if selected:
            out["changed"] = [
                float(torch.ne(new.selected, old.selected).any(1).float().mean())
                for new, old in pairs
                if new.selected is not None and old.selected is not None
            ]
            out["usage"] = torch.cat(selected).float().mean(0).tolist()
        out["held"] = {}
        for space, target in protected.items():
            if self.references and self.projection.rank(space):
                sketches = [_like_parameter(known["sketch"][space], target) for known in self.references.values()]
                total = torch.stack([explained_energy(self.projection, space, rows) for rows in sketches]).sum(0)
                out["held"][space] = _ratio(*total)
        return out

    def _sketch(self, method: Method, task: Task, progress: Progress) -> dict[str, Tensor]:
        """Return random sketches `(..., K, D)` of the inputs of the sample, by space.

        Weights are drawn image by image, so that they do not depend on the batch size.
        """
        config, evaluation = self.config, self.evaluation
        fabric, title = evaluation.fabric, evaluation.scenario.describe(task)
        plan = sequential_batches(self.sample(task), self.micro_batch_size)
        loading = LoaderOptions(device=fabric.device)
        stream = batches(evaluation.test_split(), plan, loading)  # every process sees them all
        sketch: dict[str, Tensor] = {}
        for batch in track(progress, stream, len(plan), f"measuring drift on {title}"):
            if not len(batch.indices):
                continue
            images = batch.images.to(fabric.device)
            frozen = evaluation.frozen(method, images, batch.indices)
            with fabric.autocast():
                activations = method.activations(images, frozen and frozen.query)
            for space in self.projection.protected:
                rows = activations[space]
                weights = [
                    torch.randn(
                        rows.sketch_shape(SKETCH_SIZE),
                        dtype=torch.float64,
                        generator=make_generator(config.seed, "drift", task.index, index, space),
                    )
                    for index in batch.indices.tolist()
                ]
                mixtures = rows.sketch(torch.stack(weights))
                sketch[space] = sketch[space] + mixtures if space in sketch else mixtures
        return {space: mixtures.float() for space, mixtures in sketch.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the meter."""
        return {
            "params_at_task_start": self.params_at_task_start,
            "energies": self.energies,
            "references": {task: Piece(answers) for task, answers in self.references.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a `state_dict`."""
        self.params_at_task_start = dict(state["params_at_task_start"])
        self.energies, self.references = dict(state["energies"]), dict(state["references"])


def explained_energy(projection: Projection, space: str, tensor: Tensor) -> Tensor:
    """Return the squared norm of `tensor (..., D)` in the protected subspace of `space`, and in total, `(2,)`."""
    rows = to_float64(tensor)
    total, outside = rows.square().sum(), projection.project(space, rows).square().sum()
    return torch.stack([total - outside, total])


def _measured(method: Method, kept: list[FeatureBatch], classes: tuple[int, ...], task: Task) -> Drift:
    """Return measurements on images of `task` with the current parameters, in the order of the split, on the CPU."""
    device = next(method.parameters()).device
    batch = FeatureBatch.concat(kept)
    batch = batch.rows(batch.indices.argsort())
    indices = torch.searchsorted(task.test.sort().values, batch.indices)
    features, query = batch.images.features, batch.images.query
    logits = method.head_logits(features.to(device))[:, list(classes)].cpu()
    selected = None if query is None else method.selected_prompts(query.to(device))
    return Drift(indices, features, logits - logits.mean(1, keepdim=True), None if selected is None else selected.cpu())


def _responses(sketch: Tensor, target: ProtectedParameter) -> Tensor:
    """Return the inner products of a protected parameter with inputs `(..., K, D)`, on the CPU."""
    parameter = target.parameter.detach().float().cpu().transpose(target.axis, -1)
    return sketch.cpu() @ parameter.mT


def _like_parameter(sketch: Tensor, target: ProtectedParameter) -> Tensor:
    """Return inputs with as many axes as the parameter that they are multiplied with."""
    return sketch[(None,) * (target.parameter.dim() - sketch.dim())].to(target.parameter.device)


def _change(now: Tensor, then: Tensor) -> float | None:
    """Return the relative change: the norm of the difference, divided by the norm of `then`; None if that is 0."""
    return _ratio((now - then).norm(), then.norm())


def _ratio(part: Tensor, whole: Tensor) -> float | None:
    return float(part / whole) if float(whole) else None
