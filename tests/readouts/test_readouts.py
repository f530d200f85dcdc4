from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from torch import nn

from pgp.readouts.head import MethodHead
from pgp.readouts.lda import LDA

LABELS = torch.tensor([0, 0, 0, 1, 1, 1, 3, 3, 3, 3])
FEATURES = torch.randn(10, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 3 * LABELS[:, None]


def fitted(shrinkage=0.3, parts=None):
    readout = LDA(5, LDA.Config(shrinkage=shrinkage))
    for part in parts or [range(10)]:
        readout.observe(FEATURES[list(part)], LABELS[list(part)])
        readout.end_task()
    return readout


def test_logits_against_the_textbook():
    # sklearn divides the covariance by n, the textbook (and we) by n - C, so the truth is spelled out here
    means = torch.stack([FEATURES[c == LABELS].mean(0) for c in (0, 1, 3)])
    centred = torch.cat([FEATURES[c == LABELS] - FEATURES[c == LABELS].mean(0) for c in (0, 1, 3)])
    S = centred.T @ centred / (10 - 3)
    S = 0.7 * S + 0.3 * S.trace() / 4 * torch.eye(4)
    x = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    distances = torch.stack([(x - m) @ S.inverse() @ (x - m).T for m in means]).diagonal(dim1=1, dim2=2).T
    logits = fitted().logits(x).double()
    expected = -distances / 2
    ours = logits[:, [0, 1, 3]]
    torch.testing.assert_close(ours - ours[:, :1], expected - expected[:, :1], rtol=1e-4, atol=1e-4)
    assert torch.isinf(logits[:, [2, 4]]).all()


@pytest.mark.parametrize("shrinkage", [0.05, 0.5, 1.0])
def test_logits_against_sklearn(shrinkage):
    labels = torch.arange(60) % 4
    draws = torch.randn(60 + 25, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    features, x = (
        draws[:60] * torch.linspace(0.5, 2, 6) + labels[:, None] * torch.tensor([1, -0.5, 0, 0, 0.3, 1]),
        draws[60:],
    )
    theirs = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage, priors=[0.25] * 4)
    theirs.fit(features.numpy(), labels.numpy())
    readout = LDA(4, LDA.Config(shrinkage=shrinkage))
    readout.observe(features, labels)
    readout.end_task()
    ours = readout.logits(x).double()
    # classes of the same size differ from sklearn in the divisor of the covariance alone: n there, n - C here
    expected = torch.from_numpy(theirs.decision_function(x.numpy())) * (60 - 4) / 60
    torch.testing.assert_close(ours - ours[:, :1], expected - expected[:, :1], rtol=1e-4, atol=1e-5)
    assert np.array_equal(ours.argmax(1), theirs.predict(x.numpy()))


@settings(max_examples=25, deadline=None)
@given(st.permutations(range(10)), st.sets(st.integers(1, 9), max_size=4))
def test_streams_in_any_order(order, cuts):
    readout = LDA(5, LDA.Config(shrinkage=0.3))
    for part in torch.tensor(order).tensor_split(sorted(cuts)):
        readout.observe(FEATURES[part], LABELS[part])
    readout.end_task()
    torch.testing.assert_close(readout.logits(FEATURES), fitted().logits(FEATURES))


def test_tasks_may_share_classes():
    parts = [[9, 8, 1], [0, 3, 2, 4], [5, 7, 6]]
    torch.testing.assert_close(fitted(parts=parts).logits(FEATURES), fitted().logits(FEATURES))


@pytest.mark.parametrize("chosen", [[9, 3, 1], [0, 4, 8], [2, 5, 6], [1, 5, 7]])
def test_an_image_per_class_has_no_covariance(chosen):
    with pytest.warns(UserWarning, match="features do not vary within classes"):
        readout = fitted(parts=[chosen])
    logits = readout.logits(FEATURES[chosen])
    assert torch.equal(logits.argmax(1), LABELS[chosen])  # the nearest mean
    nearest = -(torch.cdist(FEATURES[chosen], FEATURES[chosen]) ** 2) / 2
    expected = nearest - nearest[:, :1]
    got = logits[:, LABELS[chosen]]
    torch.testing.assert_close((got - got[:, :1]).double(), expected.double(), rtol=1e-4, atol=1e-4)


def test_a_common_offset_of_all_features_changes_nothing():
    def differences(offset):
        readout = LDA(5, LDA.Config(shrinkage=0.3))
        readout.observe(FEATURES + offset, LABELS)
        readout.end_task()
        logits = readout.logits(FEATURES + offset)[:, [0, 1, 3]]
        return logits - logits[:, :1]

    torch.testing.assert_close(differences(1000), differences(0), rtol=1e-3, atol=1e-3)


def test_an_observed_task_counts_from_its_end_on():
    readout = fitted()
    before = readout.logits(FEATURES)
    readout.observe(FEATURES[:2] + 9, torch.tensor([4, 4]))
    assert torch.equal(readout.logits(FEATURES), before)
    readout.end_task()
    assert readout.logits(FEATURES)[:, 4].isfinite().all()
    assert torch.isinf(readout.logits(FEATURES)[:, 2]).all()


def test_full_shrinkage_is_the_nearest_mean():
    means = torch.stack([FEATURES[c == LABELS].mean(0) for c in (0, 1, 3)])
    nearest = torch.cdist(FEATURES, means).argmin(1)
    assert torch.equal(fitted(1.0).logits(FEATURES).argmax(1), torch.tensor([0, 1, 3])[nearest])


def test_state_goes_round():
    restored = LDA(5, LDA.Config(shrinkage=0.3))
    restored.load_state_dict(fitted().state_dict())
    assert torch.equal(restored.logits(FEATURES), fitted().logits(FEATURES))
    more, labels = FEATURES[:4] - 5, torch.tensor([2, 2, 4, 4])
    for readout in (restored, whole := fitted()):
        readout.observe(more, labels)
        readout.end_task()
    assert torch.equal(restored.logits(FEATURES), whole.logits(FEATURES))


def test_a_readout_without_tasks_goes_round_too():
    restored = LDA(5)
    restored.load_state_dict(LDA(5).state_dict())
    with pytest.raises(ValueError, match="at least one task"):
        restored.logits(FEATURES)


@pytest.mark.parametrize("shrinkage", [0, -0.1, 1.5, float("nan")])
def test_shrinkage_is_a_fraction(shrinkage):
    with pytest.raises(ValueError, match=rf"shrinkage from 1e-6 to 1, or None .* got {shrinkage}"):
        LDA.Config(shrinkage=shrinkage)


def test_errors():
    with pytest.raises(
        ValueError, match=r"at least one task before logits\(\): call observe\(\) and end_task\(\) first"
    ):
        LDA(5).logits(FEATURES)
    constant = LDA(5)
    constant.observe(torch.ones(4, 3), torch.tensor([0, 0, 1, 1]))
    with pytest.warns(UserWarning, match="features do not vary within classes"):
        constant.end_task()


def test_a_first_task_without_images_is_named():  # all were bad and skipped, say
    with pytest.raises(ValueError, match="observe"):
        LDA(5).end_task()


def test_sequential_asks_the_head():
    head = nn.Linear(4, 5).double()
    readout = MethodHead.Config().build(head, classes=5, seed=0)
    readout.observe(FEATURES, LABELS)
    readout.end_task()
    assert torch.equal(readout.logits(FEATURES), head(FEATURES))
    assert readout.state_dict() == {}


def test_config_builds_what_it_says():
    built = LDA.Config(shrinkage=0.3).build(nn.Linear(4, 5), classes=5, seed=0)
    built.observe(FEATURES, LABELS)
    built.end_task()
    assert torch.equal(built.logits(FEATURES), fitted(0.3).logits(FEATURES))
