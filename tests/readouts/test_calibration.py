"""Probabilities: the temperature from images held out, and the calibration error of a run."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from scipy.special import softmax

import tiny
from pgp import train
from pgp.datasets.synthetic import Synthetic
from pgp.evaluation.calibration import (
    NUM_BINS,
    calibration_bins,
    calibration_error_by_chance,
    expected_calibration_error,
)
from pgp.methods.head_only import HeadOnly
from pgp.predict import Predictor
from pgp.readouts import calibration, statistics
from pgp.readouts.base import Features
from pgp.readouts.calibration import (
    NUM_FOLDS,
    NUM_HELD_OUT,
    TEMPERATURES,
    HeldOutTest,
    HeldOutTests,
    brier_scores,
)
from pgp.readouts.head import MethodHead
from pgp.readouts.lda import LDA, NCM
from pgp.readouts.logistic import Logistic
from pgp.readouts.ranpac import RanPAC

D, CLASSES = 6, 5
READOUTS = (LDA.Config(), NCM.Config(), Logistic.Config())


def drawn(each=40, classes=CLASSES, noise=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    means = 1.5 * torch.randn(CLASSES, D, generator=torch.Generator().manual_seed(9))
    labels = torch.arange(classes).repeat_interleave(each)
    return means[labels] + noise * torch.randn(len(labels), D, generator=generator), labels


def results(readout, features, labels):
    """Return the scores of images that the readout was not fitted to, `(2, G)`."""
    return brier_scores(readout.logits(features), labels)


def with_one_mistake(scores, images):
    """Add one wrong prediction in all, `(1, G)`."""
    return (scores[0] + scores[1] / images)[None]


def test_the_temperature_minimises_the_squared_error_of_the_probabilities():
    logits = 3 * torch.randn(200, CLASSES, generator=torch.Generator().manual_seed(0))
    logits[:, -1] = -torch.inf  # a class that was not observed
    labels = torch.distributions.Categorical(logits=logits / 4).sample()
    array = logits.double().numpy()
    one_hot = np.eye(CLASSES)[labels.numpy()]

    def scores(log_temperature):
        probabilities = softmax(array / np.exp(log_temperature), axis=1)
        unknown = np.pad(probabilities, ((0, 0), (0, 1))) - np.eye(CLASSES + 1)[-1]  # a class more, which is right
        return [float(((probabilities - one_hot) ** 2).sum()), float((unknown**2).sum())]

    found = brier_scores(logits, labels)
    np.testing.assert_allclose(found.T.numpy(), [scores(np.log(t)) for t in TEMPERATURES.numpy()], rtol=1e-10)
    best = np.exp(minimize_scalar(lambda t: scores(t)[0], bounds=(-3, 5), method="bounded").x)
    assert float(TEMPERATURES[found[0].argmin()]) == pytest.approx(best, rel=0.1)
    halves = brier_scores(logits[:90], labels[:90]) + brier_scores(logits[90:], labels[90:])
    torch.testing.assert_close(halves, found)


@pytest.mark.parametrize("config", [LDA.Config(), LDA.Config(shrinkage=None), RanPAC.Config(dimensions=50)])
def test_correct_predictions_of_few_images_are_not_certain(config):
    features, labels = drawn(noise=0.1)
    readout = config.build(torch.nn.Linear(D, CLASSES), CLASSES, 0)
    selected = readout.select_features(Features(features))
    held_out = torch.arange(len(labels)) % 5 == 0
    readout.observe(selected, labels)
    readout.hold_out(selected[held_out], labels[held_out], augmented=False)
    readout.end_task()
    confidence, predicted = readout.probabilities(readout.logits(selected)).max(1)
    assert torch.equal(predicted, labels)
    n = int(held_out.sum())
    assert 1 - 2 / n < float(confidence.mean()) < 1 - 0.1 / n


def test_a_candidate_that_is_always_wrong_and_never_sure_is_not_the_best():
    """The error of the confidence alone would be near 0."""
    labels = torch.arange(40) % CLASSES
    always_wrong = 1.0 * torch.nn.functional.one_hot((labels + 1) % CLASSES, CLASSES)
    often_right = 1.0 * torch.nn.functional.one_hot((labels + (torch.arange(40) >= 24)) % CLASSES, CLASSES)
    tests = HeldOutTests(2)
    tests.add(
        HeldOutTest(40, 40, torch.stack([brier_scores(logits, labels) for logits in (always_wrong, often_right)], 1))
    )
    assert tests.best_candidate == 1


def test_a_class_whose_images_are_all_held_out_is_left_out_of_the_test():
    features, labels = drawn()
    held_out = (torch.arange(len(labels)) % 5 == 0) | (labels == 4)
    readout, without = LDA(CLASSES), LDA(CLASSES)
    readout.observe(features, labels)
    readout.hold_out(features[held_out], labels[held_out], augmented=False)
    readout.end_task()
    without.observe(features[~held_out], labels[~held_out])
    without.end_task()
    tested = held_out & (labels < 4)
    expected = with_one_mistake(results(without, features[tested], labels[tested]), int(tested.sum()))
    torch.testing.assert_close(readout.tests.scores, expected, rtol=1e-4, atol=1e-4)
    assert [test.images for test in readout.tests.by_task] == [int(tested.sum())]


def test_one_class_calibrates_nothing_and_chooses_nothing():
    features, labels = drawn(classes=1)
    readout = LDA(CLASSES, LDA.Config(shrinkage=None))
    readout.observe(features, labels)
    readout.hold_out(features[:8], labels[:8], augmented=False)
    readout.end_task()
    assert (readout.temperature, readout.regularisation) == (1, 0.1)
    assert readout.unknown_threshold(0.95) is not None


def test_an_earlier_state_has_its_own_temperature_and_shrinkage():
    features, labels = drawn(noise=3.0)
    config = LDA.Config(shrinkage=None)
    readout = LDA(CLASSES, config)
    readout.observe(features[labels == 0][:1], labels[labels == 0][:1])
    with pytest.warns(UserWarning, match="do not vary within classes"):
        readout.end_task()
    early = readout.state_dict()
    rows = labels > 0
    readout.observe(features[rows], labels[rows])
    readout.hold_out(features[rows][::3], labels[rows][::3], augmented=False)
    readout.end_task()
    assert (readout.temperature, readout.regularisation) != (1, 0.1)
    with pytest.warns(UserWarning, match="do not vary within classes"):
        readout.load_state_dict(early)
    assert (readout.temperature, readout.regularisation) == (1, 0.1)


def test_features_that_are_not_finite_are_an_error():
    features, labels = drawn()
    features[3, 2] = torch.nan
    readout = LDA(CLASSES)
    readout.observe(features, labels)
    with pytest.raises(ValueError, match="expected features of this task that are finite, got NaN or infinity"):
        readout.end_task()


def test_the_calibration_error_is_that_of_its_definition():
    probabilities = torch.randn(500, 4, generator=torch.Generator().manual_seed(0)).softmax(1)
    labels = torch.arange(500) % 4
    confidence, predicted = (tensor.numpy() for tensor in probabilities.max(1))
    hit = predicted == labels.numpy()
    expected = 0.0
    for number in range(NUM_BINS):
        inside = (confidence >= number / NUM_BINS) & (confidence < (number + 1) / NUM_BINS)
        if inside.any():
            expected += inside.mean() * abs(hit[inside].mean() - confidence[inside].mean())
    bins = calibration_bins(probabilities, labels)
    assert expected_calibration_error(bins) == pytest.approx(expected)
    halves = calibration_bins(probabilities[:123], labels[:123]) + calibration_bins(probabilities[123:], labels[123:])
    torch.testing.assert_close(halves, bins)
    assert calibration_bins(torch.ones(1, 1), torch.zeros(1, dtype=torch.long))[-1].tolist() == [1, 1, 1]


@pytest.mark.parametrize("images", [1, 7, 400])
def test_the_calibration_error_by_chance_is_that_of_drawn_labels(images):
    generator = torch.Generator().manual_seed(0)
    probabilities = (3 * torch.randn(images, 4, generator=generator)).softmax(1)
    probabilities[0] = torch.tensor([1.0, 0, 0, 0])  # certain, and right
    drawn = [probabilities.multinomial(1, generator=generator)[:, 0] for _ in range(400)]
    errors = [expected_calibration_error(calibration_bins(probabilities, labels)) for labels in drawn]
    found = calibration_error_by_chance(calibration_bins(probabilities, drawn[0]))
    assert found == pytest.approx(np.mean(errors), rel=0.05)  # not exactly: confidences differ within a bin


@pytest.mark.parametrize("config", READOUTS, ids=lambda config: config.tag)
def test_what_is_held_out_sets_the_temperature_and_nothing_else(config):
    """Fitting without the held-out images scores them; the fit that stays has seen all of them."""
    features, labels = drawn()
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    held_out[::5] = True
    head = torch.nn.Linear(D, CLASSES)
    readout, plain, without = (config.build(head, CLASSES, 0) for _ in range(3))
    readout.observe(features, labels)
    readout.hold_out(features[held_out][:11], labels[held_out][:11], augmented=False)
    readout.hold_out(features[held_out][11:], labels[held_out][11:], augmented=False)
    plain.observe(features, labels)
    without.observe(features[~held_out], labels[~held_out])
    for one in (readout, plain, without):
        one.end_task()
    torch.testing.assert_close(readout.logits(features), plain.logits(features))
    expected = with_one_mistake(results(without, features[held_out], labels[held_out]), int(held_out.sum()))
    torch.testing.assert_close(readout.tests.scores, expected, rtol=1e-4, atol=1e-4)
    assert plain.temperature == 1
    assert readout.temperature == float(TEMPERATURES[expected.argmin()])
    again = config.build(head, CLASSES, 0)
    again.load_state_dict(readout.state_dict())
    assert again.temperature == readout.temperature
    logits = readout.logits(features)
    torch.testing.assert_close(readout.probabilities(logits), (logits / readout.temperature).softmax(1))


def test_augmented_views_of_held_out_images_are_left_out_and_tested_on_too():
    features, labels = drawn()
    views = features + 0.1
    held_out = torch.arange(len(labels)) % 5 == 0
    readout, without = LDA(CLASSES), LDA(CLASSES)
    for rows, augmented in ((features, False), (views, True)):
        readout.observe(rows, labels)
        readout.hold_out(rows[held_out], labels[held_out], augmented=augmented)
        without.observe(rows[~held_out], labels[~held_out])
    readout.end_task()
    without.end_task()
    n = int(held_out.sum())
    found = sum(results(without, rows[held_out], labels[held_out]) for rows in (features, views))
    torch.testing.assert_close(readout.tests.scores, with_one_mistake(found, 2 * n), rtol=1e-4, atol=1e-4)
    assert [(test.images, test.views) for test in readout.tests.by_task] == [(n, 2 * n)]
    torch.testing.assert_close(readout.tests.by_task[0].unlike, without.unknown_scores(features[held_out]).sort()[0])


@pytest.mark.parametrize("config", [*READOUTS, LDA.Config(shrinkage=None), RanPAC.Config(dimensions=50)],
                         ids=lambda config: config.name)  # fmt: skip
def test_each_fold_is_left_out_of_a_fit_that_is_tested_on_it(config):
    features, labels = drawn(noise=2.0)
    head = torch.nn.Linear(D, CLASSES)
    readout = config.build(head, CLASSES, 0)
    selected = readout.select_features(Features(features))
    fold = torch.arange(len(labels)) % 7  # the last two are never held out
    readout.observe(selected, labels)
    for number in range(NUM_FOLDS):
        for rows in (fold == number).nonzero()[:, 0].split(15):
            readout.hold_out(selected[rows], labels[rows], fold=number, augmented=False)
    readout.end_task()
    (test,) = readout.tests.by_task
    used = 1 if isinstance(readout, Logistic | RanPAC) else NUM_FOLDS  # a fit of these takes long
    errors, unlike = torch.zeros_like(test.errors), []
    for number in range(used):
        without = config.build(head, CLASSES, 0)
        without.select_features(Features(features))
        without.observe(selected[fold != number], labels[fold != number])
        without.end_task()
        for index, candidate in enumerate(readout.candidates):
            without.regularisation = candidate
            if not isinstance(readout, Logistic):
                without._fit()
            errors[:, index] += results(without, selected[fold == number], labels[fold == number])
        without.regularisation = readout.regularisation
        if readout.detects_unknown:
            unlike.append(without.unknown_scores(selected[fold == number]))
    assert test.images == test.views == int((fold < used).sum())
    torch.testing.assert_close(test.errors, errors, rtol=1e-4, atol=1e-4)
    if unlike:
        torch.testing.assert_close(test.unlike, torch.cat(unlike).sort()[0], rtol=1e-4, atol=1e-4)
    assert readout.tests.enough == NUM_HELD_OUT * used // NUM_FOLDS


def test_as_many_folds_are_held_out_as_are_enough(tmp_path):
    """Of 24 images of 2 classes in each task; if 8 are enough, two of five folds."""
    config = tiny.config(dataset=Synthetic(), method=HeadOnly.Config(), readouts=(LDA.Config(),))
    per_task = len(config.dataset.build().train) // 3
    tested = {}
    for enough in (NUM_HELD_OUT, per_task // 3, 3):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(calibration, "NUM_HELD_OUT", enough)
            run = train.train(config, tmp_path / str(enough))
        (tested[enough],) = {tuple(row) for row in run.load()["readouts"]["lda"]["test_sizes"].tolist()}
    assert tested[NUM_HELD_OUT] == (per_task,) * 3
    assert per_task // 3 <= tested[per_task // 3][0] <= per_task // 2
    assert tested[3] == (4,) * 3  # eight folds, the first of which has two of the twelve images of each class


@pytest.mark.parametrize("noise", [1e-5, 3e-6, 1e-6, 6e-7, 3e-7])
@pytest.mark.parametrize("config", [LDA.Config(shrinkage=None), LDA.Config(), Logistic.Config(shrinkage=1e-6)],
                         ids=lambda config: config.name)  # fmt: skip
def test_features_that_hardly_vary_can_be_fitted(config, noise):
    """Rounding errors of their covariance may be larger than its smallest eigenvalues, if it is shrunk little."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(4).repeat_interleave(50)
    features = torch.randn(4, 200, generator=generator)[labels] + noise * torch.randn(200, 200, generator=generator)
    readout = config.build(torch.nn.Linear(200, 4), 4, 0)
    readout.observe(features, labels)
    readout.hold_out(features[::5], labels[::5], augmented=False)
    readout.end_task()
    assert torch.equal(readout.logits(features).argmax(1), labels)
    assert readout.unknown_scores(features).isfinite().all()


@pytest.mark.parametrize("config", [LDA.Config(shrinkage=None), RanPAC.Config(dimensions=20)], ids=lambda c: c.name)
def test_what_cannot_be_tested_chooses_nothing(config):
    """The second task has one image, which is held out: without it, its class is not known."""
    features, labels = drawn(noise=2.0)
    readout, again = (config.build(torch.nn.Linear(D, CLASSES), CLASSES, 0) for _ in range(2))
    selected = readout.select_features(Features(features))
    held_out = (labels < 4) & (torch.arange(len(labels)) % 5 == 0)
    readout.observe(selected[labels < 4], labels[labels < 4])
    readout.hold_out(selected[held_out], labels[held_out], augmented=False)
    readout.end_task()
    chosen = readout.regularisation
    assert chosen != readout.candidates[-1]
    readout.observe(selected[-1:], labels[-1:])
    readout.hold_out(selected[-1:], labels[-1:], augmented=False)
    readout.end_task()
    assert readout.regularisation == chosen
    again.load_state_dict(readout.state_dict())
    torch.testing.assert_close(again.logits(selected), readout.logits(selected))


def test_many_held_out_images_are_used_in_parts(monkeypatch):
    features, labels = drawn()
    states = []
    for size in (1000, 7):
        monkeypatch.setattr(statistics, "LARGEST_BATCH", size)
        readout = LDA(CLASSES)
        for augmented in (False, True):
            readout.observe(features, labels)
            readout.hold_out(features[::3], labels[::3], augmented=augmented)
        readout.end_task()
        states.append(readout.state_dict())
    torch.testing.assert_close(states[0], states[1])


def test_a_state_of_more_classes_is_an_error():
    features, labels = drawn()
    for config in READOUTS:
        readout, small = (config.build(torch.nn.Linear(D, count), count, 0) for count in (CLASSES, CLASSES - 1))
        readout.observe(features, labels)
        readout.end_task()
        with pytest.raises(ValueError, match="expected a state of at most 4 classes, got one of 5"):
            small.load_state_dict(readout.state_dict())


def test_few_images_leave_the_temperature_at_one(recwarn):
    """One image a class has none to hold out; of two, one is left, which says nothing of the variance."""
    for each in (1, 2):
        features, labels = drawn(each=each)
        readout = LDA(CLASSES)
        readout.observe(features, labels)
        held_out = torch.arange(len(labels)) % 2 == 0
        if each == 2:
            readout.hold_out(features[held_out], labels[held_out], augmented=False)
        readout.end_task()
        assert readout.temperature == 1
    assert len([warning for warning in recwarn if "do not vary" in str(warning.message)]) == 1


def test_tasks_add_up_and_only_numbers_of_held_out_images_are_kept():
    features, labels = drawn()
    readout = LDA(CLASSES)
    total, tested = torch.zeros(2, len(TEMPERATURES), dtype=torch.float64), 0
    for classes in ([0, 1], [2, 3, 4]):
        rows = torch.isin(labels, torch.tensor(classes))
        held_out = rows & (torch.arange(len(labels)) % 4 == 0)
        without = LDA(CLASSES)
        seen = torch.isin(labels, torch.arange(max(classes) + 1))
        without.observe(features[seen & ~held_out], labels[seen & ~held_out])
        without.end_task()
        total += results(without, features[held_out], labels[held_out])
        tested += int(held_out.sum())
        readout.observe(features[rows], labels[rows])
        readout.hold_out(features[held_out], labels[held_out], augmented=False)
        readout.end_task()
    torch.testing.assert_close(readout.tests.scores, with_one_mistake(total, tested), rtol=1e-4, atol=1e-4)
    assert set(readout.state_dict()) == {"counts", "sums", "products", "errors", "unlike", "test_sizes"}


def test_a_run_is_calibrated_and_says_so(tmp_path):
    """On pictures with much noise, LDA is sure of what it gets wrong; its temperature brings the loss down."""
    data = Synthetic(noise=0.8)
    config = tiny.config(dataset=data, method=HeadOnly.Config(), readouts=(LDA.Config(), MethodHead.Config()), epochs=1)
    run = train.train(config, tmp_path / "run")
    *_, last = run.events("task")
    assert set(last["calibration"]) == {"lda", "head"}
    found = last["calibration"]["lda"]
    images, hits = sum(found["images"]), sum(found["hits"])
    assert images == len(config.dataset.build().test)
    assert hits / images == pytest.approx(last["average_accuracy"]["lda"])
    errors = [abs(hit - sure) for hit, sure in zip(found["hits"], found["confidence"], strict=True)]
    assert found["error"] == pytest.approx(sum(errors) / images)
    predictor = Predictor(run, "lda")
    assert predictor._readout.temperature > 1
    split = config.dataset.build().test
    given = probabilities(predictor, split)
    bins = calibration_bins(given, true_columns(predictor, split))
    assert expected_calibration_error(bins) == pytest.approx(found["error"], abs=1e-6)
    more = replace(data, per_class=120).build().test
    given, columns = probabilities(predictor, more), true_columns(predictor, more)
    raw = (given.clamp(min=1e-30).log() * predictor._readout.temperature).softmax(1)
    calibrated, raw_loss = (torch.nn.functional.nll_loss(p.log(), columns) for p in (given, raw))
    assert calibrated < raw_loss - 0.3


def probabilities(predictor, split):
    return predictor.probabilities([split.image(index) for index in range(len(split))])


def true_columns(predictor, split):
    return torch.tensor([predictor.classes.index(f"pattern {label}") for label in split.labels.tolist()])
