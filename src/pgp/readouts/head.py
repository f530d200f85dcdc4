"""The method's own head, trained with the prompts task by task: the published readout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from pgp.readouts.base import Readout


class MethodHead(Readout):
    """The classifier that is trained with the prompts."""

    @dataclass(frozen=True)
    class Config(Readout.Config):
        """The method's own head; there are no settings."""

        tag = "head"

        @property
        def name(self) -> str:
            """See `Readout.Config.name`."""
            return "head"

        @property
        def uses_head(self) -> bool:
            """See `Readout.Config.uses_head`."""
            return True

        def build(self, head: nn.Module, classes: int, seed: int) -> MethodHead:
            """Return a readout that calls `head`."""
            return MethodHead(head)

    name = "head"
    needs_fit = False

    def __init__(self, head: nn.Module) -> None:
        self.head = head

    def observe(self, features: Tensor, labels: Tensor) -> None:
        """Do nothing: the head is trained already."""

    def end_task(self) -> None:
        """Do nothing: the head is trained already."""

    def logits(self, features: Tensor) -> Tensor:
        """Return `head(features)`, `(B, C)`."""
        logits: Tensor = self.head(features)
        return logits

    def state_dict(self) -> dict[str, Tensor]:
        """Return an empty dictionary: the head belongs to the method."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Do nothing: the head belongs to the method."""
