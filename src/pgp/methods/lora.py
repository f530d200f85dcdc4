"""LoRA (Hu et al., ICLR 2022): low-rank updates of the weights of a frozen encoder, one for each task.

With projected updates, this is the idea of InfLoRA (Liang and Li, CVPR 2024): new updates do not change old outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pgp.backbones.base import LINEAR_MAPS, Backbone
from pgp.methods.adapted import AdaptedEncoder, Part, check_part_settings, check_rank, select_places
from pgp.precision import full_precision
from pgp.scenario import Task


class LoRA(AdaptedEncoder):
    """Updates `W + s B A` of linear maps W `(out, in)`, with A `(r, in)` and B `(out, r)`.

    When a task ends, its `s B A` is added to the sum of all earlier ones. So size and cost do not grow with the number
    of tasks.
    """

    kind = "lora"

    @dataclass(frozen=True)
    class Config(AdaptedEncoder.Config):
        """Which linear maps are updated, and how."""

        tag = "lora"

        rank: int = 10
        """Rank r of each task's update `s B A` of a linear map, with A `(r, in)` and B `(out, r)`."""
        places: tuple[str, ...] = ("q", "v")
        """Linear maps of a block to update: q, k, v and proj of the attention, fc1 and fc2 of the MLP."""
        layers: tuple[int, ...] | None = None
        """Blocks to update, counted from 0. If None, all."""
        alpha: float | None = None
        """Updates are multiplied by s = alpha / rank. If None, by 1."""
        train_input_side: bool = True
        """Train the input side A, too. If not, A stays as it was drawn and only the output side B learns, as in
        InfLoRA."""

        def __post_init__(self) -> None:
            check_part_settings(self.rank, self.places, LINEAR_MAPS, self.layers)
            if self.alpha is not None and not self.alpha > 0:
                raise ValueError(f"expected method.alpha above 0, or None, got {self.alpha}")

        def as_expert(self) -> LoRA.Config:
            """See `Method.Config.as_expert`."""
            return self

        def build(self, backbone: Backbone, class_names: Sequence[str], generator: torch.Generator) -> LoRA:
            """Return untrained updates, which are 0."""
            return LoRA(self, backbone, len(class_names), generator)

    def __init__(self, config: LoRA.Config, backbone: Backbone, classes: int, generator: torch.Generator) -> None:
        super().__init__(backbone, classes, generator)
        scale = 1.0 if config.alpha is None else config.alpha / config.rank
        for place in select_places(backbone, config.places, config.layers):
            weight, bias = backbone.linear_map(place)
            check_rank(config.rank, min(weight.shape), place)
            self.parts[str(place)] = LowRankUpdate(weight, bias, config.rank, scale)
            self.parts[str(place)].down.requires_grad_(config.train_input_side)
        self._merge()

    def begin_task(self, task: Task) -> None:
        """See `AdaptedEncoder.begin_task`."""
        super().begin_task(task)
        self._merge()  # the precision of the encoder may have changed since it was built

    def end_task(self, task: Task) -> None:
        """See `AdaptedEncoder.end_task`."""
        super().end_task(task)
        self._merge()

    def load_trainable_state_dict(self, state: dict[str, Tensor]) -> None:
        """See `Method.load_trainable_state_dict`."""
        super().load_trainable_state_dict(state)
        self._merge()

    @torch.no_grad()
    def _merge(self) -> None:
        """Compute the weight of each updated linear map from the encoder's and the sum of all updates.

        In mixed precision, only the sum is rounded: a rounded weight would absorb small updates.
        """
        for place, part in self.by_place():
            assert isinstance(part, LowRankUpdate)
            weight, _ = self.backbone.linear_map(place)
            part.merged = (part.weight.to(part.total) + part.total).to(weight)


class LowRankUpdate(Part):
    """A linear map with the sum of all earlier updates, and with the current task's."""

    total: Tensor
    """The sum of the updates of earlier tasks, `(out, in)`."""
    merged: Tensor
    """The weight of the encoder plus `total`, in the precision of the encoder, `(out, in)`."""
    bias: Tensor | None
    """The encoder's bias, `(out,)`."""

    def __init__(self, weight: Tensor, bias: Tensor | None, rank: int, scale: float) -> None:
        super().__init__(weight.shape[1], weight.shape[0], rank)
        self.scale = scale
        self.register_buffer("total", torch.zeros(weight.shape))
        self.weight = weight.detach()  # before it is rounded; no buffer, because only merging needs it
        self.register_buffer("merged", weight.detach().clone(), persistent=False)
        self.register_buffer("bias", None if bias is None else bias.detach().clone(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return `x (W + total)^T + bias + s x A^T B^T` for x `(B, N, in)`, `(B, N, out)`."""
        output = F.linear(x, self.merged, self.bias)
        inner = F.linear(x, self.down).flatten(0, -2)  # (B * N, r)
        return torch.addmm(output.flatten(0, -2), inner, self.up.T, alpha=self.scale).view_as(output)

    def store(self) -> None:
        """Add the current task's update to the sum of earlier ones."""
        with full_precision(self.total.device):
            self.total += self.scale * self.up @ self.down
