"""Base class of readouts, the classifiers that turn features into logits at test."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn


class Features(NamedTuple):
    """Features that readouts use, for `B` images."""

    features: Tensor
    """Features of the method, with its prompts, `(B, D)`."""
    query: Tensor | None = None
    """CLS token of the frozen encoder without prompts, `(B, Q)`, if the method or a readout uses it."""
    patches: Tensor | None = None
    """Mean of the patch tokens of the frozen encoder without prompts, `(B, Q)`, if a readout uses it."""
    experts: Tensor | None = None
    """The k experts that an image may belong to, the likeliest first, `(B, k)`, if the method has experts."""
    expert_logits: Tensor | None = None
    """Logarithms of their probabilities, `(B, k)`."""
    expert_features: Tensor | None = None
    """Features with each of these experts, `(B, k, D)`; `features` are those with the likeliest one."""

    def apply(self, change: Callable[[Tensor], Tensor]) -> Features:
        """Return the results of `change` for each tensor, such as some of the rows."""
        return Features(*(None if tensor is None else change(tensor) for tensor in self))  # type: ignore[arg-type]

    @staticmethod
    def concat(batches: Sequence[Features]) -> Features:
        """Return the features of all `batches` as one batch."""
        columns = (None if column[0] is None else torch.cat(column) for column in zip(*batches, strict=True))
        return Features(*columns)  # type: ignore[arg-type]


class Readout(abc.ABC):
    """A classifier of features.

    Shapes: `B` images, `D` feature width, `Q` query width, `C` classes (of all tasks, including future ones).

    The order of calls after the training of each task is `observe` for all its images, with `hold_out` for some of
    them, `compensate` if the readout `needs_drift`, then `end_task`, which fits it. `logits` may be called after the
    first task.
    """

    name: str
    """Name of the readout in reports, the same as in its configuration."""
    needs_fit: bool = True
    """Whether the readout must observe the features of each task. If not, `observe` and `end_task` do nothing."""
    similar_classes: Mapping[int, int] = {}
    """New classes of the latest task that look like an earlier class, each with that class."""
    temperature: float = 1.0
    """Softmax temperature, for calibrated probabilities."""
    needs_drift: bool = False
    """Whether the readout needs to know how the training of each task changed the features."""

    @dataclass(frozen=True)
    class Config(abc.ABC):
        """Settings of a readout; `build` creates it."""

        tag: ClassVar[str]
        """Name of this kind of readout in config.json. It must be unique among readouts and never change."""

        @property
        @abc.abstractmethod
        def name(self) -> str:
            """Name of the readout in reports and in accuracy.csv, unique among the readouts of a run."""

        @property
        def uses_query(self) -> bool:
            """Whether the readout uses the query of an image in addition to its features."""
            return False

        @property
        def uses_patches(self) -> bool:
            """Whether the readout uses the mean patch token of the frozen encoder in addition to the features."""
            return False

        @property
        def uses_experts(self) -> bool:
            """Whether the readout needs a method with experts."""
            return False

        @property
        def uses_head(self) -> bool:
            """Whether the readout uses the method's own classifier."""
            return False

        @abc.abstractmethod
        def build(self, head: nn.Module, classes: int, seed: int) -> Readout:
            """Return a readout over `classes` labels.

            Args:
                head: The method's own classifier.
                classes: Number of labels.
                seed: The run's seed, which decides every random draw of the readout.
            """

    def select_features(self, images: Features) -> Tensor:
        """Return the features that `observe` and `logits` expect, `(B, D)`: by default, `images.features`."""
        return images.features

    @abc.abstractmethod
    def observe(self, features: Tensor, labels: Tensor) -> None:
        """Observe a batch of the current task: features `(B, D)` from `select_features`, and labels `(B,)`.

        The images are training images after the training of the task: without augmentation and, if the configuration
        asks for it, in augmented views.
        """

    def hold_out(self, features: Tensor, labels: Tensor, *, augmented: bool, fold: int = 0) -> None:
        """Use these images, which were passed to `observe` too, for calibration: fit without them, score, refit.

        By default, it does nothing.

        Args:
            features: Features `(B, D)` from `select_features`.
            labels: Labels `(B,)`.
            fold: Which fit leaves these images out: one for each fold.
            augmented: Whether these are augmented views of images that are held out.
        """
        return

    def compensate(self, before: Tensor, after: Tensor) -> None:
        """Correct the stored statistics of old classes for the drift during the current task.

        It is called if the readout `needs_drift`, once for each task from the second on that may have changed features,
        before `end_task`, with the same tensors in every process. By default, it does nothing.

        Args:
            before: Features before the training of the task, `(n, D)`.
            after: Features of the same images after the training, `(n, D)`.
        """
        return

    @abc.abstractmethod
    def end_task(self) -> None:
        """Fit the readout to everything observed so far.

        Collective: in a distributed run, every process must call it.
        """

    @abc.abstractmethod
    def logits(self, features: Tensor) -> Tensor:
        """Return the logits `(B, C)` of features `(B, D)`; -inf for classes that were never observed."""

    @property
    def detects_unknown(self) -> bool:
        """Whether `unknown_scores` can tell images of classes that were never learned. By default, it cannot."""
        return False

    def unknown_scores(self, features: Tensor) -> Tensor:
        """Return a score `(B,)` of features `(B, D)`, the higher the less like the learned classes.

        Raises:
            NotImplementedError: If the readout does not `detects_unknown`.
        """
        raise NotImplementedError(f"{type(self).__name__} cannot tell unknown images")

    def unknown_threshold(self, keep: float) -> float | None:
        """Return the score that a fraction `keep` of held-out training images do not exceed; None if there are none."""
        return None

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return the probabilities `(B, C)` of logits `(B, C)`, some of which may be masked by -inf."""
        return (logits / self.temperature).softmax(-1)

    @abc.abstractmethod
    def state_dict(self) -> dict[str, Tensor]:
        """Return the state of the readout, as tensors."""

    @abc.abstractmethod
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore a `state_dict`. It may cover only the first classes."""
