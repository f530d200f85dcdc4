"""Logistic regression on features drawn from class statistics: no image is stored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pgp.readouts.statistics import StatisticsReadout
from pgp.rng import make_generator
from pgp.subspace import to_float64


class Logistic(StatisticsReadout):
    """A linear classifier of all classes seen so far, trained again after each task.

    It is trained on draws from a normal distribution around each class mean, with the shrunk covariance that all
    classes share, in coordinates in which that covariance is the identity. It starts from its last weights, and for the
    classes of a new task from the method's head.
    """

    @dataclass(frozen=True)
    class Config(StatisticsReadout.Config):
        """How many features are drawn, and how the classifier is trained on them."""

        tag = "logistic"

        shrinkage: float = 0.1
        """Weight of the isotropic part of the covariance, in (0, 1]."""
        draws: int = 32
        """Features drawn for each class."""
        decay: float = 1e-3
        """L2 penalty: weight of half the sum of squared weights."""
        steps: int = 50
        """Largest number of L-BFGS iterations."""

        def __post_init__(self) -> None:
            super().__post_init__()
            if not (0 < self.shrinkage <= 1 and self.draws > 0 and self.decay >= 0 and self.steps > 0):
                raise ValueError(f"expected shrinkage in (0, 1], draws and steps above 0 and decay of at least 0, got"
                                 f" {self}")  # fmt: skip

        @property
        def name(self) -> str:
            """See `Readout.Config.name`."""
            return "logistic" + self.suffix

        def build(self, head: nn.Module, classes: int, seed: int) -> Logistic:
            """Return a readout that has seen no class yet."""
            return Logistic(head, classes, self, seed)

    def __init__(self, head: nn.Module, classes: int, config: Logistic.Config | None = None, seed: int = 0) -> None:
        self.config = config or Logistic.Config()
        super().__init__(classes, self.config)
        self.name, self.head, self.seed = self.config.name, head, seed
        self._weight = self._bias = torch.empty(0)  # (C, D), (C,)

    def logits(self, features: Tensor) -> Tensor:
        """Return `W x + b`, `(B, C)`; -inf for classes that were never observed.

        Raises:
            ValueError: If no task was finished yet.
        """
        if not self.state:
            raise ValueError("expected at least one task before logits(): call observe() and end_task() first")
        x = to_float64(features)
        weight, bias = self._weight.to(x.device), self._bias.to(x.device)
        logits = x @ weight.T + bias.masked_fill(~self.seen.to(x.device), -torch.inf)
        return logits.to(features.device, torch.float32)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the statistics and the classifier."""
        return {**self.state, "weight": self._weight, "bias": self._bias} if self.state else {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore a `state_dict`, which may be of fewer classes, the first ones."""
        if state:
            statistics = dict(state)
            weight, bias = statistics.pop("weight"), statistics.pop("bias")
            missing = self.classes - len(bias)
            self._weight = torch.cat([weight, weight.new_zeros(missing, weight.shape[1])])
            self._bias = torch.cat([bias, bias.new_zeros(missing)])
            super().load_state_dict(statistics)

    def _fit(self) -> None:
        """Do nothing: `end_task` trains, and a restored classifier is trained already."""

    def end_task(self) -> None:
        """See `StatisticsReadout.end_task`; then train on draws from the statistics."""
        known = self.seen if self.state else torch.zeros(0, dtype=torch.bool)
        super().end_task()
        self._begin(known)
        self._train()

    def _begin(self, known: Tensor) -> None:
        """Start the rows of classes that are not `known` yet from the method's head, if it is linear."""
        if not len(known):
            self._weight, self._bias = torch.zeros_like(self.means), torch.zeros_like(self.means[:, 0])
            known = torch.zeros_like(self.seen)
        new = self.seen & ~known
        if isinstance(self.head, nn.Linear) and self.head.weight.shape == self._weight.shape:
            self._weight[new] = self.head.weight.detach().to(self._weight)[new]
            self._bias[new] = self.head.bias.detach().to(self._bias)[new]

    @torch.enable_grad()
    def _train(self) -> None:
        means = self.means[self.seen]  # (S, D)
        covariance = self.covariance(self.config.shrinkage)
        root = torch.eye(means.shape[1]).to(means) if covariance is None else torch.linalg.cholesky(covariance)
        centre = means.mean(0)
        round_ = torch.linalg.solve_triangular(
            root, (means - centre).T, upper=False
        ).T  # means where features are round
        noise = torch.randn(self.config.draws, *means.shape, dtype=means.dtype,
                            generator=make_generator(self.seed, "logistic", int(self.seen.sum())))  # fmt: skip
        x = (round_ + noise.to(means.device) * (covariance is not None)).flatten(0, 1)  # (draws * S, D)
        labels = torch.arange(len(means), device=means.device).repeat(self.config.draws)
        W = (self._weight[self.seen] @ root).requires_grad_()
        b = (self._bias[self.seen] + self._weight[self.seen] @ centre).requires_grad_()
        optimizer = torch.optim.LBFGS([W, b], max_iter=self.config.steps, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimizer.zero_grad()
            value = F.cross_entropy(x @ W.T + b, labels) + self.config.decay * W.square().sum() / 2
            value.backward()
            return value

        optimizer.step(loss)
        weight = torch.linalg.solve_triangular(root.mT, W.detach().T, upper=True).T
        self._weight[self.seen] = weight
        self._bias[self.seen] = b.detach() - weight @ centre
