"""One expert for each task: what a method trained, frozen when its task ends, and found by class statistics at test."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pgp.backbones.base import Backbone
from pgp.methods.base import ExpertFeatures, Method, mask_logits
from pgp.methods.prompts import majority_vote
from pgp.readouts.base import Features
from pgp.readouts.lda import LDA
from pgp.scenario import Task
from pgp.subspace import ProtectedInputs, ProtectedParameter, on_float64_device


class TaskRouter(LDA):
    """LDA on features of the encoder without prompts, which never change: its statistics stay correct."""

    def __init__(self, classes: int) -> None:
        super().__init__(classes)
        self.name = "task router"

    def select_features(self, images: Features) -> Tensor:
        """Return the query and the mean patch token, each scaled to length 1, `(B, 2 * D)`."""
        assert images.query is not None, "the caller computes queries for experts"
        assert images.patches is not None, "the caller computes mean patch tokens for experts"
        return frozen_features(images.query, images.patches)


def frozen_features(query: Tensor, patches: Tensor) -> Tensor:
    """Return what the router classifies: query and mean patch token `(B, D)`, each scaled to length 1: `(B, 2 * D)`."""
    return torch.cat([F.normalize(query.float()), F.normalize(patches.float())], dim=1)


class Experts(Method):
    """A method whose trained part is kept separately for each task.

    At test, the router gives each image the probability of each task, by its features without prompts, and the image
    passes through the experts of the likeliest tasks. No task label is used. What tasks share
    (`Method.shared_parameters`) keeps learning, and is what a projection protects.

    Tasks beyond `limit` get no expert of their own: they use the one that the router chooses for most images of their
    first batch, and train only the head. Tasks in which only the head may learn use the expert of the first task.

    Args:
        method: The method, built from `Method.Config.as_expert`.
        classes: Number of classes C.
        limit: Largest number of experts; None for one per task.
        candidates: Number of experts that an image passes through at test, k.
    """

    uses_query = True
    uses_patches = True
    expert_of_class: Tensor
    """Number of the expert of each class, `(C,)`; -1 for classes that were not learned."""

    def __init__(self, method: Method, classes: int, limit: int | None = None, candidates: int = 1) -> None:
        nn.Module.__init__(self)
        self.method, self.limit, self.candidates = method, limit, candidates
        self.per_class_tensors = (*method.per_class_tensors, "expert_of_class")
        self.register_buffer("expert_of_class", torch.full((classes,), -1))
        self.router: TaskRouter = TaskRouter(classes)
        self.stored: list[list[Tensor]] = []
        """The parameters of each expert, in the order of `_parts`."""
        self._expert_of_task: dict[int, int] = {}

    @property
    def backbone(self) -> Backbone:  # type: ignore[override]
        """The frozen encoder."""
        return self.method.backbone

    @property
    def head(self) -> nn.Module:  # type: ignore[override]
        """The head of the method, which all experts share."""
        return self.method.head

    def begin_task(self, task: Task) -> None:
        """Begin a new expert, if there may be one more."""
        if self._may_have_own_expert(task):
            self.method.begin_task(task)
            self._use_expert(task.index, task)

    def skip_task(self, task: Task) -> None:
        """Give a task that trains only the head no expert of its own: it uses that of the first task."""
        if task.index == 0:
            self.begin_task(task)
        else:
            self._use_expert(0, task)

    def refresh_head(self, task: Task) -> None:
        """See `Method.refresh_head`."""
        self.method.refresh_head(task)

    @torch.no_grad()
    def end_task(self, task: Task) -> None:
        """Keep the expert of the task as it is now."""
        self.method.refresh_head(task)
        if self._has_own_expert(task):
            self.stored[task.index :] = [[part.detach().clone() for part in self._parts()]]

    def features(self, images: Tensor, query: Tensor | None = None, *, by_vote: bool = False) -> Tensor:
        """Return the features with the likeliest expert of each image, `(B, D)`; see `Method.features`."""
        found = self.features_by_expert(images, query)
        return self.method.features(images, query, by_vote=by_vote) if found is None else found.features[:, 0]

    def features_by_expert(
        self, images: Tensor, query: Tensor | None = None, patches: Tensor | None = None, task: Task | None = None
    ) -> ExpertFeatures | None:
        """See `Method.features_by_expert`. Before the end of the first task, there are no experts."""
        if not self.stored:
            return None
        if query is None or patches is None:
            query, patches = self.query_and_patches(images)
        if task is None:
            experts, logits = self.route(query, patches)
        else:
            experts = self.expert_of_class[task.classes[0]].expand(len(images), 1)
            logits = torch.zeros_like(experts, dtype=torch.float32)
        return ExpertFeatures(experts, logits, self._candidate_features(images, query, experts))

    def route(self, query: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
        """Return the likeliest experts of images, and the logarithms of their probabilities, `(B, k)` each.

        The probability of an expert is the sum of those of its classes.

        Args:
            query: Queries of the images, `(B, D)`.
            patches: Means of their patch tokens without prompts, `(B, D)`.
        """
        logits = self.router.logits(frozen_features(query, patches))  # (B, C)
        by_class = self.router.probabilities(logits)  # 0 for classes that were not learned
        by_expert = by_class.new_zeros(query.shape[0], len(self.stored))
        by_expert.index_add_(1, self.expert_of_class.clamp(min=0).to(logits.device), by_class)
        best = by_expert.topk(min(self.candidates, len(self.stored)), dim=1)
        return best.indices, best.values.clamp(min=torch.finfo(best.values.dtype).tiny).log()

    @torch.no_grad()
    def prepare_batch(self, images: Tensor, task: Task, query: Tensor | None = None) -> dict[str, Tensor]:
        """See `Method.prepare_batch`. The first batch of a task without an expert of its own chooses one.

        Collective: in a distributed run, every process must call it.
        """
        if self._has_own_expert(task):
            return self.method.prepare_batch(images, task, query)
        if self._expert_of(task) < 0:
            query, patches = self.query_and_patches(images)
            nearest = majority_vote(self.route(query, patches)[0][:, :1], len(self.stored))  # (B, 1), of all processes
            self.expert_of_class[list(task.classes)] = nearest[0, 0].to(self.expert_of_class)
        return {"query": self.query(images) if query is None else query}

    def batch_constants(self, task: Task) -> dict[str, Tensor]:
        """See `Method.batch_constants`."""
        return self.method.batch_constants(task) if self._has_own_expert(task) else {}

    def can_learn(self, task: Task) -> bool:
        """See `Method.can_learn`. A task without an expert of its own chooses one in training."""
        return self.method.can_learn(task) or not self._may_have_own_expert(task)

    def loss(self, images: Tensor, labels: Tensor, task: Task, prepared: dict[str, Tensor] | None = None) -> Tensor:
        """Return the loss of the method. Without an expert of its own, a task trains only the head."""
        prepared = prepared or self.prepare_batch(images, task)
        if self._has_own_expert(task):
            return self.method.loss(images, labels, task, prepared)
        with torch.no_grad(), self._expert(self._expert_of(task)):
            features = self.method.features(images, prepared["query"])
        return F.cross_entropy(mask_logits(self.head_logits(features), task.classes), labels)

    def protected(self) -> dict[str, ProtectedParameter]:
        """Return the protected parameters of the method that all tasks share."""
        shared = {id(parameter) for parameter in self.method.shared_parameters()}
        protected = self.method.protected().items()
        return {space: target for space, target in protected if id(target.parameter) in shared}

    @torch.no_grad()
    def activations(self, images: Tensor, query: Tensor | None = None) -> dict[str, ProtectedInputs]:
        """Return the inputs of these parameters, with the expert that was trained last."""
        inputs = self.method.activations(images, query)
        return {space: inputs[space] for space in self.protected()}

    @property
    def features_drift(self) -> bool:
        """See `Method.features_drift`. An expert never changes; what tasks share may."""
        return bool(self.method.shared_parameters())

    def prompt_parameters(self) -> list[nn.Parameter]:
        """See `Method.prompt_parameters`."""
        return self.method.prompt_parameters()

    def trainable_state_dict(self) -> dict[str, Tensor]:
        """Return the state of the method, of all experts and of the router, by name."""
        state = {**self.method.trainable_state_dict(), "expert_of_class": self.expert_of_class}
        for number, tensors in enumerate(self.stored):
            state |= {f"stored.{number}.{index}": tensor for index, tensor in enumerate(tensors)}
        return state | {f"router.{name}": tensor for name, tensor in self.router.state_dict().items()}

    def load_trainable_state_dict(self, state: dict[str, Tensor]) -> None:
        """See `Method.load_trainable_state_dict`."""
        own = {name: tensor for name, tensor in state.items() if not name.startswith(("stored.", "router."))}
        if "expert_of_class" not in own:
            raise ValueError(f"expected a checkpoint with experts, got {sorted(own)}: it belongs to another run")
        width = 2 * self.backbone.width
        if "router.sums" in state and state["router.sums"].shape[1] != width:
            raise ValueError(f"expected a router of {width} features, got {state['router.sums'].shape[1]}: an older pgp"
                             " wrote it; start a new run")  # fmt: skip
        numbers = own.pop("expert_of_class")
        self.method.load_trainable_state_dict(own)
        self.expert_of_class.fill_(-1)  # for classes that were added later
        self.expert_of_class[: len(numbers)] = numbers.to(self.expert_of_class)
        self._expert_of_task = {}
        count = len({name.split(".")[1] for name in state if name.startswith("stored.")})
        parts = self._parts()
        self.stored = [
            [state[f"stored.{n}.{index}"].to(part) for index, part in enumerate(parts)] for n in range(count)
        ]
        router = {name.removeprefix("router."): tensor for name, tensor in state.items() if name.startswith("router.")}
        self.router.load_state_dict(on_float64_device(router, self.expert_of_class.device))

    def for_export(self) -> Method:
        """See `Method.for_export`. Each image passes through every expert."""
        return AllExperts(self) if self.stored else self

    def _use_expert(self, number: int, task: Task) -> None:
        """Let `task` use the expert with this number."""
        self.expert_of_class[list(task.classes)] = number
        self._expert_of_task[task.index] = number

    def _expert_of(self, task: Task) -> int:
        """Return the number of the expert that `task` uses, or -1. After a resume, it waits for a GPU once."""
        if task.index not in self._expert_of_task:
            number = int(self.expert_of_class[task.classes[0]])
            if number < 0:
                return number
            self._expert_of_task[task.index] = number
        return self._expert_of_task[task.index]

    def _may_have_own_expert(self, task: Task) -> bool:
        return self.limit is None or task.index < self.limit

    def _has_own_expert(self, task: Task) -> bool:
        """Return whether `task` has an expert of its own, or will have one once it begins."""
        number = self._expert_of(task)
        return number == task.index or (number < 0 and self._may_have_own_expert(task))

    def _parts(self) -> list[nn.Parameter]:
        """Return the parameters that each expert has for itself."""
        others = {id(parameter) for parameter in (*self.head.parameters(), *self.method.shared_parameters())}
        named = self.method.named_parameters()
        return [part for name, part in named if not name.startswith("backbone.") and id(part) not in others]

    @contextmanager
    def _expert(self, number: int) -> Iterator[None]:
        """Give the method the parameters of one expert inside the `with` block."""
        parts = self._parts()
        current = [part.data for part in parts]
        for part, tensor in zip(parts, self.stored[number], strict=True):
            part.data = tensor.to(part.device)
        try:
            yield
        finally:
            for part, tensor in zip(parts, current, strict=True):
                part.data = tensor

    def _candidate_features(self, images: Tensor, query: Tensor, experts: Tensor) -> Tensor:
        """Return the features `(B, k, D)` of each image with each of its `experts (B, k)`."""
        return torch.stack([self._features_with(images, query, column) for column in experts.unbind(1)], dim=1)

    def _features_with(self, images: Tensor, query: Tensor, experts: Tensor) -> Tensor:
        """Return the features `(B, D)` of each image with one expert, `experts (B,)`."""
        rows = [(experts == number).nonzero()[:, 0] for number in range(len(self.stored))]
        found, order = [], []
        for number, own in enumerate(rows):
            if len(own):
                with self._expert(number):
                    found.append(self.method.features(images[own], query[own]))
                order.append(own)
        return torch.cat(found)[torch.cat(order).argsort()]


class AllExperts(Experts):
    """The same experts as copies of the method, for export: each image passes through all of them.

    Args:
        experts: Finished experts.
    """

    def __init__(self, experts: Experts) -> None:
        super().__init__(experts.method, len(experts.expert_of_class), experts.limit, experts.candidates)
        self.expert_of_class, self.router, self.stored = experts.expert_of_class, experts.router, experts.stored
        self.copies = nn.ModuleList(self._copy(number) for number in range(len(self.stored)))

    def _copy(self, number: int) -> nn.Module:
        """Return a copy of the method with the parameters of one expert, and the same encoder."""
        with self._expert(number):
            return copy.deepcopy(self.method, {id(self.backbone): self.backbone})

    def _candidate_features(self, images: Tensor, query: Tensor, experts: Tensor) -> Tensor:
        """See `Experts`."""
        all_features = [method.features(images, query) for method in self.copies]  # type: ignore[operator]
        features = torch.stack(all_features, dim=1)  # (B, experts, D)
        return features.gather(1, experts.unsqueeze(2).expand(-1, -1, features.shape[2]))  # (B, k, D)
