"""No projection: the unprojected twin of every run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pgp.projections import Projection
from pgp.subspace import Protected, Rows


class NoProjection(Projection):
    """Protects nothing and asks for nothing."""

    @dataclass(frozen=True)
    class Config(Projection.Config):
        """It has no settings."""

        def build(self) -> NoProjection:
            """A projection that does nothing."""
            return NoProjection()

    collect = None

    def observe(self, space: str, rows: Rows) -> None:
        """Look away."""

    def end_task(self, protected: Mapping[str, Protected]) -> dict[str, float]:
        """No space, no rank."""
        return {}
