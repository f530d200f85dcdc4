"""Readouts, the classifiers that turn features into logits at test: one file each, and the base class in `base`."""

from pgp.readouts.base import Readout as Readout
