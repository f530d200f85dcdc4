"""The contract of a readout: how features become logits at test. It decides more accuracy than any projection does."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn


class Readout(abc.ABC):
    """Turns features into logits; fitted, if at all, from class statistics that stream by once a task."""

    name: str
    """How reports call it: that of its configuration."""
    fitted: bool = True
    """Whether it has to observe the features of each task."""
    compensates: bool = False
    """Whether it wants to know how the training of each task moved features."""

    @dataclass(frozen=True)
    class Config(abc.ABC):
        """How to make one; `build` is the factory."""

        tag: ClassVar[str]
        """Name of this kind of readout in config.json, unique among all of them; it must never change."""

        @property
        @abc.abstractmethod
        def name(self) -> str:
            """How reports call it; no two readouts of a run have one name."""

        @property
        def reads_query(self) -> bool:
            """Whether it wants to know the query of an image, too."""
            return False

        @abc.abstractmethod
        def build(self, head: nn.Module, classes: int, seed: int) -> Readout:
            """Return a readout over `classes` labels.

            Args:
                head: The method's own classifier.
                classes: Number of labels.
                seed: The run's seed, which decides every random draw of the readout.
            """

    def reads(self, features: Tensor, query: Tensor | None) -> Tensor:
        """What it is to be given of images with features `(B, D)` and queries `(B, Q)`: the features, `(B, D)`."""
        return features

    @abc.abstractmethod
    def observe(self, features: Tensor, labels: Tensor) -> None:
        """Take in features `(B, D)`, as it `reads` them, and labels `(B,)` of the current task, in test views, after
        its training.
        """

    def moved(self, before: Tensor, after: Tensor) -> None:
        """Take in features `(n, D)` of all the current task's images as they were before and after its training, in
        test views, in every process; from the second task on, before `end_task`. One that does not `compensate`
        ignores it.
        """
        return

    @abc.abstractmethod
    def end_task(self) -> None:
        """Fit to what was observed so far.

        Collective: every process must call it.
        """

    @abc.abstractmethod
    def logits(self, features: Tensor) -> Tensor:
        """Logits `(B, C)` over all labels; -inf for those it knows nothing about."""

    @abc.abstractmethod
    def state_dict(self) -> dict[str, Tensor]:
        """All it has learned, as tensors."""

    @abc.abstractmethod
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore a `state_dict`."""
