"""A readout of your own: the class mean with the largest cosine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pgp.distributed import all_reduce_sum_
from pgp.readouts import Readout
from pgp.subspace import to_float64


class CosineMeans(Readout):
    """Sums of normalised features, one for each class; an image belongs to the class with the nearest direction."""

    @dataclass(frozen=True)
    class Config(Readout.Config):
        """How sharp the probabilities are."""

        tag = "cosine-means"

        temperature: float = 0.05
        """Divides the cosines, which become logits."""

        @property
        def name(self) -> str:
            """See `Readout.Config.name`."""
            return "cosine"

        def build(self, head: nn.Module, classes: int, seed: int) -> CosineMeans:
            """Return a readout that has seen no class yet."""
            return CosineMeans(classes, self)

    def __init__(self, classes: int, config: CosineMeans.Config) -> None:
        self.name, self.config, self.classes = config.name, config, classes
        self.sums = torch.empty(0)
        self._task = torch.empty(0)

    def observe(self, features: Tensor, labels: Tensor) -> None:
        """Add the directions `(B, D)` of a batch to the sums of this task."""
        directions = F.normalize(to_float64(features), dim=1)
        chosen = F.one_hot(labels, self.classes).to(directions)  # (B, C)
        sums = chosen.T @ directions  # (C, D)
        self._task = self._task + sums if self._task.numel() else sums

    def end_task(self) -> None:
        """Add this task's sums, over all processes.

        Collective: every process must call it.
        """
        all_reduce_sum_(self._task)
        self.sums = self.sums + self._task if self.sums.numel() else self._task
        self._task = torch.empty(0)

    def logits(self, features: Tensor) -> Tensor:
        """Return the cosines over the temperature, `(B, C)`; -inf for classes that were never observed."""
        means = F.normalize(self.sums, dim=1)
        cosines = F.normalize(to_float64(features), dim=1) @ means.T
        cosines = cosines.masked_fill(~self.sums.any(1), -torch.inf)
        return (cosines / self.config.temperature).to(features.device, torch.float32)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the sums."""
        return {"sums": self.sums}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore a `state_dict`, which may be of fewer classes, the first ones."""
        sums = state["sums"]
        missing = self.classes - len(sums) if sums.numel() else 0
        self.sums = torch.cat([sums, sums.new_zeros(missing, *sums.shape[1:])])
