"""Prompt-based continual learning with gradient projection.

The public names are listed in `__init__.pyi` and loaded when they are first used, so that importing pgp is fast. Start
with `pgp.train.train` for whole runs, and with `Orthogonal` for your own training loop.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
