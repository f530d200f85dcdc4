"""Online (prequential) accuracy: every training image is predicted before it is learned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pgp.distributed import all_reduce_sum_
from pgp.methods.base import Method, mask_logits
from pgp.scenario import Task


class OnlineAccuracy:
    """Counts of training images, and of those predicted correctly before they were learned, by task.

    Predictions are those of the method's own head over the classes of all tasks so far, including the current one. They
    use no task label, and each image is predicted by itself, with the test transform. This costs another loading, query
    (unless queries are clean) and forward pass of each training image (for CLIP, also a pass of the text encoder in
    each step). It changes nothing that is learned.
    """

    def __init__(self, tasks: int, device: torch.device) -> None:
        self.counts = torch.zeros(tasks, 2, dtype=torch.int64)
        """Number of correct predictions and of images by task, `(T, 2)`, over all processes."""
        self._new = torch.zeros(2, dtype=torch.int64, device=device)
        self._summarized = self.counts.sum(0)

    @torch.no_grad()
    def predict(
        self,
        method: Method,
        images: Tensor,
        labels: Tensor,
        task: Task,
        seen: Sequence[int],
        query: Tensor | None = None,
    ) -> None:
        """Predict images `(B, 3, S, S)` of `task` that are about to be learned, among the classes `seen`.

        If `query` is None, it is computed. It does not wait for the device.
        """
        method.refresh_head(task)  # the cached class embeddings must follow the last step
        logits = mask_logits(method(images, query).float(), seen)
        correct = (logits.argmax(1) == labels).sum()
        self._new = self._new + torch.stack([correct, torch.full_like(correct, len(labels))])

    def summarize(self, task: Task) -> dict[str, float]:
        """Return the number of images so far, the accuracy over all of them, and over those since the last summary.

        It waits for the device.

        Collective: in a distributed run, every process must call it.
        """
        self.counts[task.index] += all_reduce_sum_(self._new).cpu()
        self._new = torch.zeros_like(self._new)
        total = self.counts.sum(0)
        recent = total - self._summarized
        self._summarized = total
        return {"images": int(total[1]), "accuracy": _rate(total), "recent": _rate(recent)}

    def accuracy(self, task: Task) -> float:
        """Return the online accuracy over the images of one task."""
        return _rate(self.counts[task.index])

    def state_dict(self) -> dict[str, Tensor]:
        """Return the counts as of the last `summarize`."""
        return {"counts": self.counts}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore a `state_dict`."""
        self.counts = torch.zeros_like(self.counts)
        self.counts[: len(state["counts"])] = state["counts"]  # tasks may have been added since
        self._summarized = self.counts.sum(0)


def _rate(counts: Tensor) -> float:
    correct, images = counts.tolist()
    return correct / images if images else 0.0
