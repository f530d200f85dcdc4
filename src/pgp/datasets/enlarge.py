"""Crops of a batch of small images, enlarged by two matrix products on any device.

The result equals that of torchvision on a processor with AVX2 bit for bit. There, weights of interpolation are integers
of 15 bits (over a power of two), and values are rounded to uint8 after each direction. Products and sums of such
integers are exact in float32, in any order, so neither the device nor the rest of the batch changes a pixel.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pgp.precision import float32_products

LARGEST_WEIGHT = (1 << 15) - 1
"""Largest integer that stands for a weight."""


class Crop(NamedTuple):
    """A box of an image in pixels, and whether it is flipped horizontally. A batch of crops is a tensor `(B, 5)`."""

    top: int
    left: int
    height: int
    width: int
    flip: bool


class Interpolation(NamedTuple):
    """A kernel of interpolation."""

    kernel: Callable[[Tensor], Tensor]
    """Weight of a pixel by its distance, for distances below `support`."""
    support: int
    """Distance in pixels from which on weights are 0."""
    overshoots: bool
    """Whether weights may be negative, so that values may leave [0, 255]."""


def _linear(distance: Tensor) -> Tensor:
    return 1 - distance


def _cubic(distance: Tensor) -> Tensor:
    """Return the kernel of Keys (1981) with a = -1/2."""
    near = (1.5 * distance - 2.5) * distance**2 + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    return torch.where(distance < 1, near, far)


BILINEAR = Interpolation(_linear, support=1, overshoots=False)
BICUBIC = Interpolation(_cubic, support=2, overshoots=True)


def enlarge(
    images: Tensor,
    crops: Tensor,
    resized: tuple[int, int],
    size: int,
    kind: Interpolation,
    finish: Callable[[Tensor], object],
) -> Tensor:
    """Resize a box of each image, keep the centre, and flip it if its crop says so.

    Args:
        images: `(B, 3, H, W)` uint8.
        crops: `(B, 5)` on the CPU, see `Crop`. No box may be larger than `resized`.
        resized: Height and width in pixels to which each box is resized.
        size: Height and width of its centre, which is kept.
        kind: `BILINEAR` or `BICUBIC`.
        finish: Called with the results, some images at a time, to change them in place: whole numbers in [0, 255],
            `(b, 3, size, size)`.

    Returns:
        `(B, 3, size, size)` float32, on the device of the images.
    """
    count, device = len(images), images.device
    down = torch.zeros(count, size, images.shape[2] + 1)  # the last weight is for a constant 1 behind the pixels:
    across = torch.zeros(count, size, images.shape[3] + 1)  # with 1/2 there, rounding down rounds half up
    down[..., -1] = across[..., -1] = 0.5
    for number, (top, left, height, width, flip) in enumerate(crops.tolist()):
        down[number, :, top : top + height] = _weights(height, resized[0], size, kind, flip=False)
        across[number, :, left : left + width] = _weights(width, resized[1], size, kind, flip=bool(flip))
    down, across = down.to(device), across.to(device)
    pixels = F.pad(images.float(), (0, 1), value=1).flatten(1, 2)  # (B, 3 H, W + 1)
    lines = torch.empty(count, pixels.shape[1], size, device=device)
    views = torch.empty(count, 3, size, size, device=device)
    with float32_products(device.type, tf32=False):
        torch.bmm(pixels, across.mT, out=lines)  # with out=, autocast leaves the product as exact as it is
        lines = _round_(lines, kind).unflatten(1, images.shape[1:3])  # (B, 3, H, S)
        lines = F.pad(lines, (0, 0, 0, 1), value=1)  # (B, 3, H + 1, S)
        step = 1 if device.type == "cpu" else count  # one view fits in a processor's cache, a batch does not
        for first in range(0, count, step):
            rows = slice(first, first + step)
            torch.matmul(down[rows, None], lines[rows], out=views[rows])  # (b, 3, S, S)
            finish(_round_(views[rows], kind))
    return views


def margin(excess: int | torch.SymInt) -> int | torch.SymInt:
    """Return the pixels before the centre of a line that has `excess` more: half of them, rounded half to even."""
    return excess // 2 + excess % 4 // 3


def _round_(values: Tensor, kind: Interpolation) -> Tensor:
    """Round values that include 1/2 down to whole numbers in [0, 255], in place."""
    values.floor_()
    return values.clamp_(0, 255) if kind.overshoots else values


@functools.lru_cache(maxsize=512)
def _weights(length: int, resized: int, size: int, kind: Interpolation, *, flip: bool) -> Tensor:
    """Return the weights of a line's pixels for each pixel of the centre of the enlarged line.

    Args:
        length: Pixels of the line.
        resized: Pixels of the enlarged line.
        size: Pixels of its centre.
        kind: How to interpolate.
        flip: Whether to reverse the centre.

    Returns:
        `(size, length)`, which must not be written to.
    """
    centres = (torch.arange(resized, dtype=torch.float64) + 0.5) * (length / resized)
    distance = (torch.arange(length) + 0.5 - centres[:, None]).abs()  # (R, L)
    weights = kind.kernel(distance).where(distance < kind.support, 0)
    weights /= weights.sum(1, keepdim=True)
    unit = 2.0 ** math.floor(math.log2((LARGEST_WEIGHT + 0.5) / float(weights.max())))
    weights = weights.sign() * (weights.abs() * unit + 0.5).floor() / unit  # rounded half away from 0
    start = int(margin(resized - size))
    centre = weights[start : start + size]
    return (centre.flip(0) if flip else centre).float()
