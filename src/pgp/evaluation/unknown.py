"""How well a score tells images of classes that were never learned from images of learned classes."""

from __future__ import annotations

from sklearn.metrics import roc_auc_score
from torch import Tensor, cat, ones_like, zeros_like


def auroc(known: Tensor, unknown: Tensor) -> float:
    """Return the area under the ROC curve: how often an unknown image has a higher score than a known one, in [0, 1].

    Args:
        known: Scores of images of learned classes, `(n,)`.
        unknown: Scores of images of other classes, `(m,)`.
    """
    return float(roc_auc_score(cat([zeros_like(known), ones_like(unknown)]).cpu(), cat([known, unknown]).cpu()))


def false_positive_rate(known: Tensor, unknown: Tensor, keep: float = 0.95) -> float:
    """Return the fraction of unknown images that pass for known, at the threshold that keeps `keep` of the known ones.

    >>> import torch
    >>> false_positive_rate(torch.arange(100.0), torch.tensor([50.0, 94.0, 95.0, 200.0]))
    0.5
    """
    threshold = known.sort()[0][min(int(keep * len(known)), len(known) - 1)]
    return float((unknown < threshold).float().mean())
