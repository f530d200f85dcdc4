"""How class statistics drift with the features, estimated on images of a new task before and after its training."""

from __future__ import annotations

import torch
from torch import Tensor

from pgp.readouts.covariance import SquaredDistances, rounding_error, shrink


def mean_shift(means: Tensor, before: Tensor, after: Tensor, variance: float) -> Tensor:
    """Return the estimated drift `(C, D)` of each of `means (C, D)`: a weighted mean of `after - before (n, D)`.

    The weight of an image is `exp(-|before - mean|^2 / (2 variance))` (Yu et al., CVPR 2020).

    >>> images = torch.tensor([[0.0], [10.0]])
    >>> mean_shift(torch.tensor([[1.0], [9.0]]), images, images + torch.tensor([[2.0], [-2.0]]), variance=1.0)
    tensor([[ 2.],
            [-2.]])
    """
    distances = torch.cdist(means, before).square()  # (C, n)
    # subtracting the smallest distance keeps the softmax finite for tiny variances: the nearest image then decides
    relative = distances - distances.amin(1, keepdim=True)  # (C, n)
    weights = (-relative / (2 * variance)).softmax(1)  # (C, n)
    return weights @ (after - before)


def affine_drift(before: Tensor, after: Tensor, ridge: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return m `(D,)`, b `(D,)` and A `(D, D)` of the map `x -> x + b + (x - m) A` that fits `before -> after` best.

    This is a ridge regression of the drift `after - before (n, D)`. The penalty is `ridge` times the mean variance of
    `before`.

    >>> images = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    >>> affine_drift(images, images * torch.tensor([3.0, 1.0]) + 5, ridge=1e-9)[2].round(decimals=4)
    tensor([[2., 0.],
            [0., 0.]])
    """
    centre, drift = before.mean(0), after - before
    offset, x = drift.mean(0), before - centre
    covariance = x.T @ x / len(x)  # (D, D)
    penalty = ridge * covariance.trace() / len(covariance) + torch.finfo(covariance.dtype).tiny
    penalised = covariance + penalty * torch.eye(len(covariance)).to(covariance)
    matrix = torch.linalg.solve(penalised, x.T @ (drift - offset) / len(x))  # (D, D)
    return centre, offset, matrix


def transformed_covariance(within: Tensor, matrix: Tensor, weights: Tensor, shares: Tensor) -> Tensor:
    """Return the covariance `(D, D)` after the images of each class went through `x -> x + w x A`, A = `matrix (D, D)`.

    Args:
        within: Covariance within classes, equal in all of them.
        matrix: The map.
        weights: w of each class, `(C,)`.
        shares: Share of each class in all images, `(C,)`.
    """
    mixed = within @ matrix
    return within + shares @ weights * (mixed + mixed.T) + shares @ weights.square() * (matrix.T @ mixed)


def nearness(means: Tensor, images: Tensor) -> Tensor:
    """Return a weight for each class, from 1 if its mean lies among the images to 0 if it is far away, `(C,)`.

    It is `min(1, 1 / r)^4`, with r the squared Mahalanobis distance of the class mean to the mean of the images,
    relative to the average distance of an image. The covariance is shrunk by 0.1. Each image is left out of the mean
    and the covariance for its own distance, which would be far too small otherwise if images are few. If images do not
    vary, the weights are 0.

    Args:
        means: Class means, `(C, D)`.
        images: Features of the new task's images, `(n, D)`.

    >>> images = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    >>> nearness(torch.tensor([[0.0, 0.5], [1.0, 0.0], [3.0, 0.0], [10.0, 0.0]]), images).round(decimals=4)
    tensor([1.0000, 1.0000, 0.0595, 0.0000])
    """
    centre, shrinkage = images.mean(0), 0.1
    scatter = (images - centre).T @ (images - centre)  # (D, D)
    if scatter.trace() <= rounding_error(images.T @ images):
        return torch.zeros(len(means)).to(means)
    distances = SquaredDistances(centre[None], shrink(scatter / len(images), shrinkage))
    n, included = len(images), distances(images)[:, 0]  # (n,)
    ratio = n / (n - 1)  # of an image's distance from the mean of the others to that from the mean of all
    left_out = ratio**2 * included / (1 - (1 - shrinkage) * ratio * included / n)
    relative = distances(means)[:, 0] / left_out.mean()
    return relative.clamp(min=1).reciprocal() ** 4
