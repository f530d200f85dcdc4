"""Bottleneck adapters (Houlsby et al., ICML 2019) behind the attention and the MLP of a frozen encoder's blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pgp.backbones.base import OUTPUTS, Backbone
from pgp.methods.adapted import AdaptedEncoder, Part, check_part_settings, check_rank, select_places


class Adapter(AdaptedEncoder):
    """Two small layers with a ReLU between them, `x + s B relu(A x)`, with A `(r, D)` and B `(D, r)`.

    There is no bias, so that old outputs stay the same if `A x = 0` for old inputs x. Because of the ReLU, the adapters
    of tasks cannot be added up: they are kept side by side, `2 r D` numbers for each task and place. That is less than
    the sum of updates that LoRA keeps, until there are `D / 2r` tasks.
    """

    kind = "adapter"

    @dataclass(frozen=True)
    class Config(AdaptedEncoder.Config):
        """Where adapters are, and their size."""

        tag = "adapter"

        rank: int = 8
        """Width r of each task's bottleneck, with input side A `(r, D)` and output side B `(D, r)`."""
        places: tuple[str, ...] = ("attn", "mlp")
        """Outputs of a block that have an adapter: attn, mlp. It comes before they are added to the tokens."""
        layers: tuple[int, ...] | None = None
        """Blocks with adapters, counted from 0. If None, all."""
        scale: float = 1.0
        """Factor of the adapters' outputs, s."""
        train_input_side: bool = True
        """Train the input side A, too. If not, A stays as it was drawn and only the output side B learns."""

        def __post_init__(self) -> None:
            check_part_settings(self.rank, self.places, OUTPUTS, self.layers)
            if not self.scale > 0:
                raise ValueError(f"expected method.scale above 0, got {self.scale}")

        def as_expert(self) -> Adapter.Config:
            """See `Method.Config.as_expert`."""
            return self

        def build(self, backbone: Backbone, class_names: Sequence[str], generator: torch.Generator) -> Adapter:
            """Return untrained adapters, which change nothing."""
            return Adapter(self, backbone, len(class_names), generator)

    def __init__(self, config: Adapter.Config, backbone: Backbone, classes: int, generator: torch.Generator) -> None:
        super().__init__(backbone, classes, generator)
        for place in select_places(backbone, config.places, config.layers):
            check_rank(config.rank, backbone.width, place)
            self.parts[str(place)] = Bottleneck(backbone.width, config.rank, config.scale)
            self.parts[str(place)].down.requires_grad_(config.train_input_side)

    def load_trainable_state_dict(self, state: dict[str, Tensor]) -> None:
        """See `Method.load_trainable_state_dict`. The state may have adapters of any number of tasks."""
        for name, part in self.parts.items():
            for side in ("earlier_down", "earlier_up"):
                stored = state.get(f"parts.{name}.{side}")
                if stored is not None:
                    setattr(part, side, torch.zeros_like(stored, device=getattr(part, side).device))
        super().load_trainable_state_dict(state)


class Bottleneck(Part):
    """The adapters of all earlier tasks at one place, and the current task's."""

    earlier_down: Tensor
    """Input sides of earlier tasks' adapters, one below the other, `(R, D)`."""
    earlier_up: Tensor
    """Output sides of earlier tasks' adapters, side by side, `(D, R)`."""

    def __init__(self, width: int, rank: int, scale: float) -> None:
        super().__init__(width, width, rank)
        self.scale = scale
        self.register_buffer("earlier_down", torch.zeros(0, width))
        self.register_buffer("earlier_up", torch.zeros(width, 0))

    def forward(self, x: Tensor) -> Tensor:
        """Return `x + s B relu(A x)`, summed over all tasks, for x `(B, N, D)`."""
        down = torch.cat([self.earlier_down, self.down])  # (R + r, D)
        up = torch.cat([self.earlier_up, self.up], dim=1)  # (D, R + r)
        return x + self.scale * F.linear(F.linear(x, down).relu(), up)

    def store(self) -> None:
        """Put the current task's adapter beside those of earlier tasks, if it has learned anything."""
        if bool(self.up.any()):
            self.earlier_down = torch.cat([self.earlier_down, self.down.detach()])
            self.earlier_up = torch.cat([self.earlier_up, self.up.detach()], dim=1)
