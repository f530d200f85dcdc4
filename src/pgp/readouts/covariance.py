"""Shrunk covariances, and distances under them."""

from __future__ import annotations

import torch
from torch import Tensor

SHRINKAGES = (0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9)
"""Values of the shrinkage that are tried on held-out images."""


def check_shrinkage(shrinkage: float | None) -> None:
    """Raise a ValueError if `shrinkage` is neither None nor from 1e-6, below which rounding errors decide, to 1."""
    if shrinkage is not None and not 1e-6 <= shrinkage <= 1:
        raise ValueError("expected shrinkage from 1e-6 to 1, or None to choose it on held-out images, got"
                         f" {shrinkage}")  # fmt: skip


def shrinkage_candidates(shrinkage: float | None) -> tuple[tuple[float, ...], float]:
    """Return the values to choose from, and the default, for a setting of the shrinkage."""
    return (SHRINKAGES, 0.1) if shrinkage is None else ((shrinkage,), shrinkage)


def shrink(covariance: Tensor, shrinkage: float) -> Tensor:
    """Return `(1 - a) S + a tr(S)/D I` for a covariance S `(D, D)` and a = `shrinkage`.

    >>> shrink(torch.tensor([[3.0, 1.0], [1.0, 1.0]]), 0.5)
    tensor([[2.5000, 0.5000],
            [0.5000, 1.5000]])
    """
    shrunk = (1 - shrinkage) * covariance
    shrunk.diagonal().add_(shrinkage * covariance.trace() / len(covariance))
    return shrunk


def cholesky(covariance: Tensor) -> Tensor:
    """Return L with `L L^T` = a covariance `(D, D)`, up to rounding.

    If features hardly vary, a covariance can have negative eigenvalues because of rounding errors. Then 1, 10, 100, ...
    times the rounding error is added to its diagonal, until it has none.
    """
    root: Tensor
    root, failed = torch.linalg.cholesky_ex(covariance)
    added = float(torch.finfo(covariance.dtype).eps * covariance.diagonal().abs().mean())
    while failed:
        root, failed = torch.linalg.cholesky_ex(covariance + added * torch.eye(len(covariance)).to(covariance))
        added *= 10
    return root


class SquaredDistances:
    """Squared Mahalanobis distances to means m `(C, D)` under a covariance S `(D, D)`.

    Without a covariance, because features do not vary, it is the identity.
    """

    def __init__(self, means: Tensor, covariance: Tensor | None) -> None:
        self._centre = means.mean(0)
        self._root = torch.eye(means.shape[1]).to(means) if covariance is None else cholesky(covariance)
        self._white_means = self._whiten(means)

    def __call__(self, x: Tensor) -> Tensor:
        """Return `(x - m)^T S^-1 (x - m)` for x `(B, D)` and each mean, `(B, C)`."""
        return torch.cdist(self._whiten(x), self._white_means).square()

    def _whiten(self, rows: Tensor) -> Tensor:
        white: Tensor = torch.linalg.solve_triangular(self._root, (rows - self._centre).T, upper=False).T
        return white


def rounding_error(products: Tensor) -> Tensor:
    """Return the rounding error of the trace of a sum of products `(D, D)`."""
    return len(products) * torch.finfo(torch.float64).eps * products.trace()
