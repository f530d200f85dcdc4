"""Accuracy along the stream of an online run: every image is predicted when it comes, and learned after that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pgp.distributed import all_reduce_sum_
from pgp.methods.base import Method, mask_logits
from pgp.scenario import Task


class OnlineAccuracy:
    """Counts of images that came, and of those whose class was told before they were learned, by task.

    A prediction is the method's own head's over the classes of all tasks so far, the current one's among them, with no
    task label and image by image, in its test view. It costs another loading, query and forward pass of each training
    image (and for CLIP, in each step, its class names in their context); nothing that is learned changes.
    """

    def __init__(self, tasks: int) -> None:
        self.counts = torch.zeros(tasks, 2, dtype=torch.int64)
        """Right predictions and images by task `(T, 2)`, over all processes."""
        self._new = torch.zeros(2, dtype=torch.int64)
        self._looked = self.counts.sum(0)

    @torch.no_grad()
    def predict(self, method: Method, images: Tensor, labels: Tensor, task: Task, seen: Sequence[int]) -> None:
        """Predict images `(B, 3, S, S)` of `task` that are about to be learned; `seen` are the classes to choose from.

        No device is waited for.
        """
        method.refresh_head(task)  # what the head keeps of this task, up to the last step
        logits = mask_logits(method(images).float(), seen)
        right = (logits.argmax(1) == labels).sum()
        self._new = self._new.to(right.device) + torch.stack([right, torch.full_like(right, len(labels))])

    def summarize(self, task: Task) -> dict[str, float]:
        """Return the images so far, the accuracy over all of them, and over those since the last look.

        It waits for the device. Collective: every process must call it.
        """
        self.counts[task.index] += all_reduce_sum_(self._new).cpu()
        self._new = torch.zeros_like(self._new)
        total = self.counts.sum(0)
        since, self._looked = total - self._looked, total
        return {"images": int(total[1]), "accuracy": _rate(total), "recent": _rate(since)}

    def accuracy(self, task: Task) -> float:
        """Return the accuracy over the images of one task, as they came."""
        return _rate(self.counts[task.index])

    def state_dict(self) -> dict[str, Tensor]:
        """Return the counts, after a `summarize`."""
        return {"counts": self.counts}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore a `state_dict`."""
        self.counts = torch.zeros_like(self.counts)
        self.counts[: len(state["counts"])] = state["counts"]  # tasks may have been added since
        self._looked = self.counts.sum(0)


def _rate(counts: Tensor) -> float:
    right, images = counts.tolist()
    return right / images if images else 0.0
