"""A method of your own: one set of prompts, shared by all images, before the first block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pgp.backbones import Backbone
from pgp.methods.base import Method, linear_head, mask_logits
from pgp.scenario import Task
from pgp.subspace import ProtectedInputs, ProtectedParameter


class SharedPrompts(Method):
    """Prompts `(L, D)` that join the tokens of every image; the head reads CLS."""

    uses_query = False  # no image selects anything, so no pass without prompts is needed

    @dataclass(frozen=True)
    class Config(Method.Config):
        """How many prompts there are."""

        tag = "shared-prompts"

        length: int = 5
        """Number of prompt tokens, L."""

        def build(self, backbone: Backbone, class_names: Sequence[str], generator: torch.Generator) -> SharedPrompts:
            """Return an untrained method."""
            return SharedPrompts(self.length, backbone, len(class_names), generator)

    def __init__(self, length: int, backbone: Backbone, classes: int, generator: torch.Generator) -> None:
        super().__init__(backbone, linear_head(backbone.width, classes, generator))
        self.prompts = nn.Parameter(0.02 * torch.randn(length, backbone.width, generator=generator))

    def features(self, images: Tensor, query: Tensor | None = None, *, by_vote: bool = False) -> Tensor:
        """Return the final CLS token, `(B, D)`."""
        prompts = self.backbone.embed_prompts(self.prompts).expand(len(images), -1, -1)  # (B, L, D)
        tokens: Tensor = self.backbone(images, {0: prompts}, num_tokens=1)
        return tokens[:, 0]

    def loss(self, images: Tensor, labels: Tensor, task: Task, prepared: dict[str, Tensor] | None = None) -> Tensor:
        """Return the cross-entropy over the classes of `task`."""
        return F.cross_entropy(mask_logits(self(images), task.classes), labels)

    def protected(self) -> dict[str, ProtectedParameter]:
        """Return the prompts: what they do to old images must not change."""
        return {"prompts": ProtectedParameter(self.prompts)}

    @torch.no_grad()
    def activations(self, images: Tensor, query: Tensor | None = None) -> dict[str, ProtectedInputs]:
        """Return the tokens of the images and the prompts as they enter the first block together."""
        prompts = self.backbone.embed_prompts(self.prompts).expand(len(images), -1, -1)
        return {"prompts": ProtectedInputs(self.backbone.embed(images), prompts)}
