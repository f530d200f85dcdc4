"""Methods, which learn prompts or a head on a frozen encoder: one file each, and the base class in `base`."""

from pgp.methods.base import Method as Method
