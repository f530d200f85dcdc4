from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import oracles
from pgp.subspace import Moment, basis_of, extend, rank_of, second_of_sums


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def observed(*batches):
    moment = Moment()
    for rows in batches:
        moment.observe(rows)
    return moment


@pytest.mark.parametrize("energy", [0.0, 0.3, 0.5, 0.9, 0.99, 1.0])
def test_growth_follows_gpm(energy):
    tasks = [draw(7, 12, seed=t) * torch.linspace(3, 0.1, 12) for t in range(4)]
    basis = torch.zeros(12, 0, dtype=torch.float64)
    for rows, truth in zip(tasks, oracles.gpm([rows.numpy() for rows in tasks], energy), strict=True):
        basis = extend(basis, observed(rows).second, energy)
        np.testing.assert_allclose(basis @ basis.T, truth @ truth.T, atol=1e-9)


@settings(max_examples=25, deadline=None)
@given(st.permutations(range(10)), st.integers(1, 9))
def test_order_and_batching_do_not_matter(order, cut):
    rows = draw(10, 5)
    whole, parts = observed(rows), observed(rows[order][:cut], rows[order][cut:])
    torch.testing.assert_close(whole.second, parts.second, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(whole.mean, parts.mean, rtol=1e-13, atol=1e-13)


def test_stays_orthonormal():
    basis = torch.zeros(64, 0, dtype=torch.float64)
    for t in range(10):
        basis = extend(basis, observed(draw(20, 64, seed=t)).second, 0.5)
    gap = basis.T @ basis - torch.eye(basis.shape[1])
    assert basis.shape[1] > 20
    assert gap.abs().max() < 1e-12


def test_the_ends_of_the_energy():
    second = observed(draw(3, 8)).second
    assert basis_of(second, 0.0).shape == (8, 0)
    assert basis_of(second, 1.0).shape == (8, 3)
    assert basis_of(observed(draw(30, 8)).second, 1.0).shape == (8, 8)


def test_heads_are_separate_worlds():
    rows = torch.stack([draw(6, 8, seed=1) @ torch.diag(torch.tensor([9.0] + [0.1] * 7).double()), draw(6, 8, seed=2)])
    more = draw(2, 4, 8, seed=3)
    both = extend(basis_of(observed(rows).second, 0.9), observed(more).second, 0.8)
    ranks = []
    for head in range(2):
        alone = extend(basis_of(observed(rows[head]).second, 0.9), observed(more[head]).second, 0.8)
        torch.testing.assert_close(both[head] @ both[head].T, alone @ alone.T, rtol=0, atol=1e-10)
        ranks.append(alone.shape[1])
        assert (both[head][:, alone.shape[1] :] == 0).all()
    assert ranks[0] != ranks[1]
    assert both.shape[-1] == max(ranks)
    assert rank_of(both) == sum(ranks) / 2


def test_moment_of_all_sums():
    x, p = draw(5, 4, seed=1), draw(3, 4, seed=2)
    sums = (x[:, None] + p[None]).reshape(-1, 4)
    torch.testing.assert_close(second_of_sums(observed(x), observed(p)), sums.T @ sums / 15)


def test_errors():
    with pytest.raises(ValueError, match=r"energy in \[0, 1\].*got 1.5"):
        basis_of(torch.eye(2), 1.5)
    with pytest.raises(ValueError, match="width 3"):
        observed(draw(2, 3)).observe(draw(2, 4))
    with pytest.raises(ValueError, match="call observe"):
        _ = Moment().second
