"""What learns on top of a frozen encoder: one file per method, and the contract in `base`."""

from pgp.methods.base import Method as Method
