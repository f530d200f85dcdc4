"""Images of classes that were never learned: the score, its threshold, and what predictions say."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

import oracles
import tiny
from pgp.cli.main import main
from pgp.datasets.synthetic import Synthetic
from pgp.evaluation.unknown import auroc, false_positive_rate
from pgp.methods.head_only import HeadOnly
from pgp.predict import Predictor
from pgp.readouts.base import Features
from pgp.readouts.head import MethodHead
from pgp.readouts.lda import LDA, NCM
from pgp.readouts.logistic import Logistic
from pgp.train import train

C, D = 5, 4
KINDS = (LDA.Config(), LDA.Config(shrinkage=None), NCM.Config(), Logistic.Config())


def drawn(each=60, seed=0, spread=4.0, means=9):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(C).repeat_interleave(each)
    centres = spread * torch.randn(C, D, generator=torch.Generator().manual_seed(means), dtype=torch.float64)
    noise = torch.randn(len(labels), D, generator=generator, dtype=torch.float64) * torch.tensor([2, 1, 0.5, 0.2])
    return centres[labels] + noise, labels


@pytest.mark.parametrize("shrinkage", [0.01, 0.3, 1.0])
def test_the_score_is_the_relative_mahalanobis_distance(shrinkage):
    (features, labels), (test, _) = drawn(), drawn(each=3, seed=1, means=2)
    readout = LDA(C, LDA.Config(shrinkage=shrinkage))
    for rows in (slice(0, 130), slice(130, None)):
        readout.observe(features[rows], labels[rows])
    readout.end_task()
    expected = oracles.relative_mahalanobis(features.numpy(), labels.numpy(), shrinkage, test.numpy())
    np.testing.assert_allclose(readout.unknown_scores(test).numpy(), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("config", KINDS, ids=lambda config: config.name)
def test_the_threshold_keeps_held_out_images_of_all_tasks(config):
    readout = config.build(torch.nn.Linear(D, C), C, 0)
    features, labels = drawn(each=100)
    held_out = torch.arange(len(labels)) % 5 == 0
    for classes in ([0, 1, 2], [3, 4]):
        rows = torch.isin(labels, torch.tensor(classes))
        readout.observe(features[rows], labels[rows])
        readout.hold_out(features[rows & held_out], labels[rows & held_out], augmented=False)
        readout.end_task()
    assert [test.images for test in readout.tests.by_task] == [60, 40]
    scores = torch.cat([test.unlike for test in readout.tests.by_task])
    for keep in (0.5, 0.95):
        assert float((scores <= readout.unknown_threshold(keep)).double().mean()) == pytest.approx(keep, abs=0.02)
    again = config.build(torch.nn.Linear(D, C), C, 0)
    again.load_state_dict(readout.state_dict())
    assert again.unknown_threshold(0.95) == readout.unknown_threshold(0.95)
    known, _ = drawn(each=200, seed=3)
    unknown, _ = drawn(each=200, seed=4, means=11)
    assert auroc(readout.unknown_scores(known), readout.unknown_scores(unknown)) > 0.8


def test_the_latest_tests_are_kept():
    features, labels = drawn(each=75)
    readout, sizes = LDA(C), []
    readout.tests.enough = 100
    for label in range(C):
        rows = labels == label
        readout.observe(features[rows], labels[rows])
        readout.hold_out(features[rows][:45], labels[rows][:45], augmented=False)
        readout.end_task()
        sizes.append([test.images for test in readout.tests.by_task])
    assert sizes == [[45], [45, 45], [45, 45, 45], [45, 45, 45], [45, 45, 45]]
    last = torch.cat([test.unlike for test in readout.tests.by_task]).sort()[0]
    assert readout.unknown_threshold(0.9) == last[int(0.9 * 135)]


def test_auroc_and_false_positives_are_those_of_their_definitions():
    known, unknown = (torch.randn(300, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    unknown = unknown + 1
    pairs = (unknown[:, None] > known).double().mean()
    assert auroc(known, unknown) == pytest.approx(float(pairs))
    threshold = np.quantile(known.numpy(), 0.95, method="higher")
    assert false_positive_rate(known, unknown) == pytest.approx(float((unknown < threshold).double().mean()), abs=0.01)


def test_one_image_of_each_class_has_no_threshold(recwarn):
    features, labels = drawn(each=1)
    readout = LDA(C)
    readout.observe(features, labels)
    readout.end_task()
    assert readout.unknown_threshold(0.95) is None
    assert readout.unknown_scores(features).isfinite().all()


def test_images_that_are_all_the_same_have_scores(recwarn):
    features = torch.ones(6, D)
    readout = LDA(C)
    readout.observe(features, torch.zeros(6, dtype=torch.long))
    readout.hold_out(features[:2], torch.zeros(2, dtype=torch.long), augmented=False)
    readout.end_task()
    assert readout.unknown_scores(features).tolist() == [0] * 6


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    config = tiny.config(dataset=Synthetic(per_class=60), method=HeadOnly.Config(learns=True),
                         readouts=(LDA.Config(), MethodHead.Config()))  # fmt: skip
    return train(config, tmp_path_factory.mktemp("unknown") / "run")


def noise(each=20):
    return list(torch.randint(0, 256, (each, 3, 16, 16), generator=torch.Generator().manual_seed(0)).to(torch.uint8))


def test_a_predictor_says_unknown_for_noise_and_not_for_what_it_learned(run):
    predictor = Predictor(run)
    split = run.config.dataset.build().test
    learned = [split.image(index) for index in range(len(split))]
    assert np.mean([one.unknown for one in predictor.predict(learned, reject=0.1)]) < 0.4
    assert np.mean([one.unknown for one in predictor.predict(noise(), reject=0.1)]) > 0.9
    assert not any(one.unknown for one in predictor.predict(noise()))
    plain, asked = predictor.predict(noise()), predictor.predict(noise(), reject=0.1)
    assert [one[:2] for one in plain] == [one[:2] for one in asked]
    assert predictor.predict([], reject=0.1) == []
    scores = predictor.unknown_scores(noise())
    assert (scores > predictor.unknown_threshold(0.1)).tolist() == [one.unknown for one in asked]


def test_what_cannot_tell_says_so(run):
    with pytest.raises(ValueError, match=r"expected a readout that can tell unknown images .*, got 'head'"):
        Predictor(run, "head").predict(noise(), reject=0.05)
    for wrong in (0.0, 1.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=r"expected reject in \(0, 1\), .* got"):
            Predictor(run).predict(noise(), reject=wrong)


def test_the_command_prints_unknown(run, tmp_path, capsys):
    Image.fromarray(noise()[0].permute(1, 2, 0).numpy()).save(tmp_path / "noise.png")
    words = ["predict", str(run.folder), str(tmp_path / "noise.png")]
    main([*words, "--unknown"])
    assert capsys.readouterr().out.split("\t")[1] == "unknown"
    main([*words, "--unknown", "--json"])
    assert json.loads(capsys.readouterr().out)["unknown"] is True
    main([*words, "--json"])
    assert "unknown" not in json.loads(capsys.readouterr().out)
    with pytest.raises(SystemExit):
        main([*words, "--unknown", "--readout", "head"])
    assert "expected a readout that can tell unknown images" in capsys.readouterr().err


@pytest.mark.parametrize("config", KINDS, ids=lambda config: config.name)
def test_a_class_that_was_learned_under_another_name_is_similar(config):
    (features, labels), (again, _) = drawn(each=200), drawn(each=200, seed=5)
    readout = config.build(torch.nn.Identity(), C + 2, 0)

    def learn(features, labels, held_out=None):
        selected = readout.select_features(Features(features.float()))
        readout.observe(selected, labels)
        if held_out is not None:
            readout.hold_out(selected[held_out], labels[held_out], augmented=False)
        readout.end_task()

    learn(features, labels, torch.arange(len(labels)) % 5 == 0)
    assert readout.similar_classes == {}  # nothing is older
    new = torch.cat([again[labels == 2], again[labels == 3] + torch.tensor([30.0, 0, 0, 0])])
    learn(new, torch.tensor([C, C + 1]).repeat_interleave(200))
    assert readout.similar_classes == {C: 2}
    few = config.build(torch.nn.Identity(), C + 2, 0)
    for rows, own in ((features, labels), (again[labels == 2], torch.full((200,), C))):
        few.observe(few.select_features(Features(rows.float())), own)
        few.end_task()
    assert few.similar_classes == {}  # nothing was held out, so nothing tells what is unlike all classes
    learn(again[labels == 2], torch.full((200,), C))
    assert readout.similar_classes == {}  # it is not new any more


@pytest.mark.parametrize("config", KINDS, ids=lambda config: config.name)
def test_a_class_between_two_old_ones_is_not_similar(config):
    features, labels = drawn(each=200)
    readout = config.build(torch.nn.Identity(), C + 1, 0)
    selected = readout.select_features(Features(features.float()))
    held_out = torch.arange(len(labels)) % 5 == 0
    readout.observe(selected, labels)
    readout.hold_out(selected[held_out], labels[held_out], augmented=False)
    readout.end_task()
    between = readout.select_features(Features((features[labels == 0] + features[labels == 1]).float() / 2))
    readout.observe(between, torch.full((200,), C))
    readout.end_task()
    assert readout.similar_classes == {}
