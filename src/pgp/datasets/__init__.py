"""Where images come from: one file per data set or source, and the base class in `base`.

torchvision and PIL are imported in this folder and nowhere else.
"""

from pgp.datasets.base import Dataset as Dataset
from pgp.datasets.base import DatasetConfig as DatasetConfig
from pgp.datasets.base import Split as Split
