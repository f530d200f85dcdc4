"""The images that a run confuses, and what it confuses them with."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from pgp.datasets.base import Split
from pgp.datasets.thumbnails import thumbnail
from pgp.evaluation.predictions import Predictions
from pgp.runs.run import Run
from pgp.training.tasks import build_tasks

THUMBNAIL = 88
"""Pixels of the longer side of a picture."""


class Pair(NamedTuple):
    """Two classes of which one is predicted as the other."""

    label: int
    """The images' class."""
    predicted: int
    images: int
    """Number of images."""


class ConfusedImage(NamedTuple):
    """An image that was predicted as another class."""

    image: int
    """Its index in the test split."""
    label: int
    predicted: int
    confidence: float
    """Probability of the predicted class, in [0, 1]."""
    picture: str
    """A data URI."""


def top_pairs(confusion: Tensor, most: int) -> list[Pair]:
    """Return the pairs of different classes with the most images, `most` at most, the largest first.

    Args:
        confusion: Number of images of each class (row) that were predicted as each class (column), `(C, C)`.
        most: Maximum number of pairs.

    >>> import torch
    >>> top_pairs(torch.tensor([[5, 2], [1, 7]]), 1)
    [Pair(label=0, predicted=1, images=2)]
    """
    wrong = confusion.clone().fill_diagonal_(0).flatten()
    counts, places = wrong.sort(descending=True, stable=True)
    size = len(confusion)
    found = zip(places[:most].tolist(), counts[:most].tolist(), strict=True)
    return [Pair(place // size, place % size, count) for place, count in found if count]


def read_test_images(run: Run, predictions: Predictions) -> Split:
    """Return the test images of a run, read from where its data are.

    Raises:
        ValueError: If they are not there any more, or are other images than those that were predicted.
    """
    config = run.config
    where = ", ".join(str(path) for data in (config.dataset, *config.added) for path in data.search_paths)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            data, _ = build_tasks(config, run.data)
        labels = data.test.labels
        if not len(predictions.images) or int(predictions.images.max()) >= len(labels):
            raise ValueError("some of them are missing")
        if not labels[predictions.images].equal(predictions.labels):
            raise ValueError("they are other images")
    except Exception as error:  # whatever a reader of data raises: a report needs no images
        raise ValueError(f"the test images are no longer at {where or 'their place'} ({error})") from error
    return data.test


def confused_images(
    split: Split, predictions: Predictions, column: str, pairs: Sequence[Pair], most: int
) -> list[ConfusedImage]:
    """Return images of the most confused pairs, those with the highest confidence, `most` at most.

    The first images of all pairs come before their second ones. Images that cannot be read are left out.

    Args:
        split: The test images.
        predictions: What was predicted for them.
        column: The readout.
        pairs: Pairs of classes, the most confused first.
        most: Maximum number of images.
    """
    predicted, confidence = predictions.top[column][:, 0], predictions.confidence[column]
    queues = []
    for pair in pairs:
        rows = ((predictions.labels == pair.label) & (predicted == pair.predicted)).nonzero().flatten()
        queues.append(rows[confidence[rows].argsort(descending=True, stable=True)].tolist())
    found: list[ConfusedImage] = []
    for turn in range(max(map(len, queues), default=0)):
        for pair, queue in zip(pairs, queues, strict=True):
            if len(found) == most:
                return found
            if turn < len(queue):
                index = int(predictions.images[queue[turn]])
                try:
                    picture = thumbnail(split.image(index), THUMBNAIL)
                except (OSError, ValueError):
                    continue
                found.append(ConfusedImage(index, pair.label, pair.predicted, float(confidence[queue[turn]]), picture))
    return found
