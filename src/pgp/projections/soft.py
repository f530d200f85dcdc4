"""Scale each direction of an update by how little old inputs use it, instead of keeping or removing it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pgp.projections.base import Projection
from pgp.projections.moments import BasisRule, MomentProjection
from pgp.subspace import ProtectedParameter, to_float64


class Soft(MomentProjection):
    """Multiplies updates by `lambda (C + lambda I)^-1`, where C is the sum of old tasks' second moments.

    A direction of energy e (an eigenvalue of C) is scaled by `lambda / (e + lambda)`. This is the update that minimises
    its squared distance to the original one plus its mean squared response to old inputs, divided by lambda. With
    lambda towards 0, only directions that no old input uses are left; with a large lambda, nothing changes.
    """

    @dataclass(frozen=True)
    class Config(Projection.Config):
        """How strongly old inputs are protected, and what is projected."""

        tag = "soft"

        ridge: float = 0.01
        """lambda, in multiples of the mean eigenvalue of the first task's second moment."""
        basis: BasisRule = "input"
        """Vectors whose second moments are summed, for old inputs x and old prompts p. input: x alone. sum: all sums
        x + p. union: x and p."""
        apply_to: Literal["gradient", "update"] = "update"
        """What is projected. gradient: the gradient before the optimizer's step. update: the change of the parameter by
        the step."""

        def __post_init__(self) -> None:
            if not self.ridge > 0:
                raise ValueError(f"expected projection.ridge above 0, got {self.ridge}")

        def build(self, protected: Mapping[str, ProtectedParameter], seed: int = 0) -> Soft:
            """Return a projection that changes nothing yet."""
            return Soft(protected, self, seed)

    def __init__(
        self, protected: Mapping[str, ProtectedParameter], config: Soft.Config | None = None, seed: int = 0
    ) -> None:
        self.config = config or Soft.Config()
        super().__init__(protected, self.config.basis, seed)
        self.apply_to = self.config.apply_to
        self.moments: dict[str, Tensor] = {}
        """Sum of old tasks' second moments `(..., D, D)`, by space."""
        self.penalties: dict[str, Tensor] = {}
        """lambda of each space, `(..., 1, 1)`; 0 before the first inputs."""

    def end_task(self) -> dict[str, float]:
        """Add this task's second moments, and return the effective rank of each space.

        Collective: in a distributed run, every process must call it.

        Raises:
            ValueError: If no inputs of a space were observed in this task.
        """
        for space, seconds in self.take_moments().items():
            moment = torch.stack(seconds).sum(0)  # (..., D, D)
            if space not in self.moments:
                self.moments[space] = torch.zeros_like(moment)
                self.penalties[space] = torch.zeros_like(moment[..., :1, :1])
            first = self.config.ridge * moment.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
            known = self.penalties[space].to(moment)  # restored ones are on the CPU
            self.penalties[space] = torch.where(known > 0, known, first)
            self.moments[space] = self.moments[space].to(moment) + moment
        self._scale()
        return {space: self.rank(space) for space in self.protected}

    def _scale(self) -> None:
        """Compute `lambda (C + lambda I)^-1` of each space. It takes the place of a basis."""
        for space, moment in self.moments.items():
            penalty = self.penalties[space].to(moment)
            penalty = torch.where(penalty > 0, penalty, 1.0)  # without inputs yet, nothing is scaled
            penalised = moment + penalty * torch.eye(moment.shape[-1]).to(moment)
            self.bases[space] = penalty * torch.linalg.inv(penalised)

    def project(self, space: str, tensor: Tensor) -> Tensor:
        """Return `tensor (..., D)` times `lambda (C + lambda I)^-1` of `space`.

        It is computed in float64 and returned in the dtype of `tensor`.
        """
        if space not in self.bases:
            return tensor
        vectors = to_float64(tensor)
        self.bases[space] = self.bases[space].to(vectors.device)
        return (vectors @ self.bases[space]).to(tensor)

    def rank(self, space: str) -> float:
        """Return the effective number of protected directions, `sum of e / (e + lambda)`, averaged over heads."""
        if space not in self.bases:
            return 0.0
        scaling = self.bases[space]
        kept = scaling.diagonal(dim1=-2, dim2=-1).sum(-1)
        return float((scaling.shape[-1] - kept).mean())

    def full_spaces(self) -> list[str]:
        """Return none: every direction can change a little."""
        return []

    def state_dict(self) -> dict[str, Tensor]:
        """Return moment and lambda of each space."""
        moments = {f"{space} moment": moment for space, moment in self.moments.items()}
        return moments | {f"{space} penalty": penalty for space, penalty in self.penalties.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore a `state_dict`."""
        for name, tensor in state.items():
            space, _, kind = name.rpartition(" ")
            (self.moments if kind == "moment" else self.penalties)[space] = tensor
        self._scale()
