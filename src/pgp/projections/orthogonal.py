"""Prompt gradient projection (Qiao et al., ICLR 2024), with subspaces computed from second moments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pgp.projections.base import Projection
from pgp.projections.moments import BasisRule, MomentProjection
from pgp.subspace import ProtectedParameter, extend_basis


class Orthogonal(MomentProjection):
    """Replaces each gradient or update g of a protected parameter by `g - g U U^T`.

    The columns of U are an orthonormal basis of the protected subspace: directions that the parameter's inputs in old
    tasks use, such as sums of old tokens x and old prompts p. The paper argues that, to first order, a change dp of a
    prompt does not change old attention scores if `x dp^T = 0` and `p dp^T = 0` for all old x and p; docs/methods.md
    says when this holds. Keys for selecting prompts are kept orthogonal to old queries of images in the same way, and
    attention keys of prefixes to old attention queries of their head. The basis grows by the rule of GPM, see
    `pgp.subspace.extend_basis`.
    """

    @dataclass(frozen=True)
    class Config(Projection.Config):
        """Settings of PGP: how large the protected subspaces are, and what is projected."""

        tag = "orthogonal"

        basis: BasisRule = "sum"
        """Vectors that the protected subspace is computed from, for old inputs x and old prompts p. sum: all sums x + p
        (the paper). union: x and p, each by itself. input: x alone (GPM)."""
        energy: float = 0.5
        """Fraction of the inputs' energy (trace of their second moment) that the basis must capture at least, in
        [0, 1]; epsilon in the paper."""
        key_energy: float = 0.97
        """As `energy`, for the keys of prompts, whose inputs are the queries."""
        apply_to: Literal["gradient", "update"] = "gradient"
        """What is projected. gradient: the gradient before the optimizer's step (the paper). update: the change of the
        parameter by the step. With Adam or weight decay, only this keeps steps out of the subspace."""
        value_energy: float | None = None
        """As `energy`, for parameters whose inputs are attention weights: values of prefixes, and prompts along the
        prompt axis. If None, `energy`."""
        preserve_key_norms: bool = False
        """Also keep the norm of each prompt key; only with apply_to=update. Images select keys by cosine similarity,
        which depends on the norm of a key even if its inner products with old queries do not change."""

        def __post_init__(self) -> None:
            for name in ("energy", "key_energy", "value_energy"):
                value = getattr(self, name)
                if value is not None and not 0 <= value <= 1:
                    raise ValueError(f"expected projection.{name} in [0, 1], got {value}")
            if self.preserve_key_norms and self.apply_to == "gradient":
                raise ValueError(
                    "expected projection.apply_to=update with projection.preserve_key_norms, got gradient: norms can be"
                    " kept only if the step itself is projected"
                )

        def build(self, protected: Mapping[str, ProtectedParameter], seed: int = 0) -> Orthogonal:
            """Return a projection without any protected directions."""
            return Orthogonal(protected, self, seed)

        def energy_of(self, role: str) -> float:
            """Return the fraction of the second moment's trace that the basis must capture for this role."""
            if role == "value" and self.value_energy is not None:
                return self.value_energy
            return self.key_energy if role == "key" else self.energy

    def __init__(
        self, protected: Mapping[str, ProtectedParameter], config: Orthogonal.Config | None = None, seed: int = 0
    ) -> None:
        self.config = config or Orthogonal.Config()
        super().__init__(protected, self.config.basis, seed)
        self.apply_to = self.config.apply_to

    def end_task(self) -> dict[str, float]:
        """Extend each basis by this task's second moments, clear the moments, and return the rank of each space.

        Collective: in a distributed run, every process must call it.

        Raises:
            ValueError: If no inputs of a space were observed in this task.
        """
        for space, moments in self.take_moments().items():
            for second in moments:
                basis = self.bases.get(space, second.new_zeros(*second.shape[:-1], 0))
                self.bases[space] = extend_basis(basis, second, self.config.energy_of(self.protected[space].role))
        return {space: self.rank(space) for space in self.protected}

    def _constrained_value(self, space: str, target: ProtectedParameter, before: Tensor) -> Tensor:
        """Return `before` plus the projected change; for keys, rescaled so that their norms do not change.

        Only the component outside the protected subspace is rescaled, so inner products with protected directions stay
        the same. See `Projection._constrained_value`.
        """
        after = super()._constrained_value(space, target, before)
        if target.role != "key" or not self.config.preserve_key_norms:
            return after
        outside_before, outside_after = self.project(space, before), self.project(space, after)  # (M, D)
        norm_before = outside_before.norm(dim=-1, keepdim=True)  # (M, 1)
        norm_after = outside_after.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(outside_after.dtype).tiny)
        rescaled: Tensor = after + (norm_before / norm_after - 1) * outside_after
        return rescaled
