"""Linear discriminant analysis on class statistics: it has a closed form and stores no image."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pgp.readouts.base import Readout
from pgp.readouts.covariance import check_shrinkage, cholesky, shrinkage_candidates
from pgp.readouts.statistics import StatisticsReadout
from pgp.subspace import to_float64


class LDA(StatisticsReadout):
    """LDA with equal priors and one pooled covariance S, shrunk to `(1 - a) S + a tr(S)/D I`.

    If features do not vary within classes, for example with one image per class, it predicts the nearest class mean.
    """

    @dataclass(frozen=True)
    class Config(StatisticsReadout.Config):
        """Shrinkage of the covariance, and settings of the class statistics."""

        tag = "lda"

        shrinkage: float | None = 0.1
        """Weight a of the isotropic part of the covariance, in (0, 1]. With 1, LDA becomes the nearest class mean. None
        chooses it by the Brier score of held-out training images, after each task."""

        def __post_init__(self) -> None:
            super().__post_init__()
            check_shrinkage(self.shrinkage)

        @property
        def name(self) -> str:
            """See `Readout.Config.name`."""
            return "lda" + self.suffix + ("+tuned" if self.shrinkage is None else "")

        def build(self, head: nn.Module, classes: int, seed: int) -> LDA:
            """Return a readout that has seen no class yet."""
            return LDA(classes, self)

    def __init__(self, classes: int, config: LDA.Config | None = None) -> None:
        self.config = config or LDA.Config()
        super().__init__(classes, self.config, *shrinkage_candidates(self.config.shrinkage))
        self.name = self.config.name
        self._weight = self._bias = self._centre = torch.empty(0)

    def logits(self, features: Tensor) -> Tensor:
        """Return `d_c^T S^-1 (x - m) - d_c^T S^-1 d_c / 2`, `(B, C)`, with `d_c = m_c - m`.

        Here m_c is the mean of class c and m the mean of all class means. Classes never observed get -inf.

        Raises:
            ValueError: If no task has ended yet.
        """
        self._require_fit("logits")
        x = to_float64(features)
        weight, bias, centre = (tensor.to(x.device) for tensor in (self._weight, self._bias, self._centre))
        return ((x - centre) @ weight + bias).to(features.device, torch.float32)

    def _fit(self) -> None:
        means, shrunk = self.means, self.covariance(self.regularisation)
        if shrunk is None:
            if self.regularisation < 1:
                warnings.warn("features do not vary within classes (is there one image per class?): lda predicts the"
                              " nearest class mean", stacklevel=2)  # fmt: skip
            shrunk = torch.eye(means.shape[1]).to(means)
        self._centre = means[self.seen].mean(0)
        centred = means - self._centre  # (C, D)
        self._weight = torch.cholesky_solve(centred.T, cholesky(shrunk))  # (D, C)
        self._bias = torch.where(self.seen, -(centred * self._weight.T).sum(1) / 2, -torch.inf)  # (C,)


class NCM(LDA):
    """Nearest class mean: LDA with covariance s I, where s is the mean variance within classes.

    Its logits are `-|x - m_c|^2 / 2s`, up to a constant.
    """

    @dataclass(frozen=True)
    class Config(Readout.Config):
        """Nearest class mean; there are no settings."""

        tag = "ncm"

        @property
        def name(self) -> str:
            """See `Readout.Config.name`."""
            return "ncm"

        def build(self, head: nn.Module, classes: int, seed: int) -> NCM:
            """Return a readout that has seen no class yet."""
            return NCM(classes)

    def __init__(self, classes: int) -> None:
        super().__init__(classes, LDA.Config(shrinkage=1.0))
        self.name = "ncm"
