from __future__ import annotations

import pytest
import torch
from torch import nn

from pgp.readouts.lda import LDA
from pgp.readouts.sequential import Sequential

LABELS = torch.tensor([0, 0, 0, 1, 1, 1, 3, 3, 3, 3])
FEATURES = torch.randn(10, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 3 * LABELS[:, None]


def fitted(shrinkage=0.3, parts=None):
    readout = LDA(5, shrinkage)
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


def test_streams_in_any_order():
    one, other = fitted().logits(FEATURES), fitted(parts=[[9, 3, 1], [0, 8, 2, 4], [5, 7, 6]]).logits(FEATURES)
    torch.testing.assert_close(one, other)


def test_full_shrinkage_is_the_nearest_mean():
    means = torch.stack([FEATURES[c == LABELS].mean(0) for c in (0, 1, 3)])
    nearest = torch.cdist(FEATURES, means).argmin(1)
    assert torch.equal(fitted(1.0).logits(FEATURES).argmax(1), torch.tensor([0, 1, 3])[nearest])


def test_state_goes_round():
    restored = LDA(5, 0.3)
    restored.load_state_dict(fitted().state_dict())
    assert torch.equal(restored.logits(FEATURES), fitted().logits(FEATURES))


def test_errors():
    with pytest.raises(ValueError, match=r"shrinkage in \(0, 1\], got 0"):
        LDA.Config(shrinkage=0)
    with pytest.raises(ValueError, match="at least one task"):
        LDA(5).logits(FEATURES)
    constant = LDA(5)
    constant.observe(torch.ones(4, 3), torch.tensor([0, 0, 1, 1]))
    with pytest.raises(ValueError, match="vary within classes"):
        constant.end_task()


def test_sequential_asks_the_head():
    head = nn.Linear(4, 5).double()
    assert torch.equal(Sequential(head).logits(FEATURES), head(FEATURES))
