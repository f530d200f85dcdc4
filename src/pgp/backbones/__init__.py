"""Frozen encoders: one file per library, base classes in `base`. Only this folder imports timm and open_clip."""

from pgp.backbones.base import Backbone as Backbone
from pgp.backbones.base import Trace as Trace
from pgp.backbones.base import VisionLanguage as VisionLanguage
