"""Image files as a split of a data set."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pgp.datasets.base import BadImageError, Split
from pgp.datasets.cache import ImageCache
from pgp.datasets.decode import SUFFIXES, decode
from pgp.datasets.holdout import holdout_mask
from pgp.datasets.scan import images_below


class FileSplit(Split):
    """Image files, decoded when asked for, and once where memory allows."""

    def __init__(self, paths: list[Path], labels: list[int], domains: list[int] | None = None) -> None:
        self.paths, self.labels = paths, torch.tensor(labels, dtype=torch.int64)
        self.memory = ImageCache(len(paths))
        self.domains = None if domains is None else torch.tensor(domains, dtype=torch.int64)

    @classmethod
    def of(cls, folder: Path, names: Sequence[str], domains: Sequence[str] = ()) -> FileSplit:
        """Return all images below `folder/<name>`, or below `folder/<domain>/<name>` if there are domains.

        Images of a class are in alphabetical order. The label is the index of the name in `names`.
        """
        found = [
            (path, label, number)
            for number, domain in enumerate(domains or [""])
            for label, name in enumerate(names)
            if (folder / domain / name).is_dir()
            for path in images_below(folder / domain / name)
        ]
        if not found:
            inside = "<domain>/<class>" if domains else "<class>"
            raise ValueError(f"no images in {folder}/{inside}/: expected files ending in {', '.join(sorted(SUFFIXES))}")
        paths, labels, numbers = (list(column) for column in zip(*found, strict=True))
        return cls(paths, labels, numbers if domains else None)

    def parted(self, fraction: float, seed: int) -> tuple[FileSplit, FileSplit]:
        """Split into training and test images: a `fraction` of each class (in each domain) is for testing."""
        test = holdout_mask(self, fraction, seed)
        return self.at((~test).nonzero().flatten().tolist()), self.at(test.nonzero().flatten().tolist())

    def at(self, indices: Iterable[int]) -> FileSplit:
        """Return the split of the images at these indices, in this order."""
        indices = list(indices)
        domains = None if self.domains is None else self.domains[indices].tolist()
        return FileSplit([self.paths[i] for i in indices], self.labels[indices].tolist(), domains)

    def names(self) -> list[str]:
        """Return the paths of the images, without the folder that contains them all."""
        try:
            shared = os.path.commonpath([path.parent for path in self.paths])
        except ValueError:  # on two drives, which share nothing
            return [path.as_posix() for path in self.paths]
        return [path.relative_to(shared).as_posix() for path in self.paths]

    def image(self, index: int) -> Tensor:
        """See `Split.image`."""
        return self.memory.get_or_decode(index, lambda: read_image(self.paths[index]))


def read_image(path: Path, content: bytes | None = None) -> Tensor:
    """Decode the image at `path` to upright RGB, `(3, H, W)` uint8, with transparency on white.

    If its bytes are given as `content`, `path` is only used in error messages.
    """
    with naming(path):
        image = decode(path if content is None else content)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


@contextmanager
def naming(name: object) -> Iterator[None]:
    """Raise a BadImageError with the name of an image for any error in decoding it."""
    try:
        yield
    except Exception as error:  # whatever a decoder raises
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise BadImageError(f"cannot read the image {name}: {reason or type(error).__name__}") from error
