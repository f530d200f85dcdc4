"""A linear classifier on frozen features, without prompts: a baseline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pgp.backbones.base import Backbone
from pgp.methods.base import Method, linear_head, mask_logits
from pgp.scenario import Task


class HeadOnly(Method):
    """A linear head on the features of the frozen encoder. Nothing else is trained."""

    uses_image = False

    @dataclass(frozen=True)
    class Config(Method.Config):
        """Whether the head is trained."""

        tag = "head-only"

        learns: bool = True
        """Train the head. Readouts that are fitted to class statistics do not need it."""

        def build(self, backbone: Backbone, class_names: Sequence[str], generator: torch.Generator) -> HeadOnly:
            """Return an untrained head."""
            head = linear_head(backbone.width, len(class_names), generator).requires_grad_(self.learns)
            return HeadOnly(backbone, head)

    def features(self, images: Tensor, query: Tensor | None = None, *, by_vote: bool = False) -> Tensor:
        """Return the query itself, `(B, D)`."""
        return self.query(images) if query is None else query

    @property
    def features_drift(self) -> bool:
        """See `Method.features_drift`."""
        return False

    def can_learn(self, task: Task) -> bool:
        """See `Method.can_learn`."""
        return len(task.classes) > 1

    def loss(self, images: Tensor, labels: Tensor, task: Task, prepared: dict[str, Tensor] | None = None) -> Tensor:
        """Return the cross-entropy over the classes of `task`."""
        query = (prepared or self.prepare_batch(images, task))["query"]
        return F.cross_entropy(mask_logits(self.head_logits(query), task.classes), labels)
