from __future__ import annotations

import numpy as np
import pytest
import torch

import oracles
import test_conformance as conformance
from conftest import golden_vit
from pgp.methods.dualprompt import DualPrompt
from pgp.methods.prompts import scatter_by_prompt
from pgp.projections.orthogonal import Orthogonal
from pgp.projections.released import ReleasedBasis
from pgp.rng import make_generator
from pgp.scenario import Task
from prompted import TASK, drift_of, few_tokens, images


def build(vit=None, **settings):
    config = DualPrompt.Config(**{"prompt_mask": False, **settings})
    return config.build(vit or golden_vit(), "abcdef", make_generator(0, "init")).double()


def drift(protect, config, **settings):
    """How far a new task moves features of old images, relatively, and how far its loss falls."""
    method = build(few_tokens(), general_length=12, expert_length=12, protect=protect, **settings)
    return drift_of(method, config)


EVERYTHING = {"basis": "input", "energy": 1.0, "key_energy": 1.0}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        *(
            pytest.param(settings, marks=pytest.mark.slow)
            for settings in ({"top_k": 2, "pull": 0.0}, {"prompt_mask": True}, {"same_key_and_value": True})
        ),
    ],
)
def test_old_features_stay_through_the_whole_network(settings):
    """Keys and values, all energy, the update projected: by rounding only. Nothing less holds, by at least this.

    What an image picks is another matter: a key's cosine changes with its norm, so with top_k 2 the pull rests here.
    """
    moved = {
        name: drift(protect, config, **settings)
        for name, protect, config in (
            ("exact", "keys+values", Orthogonal.Config(**EVERYTHING, apply_to="update")),
            ("gradient", "keys+values", Orthogonal.Config(**EVERYTHING, apply_to="gradient")),
            ("keys", "keys", Orthogonal.Config(**EVERYTHING, apply_to="update")),
            ("none", "keys", None),
        )
    }
    far, fall = moved["exact"]
    assert far < 1e-10
    assert fall > 0.3
    assert moved["gradient"][0] > 0.01  # Adam rescales the projected gradient, coordinate by coordinate
    assert moved["keys"][0] > 0.1  # as in the paper: values are free
    assert moved["none"][0] > moved["gradient"][0]


def test_values_are_held_for_the_images_that_picked_them():
    shares = torch.rand(3, 2, 4, 6, generator=torch.Generator().manual_seed(0))  # (B, H, N, k * L), k = 2
    indices = torch.tensor([[4, 1], [1, 0], [2, 3]])
    by_prefix = scatter_by_prompt(shares, indices, size=5)
    assert by_prefix.shape == (3, 5, 2, 4, 3)
    for image, (first, second) in enumerate(indices.tolist()):
        assert torch.equal(by_prefix[image, first], shares[image, ..., :3])
        assert torch.equal(by_prefix[image, second], shares[image, ..., 3:])
        others = [prefix for prefix in range(5) if prefix not in (first, second)]
        assert not by_prefix[image, others].any()


@torch.no_grad()
def test_traces_against_explicit_softmax():
    method, x = build(protect="keys+values", general_layers=(0,), expert_layers=(3,)), images(2)
    rows, vit = method.activations(x), method.backbone
    block, tokens = vit.vit.blocks[0], vit.embed(x)
    q, k, _ = block.attn.qkv(block.norm1(tokens)).view(2, 17, 3, 4, 12).permute(2, 0, 3, 1, 4)
    torch.testing.assert_close(rows["general 0 keys"].inputs, q, rtol=0, atol=1e-12)
    prefix = method.general["0"].keys[0]
    for image in range(2):
        for head in range(4):
            scores = q[image, head] @ torch.cat([prefix[head], k[image, head]]).T * block.attn.scale
            expected = oracles.softmax(scores.numpy())[:, :5]
            np.testing.assert_allclose(rows["general 0 values"].inputs[image, 0, head], expected, atol=1e-12)


@torch.no_grad()
def test_nothing_above_the_deepest_protected_layer_is_computed(monkeypatch):
    method, x = build(), images(2)
    query = method.query(x)
    for block in method.backbone.vit.blocks[5:]:
        monkeypatch.setattr(block, "forward", None)
    norms = []
    for block in method.backbone.vit.blocks:
        block.norm1.register_forward_hook(lambda *_: norms.append("attention"))
        block.norm2.register_forward_hook(lambda *_: norms.append("mlp"))
    method.activations(x, query)
    assert (norms.count("attention"), norms.count("mlp")) == (5, 4)  # of layer 4, its queries only


@torch.no_grad()
def test_expert_tokens_join_from_their_layer_on():
    method, x = build(expert_type="token", general_layers=()), images(2)
    indices = torch.tensor([[7], [0]])
    vit = method.backbone
    tokens = vit.embed(x)
    for layer, block in enumerate(vit.vit.blocks):
        if layer in (2, 3, 4):
            prompts = method.experts[str(layer)].tokens[indices[:, 0]]
            tokens = torch.cat([prompts, tokens], dim=1)  # anywhere: attention does not know the order
        tokens = block(tokens)
    expected = vit.vit.norm(tokens)[:, 15]
    torch.testing.assert_close(method._prompted_features(x, indices), expected, rtol=0, atol=1e-12)
    assert {"expert 2", "expert 3", "expert 4", "keys"} == method.protected().keys() == method.activations(x).keys()


@pytest.mark.parametrize("mask", [False, True])
def test_a_task_that_trains_only_the_head_leaves_features_as_they_are(mask):
    method = build(prompt_mask=mask, shared_pool=True)
    with torch.no_grad():
        method.key.copy_(torch.randn(method.key.shape, generator=torch.Generator().manual_seed(2)))
    x = images(8)
    query = method.query(x)
    before, slot = method.features(x, query), Task(1, (2, 3), torch.arange(0), torch.arange(0))
    method.trains_head_only = True
    method.skip_task(slot)
    assert torch.equal(method.features(x, query), before)
    assert torch.equal(method.prepare_batch(x, slot, query)["indices"], selected(method, query))
    method.trains_head_only = False
    own = torch.ones(8, 1, dtype=torch.long)
    assert torch.equal(method.prepare_batch(x, slot, query)["indices"], own if mask else selected(method, query))


def selected(method, query):
    """The experts that images select at test."""
    return method.selected_prompts(query).nonzero()[:, 1:]


def test_experts_are_handed_on():
    method = build(shared_pool=True, top_k=2)
    before = {name: tensor.clone() for name, tensor in method.trainable_state_dict().items()}
    method.begin_task(Task(2, (4,), TASK.train, TASK.test))
    for name, tensor in method.trainable_state_dict().items():
        expected = before[name].clone()
        if name.startswith("experts"):
            expected[4:6] = before[name][2:4]
        assert torch.equal(tensor, expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_k": 11}, r"method.top_k of at most method.pool_size 10, got 11"),
        ({"pool_size": 0}, r"method.pool_size of at least 1, got 0"),
        ({"general_length": 0}, r"method.general_length of at least 1, got 0"),
        ({"expert_layers": (1, 2)}, r"each layer at most once .* method.general_layers \(0, 1\), got \(1, 2\)"),
        ({"expert_layers": ()}, r"expected method.expert_layers"),
        ({"expert_layers": (2, 6)}, r"layers between 0 and 5, the last of this model, got 6"),
        ({"general_layers": (-1,)}, "layers between 0 and 5.*got -1"),
    ],
)
def test_settings_that_do_not_fit(settings, message):
    with pytest.raises(ValueError, match=message):
        build(**settings)


@pytest.mark.parametrize(
    "settings", [{"protect": "keys+values", "top_k": 2, "prompt_mask": False}, {"expert_type": "token"}]
)
def test_variants_keep_the_promises_of_every_method(settings):
    def variant():
        return conformance.built(DualPrompt.Config(**settings))

    conformance.test_what_is_protected_meets_what_is_observed(variant())
    conformance.test_loss_falls_and_only_the_method_learns(variant())
    conformance.test_state_goes_round_without_the_encoder(variant())
    conformance.test_no_image_depends_on_its_batch(variant())
    conformance.test_a_boundary_and_a_step_of_every_projection(variant(), "orthogonal")


def test_the_released_projection_refuses_values():
    method = conformance.built(DualPrompt.Config(protect="keys+values"))
    with pytest.raises(ValueError, match="never protects values"):
        ReleasedBasis.Config().build(method.protected())
