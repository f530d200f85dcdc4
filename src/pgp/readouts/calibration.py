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
