"""A classifier with the interface of scikit-learn, for images in arrays or in files."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.preprocessing import LabelEncoder
from sklearn.utils.multiclass import check_classification_targets, unique_labels
from sklearn.utils.validation import check_consistent_length, check_is_fitted
from torch import Tensor

from pgp.config import Config
from pgp.datasets.in_memory import InMemory, as_image, check_images
from pgp.predict import Predictor
from pgp.recipes import configure
from pgp.runs.run import Run
from pgp.system.outputs import is_empty, make_unique_folder
from pgp.system.paths import StrPath, as_path
from pgp.train import resume, train
from pgp.training.devices import accelerator_name


class ContinualImageClassifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """Classify images, and learn further classes without the images of earlier ones.

    Images are a list of paths, of images of Pillow or of arrays `(H, W, 3)` or `(H, W)`, or an array `(n, H, W, 3)` or
    `(n, H, W)`; arrays are uint8, with channels last. Labels are texts or numbers. All images are for training: none is
    held out for testing.

    Args:
        recipe: Name of a recipe (see pgp list), or a `Config`, whose data set is not used. `quick` trains nothing by
            gradients; `own` trains LoRA with projection. Both download their encoder on first use.
        settings: Other settings of the recipe, named as the flags of pgp train, such as `{"epochs": 2}`. With
            `{"setting": "dil"}`, each call of `partial_fit` brings new images of the same classes. With `{"tasks": 5}`,
            `fit` learns the classes in 5 tasks; the default is a single one.
        random_state: Seed of every random draw, an integer.
        folder: Folder in which each `fit` creates a run folder. If None, it is a temporary one, which is deleted with
            the estimator; then the fitted estimator cannot be pickled.

    Attributes:
        classes_: Labels of the classes learned so far, sorted.
        run_: The run, which pgp predict, pgp export and `Predictor` take.

    Example:
        >>> from sklearn.datasets import load_digits
        >>> X, y = load_digits(return_X_y=True)
        >>> X = (X.reshape(-1, 8, 8) * 255 / 16).round().astype("uint8")
        >>> classifier = ContinualImageClassifier("demo-quick", settings={"views": 0})
        >>> classifier.fit(X[:100][y[:100] < 8], y[:100][y[:100] < 8]).classes_
        array([0, 1, 2, 3, 4, 5, 6, 7])
        >>> classifier.partial_fit(X[:100][y[:100] >= 8], y[:100][y[:100] >= 8]).classes_
        array([0, 1, 2, 3, 4, 5, 6, 7, 8, 9])
        >>> classifier.score(X[100:200], y[100:200]) > 0.8
        True
    """

    def __init__(
        self,
        recipe: str | Config = "quick",
        *,
        settings: Mapping[str, Any] | None = None,
        random_state: int = 42,
        folder: StrPath | None = None,
    ) -> None:
        self.recipe, self.settings, self.random_state, self.folder = recipe, settings, random_state, folder

    def fit(self, X: Any, y: Any) -> ContinualImageClassifier:
        """Learn the classes of images `X` with labels `y (n,)` in a new run, as one task.

        Raises:
            ValueError: If they, or the settings, do not fit.
            BadImageError: If a file cannot be read. The message names it.
        """
        data, names = _training_data(X, y, {})
        config = configure(self.recipe, {"tasks": 1, "seed": self.random_state, **(self.settings or {})})
        delete = None
        if self.folder is None:
            parent = Path(tempfile.mkdtemp(prefix="pgp-"))
            delete = weakref.finalize(self, _delete, parent, os.getpid())
        else:
            parent = as_path(self.folder, "a folder for runs").expanduser().absolute()
        folder = make_unique_folder(parent, f"{config.name}-seed{config.seed}")
        try:
            with _untested():
                run = train(replace(config, dataset=data), folder)
        except BaseException:
            if delete:
                delete()
            elif is_empty(folder):
                shutil.rmtree(folder)
            raise
        if previous := self.__dict__.pop("_delete", None):
            previous()
        if delete:
            self._delete = delete
        return self._fitted(run, names)

    def partial_fit(self, X: Any, y: Any, classes: Any = None) -> ContinualImageClassifier:
        """Learn the classes of further images as one more task, from the run alone. The first call is `fit`.

        The settings are those of the first call. If learning fails, the estimator stays as it was.

        Args:
            X: Images of classes that were not learned yet; with setting `dil`, of classes that were.
            y: Their labels, `(n,)`.
            classes: Not needed, because new classes can come with any call. If given, the labels have to be among them.

        Raises:
            ValueError: If a class was learned already (with setting `dil`: was not), or as `fit`.
            BadImageError: If a file cannot be read. The message names it.
        """
        data, names = _training_data(X, y, self._names if hasattr(self, "run_") else {})
        new = np.asarray(list(names))
        if classes is not None and (unknown := set(names) - set(np.asarray(classes).tolist())):
            raise ValueError(f"expected labels among classes, got {sorted(unknown)[:5]}")
        if not hasattr(self, "run_"):
            return self.fit(X, y)
        unique_labels(self.classes_, new)  # raises if they are texts and numbers
        known = np.isin(new, self.classes_)
        if self.run_.config.setting == "dil":
            if not known.all():
                raise ValueError(f"expected images of classes that were learned before, because setting is dil, got"
                                 f" {new[~known].tolist()[:5]}")  # fmt: skip
        elif known.any():
            raise ValueError(f"class {new[known].tolist()[0]!r} was learned already: partial_fit learns other classes,"
                             " unless the classifier was fitted with settings={'setting': 'dil'}; or fit again, with"
                             " all images")  # fmt: skip
        self._require_unchanged()
        with _untested():
            run = resume(self.run_.folder, add=data, drop=True)  # an interrupted call may have left a checkpoint
        return self._fitted(run, self._names | names)

    def predict(self, X: Any) -> NDArray[Any]:
        """Return the most probable class of each image, `(n,)`."""
        best: NDArray[Any] = self.predict_proba(X).argmax(1)
        return np.asarray(self.classes_[best])

    def predict_proba(self, X: Any) -> NDArray[np.float32]:
        """Return the probabilities of images, `(n, C)`, in the order of `classes_`."""
        check_is_fitted(self)
        columns = [self._predictor.classes.index(self._names[label]) for label in self.classes_.tolist()]
        probabilities = [self._predictor.probabilities(batch) for batch in self._batches(X)]
        return np.asarray(torch.cat(probabilities)[:, columns].numpy())

    def unknown_scores(self, X: Any) -> NDArray[np.float32]:
        """Return a score of each image, `(n,)`, the higher the less like the learned classes.

        Raises:
            ValueError: If the readout cannot tell.
        """
        check_is_fitted(self)
        return np.asarray(torch.cat([self._predictor.unknown_scores(batch) for batch in self._batches(X)]).numpy())

    def _batches(self, X: Any) -> list[Sequence[Path | Tensor]]:
        images, size = check_images(X), self.run_.config.eval_batch_size
        return [[as_image(image) for image in images[i : i + size]] for i in range(0, len(images), size)]

    def _fitted(self, run: Run, names: dict[Any, str]) -> ContinualImageClassifier:
        self.run_, self._names, self._state = run, names, run.latest_finished()
        self.classes_ = unique_labels(np.asarray(list(names)))
        self.__dict__.pop("_predictor", None)
        return self

    @cached_property
    def _predictor(self) -> Predictor:
        self._require_unchanged()
        return Predictor(self.run_, device=accelerator_name(self.run_.config.hardware))

    def _require_unchanged(self) -> None:
        """Raise a ValueError if the run was changed elsewhere, such as by `pgp undo` or a copy of this classifier."""
        names, tasks = self.run_.data.class_names, self.run_.data.tasks[: self.run_.latest_finished().task]
        learned = {names[label] for labels in tasks for label in labels}
        if (self.run_.latest_finished(), learned) != (self._state, set(self._names.values())):
            raise ValueError(
                f"expected the run in {self.run_.folder} as this classifier left it, but it has been changed since:"
                " fit again, or use pgp.Predictor for what it has learned"
            )

    def __getstate__(self) -> dict[str, Any]:
        state = {name: value for name, value in super().__getstate__().items() if name != "_predictor"}
        if "_delete" in state:
            raise ValueError("expected a folder, to pickle a fitted ContinualImageClassifier: its run is in a temporary"
                             " folder, which is deleted with it; fit it with folder='runs'")  # fmt: skip
        return state

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.one_d_array = tags.input_tags.string = True  # paths
        tags.input_tags.two_d_array, tags.input_tags.three_d_array = False, True  # four dimensions have no tag
        return tags


def _training_data(X: Any, y: Any, known: Mapping[Any, str]) -> tuple[InMemory, dict[Any, str]]:
    """Return images as a data set, and the name of each class by its label.

    A label that is `known` already keeps its name, even if it is of another type now, such as 8 and 8.0.
    """
    if y is None:
        raise ValueError("expected labels: this classifier requires y to be passed, but the target y is None")
    images = check_images(X)
    check_classification_targets(y)
    check_consistent_length(images, y)
    encoder = LabelEncoder()
    labels = torch.from_numpy(np.asarray(encoder.fit_transform(y), dtype=np.int64))
    names = {label: known.get(label, str(label)) for label in encoder.classes_.tolist()}
    return InMemory.of(images, labels, list(names.values())), names


@contextlib.contextmanager
def _untested() -> Iterator[None]:
    """Do not warn that there are no test images: that is meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "no test images of")
        yield


def _delete(folder: Path, process: int) -> None:
    """Delete a temporary folder, unless this is a forked process that inherited it."""
    if os.getpid() == process:
        shutil.rmtree(folder, ignore_errors=True)
