"""Calibration: how far the confidence of predictions is from their accuracy, and how far it is by chance alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pgp.subspace import to_float64

NUM_BINS = 15
"""Number of bins of equal width for the expected calibration error."""


def calibration_bins(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Return, for each bin of confidence, the number of images and the sums of confidences and hits, `(NUM_BINS, 3)`.

    The confidence of an image is the probability of its predicted class. Bins of different images may be added.

    Args:
        probabilities: `(B, C)`.
        labels: `(B,)`.
    """
    confidence, predicted = to_float64(probabilities).max(1)
    bins = (confidence * NUM_BINS).long().clamp(0, NUM_BINS - 1)
    values = torch.stack([torch.ones_like(confidence), confidence, (predicted == labels).to(confidence)], 1)  # (B, 3)
    return torch.zeros(NUM_BINS, 3, dtype=torch.float64, device=values.device).index_add(0, bins, values)


def logged_bins(entry: Mapping[str, Any]) -> Tensor:
    """Return the bins `(NUM_BINS, 3)` that an entry of `calibration` in a run's log holds."""
    return torch.tensor([entry[key] for key in ("images", "confidence", "hits")], dtype=torch.float64).T


def expected_calibration_error(bins: Tensor) -> float:
    """Return the mean difference between confidence and accuracy, in [0, 1], from `calibration_bins`.

    >>> expected_calibration_error(calibration_bins(torch.tensor([[0.75, 0.25]] * 2), torch.tensor([0, 1])))
    0.25
    """
    return float((bins[:, 1] - bins[:, 2]).abs().sum() / bins[:, 0].sum())


def calibration_error_by_chance(bins: Tensor) -> float:
    """Return the `expected_calibration_error` to be expected if all probabilities were right, in [0, 1].

    It is not 0, because a bin with few images has more or fewer hits than its confidence by chance. The number of hits
    of a bin is taken as binomial, with the mean confidence of the bin. The mean absolute deviation of a binomial
    variable is that of De Moivre: `2 n! / (m! (n - m - 1)!) q^(m + 1) (1 - q)^(n - m)`, with m the integer part of n q.

    Args:
        bins: `(NUM_BINS, 3)` from `calibration_bins`.

    >>> calibration_error_by_chance(calibration_bins(torch.tensor([[0.5, 0.5]] * 2), torch.tensor([0, 1])))
    0.25
    """
    n = bins[:, 0]
    q = (bins[:, 1] / n.clamp(min=1)).clamp(0, 1)
    m = (n * q).floor()
    ways = torch.lgamma(n + 1) - torch.lgamma(m + 1) - torch.lgamma(n - m)  # -inf if m = n: then q = 1
    deviations = 2 * (ways + torch.xlogy(m + 1, q) + torch.special.xlog1py(n - m, -q)).exp()
    return float(deviations.sum() / n.sum())
