"""Classify any image with a finished run; no data set is needed."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pgp.backbones.base import Backbone
from pgp.datasets.base import BadImageError
from pgp.datasets.files import read_image
from pgp.datasets.ignored import Ignored
from pgp.datasets.scan import images_below
from pgp.evaluation.accuracy import extract_features, extract_frozen
from pgp.methods.base import Method, mask_logits
from pgp.precision import Precision, float32_products, mixed_dtype
from pgp.readouts.base import Readout
from pgp.runs.checkpoint import reading
from pgp.runs.run import Run
from pgp.subspace import on_float64_device
from pgp.system.paths import StrPath, as_path


class Prediction(NamedTuple):
    """The most probable classes of an image, the most probable one first."""

    names: tuple[str, ...]
    probabilities: tuple[float, ...]
    """Probabilities in [0, 1], of a distribution over all classes learned so far."""
    unknown: bool = False
    """Whether the image is unlike all of these classes. It is always False if no image is to be rejected."""


class Classifier(nn.Module):
    """What a run has learned so far: images to probabilities of the learned classes.

    Shapes: `B` images with `S` pixels a side, `D` features that the readout uses, `C` learned classes.

    Args:
        method: A method with its frozen encoder.
        readout: A fitted readout.
        settings: Settings of the readout.
        learned: Labels of the learned classes, in the order of the result.
        precision: Precision of the encoder's passes.
    """

    def __init__(
        self,
        method: Method,
        readout: Readout,
        settings: Readout.Config,
        learned: Sequence[int],
        precision: Precision = "32-true",
    ) -> None:
        super().__init__()
        self.method, self.readout, self.learned, self.precision = method, readout, list(learned), precision
        self._uses_query = method.uses_query or settings.uses_query
        self._uses_patches = method.uses_patches or settings.uses_patches

    def forward(self, images: Tensor) -> Tensor:
        """Return the probabilities `(B, C)` of preprocessed images `(B, 3, S, S)`."""
        return self.probabilities(self.features(images))

    def features(self, images: Tensor) -> Tensor:
        """Return the features `(B, D)` of preprocessed images `(B, 3, S, S)`."""
        frozen = None
        if self._uses_query or self._uses_patches:
            frozen = extract_frozen(self.method, images, self._autocast, patches=self._uses_patches)
        return self.readout.select_features(extract_features(self.method, images, frozen, self._autocast))

    def probabilities(self, features: Tensor) -> Tensor:
        """Return the probabilities `(B, C)` of features `(B, D)`."""
        logits = mask_logits(self.readout.logits(features), self.learned)[:, self.learned]
        return self.readout.probabilities(logits)

    def _autocast(self) -> AbstractContextManager[None]:
        device, dtype = next(self.method.parameters()).device.type, mixed_dtype(self.precision)
        if device == "cpu" and dtype is None:
            return nullcontext()  # nothing to set, and nothing that torch.export cannot trace
        return torch.autocast(device, dtype) if dtype else float32_products(device, tf32=self.precision == "tf32")


class Predictor:
    """A classifier of images, loaded from the latest finished task of a run.

    Predictions for an image do not depend on the other images of its batch.

    Args:
        run: A run, or the path of its folder.
        readout: Name of one of the run's readouts. If None, the first.
        device: Name of the device. If None, a GPU if there is one, else the CPU.
        precision: Precision of the encoder's passes. If None, that of the run.

    Raises:
        RunError: If no task of the run is finished, or the encoder is not the one of the run.
        ValueError: If the run has no such readout, or the machine no such device.
    """

    def __init__(
        self,
        run: Run | StrPath,
        readout: str | None = None,
        device: str | None = None,
        precision: Precision | None = None,
    ) -> None:
        run = run if isinstance(run, Run) else Run.open(as_path(run, "a run folder"))
        name = run.latest_finished()
        record = run.describe(name)
        config, data = run.config_of(record), run.data_of(record)
        self.run = run
        """The run."""
        state = run.load(name, {"backbone", "method", "readouts"})
        names, tasks = data.class_names, data.tasks
        self.device = _device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.transforms, precision = config.transforms, precision or config.precision
        backbone: Backbone = config.backbone.build(config.transforms.size)
        checkpoint = run.checkpoints.folder / str(name)
        with reading(checkpoint):
            run.check_encoder(state["backbone"], backbone.fingerprint())
        method = config.build_method(backbone, names)
        if dtype := mixed_dtype(precision):
            backbone.to_mixed_(dtype)
        with reading(checkpoint):
            method.load_trainable_state_dict(state["method"])
        method.to(self.device)
        readouts = {one.name: one for one in config.readouts}
        if readout is not None and readout not in readouts:
            raise ValueError(f"expected a readout of this run, one of {', '.join(readouts)}, got {readout!r}")
        settings = readouts[readout or next(iter(readouts))]
        self._readout = settings.build(method.head, len(names), config.seed)
        with reading(checkpoint):
            self._readout.load_state_dict(on_float64_device(state["readouts"][self._readout.name], self.device))
        learned = list(dict.fromkeys(label for task in tasks[: name.task] for label in task))
        self.classifier = Classifier(method, self._readout, settings, learned, precision).eval()
        """From preprocessed images to probabilities."""
        self.readout = self._readout.name
        """Name of the readout."""
        self.classes = tuple(names[label] for label in learned)
        """Names of the classes learned so far."""
        self._transform = self.transforms.test()

    @classmethod
    def from_pretrained(
        cls,
        repository_or_folder: StrPath,
        *,
        revision: str | None = None,
        readout: str | None = None,
        device: str | None = None,
        precision: Precision | None = None,
        token: str | None = None,
    ) -> Predictor:
        """Return a classifier from the Hugging Face hub, or from a run folder.

        What was downloaded stays in a cache, so a pinned revision needs no network the next time.

        Args:
            repository_or_folder: A repository that `pgp push` wrote, OWNER/NAME; or a run folder, if it exists.
            revision: Hash of a commit of the repository, which never changes; or a branch or tag. If None, the newest.
            readout: See `Predictor`.
            device: See `Predictor`.
            precision: See `Predictor`.
            token: Token of the hub, for a private repository. If None, that of `hf auth login` or of HF_TOKEN.

        Raises:
            RunError: If the hub or the repository has no such model (a `pgp.hub.HubError`), or as `Predictor`.
            ValueError: If an argument has a wrong form, or as `Predictor`.
        """
        from pgp import hub

        folder = as_path(repository_or_folder, "a run folder, or a repository OWNER/NAME")
        if not (folder.is_dir() or hub.REPOSITORY.fullmatch(str(repository_or_folder))):
            raise ValueError("expected a run folder, or a repository of the hub as OWNER/NAME, got"
                             f" {folder}: there is no such folder")  # fmt: skip
        if not folder.is_dir():
            run = hub.fetch(str(repository_or_folder), revision=revision, token=token)
        elif revision is None:
            run = Run.open(folder)
        else:
            raise ValueError(f"expected no revision for the folder {folder}, got {revision!r:.60}: it has only one")
        return cls(run, readout, device, precision)

    def save_pretrained(self, folder: StrPath, *, license: str | None = None) -> None:
        """Write a run folder with the latest finished task and a model card, fit to be published.

        Args:
            folder: Folder to write, new or empty.
            license: Licence of the model for its card, as the hub spells it, such as apache-2.0.

        Raises:
            RunError, ValueError: As `pgp.hub.save`.
        """
        from pgp import hub

        hub.save(self.run, folder, license=license)

    def push_to_hub(
        self, repository: str, *, private: bool = True, license: str | None = None, token: str | None = None
    ) -> str:
        """Publish the run on the Hugging Face hub, and return the hash of the commit; see `pgp.hub.push`.

        Args:
            repository: Name of the repository, OWNER/NAME.
            private: Whether only its owner may see it.
            license: Licence of the model for its card, as the hub spells it, such as apache-2.0.
            token: Token of the hub. If None, that of `hf auth login` or of HF_TOKEN.

        Raises:
            RunError, ValueError: As `pgp.hub.push`.
        """
        from pgp import hub

        return hub.push(self.run, repository, public=not private, license=license, token=token).revision

    def preprocess(self, images: Sequence[StrPath | Tensor]) -> Tensor:
        """Return images as the encoder takes them, `(B, 3, S, S)`; see `probabilities` for arguments and errors."""
        if isinstance(images, str | os.PathLike):
            raise TypeError(f"expected a list of images, got a single one: pass [{str(images)!r}]")
        pixels = [_checked(image) if isinstance(image, Tensor) else read_image(_file(image)) for image in images]
        size = self.transforms.size
        return torch.stack([self._transform(image) for image in pixels]) if pixels else torch.empty(0, 3, size, size)

    @torch.no_grad()
    def _features(self, images: Sequence[StrPath | Tensor]) -> Tensor:
        """Return the features `(B, D)` of images that the readout uses."""
        return self.classifier.features(self.preprocess(images).to(self.device))

    @torch.no_grad()
    def _probabilities(self, features: Tensor) -> Tensor:
        return self.classifier.probabilities(features).cpu()

    def probabilities(self, images: Sequence[StrPath | Tensor]) -> Tensor:
        """Return the probabilities `(B, len(classes))` of images, in the order of `classes`.

        Args:
            images: Paths of image files, or images `(3, H, W)` uint8.

        Raises:
            BadImageError: If a file cannot be read. The message names it.
            ValueError: If a tensor is not an image.
            TypeError: If something else is given, such as a single path.
        """
        return self._probabilities(self._features(images)) if len(images) else torch.empty(0, len(self.classes))

    @torch.no_grad()
    def unknown_scores(self, images: Sequence[StrPath | Tensor]) -> Tensor:
        """Return a score `(B,)` of images, the higher the less like the learned classes.

        Raises:
            ValueError: If the readout cannot tell, or as `probabilities`.
        """
        self._check_detects_unknown()
        return self._readout.unknown_scores(self._features(images)).cpu() if len(images) else torch.empty(0)

    def unknown_threshold(self, reject: float) -> float:
        """Return the score above which a fraction `reject` of held-out training images lie.

        Raises:
            ValueError: If `reject` is not in (0, 1), the readout cannot tell, or no images were held out.
        """
        if not 0 < reject < 1:
            raise ValueError(f"expected reject in (0, 1), the fraction of known images that may be lost, got {reject}")
        self._check_detects_unknown()
        threshold = self._readout.unknown_threshold(1 - reject)
        if threshold is None:
            raise ValueError("expected training images that were held out, to tell what is unknown, but the classes of"
                             " this run have too few images: three of a class are enough")  # fmt: skip
        return threshold

    @property
    def detects_unknown(self) -> bool:
        """Whether the readout can tell images of classes that were never learned."""
        return self._readout.detects_unknown

    def _check_detects_unknown(self) -> None:
        if not self.detects_unknown:
            raise ValueError("expected a readout that can tell unknown images (lda, ncm, logistic or"
                             f" experts+query+patches+normalize), got {self._readout.name!r}")  # fmt: skip

    def predict(
        self, images: Sequence[StrPath | Tensor], top: int = 1, reject: float | None = None
    ) -> list[Prediction]:
        """Return the most probable classes of each image.

        Args:
            images: Paths of image files, or images `(3, H, W)` uint8.
            top: Number of classes to return.
            reject: Fraction in (0, 1) of images of learned classes that may be called unknown, such as 0.05. Images
                above the score that this fraction of held-out training images exceeds are `unknown`. If None, none is.

        Raises:
            BadImageError: If a file cannot be read. The message names it.
            ValueError: If an argument is out of range, or the readout cannot tell unknown images.
            TypeError: If something else is given as images, such as a single path.
        """
        if top < 1:
            raise ValueError(f"expected top of at least 1, got {top}")
        if reject is not None:
            self.unknown_threshold(reject)  # its errors come before those of images
        return self.predict_preprocessed(self.preprocess(images), top, reject)

    @torch.no_grad()
    def predict_preprocessed(self, images: Tensor, top: int = 1, reject: float | None = None) -> list[Prediction]:
        """Return the most probable classes of images `(B, 3, S, S)` from `preprocess`; see `predict`."""
        threshold = None if reject is None else self.unknown_threshold(reject)
        if not len(images):
            return []
        features = self.classifier.features(images.to(self.device))
        best = self._probabilities(features).topk(min(top, len(self.classes)), dim=-1)
        unknown = [False] * len(features)
        if threshold is not None:
            unknown = (self._readout.unknown_scores(features) > threshold).tolist()
        return [
            Prediction(tuple(self.classes[i] for i in indices), tuple(values), is_unknown)
            for indices, values, is_unknown in zip(best.indices.tolist(), best.values.tolist(), unknown, strict=True)
        ]

    __call__ = predict

    def predict_paths(
        self, paths: Sequence[StrPath], top: int = 1, batch_size: int = 32, reject: float | None = None
    ) -> Iterator[tuple[Path, Prediction | BadImageError]]:
        """Yield each path with the prediction for its image (see `predict`), or with the error if it cannot be read."""
        if isinstance(paths, str | os.PathLike):
            raise TypeError(f"expected a list of paths, got a single one: pass [{str(paths)!r}]")
        if batch_size < 1:
            raise ValueError(f"expected batch_size of at least 1, got {batch_size}")
        for start in range(0, len(paths), batch_size):
            images = [(path, _image_or_error(path)) for path in map(_file, paths[start : start + batch_size])]
            readable = [image for _, image in images if isinstance(image, Tensor)]
            predictions = iter(self.predict(readable, top, reject))
            for path, image in images:
                yield path, image if isinstance(image, BadImageError) else next(predictions)


def _image_or_error(path: Path) -> Tensor | BadImageError:
    try:
        return read_image(path)
    except BadImageError as error:
        return error


def _file(path: StrPath) -> Path:
    return as_path(path, "an image")


def _checked(image: Tensor) -> Tensor:
    """Return `image`, and raise a ValueError if it is not an image."""
    if image.dim() != 3 or len(image) != 3 or image.dtype != torch.uint8 or not image.numel():
        raise ValueError(f"expected an image (3, H, W) of uint8, got {tuple(image.shape)} of {image.dtype}")
    return image


def _device(name: str) -> torch.device:
    """Return the device of that name, and raise a ValueError if this machine does not have it."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # which of them depends on the missing library
        reason = str(error).partition("\n")[0]
        raise ValueError(f"expected a device that this machine has, such as cpu, got {name!r}: {reason}") from error
    return device


def images_in(files_or_folders: Iterable[StrPath], ignored_files: list[Ignored] | None = None) -> list[Path]:
    """Return the files among `files_or_folders` and all images below the folders among them, each path once.

    Images of a folder are sorted alphabetically.

    Args:
        files_or_folders: Paths of images, and of folders of them.
        ignored_files: List to which files ignored in folders are added, if not None.

    Raises:
        ValueError: If a path does not exist.
    """
    paths: dict[Path, None] = {}
    for file_or_folder in files_or_folders:
        path = as_path(file_or_folder, "an image or a folder of images")
        if path.is_dir():
            ignored = Ignored(path)
            paths |= dict.fromkeys(images_below(path, ignored))
            if ignored_files is not None and ignored:
                ignored_files.append(ignored)
        elif path.exists():
            paths[path] = None
        else:
            raise ValueError(f"no file or folder at {path}")
    return list(paths)
