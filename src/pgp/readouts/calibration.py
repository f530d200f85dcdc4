"""Results on training images that a classifier was not fitted to: they calibrate probabilities, and choose settings.

See Guo et al., "On Calibration of Modern Neural Networks", ICML 2017.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pgp.subspace import to_float64

NUM_HELD_OUT = 100
"""Number of held-out images whose results are kept, of the latest tasks. Older results are dropped: they are of fits to
fewer images, whose logits and distances are larger."""
TEMPERATURES = 2.0 ** (torch.arange(-80, 65, dtype=torch.float64) / 8)
"""Temperatures that are tried, from 2^-10 to 2^8 in steps of 9 %, `(G,)`."""


def losses_by_temperature(logits: Tensor, labels: Tensor, prior: float = 0.0) -> Tensor:
    """Return the summed cross-entropy `(G,)` of logits `(B, C)` divided by each of `TEMPERATURES`, in float64.

    Adding the results for all images of a stream gives the loss of the stream, without storing any image.

    Args:
        logits: `(B, C)`.
        labels: `(B,)`.
        prior: How many times each image also counts as one of any other class. With `1 / B`, one wrong prediction is
            added in all, so that few images, if all are predicted correctly, do not make a classifier certain. Platt,
            "Probabilistic outputs for support vector machines", 1999, smooths labels for the same reason.

    >>> losses = losses_by_temperature(torch.tensor([[8.0, 0.0], [8.0, 0.0]]), torch.tensor([0, 1]))
    >>> float(TEMPERATURES[losses.argmin()])  # half of the predictions are right, so no confidence is the best
    256.0
    >>> right = torch.tensor([[8.0, 0.0]]).expand(9, 2), torch.zeros(9, dtype=torch.long)
    >>> best = TEMPERATURES[losses_by_temperature(*right, prior=1 / 9).argmin()]
    >>> round(float((8 / best).sigmoid()), 1)  # as sure as 9 of 10
    0.9
    """
    logits = to_float64(logits)
    temperatures = TEMPERATURES.to(logits.device)
    losses = torch.stack([F.cross_entropy(logits / t, labels, reduction="sum") for t in temperatures])
    if prior:
        others = logits.scatter(1, labels[:, None], -torch.inf)  # (B, C)
        has_others = others.isfinite().any(1)
        both = torch.stack([others[has_others], logits[has_others]])  # (2, B, C)
        losses += prior * torch.stack([(both / t).logsumexp(2).diff(dim=0).sum() for t in temperatures])
    return losses


class HeldOutTest(NamedTuple):
    """Results on the held-out images of a task, at the end of that task."""

    images: int
    """Number of images, without their augmented views."""
    losses: Tensor
    """Cross-entropy of all images and views by candidate and temperature, `(K, G)`; 0 if there is only one class."""
    scores: Tensor = torch.empty(0)
    """How unlike the learned classes each image is, in ascending order; empty if the readout cannot tell."""


class HeldOutTests:
    """Results on held-out images of the latest tasks: at least `NUM_HELD_OUT` images, if there are so many.

    Args:
        candidates: Number K of candidates that are compared.
    """

    def __init__(self, candidates: int) -> None:
        self.candidates = candidates
        self.by_task: list[HeldOutTest] = []

    def add(self, test: HeldOutTest) -> None:
        """Add the results of a task, and drop old ones that are not needed any more."""
        self.by_task.append(test)
        while sum(test.images for test in self.by_task[1:]) >= NUM_HELD_OUT:
            del self.by_task[0]

    def add_scores(self, scores: Tensor) -> None:
        """Add scores of the images of the latest task, `(n,)`."""
        self.by_task[-1] = self.by_task[-1]._replace(scores=scores.sort()[0])

    @property
    def losses(self) -> Tensor:
        """Cross-entropy by candidate and temperature, `(K, G)`."""
        none = torch.zeros(self.candidates, len(TEMPERATURES), dtype=torch.float64)
        return torch.stack([none, *(test.losses for test in self.by_task)]).sum(0)

    @property
    def best_candidate(self) -> int:
        """Index of the candidate with the smallest cross-entropy at its best temperature."""
        return int(self.losses.amin(1).argmin())

    def temperature(self, candidate: int) -> float:
        """Return the temperature that minimises the cross-entropy of a candidate."""
        return float(TEMPERATURES[self.losses[candidate].argmin()])

    def threshold(self, keep: float) -> float | None:
        """Return the score that a fraction `keep` of the images do not exceed; None if there are no scores."""
        scores = torch.cat([torch.empty(0), *(test.scores for test in self.by_task)]).sort()[0]
        return float(scores[min(int(keep * len(scores)), len(scores) - 1)]) if len(scores) else None

    def state_dict(self) -> dict[str, Tensor]:
        """Return the results as tensors."""
        sizes = [(test.images, len(test.scores)) for test in self.by_task]
        return {
            "losses": torch.stack([self.losses, *(test.losses for test in self.by_task)])[1:],  # (tasks, K, G)
            "scores": torch.cat([torch.empty(0), *(test.scores for test in self.by_task)]),
            "test_sizes": torch.tensor(sizes, dtype=torch.long).reshape(-1, 2),
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore a `state_dict`."""
        losses, scores, sizes = (state[name].cpu() for name in ("losses", "scores", "test_sizes"))
        by_task = scores.split(sizes[:, 1].tolist())
        self.by_task = [HeldOutTest(*test) for test in zip(sizes[:, 0].tolist(), losses, by_task, strict=True)]
