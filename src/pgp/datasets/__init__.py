"""The contract of a data set, the views that training and evaluation take of an image, and the loader.

torchvision and PIL are imported in this folder and nowhere else.
"""

from __future__ import annotations

import abc
import signal
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple

import torch
from rich.progress import Progress
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2.functional import center_crop

from pgp import platforms
from pgp.datasets.archives import Archive
from pgp.datasets.ignored import Ignored
from pgp.paths import as_path
from pgp.scenario import seed_of

LONGEST = 100
"""How many times longer than broad an image may be before its ends are cut off in the test view."""


class BadImageError(ValueError):
    """An image file that cannot be read; the message names it."""


def stopped_by(error: BadImageError) -> BadImageError:
    """Return the same error with what to do about it, for a run that it stops."""
    return BadImageError(f"{error}. --on-bad-image skip goes on without such images (beside --resume, too); pgp data"
                         " check lists them all")  # fmt: skip


class Split(abc.ABC):
    """Images with integer labels, map-style."""

    labels: Tensor
    """`(n,)`, int64."""
    domains: Tensor | None = None
    """Number of each image's domain, `(n,)`, where the data have domains."""

    @abc.abstractmethod
    def image(self, index: int) -> Tensor:
        """Image number `index`, `(3, H, W)` uint8.

        Raises:
            BadImageError: if its file cannot be read.
        """

    def names(self) -> Iterable[str]:
        """What its images are called, in their order; nothing where they have no names."""
        return ()

    def parts(self) -> tuple[Split, ...]:
        """The splits that it was joined from; itself, if it was not."""
        return (self,)

    def __len__(self) -> int:
        return len(self.labels)


class ArraySplit(Split):
    """Images that lie in memory: `images (n, H, W)` gray or `(n, 3, H, W)`, uint8."""

    def __init__(self, images: Tensor, labels: Tensor, domains: Tensor | None = None) -> None:
        if len(images) != len(labels):
            raise ValueError(f"expected one label per image, got {len(images)} images and {len(labels)} labels")
        self.images, self.labels, self.domains = images, labels.long(), domains

    def image(self, index: int) -> Tensor:
        """See `Split.image`."""
        image = self.images[index]
        return image.expand(3, -1, -1) if image.dim() == 2 else image


class Joined(Split):
    """Splits one after the other, under labels that they share."""

    def __init__(self, first: Split, second: Split, labels: Tensor) -> None:
        """`labels` are those of `second` among all classes."""
        self.first, self.second = first, second
        self.labels = torch.cat([first.labels, labels])

    def image(self, index: int) -> Tensor:
        """See `Split.image`."""
        size = len(self.first)
        return self.first.image(index) if index < size else self.second.image(index - size)

    def parts(self) -> tuple[Split, ...]:
        """See `Split.parts`."""
        return (*self.first.parts(), *self.second.parts())


class Dataset(NamedTuple):
    """A training and a test split over the same classes."""

    train: Split
    test: Split
    class_names: tuple[str, ...]
    tasks: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """Tasks that the data themselves propose, in their order: the name and the classes of each."""
    domains: tuple[str, ...] = ()
    """Names of the domains, by number."""
    folder: Path | None = None
    """Where `class_order.txt` or `tasks.json` may lie."""
    notes: tuple[str, ...] = ()
    """What a user should know of how the data were read, in words."""
    ignored: tuple[Ignored, ...] = ()
    """What lies beside the images and is not used, for each folder where there is any."""

    @property
    def classes(self) -> int:
        """Number of classes; labels run from 0."""
        return len(self.class_names)

    def told(self) -> tuple[str, ...]:
        """Return the notes, and a line for each kind of files that are ignored."""
        return (*self.notes, *(line for ignored in self.ignored for line in ignored.lines()))


class Counts(NamedTuple):
    """How large a data set is."""

    train: int
    test: int
    classes: int


@dataclass(frozen=True)
class DatasetConfig(abc.ABC):
    """How to make a data set; `build` is the factory."""

    tag: ClassVar[str]
    """Name of this kind of data set in config.json, unique among all of them; it must never change."""

    archives: ClassVar[tuple[Archive, ...]] = ()
    """What it is published as, where `fetch` downloads."""
    expected: ClassVar[Counts | None] = None
    """Its published size, where it has one."""

    def __post_init__(self) -> None:
        """Take texts for paths; a subclass that checks its settings does so after this."""
        for one in fields(self):
            if isinstance(one.default, Path):
                what = f"dataset.{one.name}"
                object.__setattr__(self, one.name, as_path(getattr(self, one.name), what))

    @abc.abstractmethod
    def build(self) -> Dataset:
        """The data set, downloaded first where it is missing and can be had."""

    def fetch(self, progress: Progress | None = None) -> None:  # noqa: B027 (most sets have nothing to fetch)
        """Nothing; what `read` needs is now on this disk, downloaded and unpacked where it was missing.

        Args:
            progress: where to draw bars, in bytes; on the error stream, where None.
        """

    def read(self) -> Dataset:
        """The data set as it lies on this disk; nothing is downloaded."""
        return self.build()

    @property
    def places(self) -> tuple[Path, ...]:
        """Where it is looked for on this disk, the first place first; none for what needs no files."""
        return ()

    def located(self) -> DatasetConfig:
        """The same with absolute paths: what a run records, for it may go on from another working folder."""
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        paths = {name: value.expanduser().absolute() for name, value in values.items() if isinstance(value, Path)}
        return replace(self, **paths)

    def moved(self, place: str) -> DatasetConfig:
        """Return the same data set at another place.

        Raises:
            ValueError: If it needs no files.
        """
        for one in fields(self):
            if one.name in ("root", "file"):
                return replace(self, **{one.name: Path(place)})
        raise ValueError(f"expected no --data for data that need no files, got {place}")

    def by_domain(self) -> DatasetConfig:
        """The same with its domains told apart, if that takes another setting."""
        return self


@dataclass(frozen=True)
class Views:
    """What the model sees of an image."""

    size: int = 224
    """Pixels a side."""
    resize: int | None = None
    """Test view: the shorter side is resized to this many pixels, bicubic, then the centre is cropped. 256/224 of
    `size`, where None."""
    scale: tuple[float, float] = (0.05, 1.0)
    """Training view: share of the image's area that a random crop covers."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Training view: aspect ratio of the crop."""
    flip: float = 0.5
    """Training view: probability of a horizontal flip."""
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Subtracted from channels in [0, 1]. The published ViT recipes do not normalise."""
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """Divides the channels after that."""

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"expected views.size of at least 1, got {self.size}")
        if self.resize is not None and self.resize < self.size:
            raise ValueError(f"expected views.resize of at least views.size {self.size}, got {self.resize}")
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"expected views.scale (low, high) with 0 < low <= high <= 1, got {self.scale}")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"expected views.ratio (low, high) with 0 < low <= high, got {self.ratio}")
        if not 0 <= self.flip <= 1:
            raise ValueError(f"expected views.flip in [0, 1], got {self.flip}")
        if not min(self.std) > 0:
            raise ValueError(f"expected views.std above 0, got {self.std}")

    def train(self) -> v2.Transform:
        """A random crop of the image `(3, H, W)` uint8, perhaps flipped, `(3, S, S)` float."""
        crop = v2.RandomResizedCrop(self.size, self.scale, self.ratio, antialias=True)
        return v2.Compose([crop, v2.RandomHorizontalFlip(self.flip), *self._to_float()])

    def test(self) -> v2.Transform:
        """The image's centre, `(3, S, S)` float."""
        resize = v2.Resize(self.resize or int(self.size * 256 / 224), InterpolationMode.BICUBIC, antialias=True)
        return v2.Compose([v2.Lambda(_without_ends), resize, v2.CenterCrop(self.size), *self._to_float()])

    def _to_float(self) -> list[v2.Transform]:
        return [v2.ToDtype(torch.float32, scale=True), v2.Normalize(self.mean, self.std)]


def _without_ends(image: Tensor) -> Tensor:
    """Cut the ends off an image `(3, H, W)` of more than `LONGEST` times its breadth.

    Its centre alone is wanted, and resizing the whole of it would take gigabytes.
    """
    length = LONGEST * min(image.shape[1:])
    if max(image.shape[1:]) <= length:
        return image
    centre: Tensor = center_crop(image, [min(side, length) for side in image.shape[1:]])
    return centre


class Batch(NamedTuple):
    """Images that the model sees at once."""

    images: Tensor
    """`(B, 3, S, S)` float."""
    labels: Tensor
    """`(B,)`."""
    indices: Tensor
    """Where they are in their split, `(B,)`."""

    def to(self, device: torch.device) -> Batch:
        """The same on another device; indices stay."""
        return Batch(self.images.to(device, non_blocking=True), self.labels.to(device, non_blocking=True), self.indices)


class Address(NamedTuple):
    """An image as a certain pass sees it: where it is in its split, and the pass that decides the augmentation."""

    image: int
    passes: int


class Viewed(torch.utils.data.Dataset[tuple[Tensor, int, int] | None]):
    """A split under a view whose every random draw is addressed by `(seed, *purpose, pass, index)`."""

    def __init__(
        self, split: Split, view: v2.Transform, seed: int, purpose: tuple[str | int, ...], skip_bad: bool
    ) -> None:
        self.split, self.view, self.seed, self.purpose, self.skip_bad = split, view, seed, purpose, skip_bad

    def __getitem__(self, address: Address) -> tuple[Tensor, int, int] | None:
        """Image, label and index; None for a bad image that is to be skipped."""
        try:
            image = self.split.image(address.image)
        except BadImageError as error:
            if not self.skip_bad:
                raise stopped_by(error) from error
            warnings.warn(f"skipped: {error}", stacklevel=2)
            return None
        with torch.random.fork_rng(devices=[]):  # torchvision draws from the global generator
            torch.default_generator.manual_seed(seed_of(self.seed, *self.purpose, address.passes, address.image))
            return self.view(image), int(self.split.labels[address.image]), address.image


class Loading(NamedTuple):
    """How batches are brought to the model."""

    workers: int = 0
    """Processes that decode and crop; 0 does it in the training process."""
    on_bad_image: Literal["error", "skip"] = "error"
    rank: int = 0
    world: int = 1
    """This process and how many there are: each takes every world-th image of a batch."""
    pin_memory: bool = True
    """Whether images go to page-locked memory where there is a GPU."""


def batches(data: Viewed, plan: Sequence[Sequence[Address]], loading: Loading) -> Iterator[Batch]:
    """The planned batches in order, each process its own share; an empty share is a batch of no images."""
    share = [list(batch[loading.rank :: loading.world]) for batch in plan]
    workers = min(loading.workers, len(share))
    loader = DataLoader(
        data,
        batch_sampler=share,
        num_workers=workers,
        multiprocessing_context=platforms.loader_start() if workers else None,
        collate_fn=_collate,
        generator=torch.Generator(),  # or the loader would draw its workers' seed from the global one
        pin_memory=loading.pin_memory and torch.cuda.is_available(),
        worker_init_fn=_let_training_decide,
    )
    try:
        yield from loader
    except BadImageError as error:  # a worker's comes with its traceback in the text
        raise BadImageError(str(error).strip().rpartition("BadImageError: ")[2]) from error


def _let_training_decide(_: int) -> None:
    """Let a process that loads images survive a signal to all: what happens then is up to the process that trains.

    A second SIGTERM ends it, for that is how the process that trains gets rid of one that hangs.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in platforms.ending_signals():
        signal.signal(number, lambda number, _: signal.signal(number, signal.SIG_DFL))


def in_order(indices: Tensor, batch_size: int, passes: int = 0) -> list[list[Address]]:
    """A plan that visits `indices` as they come.

    >>> in_order(torch.tensor([4, 5, 6]), batch_size=2)[1]
    [Address(image=6, passes=0)]
    """
    return [[Address(i, passes) for i in part.tolist()] for part in indices.split(batch_size)]


def _collate(samples: list[tuple[Tensor, int, int] | None]) -> Batch:
    good = [sample for sample in samples if sample is not None]
    if not good:
        return Batch(torch.empty(0), torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64))
    images, labels, indices = zip(*good, strict=True)
    return Batch(torch.stack(images), torch.tensor(labels), torch.tensor(indices))


def existing(folder: Path) -> Path:
    """`folder`, made absolute; a clear error if it is not there."""
    folder = folder.expanduser()
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"expected a folder of images, got {folder.absolute()}, which is none: name another, by"
                         " --data, --dataset.root or --add")  # fmt: skip
    if not folder.is_dir():
        raise ValueError(f"no data folder at {folder.absolute()}: name another, by --data, --dataset.root or --add")
    return folder.absolute()
