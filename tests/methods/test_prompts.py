from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pgp.methods.prompts import (
    PrefixPool,
    PromptPool,
    TokenPool,
    copy_previous_slot,
    cosine_similarity,
    majority_vote,
    slot_slice,
    top_k,
)
from pgp.precision import float32_products, full_precision


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def pool(**settings):
    return PromptPool(**{"size": 6, "length": 2, "width": 4, "top_k": 2, "generator": seeded(), **settings})


def queries(count=5, seed=3):
    return torch.randn(count, 4, generator=seeded(seed))


def test_match_is_cosine():
    query, key = torch.randn(3, 5, generator=seeded(1)).numpy(), torch.randn(4, 5, generator=seeded(2)).numpy()
    expected = [[q @ k / np.sqrt((q @ q) * (k @ k)) for k in key] for q in query]
    np.testing.assert_allclose(
        cosine_similarity(torch.from_numpy(query), torch.from_numpy(key)), expected, rtol=1e-5, atol=1e-6
    )


@settings(max_examples=50, deadline=None)
@given(st.permutations(range(7)), st.integers(1, 7))
def test_nearest_are_the_most_similar_first(order, k):
    similarity = torch.tensor([order, order[::-1]]) / 7
    expected = [sorted(range(7), key=lambda prompt, row=row: -row[prompt])[:k] for row in similarity.tolist()]
    assert top_k(similarity, k).tolist() == expected


@settings(max_examples=50, deadline=None)
@given(st.lists(st.permutations(range(6)), min_size=1, max_size=12), st.integers(1, 6))
def test_vote_elects_the_most_frequent(rows, k):
    chosen = torch.tensor([row[:k] for row in rows])
    counts = Counter(chosen.flatten().tolist())
    expected = sorted(range(6), key=lambda prompt: (-counts[prompt], prompt))[:k]
    assert majority_vote(chosen, 6).tolist() == [expected] * len(rows)


def test_ties_of_a_vote_go_to_the_lower_index():
    assert majority_vote(torch.tensor([[5, 1], [4, 2], [3, 0]]), size=6).tolist() == [[0, 1]] * 3
    assert majority_vote(torch.tensor([[5, 1], [5, 4]]), size=6).tolist() == [[5, 1]] * 2


def test_one_vote_for_the_whole_batch():
    some, query = pool(), queries(9)
    expected = majority_vote(some.select(query).indices, 6)
    assert torch.equal(some.select(query, by_vote=True).indices, expected)
    assert len({tuple(row) for row in some.select(query).indices.tolist()}) > 1  # without it they differ


def test_a_slot_forces_its_block():
    some, query = pool(), queries()
    assert slot_slice(1, k=2, size=6) == slice(2, 4)
    forced = some.select(query, slot=1, by_vote=True)
    assert forced.indices.tolist() == [[2, 3]] * 5
    torch.testing.assert_close(forced.key_similarity, forced.similarity[:, 2:4].sum(1).mean())


@pytest.mark.parametrize(("size", "slot"), [(6, 3), (6, 99), (7, 3)])  # a part of a block is none
def test_past_the_end_of_the_pool_the_match_is_free(size, slot):
    some, query = pool(size=size), queries()
    assert slot_slice(slot, 2, size) is None
    assert torch.equal(some.select(query, slot=slot).indices, some.select(query).indices)


def test_an_image_chooses_the_same_in_any_batch():
    some, query = pool(), queries(20)
    together = some.select(query).indices
    assert torch.equal(torch.cat([some.select(row[None]).indices for row in query]), together)
    order = torch.randperm(20, generator=seeded(5))
    assert torch.equal(some.select(query[order]).indices, together[order])


def test_tokens_are_the_chosen_prompts_in_a_row():
    some, query = pool(), queries()
    selection = some.select(query)
    tokens = some.tokens(selection)
    for image, chosen in enumerate(selection.indices.tolist()):
        assert torch.equal(tokens[image], torch.cat([some.prompts[prompt] for prompt in chosen]))


def test_initial_values_come_from_the_generator():
    one, same, other = pool(), pool(), pool(generator=seeded(1))
    assert torch.equal(one.prompts, same.prompts)
    assert torch.equal(one.key, same.key)
    assert not torch.equal(one.prompts, other.prompts)
    assert -1 <= one.prompts.min() < -0.5 < 0.5 < one.prompts.max() <= 1


def test_mean_keys_follow_the_prompts():
    some = pool(keys="mean")
    assert [name for name, _ in some.named_parameters()] == ["prompts"]
    some.select(queries()).key_similarity.backward()
    assert some.prompts.grad.norm() > 0
    with torch.no_grad():
        some.prompts[0] = torch.tensor([[1.0, 2, 3, 4], [3, 2, 1, 0]])
    assert some.key[0].tolist() == [2, 2, 2, 2]


def test_inherit_copies_the_block_before():
    some = pool()
    first, others, keys = some.prompts[:2].clone(), some.prompts[4:].clone(), some.key.clone()
    copy_previous_slot(some.prompts, 1, k=2)
    assert torch.equal(some.prompts, torch.cat([first, first, others]))
    assert torch.equal(some.key, keys)


@pytest.mark.parametrize("slot", [0, 3])
def test_the_first_block_and_those_past_the_end_inherit_nothing(slot):
    some = pool()
    before = some.prompts.clone()
    copy_previous_slot(some.prompts, slot, k=2)
    assert torch.equal(some.prompts, before)


@pytest.mark.parametrize("top_k", [0, 7])
def test_top_k_must_fit_the_pool(top_k):
    with pytest.raises(ValueError, match=f"top_k between 1 and the pool size 6, got {top_k}"):
        pool(top_k=top_k)


def test_each_image_gets_keys_and_values_of_its_own_prefixes():
    some = PrefixPool(size=5, length=3, heads=2, width=4, generator=seeded())
    indices = torch.tensor([[4, 1], [0, 2], [1, 4]])
    prefixes = some(indices)
    assert prefixes.shape == (3, 2, 2, 6, 4)
    for image, (first, second) in enumerate(indices.tolist()):
        for part, pool in enumerate((some.keys, some.values)):
            for head in range(2):
                row = torch.cat([pool[first, head], pool[second, head]])
                assert torch.equal(prefixes[image, part, head], row)
    assert torch.equal(some(indices[1:2])[0], prefixes[1])


def test_keys_can_be_values_too():
    some = PrefixPool(size=2, length=3, heads=2, width=4, generator=seeded(), shared=True)
    assert [name for name, _ in some.named_parameters()] == ["keys"]
    prefixes = some(torch.tensor([[1]]))
    assert torch.equal(prefixes[:, 0], prefixes[:, 1])


def test_token_pools_give_the_chosen_prompts_in_a_row():
    some = TokenPool(size=4, length=2, width=3, generator=seeded())
    assert torch.equal(some(torch.tensor([[3, 0]]))[0], torch.cat([some.tokens[3], some.tokens[0]]))


def test_mixed_precision_does_not_change_which_prompts_are_selected():
    generator = torch.Generator().manual_seed(0)
    key, query = torch.randn(10, 256, generator=generator), torch.randn(500, 256, generator=generator)
    exact = cosine_similarity(query, key)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(cosine_similarity(query, key), exact)
        assert (query @ key.T).dtype == torch.bfloat16


def test_float32_products_that_overlap():
    """Nothing is rounded to TF32 while a block asks for float32, and all is as before when the last has ended."""

    def flags():
        return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32

    before = flags()
    try:
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = True
        training, rounded, predicting = (float32_products("cuda", tf32=tf32) for tf32 in (False, True, False))
        training.__enter__()
        rounded.__enter__()
        assert flags() == ("highest", False)
        predicting.__enter__()
        training.__exit__(None, None, None)
        assert flags() == ("highest", False)
        predicting.__exit__(None, None, None)
        assert flags() == ("high", True)
        rounded.__exit__(None, None, None)
        assert flags() == ("highest", True)
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def test_full_precision_ends_with_its_block():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            with full_precision(torch.device("cpu")):
                assert not torch.is_autocast_enabled("cpu")
            assert torch.is_autocast_enabled("cpu")
        with full_precision(torch.device("cuda")):
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
