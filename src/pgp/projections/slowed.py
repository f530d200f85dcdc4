"""The plainest way to forget less: after the first task, prompts learn slower, or not at all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from pgp.projections import Projection
from pgp.subspace import Protected, Rows, to_float64


class Slowed(Projection):
    """From the second task on, what is protected moves `factor` of each step: in every direction alike.

    For any optimizer this is a learning rate of its own, `factor` of that of the head. A control for projections, which
    also make prompts learn less; `factor` 0 freezes them after the first task. What a method does not name as protected
    learns on.
    """

    @dataclass(frozen=True)
    class Config(Projection.Config):
        """How slow."""

        factor: float = 0.1
        """Share of a step, in [0, 1]."""

        def __post_init__(self) -> None:
            if not 0 <= self.factor <= 1:
                raise ValueError(f"expected projection.factor in [0, 1], got {self.factor}")

        def build(self) -> Slowed:
            """A projection that has seen no task yet."""
            return Slowed(self.factor)

    collect = None
    on: Literal["gradient", "update"] = "update"

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def observe(self, space: str, rows: Rows) -> None:
        """Look away."""

    def end_task(self, protected: Mapping[str, Protected]) -> dict[str, float]:
        """Every direction counts as protected."""
        for space, (parameter, axis, _role) in protected.items():
            self.bases[space] = torch.eye(parameter.shape[axis], dtype=torch.float64)
        return {space: self.rank(space) for space in protected}

    def project(self, space: str, tensor: Tensor) -> Tensor:
        """`factor` of the tensor."""
        return tensor * self.factor if space in self.bases else tensor

    def energies(self, space: str, tensor: Tensor) -> Tensor:
        """See `Projection.energies`; all of it counts as protected."""
        _, removed, whole = super().energies(space, tensor)
        return torch.stack([whole, removed, whole])

    @contextmanager
    def confined(self, protected: Mapping[str, Protected]) -> Iterator[None]:
        """Let what is done in between be done: prompts that a task hands on to the next are not learned."""
        yield

    @torch.no_grad()
    def _confine(self, protected: Mapping[str, Protected], before: Mapping[nn.Parameter, Tensor]) -> None:
        for parameter, was in before.items():  # once, however many spaces it has
            parameter.copy_(was + self.factor * (to_float64(parameter) - was))
