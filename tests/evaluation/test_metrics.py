from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import oracles
from pgp.evaluation import metrics

FIGURES = ["average_accuracy", "forgetting", "backward_transfer", "average_incremental_accuracy"]


@st.composite
def matrices(draw):
    """Rows of a (T, T) matrix filled up to task t, and t."""
    size = draw(st.integers(1, 6))
    t = draw(st.integers(1, size))
    share = st.floats(0, 1, width=32)
    return [[draw(share) if j <= i < t else math.nan for j in range(size)] for i in range(size)], t


@pytest.mark.parametrize("name", FIGURES)
@settings(max_examples=40, deadline=None)
@given(matrices())
def test_against_double_loops(name, drawn):
    rows, t = drawn
    matrix = torch.tensor(rows, dtype=torch.float64)
    assert getattr(metrics, name)(matrix[:t, :t]) == pytest.approx(getattr(oracles, name)(rows, t), abs=1e-12)


@settings(max_examples=40, deadline=None)
@given(matrices())
def test_curve(drawn):
    rows, t = drawn
    matrix = torch.tensor(rows, dtype=torch.float64)
    truth = [oracles.average_accuracy(rows, i) for i in range(1, t + 1)]
    assert metrics.accuracy_curve(matrix[:t, :t]) == pytest.approx(truth)


def test_by_hand():
    matrix = torch.tensor([[0.5, math.nan, math.nan], [0.8, 0.6, math.nan], [0.2, 0.7, 0.9]], dtype=torch.float64)
    assert metrics.average_accuracy(matrix) == pytest.approx(0.6)
    assert metrics.forgetting(matrix) == pytest.approx(((0.8 - 0.2) + (0.7 - 0.7)) / 2)
    assert metrics.backward_transfer(matrix) == pytest.approx(((0.2 - 0.5) + (0.7 - 0.6)) / 2)
    assert metrics.average_incremental_accuracy(matrix) == pytest.approx((0.5 + 0.7 + 0.6) / 3)


def test_a_single_task_forgets_nothing():
    matrix = torch.tensor([[0.75]])
    assert [getattr(metrics, name)(matrix) for name in FIGURES] == [0.75, 0, 0, 0.75]
    assert metrics.accuracy_curve(matrix) == [0.75]


def test_the_matrix_is_left_alone():
    matrix = torch.tensor([[0.9, math.nan], [0.7, 0.8]])
    before = matrix.clone()
    for name in FIGURES:
        getattr(metrics, name)(matrix)
    assert torch.equal(matrix.nan_to_num(nan=-1), before.nan_to_num(nan=-1))


@pytest.mark.parametrize("size", [0, 1, 3])
@pytest.mark.parametrize("name", [*FIGURES, "accuracy_curve"])
def test_without_a_measured_accuracy_there_is_no_figure(name, size):
    value = getattr(metrics, name)(torch.full((size, size), math.nan))
    assert all(map(math.isnan, value)) if name == "accuracy_curve" else math.isnan(value)


@pytest.mark.parametrize("name", FIGURES)
@pytest.mark.parametrize("untested", range(3))
def test_a_task_without_test_images_leaves_no_figure(name, untested):
    """Not that of the tasks before it, either: it would pass for the accuracy on all tasks."""
    matrix = torch.tensor([[0.9, math.nan, math.nan], [0.7, 0.8, math.nan], [0.5, 0.6, 0.7]], dtype=torch.float64)
    matrix[:, untested] = math.nan
    assert metrics.accuracy_curve(matrix)[untested:] == pytest.approx([math.nan] * (3 - untested), nan_ok=True)
    is_without_last = untested == 2 and name in ("forgetting", "backward_transfer")
    assert math.isfinite(getattr(metrics, name)(matrix)) == is_without_last


@pytest.mark.parametrize("shape", [(2, 3), (4,), (2, 2, 2)])
@pytest.mark.parametrize("name", [*FIGURES, "accuracy_curve"])
def test_a_matrix_must_be_square(name, shape):
    expected = str(shape).replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(ValueError, match=rf"square accuracy matrix \(t, t\), got {expected}"):
        getattr(metrics, name)(torch.zeros(shape))
