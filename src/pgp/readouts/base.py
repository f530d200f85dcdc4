"""The contract of a readout: how features become logits at test. It matters more for accuracy than the projection."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn


class Readout(abc.ABC):
    """Turns features into logits.

    Shapes: `B` images, `D` feature width, `Q` query width, `C` classes (of all tasks, including those still to come).

    For each task, `observe` takes in all its images after training, `moved` the change of their features if the
    readout `needs_drift`, then `end_task` fits it. `logits` may be called after the first task.
    """

    name: str
    """Its name in reports, that of its configuration."""
    needs_fit: bool = True
    """Whether it has to observe the features of each task. If not, `observe` and `end_task` do nothing."""
    needs_drift: bool = False
    """Whether it needs to know how the training of each task moved the features."""

    @dataclass(frozen=True)
    class Config(abc.ABC):
        """How to make one; `build` is the factory."""

        tag: ClassVar[str]
        """Name of this kind of readout in config.json, unique among all of them; it must never change."""

        @property
        @abc.abstractmethod
        def name(self) -> str:
            """Its name in reports and in accuracy.csv, unique among the readouts of a run."""

        @property
        def uses_query(self) -> bool:
            """Whether it reads the query of an image besides its features."""
            return False

        @abc.abstractmethod
        def build(self, head: nn.Module, classes: int, seed: int) -> Readout:
            """Return a readout over `classes` labels.

            Args:
                head: The method's own classifier.
                classes: Number of labels.
                seed: The run's seed, which decides every random draw of the readout.
            """

    def select_features(self, features: Tensor, query: Tensor | None) -> Tensor:
        """Return what the other functions take as features, from features `(B, D)` and queries `(B, Q)` of images.

        By default, the features themselves.
        """
        return features

    @abc.abstractmethod
    def observe(self, features: Tensor, labels: Tensor) -> None:
        """Take in a batch of the current task: features `(B, D)`, as from `reads`, and labels `(B,)`.

        The images are training images in their test view, after the training of the task.
        """

    def compensate(self, before: Tensor, after: Tensor) -> None:
        """Take in how training moved the features of all n images of the current task.

        It is called once a task from the second on, before `end_task`, with the same tensors in every process. A
        readout that does not compensate ignores it.

        Args:
            before: Features before the training of the task, `(n, D)`.
            after: Features of the same images after it, `(n, D)`.
        """
        return

    @abc.abstractmethod
    def end_task(self) -> None:
        """Fit to what was observed so far.

        Collective: every process must call it.
        """

    @abc.abstractmethod
    def logits(self, features: Tensor) -> Tensor:
        """Return the logits `(B, C)` of features `(B, D)`; -inf for classes that it has never observed."""

    @abc.abstractmethod
    def state_dict(self) -> dict[str, Tensor]:
        """Return all it has learned, as tensors."""

    @abc.abstractmethod
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore a `state_dict`, which may be of fewer classes, the first ones."""
