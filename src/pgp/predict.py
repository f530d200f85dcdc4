"""What a run has learned, put to use: names and probabilities for any image, with no data set at hand."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from pgp.backbones.base import Backbone
from pgp.datasets.base import BadImageError
from pgp.datasets.files import read_image
from pgp.datasets.ignored import Ignored
from pgp.datasets.scan import images_below
from pgp.methods.base import mask_logits
from pgp.rng import make_generator
from pgp.runs.checkpoint import reading
from pgp.runs.run import Run
from pgp.subspace import float64_device
from pgp.system.paths import Place, as_path


class Prediction(NamedTuple):
    """What an image shows, the likeliest class first."""

    names: tuple[str, ...]
    probabilities: tuple[float, ...]
    """In [0, 1]; over all classes learned so far they add up to 1."""


class Predictor:
    """Classifies images by the latest finished task of a run, image by image: no image's answer depends on its batch.

    Args:
        run: A run, or its folder, as a path or as a text.
        readout: Name of one of the run's readouts; its first, where None.
        device: Where to compute; a GPU where there is one, if None.

    Raises:
        RunError: If no task of the run is finished, or the encoder is not the one it was learned on.
        ValueError: If the run has no such readout, or the machine no such device.
    """

    def __init__(self, run: Run | Place, readout: str | None = None, device: str | None = None) -> None:
        run = run if isinstance(run, Run) else Run.open(as_path(run, "a run folder"))
        config, name = run.config, run.latest_finished()
        state = run.load(name, {"backbone", "method", "readouts"})
        names, tasks = run.classes()
        self.device = _device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        backbone: Backbone = config.backbone.build(config.transforms.size)
        place = run.checkpoints.folder / str(name)
        with reading(place):
            run.check_encoder(state["backbone"], backbone.fingerprint())
        self._half = config.precision == "bf16-mixed"
        if self._half:
            backbone.to_bfloat16_()
        self._method = config.method.build(backbone, names, make_generator(config.seed, "init"))
        with reading(place):
            self._method.load_trainable_state_dict(state["method"])
        self._method.to(self.device)
        readouts = {one.name: one for one in config.readouts}
        if readout is not None and readout not in readouts:
            raise ValueError(f"expected a readout of this run, one of {', '.join(readouts)}, got {readout!r}")
        chosen = readouts[readout or next(iter(readouts))]
        self._readout, self._uses_query = chosen.build(self._method.head, len(names), config.seed), chosen.uses_query
        with reading(place):
            kept, where = state["readouts"][self._readout.name], float64_device(self.device)
            self._readout.load_state_dict({key: tensor.to(where) for key, tensor in kept.items()})
        self._view = config.transforms.test()
        self._learned = list(dict.fromkeys(label for task in tasks[: name.task] for label in task))
        self.classes = tuple(names[label] for label in self._learned)
        """Names of the classes learned so far."""

    @torch.no_grad()
    def probabilities(self, images: Sequence[Place | Tensor]) -> Tensor:
        """Return the probability of each class `(B, len(classes))`, in the order of `classes`.

        Args:
            images: Paths of image files, or images `(3, H, W)` uint8.

        Raises:
            BadImageError: Naming the file that cannot be read.
            ValueError: If a tensor is no image.
            TypeError: If something else is given, such as one path that is in no list.
        """
        if isinstance(images, str | os.PathLike):
            raise TypeError(f"expected a list of images, got one: [{str(images)!r}] would be a list")
        if not len(images):
            return torch.empty(0, len(self.classes))
        pixels = [_checked(image) if isinstance(image, Tensor) else read_image(_file(image)) for image in images]
        batch = torch.stack([self._view(image) for image in pixels]).to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._half):
            query = self._method.query(batch) if self._uses_query else None
            features = self._method.features(batch, query).float()
        logits = mask_logits(self._readout.logits(self._readout.select_features(features, query)), self._learned)[
            :, self._learned
        ]
        return logits.softmax(-1).cpu()

    def __call__(self, images: Sequence[Place | Tensor], top: int = 1) -> list[Prediction]:
        """Return the `top` most probable classes of each image; see `probabilities`."""
        if top < 1:
            raise ValueError(f"expected top of at least 1, got {top}")
        found = self.probabilities(images).topk(min(top, len(self.classes)), dim=-1)
        return [
            Prediction(tuple(self.classes[i] for i in places), tuple(values))
            for places, values in zip(found.indices.tolist(), found.values.tolist(), strict=True)
        ]

    def predict_paths(
        self, paths: Sequence[Place], top: int = 1, batch_size: int = 32
    ) -> Iterator[tuple[Path, Prediction | BadImageError]]:
        """Yield each path with its prediction, or with the error if it cannot be read."""
        if isinstance(paths, str | os.PathLike):
            raise TypeError(f"expected a list of paths, got one: [{str(paths)!r}] would be a list")
        if batch_size < 1:
            raise ValueError(f"expected batch_size of at least 1, got {batch_size}")
        for start in range(0, len(paths), batch_size):
            read = [(path, _readable(path)) for path in map(_file, paths[start : start + batch_size])]
            found = iter(self([image for _, image in read if isinstance(image, Tensor)], top))
            for path, image in read:
                yield path, image if isinstance(image, BadImageError) else next(found)


def _readable(path: Path) -> Tensor | BadImageError:
    try:
        return read_image(path)
    except BadImageError as error:
        return error


def _file(place: Place) -> Path:
    return as_path(place, "an image")


def _checked(image: Tensor) -> Tensor:
    """Return `image`, if it is one."""
    if image.dim() != 3 or len(image) != 3 or image.dtype != torch.uint8 or not image.numel():
        raise ValueError(f"expected an image (3, H, W) of uint8, got {tuple(image.shape)} of {image.dtype}")
    return image


def _device(name: str) -> torch.device:
    """Return the device of that name, if this machine has it."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # whichever library is missing for it
        said = str(error).partition("\n")[0]
        raise ValueError(f"expected a device that this machine has, such as cpu, got {name!r}: {said}") from error
    return device


def images_in(places: Iterable[Place], told: list[Ignored] | None = None) -> list[Path]:
    """Return the files among `places`, and all images at any depth of the folders among them, each path once.

    Args:
        places: Files and folders.
        told: Takes what is ignored in the folders. If None, nobody is told.

    Raises:
        ValueError: If a place does not exist.
    """
    found: dict[Path, None] = {}
    for place in (as_path(each, "an image or a folder of images") for each in places):
        if place.is_dir():
            ignored = Ignored(place)
            found |= dict.fromkeys(images_below(place, ignored))
            if told is not None and ignored:
                told.append(ignored)
        elif place.exists():
            found[place] = None
        else:
            raise ValueError(f"no file or folder at {place}")
    return list(found)
