"""Norm layers, and how directions pass back through them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def norm_std(norm: Any, tokens: Tensor) -> Tensor:
    """Return the divisor of `norm` for each of `tokens (..., D)`, `(...)`."""
    if isinstance(norm, nn.Identity):
        return torch.ones_like(tokens[..., 0])
    centred = isinstance(norm, nn.LayerNorm)
    spread = tokens.var(-1, correction=0) if centred else tokens.square().mean(-1)
    divisor: Tensor = (spread + norm.eps).sqrt()
    return divisor


def pull_back(norm: Any, maps: Tensor) -> Tensor:
    """Pull maps `(..., D)` from the output of `norm` back to its input, up to the divisor.

    Raises:
        ValueError: For a norm that is no LayerNorm.
    """
    if isinstance(norm, nn.Identity):
        return maps
    if not isinstance(norm, nn.LayerNorm):
        raise ValueError(f"expected a model with LayerNorm for --method.protect affinity, got {type(norm).__name__}:"
                         " choose another model, or --method.protect tokens")  # fmt: skip
    maps = maps * norm.weight
    return maps - maps.mean(-1, keepdim=True)
