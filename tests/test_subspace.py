from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import oracles
from pgp.subspace import SecondMoment, extend_basis, leading_basis, mean_rank, second_moment_of_sums


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def observed(*batches):
    moment = SecondMoment()
    for rows in batches:
        moment.observe(rows)
    return moment


@pytest.mark.parametrize("energy", [0.0, 0.3, 0.5, 0.9, 0.99, 1.0])
def test_growth_follows_gpm(energy):
    tasks = [draw(7, 12, seed=t) * torch.linspace(3, 0.1, 12) for t in range(4)]
    basis = torch.zeros(12, 0, dtype=torch.float64)
    for rows, truth in zip(tasks, oracles.gpm([rows.numpy() for rows in tasks], energy), strict=True):
        basis = extend_basis(basis, observed(rows).second, energy)
        np.testing.assert_allclose(basis @ basis.T, truth @ truth.T, atol=1e-9)


@settings(max_examples=25, deadline=None)
@given(st.permutations(range(10)), st.sets(st.integers(1, 9), max_size=4), st.sampled_from([0.5, 0.9, 1.0]))
def test_order_and_batching_do_not_matter(order, cuts, energy):
    rows = draw(10, 5)
    whole, parts = observed(rows), observed(*rows[order].tensor_split(sorted(cuts)))
    assert parts.count == 10
    torch.testing.assert_close(whole.second, parts.second, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(whole.mean, parts.mean, rtol=1e-13, atol=1e-13)
    one, other = leading_basis(whole.second, energy), leading_basis(parts.second, energy)
    torch.testing.assert_close(one @ one.T, other @ other.T, rtol=0, atol=1e-10)


@pytest.mark.parametrize("shape", [(9, 4), (9, 500), (2, 9, SecondMoment.BLOCK + 1)])
def test_moment_is_that_of_the_stacked_rows_in_float64(shape):
    rows = draw(*shape).float() + 100  # the sums of float32 rows would round
    stacked = rows.double().numpy()
    moment = observed(rows[..., :2, :], rows[..., 2:, :])
    np.testing.assert_allclose(moment.mean, stacked.mean(-2), rtol=1e-14)
    np.testing.assert_allclose(moment.second, stacked.swapaxes(-1, -2) @ stacked / 9, rtol=1e-14)
    assert torch.equal(moment.second, moment.second.mT)


# tasks whose directions are alike in size, and tasks that differ in directions a thousandth as long as what they share
@pytest.mark.parametrize(("shape", "energy"), [("flat", 0.5), ("flat", 0.97), ("flat", 1.0), ("steep", 1.0)])
def test_stays_orthonormal(shape, energy):
    basis, directions = torch.zeros(64, 0, dtype=torch.float64), torch.linalg.qr(draw(64, 64, seed=99)).Q
    tasks = [draw(20, 64, seed=t) for t in range(10)]
    if shape == "steep":
        tasks = [draw(20, 2, seed=t) * torch.tensor([1, 1e-3]) @ directions[:, [0, t + 1]].T for t in range(10)]
    for rows in tasks:
        basis = extend_basis(basis, observed(rows).second, energy)
    assert (11 if shape == "steep" else 21) <= basis.shape[1] <= 64
    gap = basis.T @ basis - torch.eye(basis.shape[1])
    assert gap.abs().max() < 1e-12
    if energy == 1:
        assert max((rows - rows @ basis @ basis.T).norm() / rows.norm() for rows in tasks) < 1e-10


def test_old_columns_stay_and_what_is_held_adds_none():
    first = leading_basis(observed(draw(5, 8)).second, 0.9)
    second = extend_basis(first, observed(draw(5, 8, seed=1)).second, 0.9)
    assert torch.equal(second[:, : first.shape[1]], first)
    assert torch.equal(extend_basis(second, observed(draw(30, second.shape[1], seed=2) @ second.T).second, 1.0), second)


def test_the_ends_of_the_energy():
    second = observed(draw(3, 8)).second
    assert leading_basis(second, 0.0).shape == (8, 0)
    assert leading_basis(second, 1.0).shape == (8, 3)
    full = leading_basis(observed(draw(30, 8)).second, 1.0)
    torch.testing.assert_close(full @ full.T, torch.eye(8, dtype=torch.float64))
    assert extend_basis(full, observed(draw(30, 8, seed=1)).second, 1.0).shape == (8, 8)
    assert leading_basis(torch.zeros(8, 8), 1.0).shape == (8, 0)


def test_heads_are_separate_worlds():
    rows = torch.stack([draw(6, 8, seed=1) @ torch.diag(torch.tensor([9.0] + [0.1] * 7).double()), draw(6, 8, seed=2)])
    more = draw(2, 4, 8, seed=3)
    both = extend_basis(leading_basis(observed(rows).second, 0.9), observed(more).second, 0.8)
    ranks = []
    for head in range(2):
        alone = extend_basis(leading_basis(observed(rows[head]).second, 0.9), observed(more[head]).second, 0.8)
        torch.testing.assert_close(both[head] @ both[head].T, alone @ alone.T, rtol=0, atol=1e-10)
        ranks.append(alone.shape[1])
        assert (both[head][:, alone.shape[1] :] == 0).all()
    assert ranks[0] != ranks[1]
    assert both.shape[-1] == max(ranks)
    assert mean_rank(both) == sum(ranks) / 2


def test_columns_of_a_head_that_grows_later_come_before_its_padding():
    rows = torch.stack([draw(3, 8, seed=1), torch.zeros(3, 8)])  # the second head has met nothing yet
    before = leading_basis(observed(rows).second, 1.0)
    assert (mean_rank(before[0]), mean_rank(before[1])) == (3, 0)
    after = extend_basis(before, observed(rows.flip(0)).second, 1.0)
    assert after.shape == (2, 8, 3)
    torch.testing.assert_close(after[0], before[0])
    expected = leading_basis(observed(rows[0]).second, 1.0)
    torch.testing.assert_close(after[1] @ after[1].T, expected @ expected.T)


def test_moment_of_all_sums():
    x, p = draw(5, 4, seed=1), draw(3, 4, seed=2)
    sums = (x[:, None] + p[None]).reshape(-1, 4)
    torch.testing.assert_close(second_moment_of_sums(observed(x), observed(p)), sums.T @ sums / 15)


def test_moment_of_all_sums_head_by_head():
    x, p = draw(2, 5, 4, seed=1), draw(2, 3, 4, seed=2)
    both = second_moment_of_sums(observed(x), observed(p))
    for head in range(2):
        torch.testing.assert_close(both[head], second_moment_of_sums(observed(x[head]), observed(p[head])))


@pytest.mark.parametrize("energy", [-0.1, 1.5, float("nan")])
def test_energy_is_a_share(energy):
    with pytest.raises(ValueError, match=rf"energy in \[0, 1\] \(a fraction of .*\), got {energy}"):
        leading_basis(torch.eye(2), energy)


def test_rows_must_fit():
    with pytest.raises(ValueError, match=r"rows of width 3 and shape \(\*\(\), n, D\) as before, got \(2, 4\)"):
        observed(draw(2, 3)).observe(draw(2, 4))
    with pytest.raises(ValueError, match=r"width 3 .*got \(2, 5, 3\)"):
        observed(draw(4, 5, 3)).observe(draw(2, 5, 3))


@pytest.mark.parametrize("moment", [SecondMoment(), observed(draw(0, 3))])
@pytest.mark.parametrize("name", ["mean", "second"])
def test_no_rows_have_no_moment(moment, name):
    with pytest.raises(ValueError, match=r"at least one observed vector, got none: call observe\(\) first"):
        getattr(moment, name)
