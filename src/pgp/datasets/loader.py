"""Batches in a planned order, with augmentation that depends only on the seed, the epoch and the image."""

from __future__ import annotations

import signal
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from pgp.datasets.base import BadImageError, Split, with_advice
from pgp.datasets.enlarge import Crop
from pgp.datasets.transforms import ImageTransform
from pgp.rng import derive_seed
from pgp.system import platforms


class Batch(NamedTuple):
    """A batch of images with labels."""

    images: Tensor
    """`(B, 3, S, S)` float."""
    labels: Tensor
    """`(B,)`."""
    indices: Tensor
    """Indices of the images in their split, `(B,)`."""
    query: Tensor | None = None
    """Queries of the images, `(B, D)`, if they are known already."""

    def to(self, device: torch.device) -> Batch:
        """Return the batch with everything but its indices on another device."""
        query = None if self.query is None else self.query.to(device, non_blocking=True)
        images, labels = (tensor.to(device, non_blocking=True) for tensor in (self.images, self.labels))
        return Batch(images, labels, self.indices, query)


class SampleKey(NamedTuple):
    """An image in a certain epoch, which decides its augmentation."""

    image: int
    epoch: int


class Sample(NamedTuple):
    """An image that was loaded."""

    image: Tensor
    """The finished view `(3, S, S)` float; or, if it has a crop, the image itself, `(3, H, W)` uint8."""
    crop: Crop | None
    """Crop of a small image, which is enlarged with the rest of its batch."""
    label: int
    number: int
    """Index of the image in its split."""


class Samples(NamedTuple):
    """A batch of samples on its way to the process that trains."""

    images: Tensor
    """Finished views `(B, 3, S, S)` float; or, if there are crops, images `(B, 3, H, W)` uint8."""
    crops: Tensor | None
    """`(B, 5)`."""
    labels: Tensor
    """`(B,)`."""
    indices: Tensor
    """`(B,)`."""


class TransformedSplit(torch.utils.data.Dataset[Sample | None]):
    """A split with a transform whose random draws depend only on `(seed, *purpose, epoch, index)`."""

    def __init__(
        self,
        split: Split,
        transform: ImageTransform | Callable[[Tensor], Tensor],
        seed: int,
        purpose: tuple[str | int, ...],
        skip_bad: bool,
    ) -> None:
        self.split, self.transform, self.seed, self.purpose, self.skip_bad = split, transform, seed, purpose, skip_bad

    def __getitem__(self, address: SampleKey) -> Sample | None:
        """Load an image, and draw its crop if it is small, or else transform it; None for a bad image to be skipped."""
        try:
            image = self.split.image(address.image)
        except BadImageError as error:
            if not self.skip_bad:
                raise with_advice(error) from error
            warnings.warn(f"skipped: {error}", stacklevel=2)
            return None
        with torch.random.fork_rng(devices=[]):  # torchvision draws from the global generator
            torch.default_generator.manual_seed(derive_seed(self.seed, *self.purpose, address.epoch, address.image))
            crop = self.transform.crop(image) if isinstance(self.transform, ImageTransform) else None
            view = self.transform(image) if crop is None else image
        return Sample(view, crop, int(self.split.labels[address.image]), address.image)

    def collate(self, samples: list[Sample | None]) -> Samples:
        """Return samples as a batch. Small images are left as they are if all images are small and of one size."""
        good = [sample for sample in samples if sample is not None]
        if not good:
            return Samples(torch.empty(0), None, torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64))
        images, crops = [sample.image for sample in good], None
        if len({image.shape for image in images}) == 1 and all(sample.crop is not None for sample in good):
            crops = torch.tensor([sample.crop for sample in good])
        else:
            images = [self._view(sample) for sample in good]
        labels, indices = (torch.tensor(column) for column in zip(*(sample[2:] for sample in good), strict=True))
        return Samples(torch.stack(images), crops, labels, indices)

    def to_batch(self, samples: Samples, device: torch.device) -> Batch:
        """Return a batch with all images transformed, on `device`."""
        images = samples.images.to(device, non_blocking=True)
        if samples.crops is not None:
            assert isinstance(self.transform, ImageTransform)
            images = self.transform.batch(images, samples.crops)
        return Batch(images, samples.labels, samples.indices)

    def _view(self, sample: Sample) -> Tensor:
        """Return the transform `(3, S, S)` of a sample."""
        if sample.crop is None:
            return sample.image
        assert isinstance(self.transform, ImageTransform)
        return self.transform.batch(sample.image[None], torch.tensor([sample.crop]))[0]


class LoaderOptions(NamedTuple):
    """Settings for loading batches."""

    workers: int = 0
    """Number of processes that decode and transform images. If 0, the training process does."""
    rank: int = 0
    world_size: int = 1
    """Number of training processes. Each loads every `world_size`-th image of a batch."""
    pin_memory: bool = True
    """Whether images are loaded into page-locked memory if there is a GPU."""
    device: torch.device = torch.device("cpu")
    """Where batches of small images of one size are cropped, enlarged and flipped."""


def batches(data: TransformedSplit, plan: Sequence[Sequence[SampleKey]], loading: LoaderOptions) -> Iterator[Batch]:
    """Yield the planned batches in order, with images on `loading.device`.

    Each process loads its own images of a batch, possibly none.
    """
    own_plan = [list(batch[loading.rank :: loading.world_size]) for batch in plan]
    workers = min(loading.workers, len(own_plan))
    loader = DataLoader(
        data,
        batch_sampler=own_plan,
        num_workers=workers,
        multiprocessing_context=platforms.loader_start() if workers else None,
        collate_fn=data.collate,
        generator=torch.Generator(),  # or the loader would draw its workers' seed from the global one
        pin_memory=loading.pin_memory and torch.cuda.is_available(),
        worker_init_fn=_let_training_decide,
    )
    try:
        for samples in loader:
            yield data.to_batch(samples, loading.device)
    except BadImageError as error:  # a worker's comes with its traceback in the text
        raise BadImageError(str(error).strip().rpartition("BadImageError: ")[2]) from error


def _let_training_decide(_: int) -> None:
    """Keep a loader process alive after a signal to all processes: the training process decides what happens.

    A second SIGTERM ends the loader, because the training process ends a hanging loader this way.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in platforms.ending_signals():
        signal.signal(number, lambda number, _: signal.signal(number, signal.SIG_DFL))


def sequential_batches(indices: Tensor, batch_size: int, epoch: int = 0) -> list[list[SampleKey]]:
    """Return a plan that visits `indices` in their order.

    >>> sequential_batches(torch.tensor([4, 5, 6]), batch_size=2)[1]
    [SampleKey(image=6, epoch=0)]
    """
    return [[SampleKey(i, epoch) for i in part.tolist()] for part in indices.split(batch_size)]
