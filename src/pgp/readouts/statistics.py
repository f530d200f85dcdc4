"""Statistics of old classes instead of their images: a mean of each, and one covariance, corrected for drift."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from pgp.distributed import all_reduce_sum_
from pgp.readouts.base import Readout
from pgp.subspace import to_float64


class StatisticsReadout(Readout):
    """A readout that is fitted to class means and one pooled covariance.

    The statistics of a class are computed once, right after its task, and stored: `C * D + D * D` numbers, however many
    images there are. They go stale when later training moves the features. Projection reduces that movement; the rest
    can be compensated by moving the statistics as the features of the current task's images moved.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Readout.Config):
        """What is read, and how old statistics follow the features."""

        query: bool = False
        """Read the query of an image, its features without prompts, besides those with prompts. The query never moves,
        so half of the statistics cannot go stale, and compensation knows better how an image moved."""
        compensate: Literal["none", "shift", "linear"] = "none"
        """Move old statistics as the features of each new task's images move in its training: `shift`, each mean by the
        mean movement of the images near it (Yu et al., CVPR 2020); `linear`, means and covariance by the affine map
        that fits all movements best, a ridge regression."""
        bandwidth: float = 1.0
        """shift: width of the Gaussian weights, in standard deviations within classes."""
        ridge: float = 1.0
        """linear: ridge penalty, in multiples of the mean variance of the features."""

        def __post_init__(self) -> None:
            if not (self.bandwidth > 0 and self.ridge > 0):
                raise ValueError(f"expected bandwidth and ridge above 0, got {self.bandwidth} and {self.ridge}")

        @property
        def suffix(self) -> str:
            """The part of a readout's name that tells its query and compensation."""
            return "+query" * self.query + (f"+{self.compensate}" if self.compensate != "none" else "")

        @property
        def uses_query(self) -> bool:
            """See `Readout.Config.reads_query`."""
            return self.query

    def __init__(self, classes: int, config: StatisticsReadout.Config) -> None:
        self.classes, self.settings = classes, config
        self.needs_drift = config.compensate != "none"
        self.state: dict[str, Tensor] = {}
        self._task: dict[str, Tensor] = {}

    def select_features(self, features: Tensor, query: Tensor | None) -> Tensor:
        """Return features `(B, D)`, or features and queries `(B, D + Q)`."""
        if not self.settings.query:
            return features
        assert query is not None, "whoever knows the configuration knows that it reads queries"
        return torch.cat([features, query.to(features)], 1)

    def observe(self, features: Tensor, labels: Tensor) -> None:
        """Add a batch to the counts `(C,)`, sums `(C, D)` and pooled products `(D, D)` of this task, in float64."""
        features = to_float64(features.detach())
        chosen = nn.functional.one_hot(labels, self.classes).to(features)  # (B, C)
        _add_shares(
            self._task, {"counts": chosen.sum(0), "sums": chosen.T @ features, "products": features.T @ features}
        )

    def end_task(self) -> None:
        """Fit to the statistics of all tasks so far.

        Collective: every process must call it.

        Raises:
            ValueError: If no features of this task were observed.
        """
        if not self._task:
            raise ValueError("expected features of this task, got none: call observe() before end_task()")
        for tensor in self._task.values():
            all_reduce_sum_(tensor)
        _add_shares(self.state, self._task)
        self._task = {}
        self._fit()

    def compensate(self, before: Tensor, after: Tensor) -> None:
        """Move the statistics of old classes as the features `(n, D)` of these images moved; see `Readout.moved`."""
        if not self.state or not self.needs_drift:
            return
        device = self.state["sums"].device
        before, after = (to_float64(rows).to(device) for rows in (before, after))
        counts, means, within = self.state["counts"], self.means, self._within()
        if self.settings.compensate == "shift":
            spread = within.trace() / self._degrees_of_freedom() * self.settings.bandwidth**2
            means = means + mean_shift(means, before, after, float(spread.clamp(min=torch.finfo(torch.float64).tiny)))
        else:
            centre, offset, matrix = affine_drift(before, after, self.settings.ridge)
            means = means + offset + (means - centre) @ matrix
            transform = torch.eye(len(matrix)).to(matrix) + matrix
            within = transform.T @ within @ transform
        sums = means * counts[:, None]
        self.state = {"counts": counts, "sums": sums, "products": within + means.T @ sums}

    def state_dict(self) -> dict[str, Tensor]:
        """Return counts, sums and products."""
        return dict(self.state)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore a `state_dict`, which may be of fewer classes, the first ones, and fit to it."""
        self.state = dict(state)
        for name in ("counts", "sums") if state else ():
            missing = self.classes - len(state[name])
            self.state[name] = torch.cat([state[name], state[name].new_zeros(missing, *state[name].shape[1:])])
        if self.state:
            self._fit()

    @abc.abstractmethod
    def _fit(self) -> None:
        """Fit to the statistics."""

    @property
    def seen(self) -> Tensor:
        """Whether each class was observed, `(C,)` bool."""
        return self.state["counts"] > 0

    @property
    def means(self) -> Tensor:
        """Class means `(C, D)`, float64; 0 for a class never seen."""
        return self.state["sums"] / self.state["counts"].clamp(min=1)[:, None]

    def covariance(self, shrinkage: float) -> Tensor | None:
        """Return `(1 - a) S + a tr(S)/D I`, `(D, D)`, with S the pooled covariance within classes and a = `shrinkage`.

        None, if features do not vary within classes.
        """
        within, products = self._within(), self.state["products"]
        rounding = len(within) * torch.finfo(torch.float64).eps * products.trace()
        if not bool(within.trace() > rounding):
            return None
        covariance = within / self._degrees_of_freedom()
        isotropic = torch.eye(len(covariance)).to(covariance) * covariance.trace() / len(covariance)
        return (1 - shrinkage) * covariance + shrinkage * isotropic

    def _within(self) -> Tensor:
        """Return the sum over images of `(x - m_c)(x - m_c)^T`, `(D, D)`."""
        return self.state["products"] - self.means.T @ self.state["sums"]

    def _degrees_of_freedom(self) -> Tensor:
        return (self.state["counts"].sum() - self.seen.sum()).clamp(min=1)


def mean_shift(means: Tensor, before: Tensor, after: Tensor, spread: float) -> Tensor:
    """Return how each of `means (C, D)` moves: the weighted mean of `after - before (n, D)`.

    The weight of an image is `exp(-|before - mean|^2 / (2 spread))` (Yu et al., CVPR 2020).

    >>> images = torch.tensor([[0.0], [10.0]])
    >>> mean_shift(torch.tensor([[1.0], [9.0]]), images, images + torch.tensor([[2.0], [-2.0]]), spread=1.0)
    tensor([[ 2.],
            [-2.]])
    """
    distances = torch.cdist(means, before).square()  # (C, n)
    further = distances - distances.amin(1, keepdim=True)  # without spread, the nearest image decides
    weights = (-further / (2 * spread)).softmax(1)
    return weights @ (after - before)


def affine_drift(before: Tensor, after: Tensor, ridge: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return m `(D,)`, b `(D,)` and A `(D, D)` of the map `x -> x + b + (x - m) A` that fits `before -> after` best.

    It is a ridge regression of the movements `(n, D)`; `ridge` is in multiples of the mean variance of `before`.

    >>> images = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    >>> affine_drift(images, images * torch.tensor([3.0, 1.0]) + 5, ridge=1e-9)[2].round(decimals=4)
    tensor([[2., 0.],
            [0., 0.]])
    """
    centre, moved = before.mean(0), after - before
    offset, x = moved.mean(0), before - centre
    second = x.T @ x / len(x)
    held = ridge * second.trace() / len(second) + torch.finfo(second.dtype).tiny
    matrix = torch.linalg.solve(second + held * torch.eye(len(second)).to(second), x.T @ (moved - offset) / len(x))
    return centre, offset, matrix


def _add_shares(total: dict[str, Tensor], new: dict[str, Tensor]) -> None:
    for name, tensor in new.items():
        total[name] = total[name] + tensor if name in total else tensor
