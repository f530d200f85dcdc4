"""Slow, independent truths. The package never imports this."""

from __future__ import annotations

import numpy as np


def gpm(tasks, energy):
    """Bases after each task: from stacked rows (n, D), by SVD of what the basis does not hold (Saha et al., 2021)."""
    basis = np.zeros((tasks[0].shape[1], 0))
    out = []
    for rows in tasks:
        rest = rows - rows @ basis @ basis.T
        total = (rows**2).sum()
        held = total - (rest**2).sum()
        _, values, directions = np.linalg.svd(rest, full_matrices=False)
        for value, direction in zip(values, directions, strict=True):
            if held >= energy * total - 1e-12 * total or value <= 1e-7 * np.sqrt(total):
                break
            basis = np.concatenate([basis, direction[:, None]], axis=1)
            held += value**2
        out.append(basis)
    return out


def softmax(scores):
    """Row by row."""
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def prefix_attention(q, k, v, prefix_k, prefix_v, scale):
    """One head: softmax((q [pk; k]^T) scale) [pv; v], row by row."""
    k, v = np.concatenate([prefix_k, k]), np.concatenate([prefix_v, v])
    out = np.zeros((len(q), v.shape[1]))
    for i, row in enumerate(q):
        scores = np.array([scale * (row * key).sum() for key in k])
        weights = np.exp(scores - scores.max())
        out[i] = sum(w * value for w, value in zip(weights / weights.sum(), v, strict=True))
    return out


def adam(value, gradients, lr, decay=0.0, decoupled=False, betas=(0.9, 0.999)):
    """Where Adam's steps take `value`, by its paper (Kingma and Ba, 2015); decoupled decay is AdamW's."""
    first = second = np.zeros_like(value)
    for t, gradient in enumerate(gradients, 1):
        if decoupled:
            value = value - lr * decay * value
        else:
            gradient = gradient + decay * value
        first = betas[0] * first + (1 - betas[0]) * gradient
        second = betas[1] * second + (1 - betas[1]) * gradient**2
        unbiased = first / (1 - betas[0] ** t), second / (1 - betas[1] ** t)
        value = value - lr * unbiased[0] / (np.sqrt(unbiased[1]) + 1e-8)
    return value


def average_accuracy(a, t):
    return sum(a[t - 1][j] for j in range(t)) / t


def forgetting(a, t):
    total = 0.0
    for j in range(t - 1):
        total += max(a[i][j] for i in range(j, t)) - a[t - 1][j]
    return total / (t - 1) if t > 1 else 0.0


def backward_transfer(a, t):
    total = 0.0
    for j in range(t - 1):
        total += a[t - 1][j] - a[j][j]
    return total / (t - 1) if t > 1 else 0.0


def average_incremental_accuracy(a, t):
    return sum(average_accuracy(a, i) for i in range(1, t + 1)) / t


def ranpac(features, labels, projection, penalty, test):
    """Scores of RanPAC (McDonnell et al., 2023), with the penalty in multiples of the mean of G's diagonal."""
    hidden = np.maximum(features @ projection, 0)
    classes = labels.max() + 1
    gram = np.zeros((hidden.shape[1], hidden.shape[1]))
    target = np.zeros((hidden.shape[1], classes))
    for h, label in zip(hidden, labels, strict=True):
        gram += np.outer(h, h)
        target[:, label] += h
    weight = np.linalg.inv(gram + penalty * np.trace(gram) / len(gram) * np.eye(len(gram))) @ target
    return np.maximum(test @ projection, 0) @ weight


def relative_mahalanobis(features, labels, shrinkage, test):
    """Squared distance to the nearest class mean less that to the mean of all, image by image (Ren et al., 2021)."""
    means = [features[labels == label].mean(0) for label in range(labels.max() + 1)]
    within = sum(np.outer(x - means[c], x - means[c]) for x, c in zip(features, labels, strict=True))
    within = within / (len(features) - len(means))
    total = np.cov(features.T, bias=True)

    def distance(x, mean, covariance):
        isotropic = np.trace(covariance) / len(covariance) * np.eye(len(covariance))
        return (x - mean) @ np.linalg.inv((1 - shrinkage) * covariance + shrinkage * isotropic) @ (x - mean)

    return np.array([min(distance(x, m, within) for m in means) - distance(x, features.mean(0), total) for x in test])
