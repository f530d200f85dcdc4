"""The images that are confused: the largest pairs of classes, and of these the most confident predictions."""

from __future__ import annotations

import torch

from pgp.analysis import confusion
from pgp.evaluation.predictions import Predictions


def test_pairs_and_pictures_are_those_with_the_most_images_and_confidence():
    counts = torch.tensor([[9, 0, 3], [1, 9, 0], [5, 0, 9]])
    pairs = confusion.top_pairs(counts, 2)
    assert [tuple(pair) for pair in pairs] == [(2, 0, 5), (0, 2, 3)]
    labels = torch.tensor([2, 2, 0, 2, 0])
    found = Predictions(torch.tensor([10, 11, 12, 13, 14]), labels, labels, {"x": (2 - labels)[:, None]},
                        {"x": torch.tensor([0.5, 0.9, 0.8, 0.7, 0.6])}, None)  # fmt: skip
    images = torch.zeros(20, 3, 8, 8, dtype=torch.uint8)
    split = type("Split", (), {"image": lambda _, index: images[index]})()
    shown = confusion.confused_images(split, found, "x", pairs, 4)
    assert [one.image for one in shown] == [11, 12, 13, 14]
    assert confusion.confused_images(split, found, "x", pairs, 1)[0].image == 11
