"""Calibration of probabilities on training images that the classifier was not fitted to.

See Guo et al., "On Calibration of Modern Neural Networks", ICML 2017.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pgp.subspace import to_float64

TEMPERATURES = 2.0 ** (torch.arange(-80, 65, dtype=torch.float64) / 8)
"""Temperatures that are tried, from 2^-10 to 2^8 in steps of 9 %, `(G,)`."""
NUM_BINS = 15
"""Number of bins of equal width for the expected calibration error."""


def losses_by_temperature(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the summed cross-entropy `(G,)` of logits `(B, C)` divided by each of `TEMPERATURES`, in float64.

    Adding the results for all images of a stream gives the loss of the stream, without storing any image.

    >>> losses = losses_by_temperature(torch.tensor([[8.0, 0.0], [8.0, 0.0]]), torch.tensor([0, 1]))
    >>> float(TEMPERATURES[losses.argmin()])  # half of the predictions are right, so no confidence is the best
    256.0
    """
    logits = to_float64(logits)
    temperatures = TEMPERATURES.to(logits.device)
    return torch.stack([F.cross_entropy(logits / t, labels, reduction="sum") for t in temperatures])


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


def expected_calibration_error(bins: Tensor) -> float:
    """Return the mean difference between confidence and accuracy, in [0, 1], from `calibration_bins`.

    >>> expected_calibration_error(calibration_bins(torch.tensor([[0.75, 0.25]] * 2), torch.tensor([0, 1])))
    0.25
    """
    return float((bins[:, 1] - bins[:, 2]).abs().sum() / bins[:, 0].sum())
