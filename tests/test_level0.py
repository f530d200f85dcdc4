"""Prompts, metrics and scenarios."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import oracles
from pgp import metrics
from pgp.prompts import PromptPool, match, nearest, vote
from pgp.scenario import class_order, generator, split_by_class


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def pool(**settings):
    return PromptPool(**{"size": 6, "length": 2, "width": 4, "top_k": 2, "generator": seeded(), **settings})


def test_match_is_cosine():
    query, key = torch.randn(3, 5, generator=seeded(1)), torch.randn(4, 5, generator=seeded(2))
    expected = torch.nn.functional.cosine_similarity(query[:, None], key[None], dim=-1)
    torch.testing.assert_close(match(query, key), expected)
    assert torch.equal(nearest(expected, 1)[:, 0], expected.argmax(1))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.permutations(range(6)), min_size=1, max_size=12), st.integers(1, 6))
def test_vote_elects_the_most_frequent(rows, k):
    chosen = torch.tensor([row[:k] for row in rows])
    counts = Counter(chosen.flatten().tolist())
    expected = sorted(range(6), key=lambda prompt: (-counts[prompt], prompt))[:k]
    assert vote(chosen, 6).tolist() == [expected] * len(rows)


def test_selection_by_slot_by_image_and_past_the_end():
    some = pool()
    query = torch.randn(5, 4, generator=seeded(3))
    assert some.select(query, slot=1).indices.tolist() == [[2, 3]] * 5
    free = some.select(query).indices
    assert torch.equal(some.select(query, slot=3).indices, free)
    alone = torch.cat([some.select(row[None]).indices for row in query])
    assert torch.equal(alone, free)
    assert some.tokens(some.select(query)).shape == (5, 4, 4)


def test_shared_pool_and_mean_keys():
    some = pool(keys="mean")
    assert torch.equal(some.key, some.prompts.mean(1))
    some.inherit(0)
    some.inherit(1)
    assert torch.equal(some.prompts[2:4], some.prompts[0:2])
    before = some.prompts.clone()
    some.inherit(3)
    assert torch.equal(some.prompts, before)


def test_top_k_above_the_pool():
    with pytest.raises(ValueError, match="between 1 and the pool size 6, got 7"):
        pool(top_k=7)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 6), st.data())
def test_metrics_against_double_loops(size, data):
    t = data.draw(st.integers(1, size))
    share = st.floats(0, 1, width=32)
    rows = [[data.draw(share) if j <= i < t else float("nan") for j in range(size)] for i in range(size)]
    matrix = torch.tensor(rows, dtype=torch.float64)
    assert metrics.learned(matrix) == t
    for name in ("average_accuracy", "forgetting", "backward_transfer", "average_incremental_accuracy"):
        assert getattr(metrics, name)(matrix) == pytest.approx(getattr(oracles, name)(rows, t), abs=1e-12), name


def test_metrics_refuse_what_is_no_matrix():
    with pytest.raises(ValueError, match=r"square accuracy matrix.*\(2, 3\)"):
        metrics.forgetting(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="at least one learned task"):
        metrics.average_accuracy(torch.full((2, 2), torch.nan))


def test_tasks_partition_the_images():
    labels = torch.randint(7, (50,), generator=seeded(4))
    scenario = split_by_class(labels, labels, 3, class_order(7, seed=5))
    assert [len(task.classes) for task in scenario.tasks] == [3, 2, 2]
    assert sorted(torch.cat([task.train for task in scenario.tasks]).tolist()) == list(range(50))
    assert set(scenario.seen(2)) == set(range(7))
    for task in scenario.tasks:
        assert set(labels[task.train].tolist()) <= set(task.classes)
    with pytest.raises(ValueError, match="between 1 and 7 tasks"):
        split_by_class(labels, labels, 8, list(range(7)))


def test_draws_are_addressed():
    torch.rand(3)
    first = torch.rand(2, generator=generator(1, "a", 2))
    assert torch.equal(first, torch.rand(2, generator=generator(1, "a", 2)))
    for other in (generator(2, "a", 2), generator(1, "b", 2), generator(1, "a", 3), generator(1, "a", 2, 0)):
        assert not torch.equal(first, torch.rand(2, generator=other))
    assert class_order(9, seed=1) == class_order(9, seed=1) != class_order(9, seed=2)
