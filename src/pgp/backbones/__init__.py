"""Frozen encoders: the contract in `base`; timm and open_clip are imported in this folder and nowhere else."""

from pgp.backbones.base import Backbone as Backbone
from pgp.backbones.base import Trace as Trace
from pgp.backbones.base import VisionLanguage as VisionLanguage
