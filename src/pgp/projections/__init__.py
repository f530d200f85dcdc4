"""What keeps updates orthogonal to old tasks: one file per projection, and the contract in `base`."""

from pgp.projections.base import NoProjection as NoProjection
from pgp.projections.base import ObservationSpec as ObservationSpec
from pgp.projections.base import Projection as Projection
