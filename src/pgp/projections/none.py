"""No projection."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pgp.projections import Projection
from pgp.subspace import Protected, Rows


class NoProjection(Projection):
    """Projects nothing and observes nothing."""

    @dataclass(frozen=True)
    class Config(Projection.Config):
        """It has no settings."""

        tag = "none"

        def build(self, protected: Mapping[str, Protected], seed: int = 0) -> NoProjection:
            """Return a projection that does nothing."""
            return NoProjection(protected, seed)

    collect = None

    def observe(self, space: str, rows: Rows) -> None:
        """Ignore the inputs."""

    def end_task(self) -> dict[str, float]:
        """Return no ranks."""
        return {}
