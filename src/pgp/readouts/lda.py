"""Linear discriminant analysis on streamed class statistics: closed form, no images kept."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pgp.processes import add_up
from pgp.readouts import Readout


class LDA(Readout):
    """Class means and one pooled covariance S, shrunk: `(1 - a) S + a tr(S)/D I`; equal priors. Where features do not
    vary within classes, which is so with one image of each, the nearest mean decides.

    Statistics of a class are taken once, right after its task, and kept as they were: `C * D + D * D` numbers, whatever
    the number of images. Where later training moves the features, they go stale; that is what projection is to prevent.
    """

    @dataclass(frozen=True)
    class Config(Readout.Config):
        """How far the covariance is pulled toward a round one."""

        shrinkage: float = 0.1
        """a, in (0, 1]; 1 is the nearest class mean."""

        def __post_init__(self) -> None:
            if not 0 < self.shrinkage <= 1:
                raise ValueError(f"expected shrinkage in (0, 1], got {self.shrinkage}")

        def build(self, head: nn.Module, classes: int) -> LDA:
            """A readout that has seen no class yet."""
            return LDA(classes, self.shrinkage)

    name = "lda"

    def __init__(self, classes: int, shrinkage: float = 0.1) -> None:
        self.classes, self.shrinkage = classes, shrinkage
        self.state: dict[str, Tensor] = {}
        self._task: dict[str, Tensor] = {}
        self._weight = self._bias = self._centre = torch.empty(0)

    def observe(self, features: Tensor, labels: Tensor) -> None:
        """Add to the counts `(C,)`, sums `(C, D)` and pooled products `(D, D)` of this task, in float64."""
        features = features.detach().double()
        chosen = nn.functional.one_hot(labels, self.classes).double()  # (B, C)
        _add(self._task, {"counts": chosen.sum(0), "sums": chosen.T @ features, "products": features.T @ features})

    def end_task(self) -> None:
        """Fit to the statistics of all tasks so far."""
        if not self._task:
            raise ValueError("expected features of this task, got none: call observe() before end_task()")
        for tensor in self._task.values():
            add_up(tensor)
        _add(self.state, self._task)
        self._task = {}
        self._fit()

    def logits(self, features: Tensor) -> Tensor:
        """`d_c^T S^-1 (x - m) - d_c^T S^-1 d_c / 2`, `(B, C)`, where d_c is how far the mean of class c lies from m,
        the mean of all class means; -inf for classes that were never observed.
        """
        if not self.state:
            raise ValueError("expected at least one task before logits(): call observe() and end_task() first")
        weight, bias, centre = (tensor.to(features.device) for tensor in (self._weight, self._bias, self._centre))
        return ((features.double() - centre) @ weight + bias).float()

    def state_dict(self) -> dict[str, Tensor]:
        """Counts, sums and products."""
        return dict(self.state)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the statistics and fit to them; they may be of the first classes only."""
        self.state = dict(state)
        for name in ("counts", "sums") if state else ():
            missing = self.classes - len(state[name])
            self.state[name] = torch.cat([state[name], state[name].new_zeros(missing, *state[name].shape[1:])])
        if self.state:
            self._fit()

    def _fit(self) -> None:
        counts, sums, products = self.state["counts"], self.state["sums"], self.state["products"]
        seen = counts > 0
        means = sums / counts.clamp(min=1)[:, None]  # (C, D)
        within = products - means.T @ sums  # sum over images of (x - m_c)(x - m_c)^T
        covariance = within / (counts.sum() - seen.sum()).clamp(min=1)
        round_ = torch.eye(len(covariance)).to(covariance) * covariance.trace() / len(covariance)
        shrunk = (1 - self.shrinkage) * covariance + self.shrinkage * round_
        rounding = len(covariance) * torch.finfo(torch.float64).eps * products.trace()
        if not bool(within.trace() > rounding):
            if self.shrinkage < 1:
                warnings.warn("no spread of features within classes (one image of each?): the nearest mean decides",
                              stacklevel=2)  # fmt: skip
            shrunk = torch.eye(len(covariance)).to(covariance)
        self._centre = means[seen].mean(0)
        centred = means - self._centre
        self._weight = torch.linalg.solve(shrunk, centred.T)  # (D, C)
        self._bias = torch.where(seen, -(centred * self._weight.T).sum(1) / 2, -torch.inf)  # (C,)


def _add(total: dict[str, Tensor], new: dict[str, Tensor]) -> None:
    for name, tensor in new.items():
        total[name] = total[name] + tensor if name in total else tensor
