"""How features become logits at test: one file per readout, and the contract in `base`."""

from pgp.readouts.base import Readout as Readout
