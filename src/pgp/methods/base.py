"""Base class of methods: trainable parameters on a frozen encoder, and which of them to protect.

A method names the parameters to protect and returns their inputs. It never projects anything itself.
"""

from __future__ import annotations

import abc
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from pgp.backbones.base import Backbone
from pgp.precision import full_precision
from pgp.readouts.base import Readout
from pgp.scenario import Task
from pgp.subspace import ProtectedInputs, ProtectedParameter


class ExpertFeatures(NamedTuple):
    """Features of `B` images with each of their `k` likeliest experts."""

    experts: Tensor
    """Numbers of the experts, the likeliest first, `(B, k)`."""
    logits: Tensor
    """Logarithms of their probabilities, `(B, k)`."""
    features: Tensor
    """`(B, k, D)`."""


class Method(nn.Module, abc.ABC):
    """A frozen `backbone`, prompts that the method learns, and a `head` that turns features into logits.

    Shapes: `B` images with `S` pixels a side, `D` feature width, `C` classes (of all tasks, including future ones), `M`
    prompts.

    The order of calls for each task is `begin_task`, then `prepare_batch` and `loss` for each batch, then `end_task`.
    Evaluation calls `features` or `forward`, which must not change any state.
    """

    per_class_tensors: tuple[str, ...] = ("head.weight", "head.bias")
    """Names of the learned tensors that have a row for each class. They grow when a task with new classes is added to a
    finished run."""
    uses_query: bool = True
    """Whether features depend on the query. If not, the query is computed only for readouts that use it."""
    uses_patches: bool = False
    """Whether features depend on the mean of the patch tokens of the encoder without prompts."""
    uses_image: bool = True
    """Whether features depend on more of an image than its query."""
    selects_prompts: bool = False
    """Whether each image selects some of the prompts, by its query."""
    trains_head_only: bool = False
    """Whether the current task trains only the head; it then sees images with the prompts that they select at test."""
    router: Readout | None = None
    """A readout of the method's own, which is fitted with those of the run and tells the task of an image."""
    legacy_scope: Literal["all", "cut"] = "all"
    """Classes among which the published evaluation predicts. `all`: every class, seen or not. `cut`: the classes up to
    the task of the test batch, which uses the task. Both are reported only next to the accuracy without the task."""

    @dataclass(frozen=True)
    class Config(abc.ABC):
        """Settings of a method; `build` creates it."""

        tag: ClassVar[str]
        """Name of this kind of method in config.json. It must be unique among methods and never change."""
        allows_weight_decay: ClassVar[bool] = True
        """Whether weight decay changes little of what earlier tasks have learned, unless the optimizer is adam."""

        def as_expert(self) -> Method.Config:
            """Return settings for one expert: all trained parameters belong to one task, except head and shared ones.

            Raises:
                ValueError: If this kind of method cannot be divided into experts.
            """
            raise ValueError(f"expected a method that can have experts (l2p, dualprompt, vpt, lora or adapter), got"
                             f" {self.tag}: leave experts at none")  # fmt: skip

        @abc.abstractmethod
        def build(self, backbone: Backbone, class_names: Sequence[str], generator: torch.Generator) -> Method:
            """Return an untrained method.

            Args:
                backbone: The frozen encoder.
                class_names: Names of the C classes, by label.
                generator: Random generator for all initial values.

            Raises:
                ValueError: If the settings do not fit the encoder.
            """

    def __init__(self, backbone: Backbone, head: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def begin_task(self, task: Task) -> None:
        """Prepare for learning `task`, for example by copying the prompts of the previous task."""

    def skip_task(self, task: Task) -> None:
        """Prepare for a task in which nothing outside the head is trained. By default, as `begin_task`.

        It must not change the features of any image.
        """
        self.begin_task(task)

    def refresh_head(self, task: Task) -> None:
        """Refresh the head's cached class embeddings of `task`, if it has any. It may be called at any step."""

    def end_task(self, task: Task) -> None:
        """Store what later tasks need to know about `task`, after its training.

        A second call for the same task changes nothing.
        """
        self.refresh_head(task)

    def query(self, images: Tensor) -> Tensor:
        """Return the features of the frozen encoder without prompts, `(B, D)`.

        They do not change during training, so they are computed once for each test image and cached.
        """
        return self.backbone.encode(images)

    def query_and_patches(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the query, and the mean of the patch tokens of the frozen encoder, each `(B, D)`."""
        return self.backbone.encode_with_patches(images)

    def selected_prompts(self, query: Tensor) -> Tensor | None:
        """Return which prompts each image selects, `(B, M)` bool, or None if the method does not select prompts."""
        return None

    @abc.abstractmethod
    def features(self, images: Tensor, query: Tensor | None = None, *, by_vote: bool = False) -> Tensor:
        """Return the features for the head and the readouts, `(B, D)`.

        The features of an image do not depend on the other images of its batch, and no task label is used.

        Args:
            images: Images `(B, 3, S, S)`.
            query: The result of `query(images)`, `(B, D)`. If None, it is computed.
            by_vote: Follow the published test protocol instead: select one set of prompts for the whole batch, by
                majority vote. Every process must then make the call; see `pgp.methods.prompts.majority_vote`.
        """

    def features_by_expert(
        self, images: Tensor, query: Tensor | None = None, patches: Tensor | None = None, task: Task | None = None
    ) -> ExpertFeatures | None:
        """Return the features with each expert that an image may belong to, or None if the method has no experts.

        Args:
            images: Images `(B, 3, S, S)`.
            query: The first result of `query_and_patches(images)`, `(B, D)`. If None, both are computed.
            patches: The second one, `(B, D)`. If None, both are computed.
            task: The task of training images, whose expert is used. If None, experts are found by the query.
        """
        return None

    def for_export(self) -> Method:
        """Return a method with the same features whose operations are the same for all images. By default, itself."""
        return self

    def forward(self, images: Tensor, query: Tensor | None = None) -> Tensor:
        """Return the logits of the method's own head over all classes, `(B, C)`, computed in float32."""
        return self.head_logits(self.features(images, query))

    def head_logits(self, features: Tensor) -> Tensor:
        """Return the logits `(B, C)` of the method's own head for features `(B, D)`, computed in float32."""
        with full_precision(features.device):
            logits: Tensor = self.head(features.to(torch.promote_types(features.dtype, torch.float32)))
        return logits

    @torch.no_grad()
    def prepare_batch(self, images: Tensor, task: Task, query: Tensor | None = None) -> dict[str, Tensor]:
        """Return tensors that `loss` needs and that depend on the whole batch, by name, with one row for each image.

        It is called once for each batch, before `loss` is called for each micro-batch of it.

        Collective: in a distributed run, every process must call it, because prompts selected by vote count the votes
        of all processes.

        Args:
            images: Images `(B, 3, S, S)`.
            task: The task of the images.
            query: Queries of the images, `(B, D)`. If None and the method uses them, they are computed.
        """
        if not self.uses_query:
            return {}
        return {"query": self.query(images) if query is None else query}

    def batch_constants(self, task: Task) -> dict[str, Tensor]:
        """Return tensors shared by all micro-batches of a step, with gradients, by name. Called once per step."""
        return {}

    def can_learn(self, task: Task) -> bool:
        """Return whether the gradient of the loss on `task` can differ from 0. By default, it can.

        A cross-entropy over the classes of a task, and nothing else, is always 0 if there is only one class.
        """
        return True

    @abc.abstractmethod
    def loss(self, images: Tensor, labels: Tensor, task: Task, prepared: dict[str, Tensor] | None = None) -> Tensor:
        """Return the training loss, a scalar: the mean over the images.

        Args:
            images: Images `(B, 3, S, S)`, a batch or a micro-batch.
            labels: Labels `(B,)`.
            task: The task of the images. The loss compares its classes only.
            prepared: The rows of `prepare_batch` for these images, and the tensors of `batch_constants`. If None, they
                are computed.
        """

    def protected(self) -> dict[str, ProtectedParameter]:
        """Return the parameters whose responses to old inputs must not change, by space (name).

        For what a space is, see `ProtectedParameter`. The names and the parameter objects stay the same for the
        lifetime of the method.
        """
        return {}

    def activations(self, images: Tensor, query: Tensor | None = None) -> dict[str, ProtectedInputs]:
        """Return the inputs of each protected parameter for these images, by space: the keys are those of `protected`.

        Inputs are the vectors that the parameter is multiplied with. The tensors are detached.

        Args:
            images: Images `(B, 3, S, S)`.
            query: The result of `query(images)`, `(B, D)`. If None, it is computed.
        """
        return {}

    def activations_and_features(
        self, images: Tensor, query: Tensor | None = None
    ) -> tuple[dict[str, ProtectedInputs], Tensor]:
        """Return the results of `activations` and of `features`. Methods whose prompts are in many blocks share a pass.

        The features may differ from those of `features` by rounding. For the arguments, see `activations`.
        """
        return self.activations(images, query), self.features(images, query)

    @property
    def features_drift(self) -> bool:
        """Whether later tasks can change the features of images of old classes. Then readouts may compensate for it."""
        return True

    def shared_parameters(self) -> list[nn.Parameter]:
        """Return the parameters among `prompt_parameters` that all tasks share, even if each task has an expert."""
        return []

    def prompt_parameters(self) -> list[nn.Parameter]:
        """Return every trainable parameter outside the head: prompts, prefixes, and the keys for their selection.

        The optimizer gives them their own learning rate, which may be 0 after the first task.
        """
        head = {id(parameter) for parameter in self.head.parameters()}
        return [parameter for parameter in self.parameters() if parameter.requires_grad and id(parameter) not in head]

    def trainable_state_dict(self) -> dict[str, Tensor]:
        """Return the state of the method without the frozen encoder, by name."""
        return {name: tensor for name, tensor in self.state_dict().items() if not name.startswith("backbone.")}

    def check_affinity(self, layers: Iterable[int]) -> None:
        """Raise, before anything is trained, if the affinity of prompts cannot be protected in the blocks `layers`.

        Raises:
            ValueError: If the encoder normalises keys, which then depend on prompts in another way.
        """
        for layer in layers:
            self.backbone.key_weights(layer)

    def load_trainable_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore a `trainable_state_dict`. Classes that were added after it was saved keep their current values.

        Raises:
            ValueError: If the state belongs to another method or model, or has more classes.
        """
        own = self.trainable_state_dict()
        for name in self.per_class_tensors:
            rows, all_rows = state.get(name), own.get(name)
            if rows is not None and all_rows is not None and rows.shape[1:] == all_rows.shape[1:]:
                state = {**state, name: torch.cat([rows, all_rows[len(rows) :].to(rows)])}
        wrong = sorted(name for name in own.keys() & state.keys() if own[name].shape != state[name].shape)
        if wrong or own.keys() != state.keys():
            raise ValueError(f"expected a checkpoint of {type(self).__name__} with {sorted(own)}, got {sorted(state)}"
                             f" (of another shape: {wrong}): it belongs to another model or run")  # fmt: skip
        self.load_state_dict(state, strict=False)


def linear_head(width: int, classes: int, generator: torch.Generator) -> nn.Linear:
    """Return a linear classifier `(B, D) -> (B, C)` with small initial weights (std 0.02) and zero bias."""
    head = nn.Linear(width, classes)
    nn.init.trunc_normal_(head.weight, std=0.02, generator=generator)
    nn.init.zeros_(head.bias)
    return head


def mask_logits(logits: Tensor, classes: Sequence[int]) -> Tensor:
    """Return the logits `(B, C)` with -inf for every class outside `classes`.

    >>> mask_logits(torch.tensor([[1.0, 2.0, 3.0]]), [0, 1])
    tensor([[1., 2., -inf]])
    """
    allowed = torch.zeros(logits.shape[-1], dtype=torch.bool)
    allowed[list(classes)] = True
    return logits.masked_fill(~to_device(allowed, logits.device), -torch.inf)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor of the CPU on `device`. The CPU does not wait for a GPU to copy it."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
