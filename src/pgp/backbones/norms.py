"""Standard deviations in norm layers, and linear maps pulled back through these layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def norm_std(norm: Any, tokens: Tensor) -> Tensor:
    """Return what `norm` divides each of `tokens (..., D)` by, `(...)`: 1 for an identity."""
    if isinstance(norm, nn.Identity):
        return torch.ones_like(tokens[..., 0])
    if isinstance(norm, nn.LayerNorm):
        variance = tokens.var(-1, correction=0)
    else:
        variance = tokens.square().mean(-1)  # RMSNorm does not subtract the mean
    deviation: Tensor = (variance + norm.eps).sqrt()
    return deviation


def pull_back(norm: Any, maps: Tensor) -> Tensor:
    """Return the linear maps `(..., D)` on outputs of `norm` as maps on its inputs, without the division.

    Raises:
        ValueError: If `norm` is neither a LayerNorm nor an identity.
    """
    if isinstance(norm, nn.Identity):
        return maps
    if not isinstance(norm, nn.LayerNorm):
        raise ValueError(f"expected a model with LayerNorm for --method.protect affinity, got {type(norm).__name__}:"
                         " choose another model, or --method.protect tokens")  # fmt: skip
    maps = maps * norm.weight
    return maps - maps.mean(-1, keepdim=True)
