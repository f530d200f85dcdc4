"""Results on training images that a classifier was not fitted to: they calibrate probabilities, and choose settings.

See Guo et al., "On Calibration of Modern Neural Networks", ICML 2017.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from pgp.subspace import to_float64

NUM_FOLDS = 5
"""Number of folds that the images of each class are divided into, or more if a fold would have more images than are
enough. A fit leaves out the images of one fold and is tested on them (cross-validation)."""
NUM_HELD_OUT = 500
"""Number of held-out images that are enough. A task is tested with as many folds as they need. With fewer images, the
results of the latest tasks are kept as well. Still older results are dropped: they are of fits to fewer images, whose
logits and distances are larger."""
TEMPERATURES = 2.0 ** (torch.arange(-64, 129, dtype=torch.float64) / 8)
"""Temperatures that are tried, from 2^-8 to 2^16 in steps of 9 %, `(G,)`: logits of ridge regression are below 1, and
those of LDA are thousands if features hardly vary within classes."""


def num_folds(images: int) -> tuple[int, int]:
    """Return into how many folds a task of so many images is divided, and how many of them are held out in turn.

    >>> [num_folds(images) for images in (20, 500, 1_000, 2_500, 50_000)]
    [(5, 5), (5, 5), (5, 3), (5, 1), (100, 1)]
    """
    folds = max(NUM_FOLDS, images // NUM_HELD_OUT)
    return folds, min(folds, math.ceil(NUM_HELD_OUT * folds / max(1, images)))


def brier_scores(logits: Tensor, labels: Tensor) -> Tensor:
    """Return summed Brier scores of logits `(B, C)` divided by each of `TEMPERATURES`, `(2, G)` float64.

    Row 0 is the sum over images of the squared distance of the probabilities `(C,)` to the one-hot label. Row 1 is the
    same if each image were of a class that is not among the C, so that every prediction is wrong. Adding the results
    for all images of a stream gives those of the stream, without storing any image. Source: Brier, "Verification of
    forecasts expressed in terms of probability", 1950.

    >>> scores = brier_scores(torch.tensor([[8.0, 0.0], [8.0, 0.0]]), torch.tensor([0, 1]))
    >>> float(TEMPERATURES[scores[0].argmin()])  # half of the predictions are right, so no confidence is the best
    65536.0
    """
    logits = to_float64(logits)
    rows = torch.arange(len(labels), device=logits.device)
    sums = []
    for t in TEMPERATURES.to(logits.device):
        probabilities = (logits / t).softmax(1)  # (B, C)
        squares = probabilities.square().sum()
        sums.append(torch.stack([squares - 2 * probabilities[rows, labels].sum(), squares]))
    return torch.stack(sums, 1) + len(labels)


class HeldOutTest(NamedTuple):
    """Results on the held-out images of a task, at the end of that task."""

    images: int
    """Number of images, without their augmented views."""
    views: int
    """Number of images and of their augmented views."""
    errors: Tensor
    """`brier_scores` of all images and views, by candidate and temperature, `(2, K, G)`."""
    unlike: Tensor = torch.empty(0)
    """How unlike the learned classes each image is, in ascending order; empty if the readout cannot tell."""


class HeldOutTests:
    """Results on held-out images of the latest tasks: at least `enough` images, if there are so many.

    Candidates and temperatures are compared by the Brier score. Unlike the cross-entropy, a few grave errors do not
    dominate it. One wrong prediction is added in all (row 1 of `brier_scores`, as the mean over all images), so that
    few images, if all are predicted correctly, do not make a classifier certain. Platt, "Probabilistic outputs for
    support vector machines", 1999, smooths labels for the same reason.

    Args:
        candidates: Number K of candidates that are compared.
        enough: Number of images that are enough, so that results of older tasks are dropped.
    """

    def __init__(self, candidates: int, enough: int = NUM_HELD_OUT) -> None:
        self.candidates, self.enough = candidates, enough
        self.by_task: list[HeldOutTest] = []

    def add(self, test: HeldOutTest) -> None:
        """Add the results of a task, and drop old ones that are not needed any more."""
        self.by_task.append(test)
        while sum(test.images for test in self.by_task[1:]) >= self.enough:
            del self.by_task[0]

    def add_unlike(self, unlike: Tensor) -> None:
        """Add how unlike the learned classes the images of the latest task are, `(n,)`."""
        self.by_task[-1] = self.by_task[-1]._replace(unlike=unlike.sort()[0])

    @property
    def scores(self) -> Tensor:
        """Brier score with one wrong prediction, by candidate and temperature, `(K, G)`."""
        errors = self._errors().sum(0)  # (2, K, G)
        return errors[0] + errors[1] / max(1, sum(test.views for test in self.by_task))

    def _errors(self) -> Tensor:
        """Return the errors of all tests, `(tasks, 2, K, G)`."""
        none = torch.zeros(0, 2, self.candidates, len(TEMPERATURES), dtype=torch.float64)
        return torch.cat([none, *(test.errors[None] for test in self.by_task)])

    @property
    def is_informative(self) -> bool:
        """Whether the scores depend on the temperature: not if there are no results, or only one class."""
        return bool(self.scores.amax() > self.scores.amin())

    @property
    def best_candidate(self) -> int:
        """Index of the candidate with the best score at its best temperature."""
        return int(self.scores.amin(1).argmin())

    def temperature(self, candidate: int) -> float:
        """Return the best temperature of a candidate."""
        return float(TEMPERATURES[self.scores[candidate].argmin()])

    def threshold(self, keep: float) -> float | None:
        """Return the value that a fraction `keep` of the images do not exceed in `unlike`; None if there are none."""
        unlike = torch.cat([torch.empty(0), *(test.unlike for test in self.by_task)]).sort()[0]
        return float(unlike[min(int(keep * len(unlike)), len(unlike) - 1)]) if len(unlike) else None

    def state_dict(self) -> dict[str, Tensor]:
        """Return the results as tensors."""
        sizes = [(test.images, test.views, len(test.unlike)) for test in self.by_task]
        return {
            "errors": self._errors(),
            "unlike": torch.cat([torch.empty(0), *(test.unlike for test in self.by_task)]),
            "test_sizes": torch.tensor(sizes, dtype=torch.long).reshape(-1, 3),
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore a `state_dict`."""
        errors, unlike, sizes = (state[name].cpu() for name in ("errors", "unlike", "test_sizes"))
        images, views, lengths = sizes.T.tolist()
        self.by_task = [HeldOutTest(*test) for test in zip(images, views, errors, unlike.split(lengths), strict=True)]
