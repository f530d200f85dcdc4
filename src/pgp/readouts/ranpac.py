"""RanPAC: ridge regression on random ReLU features of a frozen encoder; it has a closed form and stores no image.

See McDonnell et al., "RanPAC: Random Projections and Pre-trained Models for Continual Learning", NeurIPS 2023.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pgp.readouts.base import Features
from pgp.readouts.statistics import StatisticsReadout
from pgp.rng import make_generator
from pgp.subspace import to_float64

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
"""Values of the ridge penalty that are tried on held-out images."""


class RanPAC(StatisticsReadout):
    """Ridge regression of one-hot labels on `h = relu(x W)`, with a fixed random W `(D, M)`.

    It keeps `G = sum h h^T (M, M)`, the sum of h for each class `(C, M)`, and W, and solves `(G + p I) V = sums^T`.
    G takes `8 M^2` bytes: 800 MB with the published M = 10,000. While a task is observed and fitted, memory is up to
    5.3 times that. Choose a smaller M on a small machine; with M = 2,000, G takes 32 MB.
    """

    @dataclass(frozen=True)
    class Config(StatisticsReadout.Config):
        """Number of random features, and penalty of the ridge regression."""

        tag = "ranpac"

        dimensions: int = 10_000
        """Number M of random features. Memory grows with its square, time to fit with its cube."""
        penalty: float | None = None
        """Ridge penalty p, in multiples of the mean of the diagonal of G. None chooses a power of ten by the
        Brier score of held-out training images, after each task."""

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.dimensions < 1 or not (self.penalty is None or self.penalty > 0):
                raise ValueError(f"expected dimensions of at least 1, and penalty above 0 or None, got"
                                 f" {self.dimensions} and {self.penalty}")  # fmt: skip
            if self.compensate != "none":
                raise ValueError(f"expected compensate='none', got {self.compensate!r}: sums of relu(x W) do not tell"
                                 f" how they change with x. Choose lda or logistic to correct for drift")  # fmt: skip

        @property
        def name(self) -> str:
            """See `Readout.Config.name`."""
            return ("ranpac" if self.dimensions == 10_000 else f"ranpac-{self.dimensions}") + self.suffix

        def build(self, head: nn.Module, classes: int, seed: int) -> RanPAC:
            """Return a readout that has seen no class yet."""
            return RanPAC(classes, self, seed)

    max_folds = 1

    def __init__(self, classes: int, config: RanPAC.Config | None = None, seed: int = 0) -> None:
        self.config = config or RanPAC.Config()
        penalty = self.config.penalty
        super().__init__(classes, self.config, PENALTIES if penalty is None else (penalty,), penalty or 0.1)
        self.name, self.seed = self.config.name, seed
        self._projection = self._weight = torch.empty(0)  # (D, M), (M, C)

    def select_features(self, images: Features) -> Tensor:
        """Return the random features `relu(x W)`, `(B, M)`, of the parts that the settings select."""
        x = super().select_features(images)
        if not len(self._projection):
            generator = make_generator(self.seed, "ranpac")
            self._projection = torch.randn(x.shape[1], self.config.dimensions, generator=generator)
        self._projection = self._projection.to(x.device)
        return (x @ self._projection.to(x)).relu()

    @property
    def detects_unknown(self) -> bool:
        """Distances under two covariances of M random features would cost more than the readout itself."""
        return False

    def logits(self, features: Tensor) -> Tensor:
        """Return the estimates of the one-hot label `h V`, `(B, C)`; -inf for classes that were never observed.

        Raises:
            ValueError: If no task has ended yet.
        """
        self._require_fit("logits")
        h = to_float64(features)
        logits = (h @ self._weight.to(h.device)).masked_fill(~self.seen.to(h.device), -torch.inf)
        return logits.to(features.device, torch.float32)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the statistics, and the projection W, since torch may draw other numbers in another version."""
        return {**super().state_dict(), "projection": self._projection} if self.state else {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore a `state_dict` and fit to it. It may cover only the first classes."""
        statistics = dict(state)
        if state:
            self._projection = statistics.pop("projection")
        super().load_state_dict(statistics)

    def _fit(self) -> None:
        moment = self.state["products"].clone()  # (M, M)
        diagonal = moment.diagonal()
        diagonal += self.regularisation * diagonal.mean() + torch.finfo(torch.float64).tiny
        torch.linalg.cholesky(moment, out=moment)  # in place, because G may take a gigabyte
        self._weight = torch.cholesky_solve(self.state["sums"].T, moment)  # (M, C)
