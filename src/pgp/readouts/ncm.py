"""The nearest class mean, the simplest readout and the lowest row of most tables."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from pgp.readouts import Readout
from pgp.readouts.lda import LDA


class NCM(LDA):
    """Logits `-|x - m_c|^2 / 2s` up to a constant: LDA with covariance s I, s the mean variance within classes."""

    @dataclass(frozen=True)
    class Config(Readout.Config):
        """It has no settings."""

        tag = "ncm"

        @property
        def name(self) -> str:
            """See `Readout.Config.name`."""
            return "ncm"

        def build(self, head: nn.Module, classes: int, seed: int) -> NCM:
            """Return a readout that has seen no class yet."""
            return NCM(classes)

    def __init__(self, classes: int) -> None:
        super().__init__(classes, LDA.Config(shrinkage=1.0))
        self.name = "ncm"
