"""Logistic regression on features sampled from class statistics: it stores no image."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pgp.readouts.covariance import check_shrinkage, cholesky, shrinkage_candidates
from pgp.readouts.statistics import StatisticsReadout
from pgp.rng import make_generator
from pgp.subspace import to_float64


class Logistic(StatisticsReadout):
    """A linear classifier of all classes seen so far, trained again after each task.

    It is trained on samples of a normal distribution around each class mean, with the shrunk covariance that all
    classes share. The samples are whitened: in their coordinates that covariance is the identity. Training starts from
    the previous weights, and for the classes of a new task from the weights of the method's head.
    """

    @dataclass(frozen=True)
    class Config(StatisticsReadout.Config):
        """Number of sampled features, and how the classifier is trained on them."""

        tag = "logistic"

        shrinkage: float | None = 0.1
        """Weight of the isotropic term of the covariance, in (0, 1]. None chooses it by the Brier score of held-out
        training images, after each task, which trains the classifier once for each value that is tried."""
        draws: int = 32
        """Number of features sampled for each class."""
        decay: float = 1e-3
        """Weight of the L2 penalty, half the sum of squared weights."""
        steps: int = 50
        """Maximum number of L-BFGS iterations."""

        def __post_init__(self) -> None:
            super().__post_init__()
            check_shrinkage(self.shrinkage)
            if not (self.draws > 0 and self.decay >= 0 and self.steps > 0):
                raise ValueError(f"expected draws and steps above 0 and decay of at least 0, got {self}")

        @property
        def name(self) -> str:
            """See `Readout.Config.name`."""
            return "logistic" + self.suffix + ("+tuned" if self.shrinkage is None else "")

        @property
        def uses_head(self) -> bool:
            """See `Readout.Config.uses_head`. New classes start from its weights."""
            return True

        def build(self, head: nn.Module, classes: int, seed: int) -> Logistic:
            """Return a readout that has seen no class yet."""
            return Logistic(head, classes, self, seed)

    max_folds = 1

    def __init__(self, head: nn.Module, classes: int, config: Logistic.Config | None = None, seed: int = 0) -> None:
        self.config = config or Logistic.Config()
        super().__init__(classes, self.config, *shrinkage_candidates(self.config.shrinkage))
        self.name, self.head, self.seed = self.config.name, head, seed
        self._weight = self._bias = torch.empty(0)  # (C, D), (C,)
        self._start: tuple[Tensor, Tensor, Tensor] | None = None
        """While a task ends: weight, bias, and which classes `(C,)` earlier tasks have shown."""

    def logits(self, features: Tensor) -> Tensor:
        """Return `W x + b`, `(B, C)`; -inf for classes that were never observed.

        Raises:
            ValueError: If no task has ended yet.
        """
        self._require_fit("logits")
        x = to_float64(features)
        weight, bias = self._weight.to(x.device), self._bias.to(x.device)
        logits = x @ weight.T + bias.masked_fill(~self.seen.to(x.device), -torch.inf)
        return logits.to(features.device, torch.float32)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the statistics and the classifier."""
        return {**super().state_dict(), "weight": self._weight, "bias": self._bias} if self.state else {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore a `state_dict`. It may cover only the first classes."""
        if state:
            statistics = dict(state)
            weight, bias = statistics.pop("weight"), statistics.pop("bias")
            missing = max(0, self.classes - len(bias))
            self._weight = torch.cat([weight, weight.new_zeros(missing, weight.shape[1])])
            self._bias = torch.cat([bias, bias.new_zeros(missing)])
            super().load_state_dict(statistics)

    def end_task(self) -> None:
        """Update the statistics as `StatisticsReadout.end_task`, then train on samples from them."""
        previously_seen = self.seen if self.state else torch.zeros(self.classes, dtype=torch.bool)
        self._start = self._weight, self._bias, previously_seen
        super().end_task()
        self._start = None

    def _fit(self) -> None:
        """Train on samples from the statistics, inside `end_task`. A restored classifier is trained already."""
        if self._start is not None:
            self._initialise(*self._start)
            self._train()

    def _initialise(self, weight: Tensor, bias: Tensor, previously_seen: Tensor) -> None:
        """Start from the previous weight and bias, and for new classes from the method's head if it is linear."""
        if not len(bias):
            weight, bias = torch.zeros_like(self.means), torch.zeros_like(self.means[:, 0])
        self._weight, self._bias = weight.clone(), bias.clone()
        new = self.seen & ~previously_seen.to(self.seen.device)  # (C,)
        if isinstance(self.head, nn.Linear) and self.head.weight.shape == self._weight.shape:
            self._weight[new] = self.head.weight.detach().to(self._weight)[new]
            self._bias[new] = self.head.bias.detach().to(self._bias)[new]

    @torch.enable_grad()
    def _train(self) -> None:
        """Train the weights and biases of the seen classes on whitened samples."""
        means = self.means[self.seen]  # (S, D)
        covariance = self.covariance(self.regularisation)
        root = torch.eye(means.shape[1]).to(means) if covariance is None else cholesky(covariance)
        centre = means.mean(0)  # (D,)
        whitened = torch.linalg.solve_triangular(root, (means - centre).T, upper=False).T  # (S, D)
        noise = torch.randn(self.config.draws, *means.shape, dtype=means.dtype,
                            generator=make_generator(self.seed, "logistic", int(self.seen.sum())))  # fmt: skip
        # without a covariance, every sample is its class mean
        x = (whitened + noise.to(means.device) * (covariance is not None)).flatten(0, 1)  # (draws * S, D)
        labels = torch.arange(len(means), device=means.device).repeat(self.config.draws)  # (draws * S,)
        W = (self._weight[self.seen] @ root).requires_grad_()  # (S, D)
        b = (self._bias[self.seen] + self._weight[self.seen] @ centre).requires_grad_()  # (S,)
        optimizer = torch.optim.LBFGS([W, b], max_iter=self.config.steps, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimizer.zero_grad()
            value = F.cross_entropy(x @ W.T + b, labels) + self.config.decay * W.square().sum() / 2
            value.backward()
            return value

        optimizer.step(loss)
        weight = torch.linalg.solve_triangular(root.mT, W.detach().T, upper=True).T  # (S, D), of features
        self._weight[self.seen] = weight
        self._bias[self.seen] = b.detach() - weight @ centre
