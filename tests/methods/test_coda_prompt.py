from __future__ import annotations

import numpy as np
import pytest
import torch

from conftest import golden_vit
from pgp.methods.coda_prompt import CODAPrompt
from pgp.projections.orthogonal import Orthogonal
from pgp.rng import make_generator
from pgp.scenario import Task
from prompted import few_tokens, images

SMALL = CODAPrompt.Config(layers=(0, 2), length=3, pool_size=12, per_task=4)


def task(number):
    return Task(number, (2 * number, 2 * number + 1), torch.arange(4), torch.arange(4))


def build(config=SMALL, encoder=None):
    return config.build(encoder or golden_vit(), "abcdef", make_generator(0, "init")).double()


def train(method, number, steps=5, projection=None):
    optimizer = torch.optim.Adam([p for p in method.parameters() if p.requires_grad], lr=0.01)
    if projection:
        projection.attach(optimizer)
    size = method.backbone.vit.patch_embed.img_size[0]
    losses = []
    for _ in range(steps):
        loss = method.loss(images(4, size, seed=number), torch.tensor(task(number).classes).repeat(2), task(number))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    method.end_task(task(number))
    return losses


def rows(pool):
    """Components, attention vectors and keys of a layer, one row each."""
    keys, values, attention, key = (p.detach().flatten(1).numpy() for p in pool.parameters())
    return keys, values, attention, key


def test_weights_are_cosines_and_prefixes_are_weighted_sums():
    method, x = build(), images(3)
    for number in (0, 1):
        method.begin_task(task(number))
        train(method, number)
    query = method.query(x)
    prefixes = method._prefixes(query)
    for layer in (0, 2):
        keys, values, attention, key = rows(method.pools[str(layer)])
        for image in range(3):
            expected = np.zeros((2, keys.shape[1]))
            for m in range(8):  # two tasks of four components
                a, b = query[image].numpy() * attention[m], key[m]
                weight = a @ b / np.sqrt(a @ a) / np.sqrt(b @ b)
                expected += weight * np.stack([keys[m], values[m]])
            np.testing.assert_allclose(prefixes[layer][image].detach().flatten(1).numpy(), expected, atol=1e-12)
    ours = method.backbone(x, prefixes=prefixes, num_tokens=1)[:, 0]
    assert torch.equal(method.features(x), ours)


def test_new_components_begin_orthonormal_to_earlier_ones():
    method = build()
    for number in range(3):
        method.begin_task(task(number))
        first, stop = 4 * number, 4 * number + 4
        for _, pool in method._pools():
            for vectors in rows(pool):
                new = vectors[first:stop]
                np.testing.assert_allclose(new @ new.T, np.eye(4), atol=1e-6)
                np.testing.assert_allclose(new @ vectors[:first].T, 0, atol=1e-6)
                assert not vectors[stop:].any()
        train(method, number, steps=2)


def test_the_penalty_is_the_squared_distance_of_gram_matrices_from_the_identity():
    method = build()
    method.begin_task(task(0))
    for _, pool in method._pools():
        assert float(pool.penalty(slice(0, 4)).detach()) < 1e-9  # they are orthonormal
    train(method, 0)
    method.begin_task(task(1))
    for _, pool in method._pools():
        with torch.no_grad():
            for parameter in pool.parameters():
                parameter[:8] += 0.1 * torch.randn(parameter[:8].shape, dtype=torch.float64)
        keys, values, attention, key = rows(pool)
        halves = np.concatenate([keys, values], axis=1) / np.sqrt(2)
        expected = sum(((X[:8] @ X[:8].T - np.eye(8)) ** 2).sum() for X in (halves, attention, key))
        np.testing.assert_allclose(float(pool.penalty(slice(4, 8)).detach()), expected, rtol=1e-10)
    x, labels = images(4), torch.tensor([2, 3, 2, 3])
    loss = float(method.loss(x, labels, task(1)).detach())
    method.config = CODAPrompt.Config(**{**vars(SMALL), "penalty": 0.0})
    plain = float(method.loss(x, labels, task(1)).detach())
    penalties = sum(float(pool.penalty(slice(4, 8)).detach()) for _, pool in method._pools())
    np.testing.assert_allclose(loss - plain, 0.1 * penalties, rtol=1e-9)


def test_each_task_trains_its_own_components_and_no_bit_of_others():
    method = build()
    for number in range(3):
        method.begin_task(task(number))
        before = [p.detach().clone() for _, pool in method._pools() for p in pool.parameters()]
        losses = train(method, number)
        assert losses[-1] < losses[0]
        after = [p.detach() for _, pool in method._pools() for p in pool.parameters()]
        own = slice(4 * number, 4 * number + 4)
        for a, b in zip(before, after, strict=True):
            changed = (a != b).flatten(1).any(1)
            assert changed[own].all()
            changed[own] = False
            assert not changed.any()


def test_when_all_components_are_learned_only_the_head_is_trained():
    method = build(CODAPrompt.Config(layers=(0,), length=2, pool_size=4, per_task=4))
    for number in range(2):
        method.begin_task(task(number))
        before = [p.detach().clone() for p in method.pools.parameters()]
        head = method.head.weight.detach().clone()
        train(method, number)
        same = all(torch.equal(a, b) for a, b in zip(before, method.pools.parameters(), strict=True))
        assert same == (number == 1)
        assert not torch.equal(head, method.head.weight)


def test_a_resumed_task_goes_on_as_it_would_have():
    method, other = build(), build()
    method.begin_task(task(0))
    train(method, 0)
    method.begin_task(task(1))
    other.load_trainable_state_dict({name: tensor.clone() for name, tensor in method.trainable_state_dict().items()})
    assert torch.equal(other.features(images(2)), method.features(images(2)))
    assert train(other, 1) == train(method, 1)


def test_projected_keys_and_values_keep_old_attention_outputs():
    """With free directions, what the components of a new task add to old attention outputs is 0."""
    config = CODAPrompt.Config(layers=(0,), length=24, pool_size=8, per_task=4, protect="keys+values")
    encoder = few_tokens(num_heads=1)
    method = build(config, encoder)
    projection = Orthogonal.Config("input", energy=1.0, value_energy=1.0, apply_to="update").build(method.protected())
    with projection.constrain():
        method.begin_task(task(0))
    train(method, 0)
    old = images(1, 16, seed=20)
    for space, inputs in method.activations(old).items():
        projection.observe(space, inputs)
    projection.end_task()
    before = method.features(old).detach()
    with projection.constrain():
        method.begin_task(task(1))
    losses = train(method, 1, steps=20, projection=projection)
    assert losses[-1] < losses[0]
    torch.testing.assert_close(method.features(old).detach(), before, rtol=0, atol=1e-10)


def test_bad_settings_say_what_was_expected():
    with pytest.raises(ValueError, match="per_task between 1 and pool_size 5, got 4 and 6"):
        CODAPrompt.Config(pool_size=5, per_task=6)
    with pytest.raises(ValueError, match="penalty of at least 0"):
        CODAPrompt.Config(penalty=-1.0)
    with pytest.raises(ValueError, match="at least one layer"):
        CODAPrompt.Config(layers=())
    with pytest.raises(ValueError, match="layers between 0 and 5, the last of this model"):
        build(CODAPrompt.Config(layers=(6,), pool_size=10))
    with pytest.raises(ValueError, match="pool_size of at most 48, the width of this model, got 100"):
        build(CODAPrompt.Config())
