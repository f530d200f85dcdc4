"""The contract of a method: what learns on top of a frozen encoder, and what of it old tasks need untouched.

A method names what to protect; it never projects.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from pgp.backbones import Backbone
from pgp.scenario import Task
from pgp.subspace import Protected, Rows


class Method(nn.Module, abc.ABC):
    """A frozen `backbone`, a `head` that reads features, and what the method learns in between.

    Shapes: `B` images, `D` feature width, `C` classes (all that will ever come).
    """

    by_class: tuple[str, ...] = ("head.weight", "head.bias")
    """Of what is learned, the tensors with a row for each class; they grow when classes join a finished run."""
    asks: bool = True
    """Whether features depend on the query. Where not, it is computed for readouts that read it only."""
    published_scope: Literal["all", "cut"] = "all"
    """What the published evaluation of this method scores over: all classes, seen or not, or those up to the task of
    the test batch. Either is only ever reported beside the honest figure."""

    @dataclass(frozen=True)
    class Config(abc.ABC):
        """How to make one; `build` is the factory."""

        tag: ClassVar[str]
        """Name of this kind of method in config.json, unique among all of them; it must never change."""

        @abc.abstractmethod
        def build(self, backbone: Backbone, class_names: Sequence[str], generator: torch.Generator) -> Method:
            """An untrained method for C named classes; all its initial values come from `generator`."""

    def __init__(self, backbone: Backbone, head: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def begin_task(self, task: Task) -> None:
        """Get ready to learn `task`."""

    def catch_up(self, task: Task) -> None:
        """Bring what the head keeps of `task` up to what is learned by now; it may be asked for at any step."""

    def end_task(self, task: Task) -> None:
        """Keep what is to be kept of `task`, now that it is trained; a later call keeps it anew."""
        self.catch_up(task)

    def query(self, images: Tensor) -> Tensor:
        """What of an image never changes while the method learns, its plain features `(B, D)`; computed once and kept
        for test images.
        """
        return self.backbone.encode(images)

    def choices(self, query: Tensor) -> Tensor | None:
        """Which prompts images with these queries choose, `(B, M)` bool; None where there is nothing to choose."""
        return None

    @abc.abstractmethod
    def features(self, images: Tensor, query: Tensor | None = None, *, by_vote: bool = False) -> Tensor:
        """What the head reads, `(B, D)`; no image's features depend on its batch, and no task label is known.

        Args:
            images: `(B, 3, S, S)`.
            query: `query(images)`, where it is known already.
            by_vote: the published test protocol instead: one choice of prompts for the whole batch, by majority.
        """

    def forward(self, images: Tensor, query: Tensor | None = None) -> Tensor:
        """Logits `(B, C)` over all classes, by the method's own head."""
        logits: Tensor = self.head(self.features(images, query))
        return logits

    @torch.no_grad()
    def prepare(self, images: Tensor, task: Task) -> dict[str, Tensor]:
        """What `loss` needs to know of a whole batch before it may be given the batch in parts: one row per image."""
        return {"query": self.query(images)} if self.asks else {}

    def shared(self, task: Task) -> dict[str, Tensor]:
        """What the loss of every part of a batch needs alike, with its graph; computed once a step."""
        return {}

    @abc.abstractmethod
    def loss(self, images: Tensor, labels: Tensor, task: Task, prepared: dict[str, Tensor] | None = None) -> Tensor:
        """Training loss of a batch of `task`, a scalar: the mean over its images.

        Args:
            images: `(B, 3, S, S)`, a batch or a part of one.
            labels: `(B,)`.
            task: the task they belong to.
            prepared: the rows of `prepare` for these images, and what is `shared`, where they have been called for the
                whole batch.
        """

    def protected(self) -> dict[str, Protected]:
        """By the name of a space: the parameter whose response to old inputs must not change."""
        return {}

    def activations(self, images: Tensor, query: Tensor | None = None) -> dict[str, Rows]:
        """By the name of a space: what meets its parameter when these images pass, the inputs to protect."""
        return {}

    def prompt_parameters(self) -> list[nn.Parameter]:
        """Return all that learns but the head: prompts, prefixes, and the keys by which images choose them.

        The optimizer gives them a learning rate of their own, which may fall to 0 after the first task.
        """
        head = {id(parameter) for parameter in self.head.parameters()}
        return [parameter for parameter in self.parameters() if parameter.requires_grad and id(parameter) not in head]

    def learned_state(self) -> dict[str, Tensor]:
        """All that learns, by name: the state without the frozen encoder."""
        return {name: tensor for name, tensor in self.state_dict().items() if not name.startswith("backbone.")}

    def load_learned_state(self, state: dict[str, Tensor]) -> None:
        """Restore a `learned_state`; classes that it does not know yet stay as they are.

        Raises:
            ValueError: if it belongs to another method or model, or to more classes.
        """
        own = self.learned_state()
        for name in self.by_class:
            rows, all_rows = state.get(name), own.get(name)
            if rows is not None and all_rows is not None and rows.shape[1:] == all_rows.shape[1:]:
                state = {**state, name: torch.cat([rows, all_rows[len(rows) :].to(rows)])}
        wrong = sorted(name for name in own.keys() & state.keys() if own[name].shape != state[name].shape)
        if wrong or own.keys() != state.keys():
            raise ValueError(f"expected a checkpoint of {type(self).__name__} with {sorted(own)}, got {sorted(state)}"
                             f" (of another shape: {wrong}): it belongs to another model or run")  # fmt: skip
        self.load_state_dict(state, strict=False)


def linear_head(width: int, classes: int, generator: torch.Generator) -> nn.Linear:
    """A linear classifier `(B, D) -> (B, C)`, near zero at first."""
    head = nn.Linear(width, classes)
    nn.init.trunc_normal_(head.weight, std=0.02, generator=generator)
    nn.init.zeros_(head.bias)
    return head


def only(logits: Tensor, classes: Sequence[int]) -> Tensor:
    """Logits `(B, C)` with -inf for every class that is not among `classes`.

    >>> only(torch.tensor([[1.0, 2.0, 3.0]]), [0, 1])
    tensor([[1., 2., -inf]])
    """
    allowed = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
    allowed[list(classes)] = True
    return logits.masked_fill(~allowed, -torch.inf)
