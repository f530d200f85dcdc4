"""Images that a program has: arrays, images of Pillow, or paths of files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pgp.datasets.base import ArraySplit, Dataset, DatasetConfig, Split
from pgp.datasets.decode import upright_rgb
from pgp.datasets.files import FileSplit, naming, read_image
from pgp.system.paths import as_path


@dataclass(frozen=True)
class InMemory(DatasetConfig):
    """Images of the running program, all for training. A run records their classes and numbers, but not where they are.

    So a run of such images can be used, and learn more classes, but neither resume inside a task nor be trained again.
    """

    tag = "in-memory"

    _data: ClassVar[Dataset | None] = None  # set by `of`; no field, so that it is not recorded

    @classmethod
    def of(cls, images: Sequence[Any], labels: Tensor, class_names: Sequence[str]) -> InMemory:
        """Return the data set of `images` (see `check_images`) with `labels (n,)`, indices of `class_names`."""
        config, domains = cls(), torch.zeros_like(labels)  # with dil, each data set is one domain
        if all(isinstance(image, str | os.PathLike) for image in images):
            paths = [as_path(image, "an image") for image in images]
            train: Split = FileSplit(paths, labels.tolist(), domains.tolist())
        else:
            train = ImageSplit(images, labels, domains)
        test = ArraySplit(torch.zeros(0, 1, 1, dtype=torch.uint8), labels[:0], domains[:0])
        object.__setattr__(config, "_data", Dataset(train, test, tuple(class_names), domains=("",)))
        return config

    def build(self) -> Dataset:
        """Return the data set.

        Raises:
            ValueError: If the images were those of a program that has ended.
        """
        if self._data is None:
            raise ValueError("expected the images that this run has learned, but they were in the memory of the program"
                             " that started it: begin another run there; this one can still be used, and classes can be"
                             " added")  # fmt: skip
        return self._data

    def with_absolute_paths(self) -> InMemory:
        """See `DatasetConfig.with_absolute_paths`; a copy would be without the images."""
        return self


class ImageSplit(Split):
    """Images of any of the types that `as_image` takes."""

    def __init__(self, images: Sequence[Any], labels: Tensor, domains: Tensor) -> None:
        self.images, self.labels, self.domains = images, labels, domains

    def image(self, index: int) -> Tensor:
        """See `Split.image`."""
        image = as_image(self.images[index], f"at index {index}")
        return read_image(image) if isinstance(image, Path) else image


def check_images(images: Any) -> Sequence[Any]:
    """Return `images` as a sequence: an array `(n, H, W, 3)` or `(n, H, W)` of uint8, or a list of images.

    Raises:
        TypeError: If they are a single path, or one of them is no image.
        ValueError: If there is none, or an array has another shape or type.
    """
    if isinstance(images, str | bytes | os.PathLike):
        raise TypeError(f"expected a list of images, got a single path: pass [{os.fspath(images)!r}]")
    if getattr(images, "ndim", 1) in (0, 2):
        raise ValueError(f"expected images (n, H, W, 3) or (n, H, W), got {tuple(images.shape)}: if each row holds the"
                         " pixels of an image, pass X.reshape(n, H, W)")  # fmt: skip
    found: Any = images if isinstance(images, np.ndarray | list | tuple) else list(images)
    if not len(found):
        raise ValueError("expected at least one image, got none")
    is_array = isinstance(found, np.ndarray) and found.ndim > 1
    for image in found[:1] if is_array else found:
        if not isinstance(image, Image.Image):  # which are all fine, and slow to convert
            as_image(image)
    return found  # type: ignore[no-any-return]


def as_image(image: Any, name: str = "in memory") -> Path | Tensor:
    """Return an image as pgp takes it: its path, or `(3, H, W)` uint8.

    Args:
        image: A path, an image of Pillow, or an array `(H, W, 3)` or `(H, W)` of uint8.
        name: What to call an image of Pillow that cannot be read.

    Raises:
        BadImageError: If an image of Pillow cannot be read.
        TypeError: If it is something else.
        ValueError: If an array has another shape or type.
    """
    if isinstance(image, str | os.PathLike):
        return as_path(image, "an image")
    if isinstance(image, Image.Image):
        with naming(name):
            image = np.array(upright_rgb(image))
    if not isinstance(image, np.ndarray):
        raise TypeError(f"expected an image as a path, an array or an image of Pillow, got {type(image).__name__}:"
                        f" {image!r:.80}")  # fmt: skip
    if image.dtype != np.uint8:
        hint = "(255 * X).round().astype('uint8')" if image.dtype.kind == "f" else "X.astype('uint8')"
        raise ValueError(f"expected images of uint8, from 0 (black) to 255, got {image.dtype}: convert them, as by"
                         f" {hint}, if that is what their values mean")  # fmt: skip
    if not image.size or image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] != 3):
        hint = ": channels come last, as in X.transpose(0, 2, 3, 1)" if image.ndim == 3 and len(image) == 3 else ""
        raise ValueError(f"expected images (H, W, 3) or (H, W), got {image.shape}{hint}")
    pixels = torch.from_numpy(np.require(image, requirements=("C", "W")))  # a copy, if torch needs one
    return pixels.expand(3, -1, -1) if image.ndim == 2 else pixels.permute(2, 0, 1)
