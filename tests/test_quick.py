"""The recipe without gradients: nothing is trained, and the order of the tasks decides nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import tiny
from pgp import recipes, train
from pgp.datasets.synthetic import Synthetic
from pgp.predict import Predictor


def config(**changes):
    base = tiny.config(dataset=Synthetic(noise=0.3, per_class=9), tasks=3)
    return replace(recipes.without_training(base), **changes)


def logits_by_name(run, images, monkeypatch):
    """Logits of each class for `images`, up to a constant for each image."""
    predictor = Predictor(run)
    monkeypatch.setattr(predictor._readout, "probabilities", lambda logits: logits)
    logits = predictor.probabilities(images)
    return dict(zip(predictor.classes, (logits - logits.mean(1, keepdim=True)).T, strict=True))


@pytest.mark.parametrize(
    ("views", "changes"),
    [
        (2, {"joint": True}),
        (2, {"tasks": 6}),
        (2, {"shuffle": True}),
        (0, {"shuffle": True, "seed": 1}),  # another seed draws other views
        (0, {"tasks": 2, "shuffle": True, "seed": 4}),
    ],
)
def test_any_order_of_tasks_gives_the_same_logits(tmp_path, monkeypatch, views, changes):
    one = train.train(config(views=views), tmp_path / "one")
    other = train.train(config(views=views, **changes), tmp_path / "other")
    split = one.config.dataset.build().test
    images = [split.image(index) for index in range(len(split))]
    logits, others = (logits_by_name(run, images, monkeypatch) for run in (one, other))
    assert logits.keys() == others.keys()
    for name in logits:
        torch.testing.assert_close(logits[name], others[name], rtol=1e-4, atol=1e-3)


def test_nothing_is_trained_and_each_image_is_encoded_once_a_view(tmp_path, monkeypatch):
    calls = []
    encode = recipes.HeadOnly.query_and_patches
    monkeypatch.setattr(
        recipes.HeadOnly, "query_and_patches", lambda self, images: calls.append(len(images)) or encode(self, images)
    )
    monkeypatch.setattr(train, "train_step", None)
    run = train.train(config(views=2), tmp_path / "run")
    data = run.config.dataset.build()
    assert sum(calls) == 3 * len(data.train) + len(data.test)
    assert run.matrices()["lda+patches+normalize"][2].mean() > 0.7
    assert {key: len(value) for key, value in run.load()["method"].items()} == {"head.weight": 6, "head.bias": 6}


def test_quick_is_own_without_training():
    quick, own = recipes.quick(), recipes.own()
    same = {"dataset", "backbone", "transforms", "tasks", "optimizer", "hardware", "seed"}
    assert all(getattr(quick, name) == getattr(own, name) for name in same)
    assert not quick.method.learns
