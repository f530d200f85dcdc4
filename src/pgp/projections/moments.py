"""Projections that are computed from the second moments of each task's inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from torch import Tensor

from pgp.projections.base import Projection
from pgp.subspace import (
    ProtectedInputs,
    ProtectedParameter,
    SecondMoment,
    flatten_images,
    second_moment_of_sums,
    to_float64,
)

BasisRule = Literal["sum", "union", "input"]
"""Vectors whose second moment is used, for old inputs x and old prompts p: all sums x + p, x and p, or x alone."""


class MomentProjection(Projection):
    """A projection that accumulates the second moments of a task's inputs, batch by batch."""

    def __init__(self, protected: Mapping[str, ProtectedParameter], rule: BasisRule, seed: int = 0) -> None:
        super().__init__(protected, seed)
        self.rule = rule
        self._inputs: dict[str, SecondMoment] = {}
        self._prompts: dict[str, SecondMoment] = {}
        self._head_maps: dict[str, Tensor] = {}
        self._same_as: dict[str, str] = {}
        """By space, another one with the same inputs in this task, whose moments are used."""

    def observe(self, space: str, inputs: ProtectedInputs) -> None:
        """Add the inputs `(B, ..., N, D)` of a batch to the second moments of `space`."""
        if inputs.same_as in self.protected:
            self._same_as[space] = inputs.same_as
            return
        if inputs.head_maps is not None:
            self._head_maps[space] = to_float64(inputs.head_maps.detach())
        self._inputs.setdefault(space, SecondMoment()).observe(flatten_images(inputs.inputs))
        if inputs.prompts is not None and self.rule != "input":
            self._prompts.setdefault(space, SecondMoment()).observe(flatten_images(inputs.prompts))

    def take_moments(self) -> dict[str, list[Tensor]]:
        """Return the second moments of this task's inputs by space, each `(..., D, D)`, and forget them.

        Collective: in a distributed run, every process must call it.

        Raises:
            ValueError: If no inputs of a space were observed in this task.
        """
        sources = {space: self._same_as.get(space, space) for space in self.protected}
        if missing := [space for space, source in sources.items() if source not in self._inputs]:
            raise ValueError(f"expected inputs of space {missing[0]!r} in this task, got none: call observe() first")
        moments = {space: self._second_moments(space) for space, source in sources.items() if space == source}
        self._inputs, self._prompts, self._same_as = {}, {}, {}
        return {space: moments[source] for space, source in sources.items()}

    def _second_moments(self, space: str) -> list[Tensor]:
        """Return the second moments of one space, each `(..., D, D)`.

        Collective: in a distributed run, every process must call it.
        """
        inputs, prompts = self._inputs[space], self._prompts.get(space)
        inputs.all_reduce()
        if space in self._head_maps:
            maps = self._head_maps[space]  # (H, d, D)
            return [(maps.mT @ inputs.second @ maps).sum(0)]  # (D, D)
        if prompts is None:
            return [inputs.second]
        prompts.all_reduce()
        if self.rule == "sum":
            return [second_moment_of_sums(inputs, prompts)]
        return [inputs.second, prompts.second]
