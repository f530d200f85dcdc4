"""Random generators that depend only on a seed and an address, not on earlier draws."""

from __future__ import annotations

import hashlib

import torch


def make_generator(seed: int, *address: str | int) -> torch.Generator:
    """Return a random generator for one purpose, named by its address, such as `(seed, "order", task, epoch)`.

    Its draws do not depend on any other draws. A resumed run, or a run with another number of workers or processes,
    therefore sees the same data.

    >>> one, same, other = (torch.rand(2, generator=make_generator(7, "init", n)) for n in (0, 0, 1))
    >>> bool((one == same).all()), bool((one == other).all())
    (True, False)
    """
    return torch.Generator().manual_seed(derive_seed(seed, *address))


def derive_seed(seed: int, *address: str | int) -> int:
    """Return a 63-bit seed for one address; see `make_generator`. On a CPU, torch uses its lowest 32 bits.

    >>> derive_seed(7, "init") == derive_seed(7, "init") != derive_seed(8, "init")
    True
    """
    digest = hashlib.blake2b(repr((seed, *address)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
