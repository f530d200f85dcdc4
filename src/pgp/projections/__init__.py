"""Projections, which keep updates orthogonal to inputs of old tasks: one file each, and the base class in `base`."""

from pgp.projections.base import NoProjection as NoProjection
from pgp.projections.base import ObservationSpec as ObservationSpec
from pgp.projections.base import Projection as Projection
