"""Precision of the encoder's passes: the names that settings use, and what they mean to torch."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal

import torch
from torch.amp import is_autocast_available

Precision = Literal["32-true", "tf32", "bf16-mixed", "16-mixed"]


def mixed_dtype(precision: Precision) -> torch.dtype | None:
    """Return the dtype of matrix products under autocast; None if there is no autocast.

    >>> mixed_dtype("bf16-mixed"), mixed_dtype("tf32")
    (torch.bfloat16, None)
    """
    dtypes: dict[str, torch.dtype] = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
    return dtypes.get(precision)


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Compute matrix products of tensors on `device` in their own dtype inside the block: no autocast, no TF32."""
    with _without_autocast(device.type), float32_products(device.type, tf32=False):
        yield


def _without_autocast(device: str) -> AbstractContextManager[object]:
    is_on = is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if is_on else nullcontext()


@contextmanager
def float32_products(device: str, *, tf32: bool) -> Iterator[None]:
    """Say how a CUDA GPU multiplies float32 matrices inside the block: in float32, or rounded to TF32.

    By itself, torch rounds to TF32 in convolutions only. Other devices are left as they are. The choice holds for the
    whole process: if several threads are inside such blocks, or blocks are nested, nothing is rounded as long as one
    of them asks for float32.

    Args:
        device: Type of the device, such as "cuda".
        tf32: Whether factors may be rounded to TF32, which has the 10 bits of float16's mantissa.
    """
    if device != "cuda":
        yield
        return
    _PRODUCTS.enter(tf32)
    try:
        yield
    finally:
        _PRODUCTS.leave(tf32)


class _Products:
    """What the blocks of `float32_products` that are open ask for, and how it was before the first of them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open = {False: 0, True: 0}  # blocks that ask for float32, and those that allow TF32
        self._before = ("highest", True)

    def enter(self, tf32: bool) -> None:
        with self._lock:
            if not any(self._open.values()):
                self._before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
            self._open[tf32] += 1
            self._apply()

    def leave(self, tf32: bool) -> None:
        with self._lock:
            self._open[tf32] -= 1
            self._apply()

    def _apply(self) -> None:
        matmul, cudnn = self._before
        if any(self._open.values()):
            cudnn = not self._open[False]
            matmul = "high" if cudnn else "highest"
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = cudnn


_PRODUCTS = _Products()
