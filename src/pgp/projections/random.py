"""A baseline for projections: protect as many directions, but random ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pgp.projections.orthogonal import Orthogonal
from pgp.rng import make_generator
from pgp.subspace import ProtectedParameter


class RandomBasis(Orthogonal):
    """Keeps steps orthogonal to random directions, in each space as many as `Orthogonal` would protect.

    The directions of a space are drawn once and used in order, so a direction that is protected stays protected.
    """

    @dataclass(frozen=True)
    class Config(Orthogonal.Config):
        """Settings of `Orthogonal`, which decide the ranks."""

        tag = "random"

        def build(self, protected: Mapping[str, ProtectedParameter], seed: int = 0) -> RandomBasis:
            """Return a projection without any protected directions."""
            return RandomBasis(protected, self, seed)

    def __init__(
        self, protected: Mapping[str, ProtectedParameter], config: Orthogonal.Config | None = None, seed: int = 0
    ) -> None:
        super().__init__(protected, config, seed)
        self._drawn: dict[str, Tensor] = {}  # by space, (..., D, D)

    def basis(self, space: str) -> Tensor:
        """Return random orthonormal columns `(..., D, r)`, per attention head as many as for old inputs."""
        basis = self.bases[space]
        if space not in self._drawn:
            shape = (*basis.shape[:-1], basis.shape[-2])
            draws = torch.randn(shape, dtype=torch.float64, generator=make_generator(self.seed, "random", space))
            self._drawn[space] = torch.linalg.qr(draws).Q.to(basis.device)
        nonzero = (basis != 0).any(-2, keepdim=True)  # (..., 1, r): bases of smaller rank end in zeros
        return self._drawn[space][..., : basis.shape[-1]] * nonzero
