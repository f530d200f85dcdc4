"""Readouts from statistics: how they follow drifting features, and the logistic one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from rich.progress import Progress
from torch import nn

import tiny
from pgp import train
from pgp.analysis.audit import audit_run
from pgp.analysis.checkpoints import evaluate_checkpoints
from pgp.backbones.base import Backbone
from pgp.datasets.synthetic import Synthetic
from pgp.methods.head_only import HeadOnly
from pgp.methods.vpt import VPT
from pgp.predict import Predictor
from pgp.readouts.base import Features
from pgp.readouts.calibration import TEMPERATURES
from pgp.readouts.compensation import nearness
from pgp.readouts.head import MethodHead
from pgp.readouts.lda import LDA
from pgp.readouts.logistic import Logistic
from pgp.runs.run import Run

D = 6
MEANS = 4 * torch.randn(5, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def drawn(labels, each=40, seed=1):
    """Features around the means of `labels`, in a common shape, and their labels."""
    labels = torch.tensor(labels).repeat_interleave(each)
    noise = torch.randn(len(labels), D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return MEANS[labels] + noise * torch.linspace(0.3, 1.5, D), labels


def taught(readout, *tasks):
    for features, labels in tasks:
        readout.observe(features, labels)
        readout.end_task()
    return readout


TURN = torch.eye(D, dtype=torch.float64) + 0.3 * torch.randn(
    D, D, dtype=torch.float64, generator=torch.Generator().manual_seed(7)
)


def drifted(features):
    return features @ TURN + 2


def followed(how, move, **settings):
    """LDA that learned classes 0 to 2, and then, as features move, classes 3 and 4; and one that learned all after."""
    old, new = drawn([0, 1, 2]), drawn([3, 4], each=100)
    readout = taught(LDA(5, LDA.Config(compensate=how, **settings)), old)
    readout.compensate(new[0], move(new[0]))
    taught(readout, (move(new[0]), new[1]))
    truth = taught(LDA(5), (move(old[0]), old[1]), (move(new[0]), new[1]))
    return readout, truth


def test_an_affine_drift_is_followed_to_the_letter():
    readout, truth = followed("linear", drifted, ridge=1e-9)
    torch.testing.assert_close(readout.means, truth.means, rtol=0, atol=1e-4)
    torch.testing.assert_close(readout.covariance(0.1), truth.covariance(0.1), rtol=0, atol=1e-4)


def test_a_common_shift_is_followed_by_both_and_missed_without():
    far = {how: followed(how, lambda x: x + 3.0) for how in ("none", "shift", "linear")}
    missed = {how: float((readout.means - truth.means).norm()) for how, (readout, truth) in far.items()}
    assert missed["shift"] < 1e-9
    assert missed["linear"] < 1e-9
    assert missed["none"] > 10


def test_a_shift_is_taken_from_images_nearby():
    readout = taught(LDA(5, LDA.Config(compensate="shift", bandwidth=0.5)), drawn([0, 1]))
    old = readout.means.clone()
    images, labels = drawn([0, 1], seed=2)
    push = torch.where(labels[:, None] == 0, 1.0, -1.0).expand(-1, D)
    readout.compensate(images, images + push)
    torch.testing.assert_close(readout.means[:2] - old[:2], torch.tensor([[1.0], [-1.0]]).double().expand(2, D),
                               rtol=0, atol=1e-3)  # fmt: skip


def test_covariances_stay_under_a_shift():
    readout = taught(LDA(5, LDA.Config(compensate="shift")), drawn([0, 1, 2]))
    before = readout.covariance(0.1)
    images, _ = drawn([3])
    readout.compensate(images, images * 1.5)
    torch.testing.assert_close(readout.covariance(0.1), before, rtol=0, atol=1e-9)


def test_nearby_follows_classes_among_the_new_images_and_leaves_others():
    """Class 2 is far from the images of the new task, which tell nothing about its drift."""
    readout = taught(LDA(5, LDA.Config(compensate="nearby", ridge=1e-9)), drawn([0, 1, 2]))
    old = readout.means.clone()
    images, _ = drawn([0, 1], seed=2)
    readout.compensate(images, drifted(images))
    torch.testing.assert_close(readout.means[:2], drifted(old[:2]), rtol=0, atol=1e-3)
    far = (readout.means[2] - old[2]).norm() / (drifted(old[2:3])[0] - old[2]).norm()
    assert 0 < far < 0.05


def test_nearby_is_linear_if_all_classes_are_near():
    images, _ = drawn([0, 1, 2, 3, 4])
    linear, nearby = (taught(LDA(5, LDA.Config(compensate=how)), drawn([0, 1, 2])) for how in ("linear", "nearby"))
    for readout in (linear, nearby):
        readout.compensate(images, drifted(images))
    torch.testing.assert_close(nearby.means, linear.means)
    torch.testing.assert_close(nearby.covariance(0.1), linear.covariance(0.1))


def test_nearby_transforms_the_covariance_by_what_each_class_does():
    """Images of class 0 move, those of class 1 are too far away; both have one covariance."""
    images, labels = drawn([0])
    classes = torch.cat([labels, labels + 1])
    readout = taught(LDA(2, LDA.Config(compensate="nearby", ridge=1e-9)), (torch.cat([images, images + 1e5]), classes))
    readout.compensate(images, drifted(images))
    moved = taught(LDA(2), (torch.cat([drifted(images), images + 1e5]), classes))
    torch.testing.assert_close(readout.covariance(0.1), moved.covariance(0.1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("images", [20, 100, 1000])
def test_nearness_does_not_depend_on_the_number_of_images(images):
    """Also if there are fewer than dimensions, so that they are near to a mean and a covariance that have them."""
    draws = torch.Generator().manual_seed(0)
    seen, same = (torch.randn(n, 200, generator=draws, dtype=torch.float64) for n in (images, 20))
    assert float(nearness(same, seen).mean()) > 0.8
    assert float(nearness(2 * same, seen).max()) < 0.05


def test_nearness_leaves_each_image_out():
    images = torch.randn(30, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 3
    centred = images - images.mean(0)
    isotropic = 0.1 * (centred.square().sum() / len(images) / 12) * torch.eye(12, dtype=torch.float64)
    distances = []
    for number in range(len(images)):
        others = torch.cat([images[:number], images[number + 1 :]])
        spread = others - others.mean(0)
        covariance = 0.9 * spread.T @ spread / len(images) + isotropic
        away = images[number] - others.mean(0)
        distances.append(away @ torch.linalg.solve(covariance, away))
    mean = images.mean(0) + torch.linspace(3, 6, 12, dtype=torch.float64)
    away = mean - images.mean(0)
    covariance = 0.9 * centred.T @ centred / len(images) + isotropic
    relative = away @ torch.linalg.solve(covariance, away) / torch.stack(distances).mean()
    assert relative > 1
    torch.testing.assert_close(nearness(mean[None], images)[0], relative**-4)


def test_no_class_is_near_to_images_that_do_not_vary():
    image = torch.rand(1, D).double()
    assert torch.equal(nearness(MEANS.double(), image.expand(3, -1)), torch.zeros(5).double())
    readout = taught(LDA(5, LDA.Config(compensate="nearby")), drawn([0, 1, 2]))
    before = readout.means.clone()
    readout.compensate(image, image + 1)
    assert torch.equal(readout.means, before)


@pytest.mark.parametrize("how", ["shift", "linear", "nearby"])
@pytest.mark.parametrize("where", [0, 1], ids=["before", "after"])
def test_features_that_are_not_finite_change_no_statistics(how, where):
    readout = taught(LDA(5, LDA.Config(compensate=how)), drawn([0, 1, 2]))
    kept = {name: tensor.clone() for name, tensor in readout.state_dict().items()}
    pair = [drawn([3, 4])[0], drifted(drawn([3, 4])[0])]
    pair[where][7, 2] = torch.inf
    with pytest.raises(ValueError, match="features of this task that are finite, got NaN or infinity: with 16-mixed"):
        readout.compensate(*pair)
    for name, tensor in readout.state_dict().items():
        assert torch.equal(tensor, kept[name]), name


def test_what_does_not_compensate_stays():
    readout = taught(LDA(5), drawn([0, 1, 2]))
    state = {name: tensor.clone() for name, tensor in readout.state_dict().items()}
    images, _ = drawn([3])
    readout.compensate(images, images + 1)
    assert all(torch.equal(state[name], tensor) for name, tensor in readout.state_dict().items())
    LDA(5, LDA.Config(compensate="linear")).compensate(images, images)  # before any class: nothing to move


def test_logistic_reads_what_it_has_seen_and_nothing_else():
    readout = Logistic(nn.Linear(D, 5), 5)
    with pytest.raises(ValueError, match="at least one task"):
        readout.logits(MEANS)
    taught(readout, drawn([0, 1, 2]), drawn([4]))
    images, labels = drawn([0, 1, 2, 4], seed=9)
    logits = readout.logits(images)
    assert torch.isinf(logits[:, 3]).all()
    assert (logits.argmax(1) == labels).double().mean() > 0.95
    agreed = logits.argmax(1) == taught(LDA(5), drawn([0, 1, 2]), drawn([4])).logits(images).argmax(1)
    assert agreed.double().mean() > 0.95  # on normal features of one covariance both are the best there is


def test_logistic_goes_round_and_starts_from_what_it_was():
    head = nn.Linear(D, 5)
    readout = taught(Logistic(head, 5), drawn([0, 1, 2]))
    restored = Logistic(head, 5)
    restored.load_state_dict(readout.state_dict())
    assert torch.equal(restored.logits(MEANS), readout.logits(MEANS))
    both = [taught(one, drawn([4])).logits(MEANS) for one in (readout, restored)]
    assert torch.equal(*both)
    unmoved = taught(Logistic(head, 5, Logistic.Config(steps=1, decay=0.0)), drawn([0, 1]))
    torch.testing.assert_close(unmoved._weight[2:], torch.zeros(3, D, dtype=torch.float64))
    smaller = Logistic(nn.Linear(D, 5), 5)
    smaller.load_state_dict({k: v[:4] if v.shape[0] == 5 else v for k, v in restored.state_dict().items()})
    assert torch.isinf(smaller.logits(MEANS)[:, [3]]).all()


def test_logistic_draws_from_the_seed_of_the_run():
    head = nn.Linear(D, 5)
    one, same, other = (
        taught(Logistic.Config(draws=2).build(head, 5, seed), drawn([0, 1, 2])).logits(MEANS)[:, :3]
        for seed in (1, 1, 2)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_logistic_survives_one_image_of_each_class():
    taught(Logistic(nn.Linear(D, 5), 5), drawn([0, 1, 2], each=1)).logits(MEANS)


@pytest.mark.parametrize("settings", [{"bandwidth": 0.0}, {"ridge": -1.0}, {"compensate": "linear", "ridge": 0.0}])
def test_settings_of_compensation_are_checked(settings):
    with pytest.raises(ValueError, match="bandwidth and ridge above 0"):
        LDA.Config(**settings)


@pytest.mark.parametrize("settings", [{"shrinkage": 0.0}, {"draws": 0}, {"decay": -1.0}, {"steps": 0}])
def test_settings_of_logistic_are_checked(settings):
    with pytest.raises(ValueError, match=r"expected (shrinkage from|draws and steps above 0 and decay of at least 0)"):
        Logistic.Config(**settings)


HOW = ("none", "shift", "linear", "nearby")
FOLLOWING = tuple(kind.Config(compensate=how) for kind in (LDA, Logistic) for how in HOW)


def test_a_run_follows_its_features_and_goes_on_inside_a_task_bitwise(tmp_path, monkeypatch):
    """What images were before a task is part of the state while the task is trained."""
    config = tiny.config(dataset=Synthetic(noise=0.05), readouts=(*FOLLOWING, MethodHead.Config()), save_every_steps=2)
    whole = train.train(config, tmp_path / "whole")
    step, calls = train.train_step, []

    def crash(*arguments, **named):
        calls.append(1)
        if len(calls) == 12:
            raise KeyboardInterrupt
        return step(*arguments, **named)

    monkeypatch.setattr(train, "train_step", crash)
    with pytest.raises(KeyboardInterrupt):
        train.train(config, tmp_path / "cut")
    monkeypatch.setattr(train, "train_step", step)
    assert "-step-" in (Run.open(tmp_path / "cut").latest_checkpoint() or "")
    resumed = train.resume(tmp_path / "cut")
    for column, matrix in whole.matrices().items():
        assert torch.equal(matrix.nan_to_num(), resumed.matrices()[column].nan_to_num())
    one, other = (run.load()["readouts"] for run in (whole, resumed))
    assert all(torch.equal(one[name][key], other[name][key]) for name in one for key in one[name])
    assert not torch.equal(one["lda"]["sums"], one["lda+shift"]["sums"])
    assert not torch.equal(one["lda+shift"]["sums"], one["lda+linear"]["sums"])
    *_, last = whole.events("task")
    tests, images = len(one["lda"]["errors"]), len(one["lda"]["unlike"])
    assert images == len(config.dataset.build().train)  # each image was held out in one fold
    numbers = 6 + 6 * 48 + 48 * 48 + tests * (2 * len(TEMPERATURES) + 3)
    assert last["readouts"]["lda"]["bytes"] == 8 * numbers + 4 * images
    assert last["readouts"]["logistic"]["seconds"] > 0


def test_the_query_is_read_beside_the_features_and_never_moves():
    readout = LDA(5, LDA.Config(query=True, compensate="linear"))
    queries, labels = drawn([0, 1, 2])
    readout.observe(readout.select_features(Features(drifted(queries), queries)), labels)
    readout.end_task()
    before = readout.means.clone()
    images, _ = drawn([3, 4])
    moved = [readout.select_features(Features(features, images)) for features in (images, images + 3)]
    readout.compensate(*moved)
    assert readout.config.name == "lda+query+linear"
    torch.testing.assert_close(readout.means[:3, D:], before[:3, D:], rtol=0, atol=1e-9)
    torch.testing.assert_close(readout.means[:3, :D], before[:3, :D] + 3, rtol=0, atol=1e-9)
    assert torch.equal(LDA(5).select_features(Features(images, queries)), images)


def test_each_part_that_a_readout_uses_is_scaled_to_length_one():
    images = Features(torch.full((2, 4), 3.0), torch.tensor([[0.0, 2.0], [5.0, 0.0]]), torch.tensor([[4.0, 3.0]] * 2))
    readout = LDA(5, LDA.Config(query=True, patches=True, normalize=True))
    assert readout.name == "lda+query+patches+normalize"
    expected = torch.tensor([[0.5, 0.5, 0.5, 0.5, 0.0, 1.0, 0.8, 0.6], [0.5, 0.5, 0.5, 0.5, 1.0, 0.0, 0.8, 0.6]])
    torch.testing.assert_close(readout.select_features(images), expected)
    plain = LDA(5, LDA.Config(patches=True))
    assert torch.equal(plain.select_features(images), torch.cat([images.features, images.patches], 1))


def test_a_query_tells_where_features_went():
    """Features that had nearly nothing to tell, and unfold in the second task's training, are followed by queries."""
    old, new = drawn([0, 1, 2], each=200), drawn([0, 1, 2, 3, 4], each=200, seed=2)
    missed = {}
    for query in (False, True):
        readout = LDA(5, LDA.Config(query=query, compensate="linear", ridge=1e-6))
        readout.observe(readout.select_features(Features(1e-3 * old[0][:, :1].expand(-1, D), old[0])), old[1])
        readout.end_task()
        readout.compensate(
            readout.select_features(Features(1e-3 * new[0][:, :1].expand(-1, D), new[0])),
            readout.select_features(Features(drifted(new[0]), new[0])),
        )
        missed[query] = float((readout.means[:3, :D] - drifted(MEANS[:3])).norm())
    assert missed[True] < 1
    assert missed[False] > 10


@pytest.mark.parametrize("method", [VPT.Config(), tiny.config().method])
def test_a_run_reads_queries_at_every_place_alike(tmp_path, method):
    readouts = (MethodHead.Config(), LDA.Config(query=True, compensate="linear"), LDA.Config())
    config = tiny.config(dataset=Synthetic(noise=0.05), method=method, readouts=readouts)
    run = train.train(config, tmp_path)
    kept = run.matrices()["lda+query+linear"]
    assert run.load()["readouts"]["lda+query+linear"]["sums"].shape == (6, 2 * 48)
    torch.testing.assert_close(evaluate_checkpoints(run, run.config)["lda+query+linear"][2], kept[2])
    column = "lda+query+linear"
    (plain,) = (f for f in audit_run(run, Progress(disable=True), ()) if f[:4] == (column, "image", None, "seen"))
    assert plain.accuracy == pytest.approx(float(kept[2].mean()))
    data, names = run.config.dataset.build(), list(run.data.class_names)
    images = [data.test.image(i) for i in range(len(data.test))]
    found = [prediction.names[0] for prediction in Predictor(run, "lda+query+linear")(images)]
    right = [name == names[label] for name, label in zip(found, data.test.labels.tolist(), strict=True)]
    assert sum(right) / len(right) == pytest.approx(float(kept[2].mean()))


@pytest.mark.parametrize("reads", [False, True])
def test_queries_are_asked_for_where_somebody_reads_them(tmp_path, monkeypatch, reads):
    asked, encode = [], Backbone.encode
    monkeypatch.setattr(Backbone, "encode", lambda self, images: asked.append(len(images)) or encode(self, images))
    readouts = (LDA.Config(query=reads, compensate="linear"),)
    train.train(tiny.config(method=VPT.Config(), readouts=readouts), tmp_path)
    assert sum(asked) == (72 + 24 if reads else 0)  # each training image, and each test image, once


def test_shift_follows_the_nearest_image_where_old_classes_have_no_spread():
    readout = LDA(4, LDA.Config(compensate="shift"))
    draws = torch.Generator().manual_seed(0)
    readout.observe(10 * torch.randn(2, 64, generator=draws), torch.tensor([0, 1]))
    with pytest.warns(UserWarning, match="features do not vary"):
        readout.end_task()
    readout.observe(torch.randn(20, 64, generator=draws), torch.tensor([2, 3] * 10))
    before = torch.randn(20, 64, generator=draws)
    readout.compensate(before, before + 0.1)
    readout.end_task()
    assert bool(readout.logits(before).isfinite().all())


def test_views_are_observed_by_readouts_and_predicted_from_alike(tmp_path):
    """A run with views has as many observations; what reads patches is the same in training, evaluation, prediction."""
    readouts = (LDA.Config(patches=True, normalize=True), LDA.Config(query=True))
    config = tiny.config(dataset=Synthetic(noise=0.05), method=HeadOnly.Config(learns=False), readouts=readouts)
    plain, run = (train.train(replace(config, views=views), tmp_path / str(views)) for views in (0, 2))
    name = readouts[0].name
    states = [one.load()["readouts"][name] for one in (plain, run)]
    assert torch.equal(states[1]["counts"], 3 * states[0]["counts"])
    assert not torch.allclose(*(state["sums"] / state["counts"][:, None] for state in states))
    torch.testing.assert_close(evaluate_checkpoints(run, run.config)[name][2], run.matrices()[name][2])
    data = run.config.dataset.build()
    images = [data.test.image(index) for index in range(len(data.test))]
    for readout in readouts:
        guesses = [prediction.names[0] for prediction in Predictor(run, readout.name)(images)]
        expected = [data.class_names[label] for label in data.test.labels.tolist()]
        hits = [guess == name for guess, name in zip(guesses, expected, strict=True)]
        assert sum(hits) / len(hits) == pytest.approx(float(run.matrices()[readout.name][2].mean()))
