from __future__ import annotations

import pytest
import torch

import test_conformance as conformance
from conftest import golden_vit, tiny_timm
from pgp.backbones.vit import ViT
from pgp.methods.vpt import VPT
from pgp.projections.orthogonal import Orthogonal
from pgp.rng import make_generator
from prompted import TASK, drift_of, few_tokens, images


def build(vit=None, **settings):
    return VPT.Config(**settings).build(vit or golden_vit(), "abcdef", make_generator(0, "init")).double()


@torch.no_grad()
def test_equals_tokens_that_join_each_block_and_leave_behind_it():
    method, x = build(length=3), images(2)
    vit = method.backbone.vit
    tokens = method.backbone.embed(x)
    for block, prompts in zip(vit.blocks, method.prompts, strict=True):
        joined = torch.cat([tokens[:, :1], prompts.expand(2, -1, -1), tokens[:, 1:]], dim=1)
        after = block(joined)
        tokens = torch.cat([after[:, :1], after[:, 4:]], dim=1)
    torch.testing.assert_close(method.features(x), vit.norm(tokens)[:, 0], rtol=0, atol=1e-10)


@torch.no_grad()
def test_prompts_may_be_learned_behind_the_norm_and_begin_as_the_others():
    x = images(2)
    torch.testing.assert_close(build().features(x), build(prompts_after_norm=True).features(x), rtol=0, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("behind_norm", [True, False])
def test_affinity_is_what_changes_scores_and_nothing_else(behind_norm):
    """Rows are what scores change by, where the norm divides by what it did."""
    method, x = build(length=3, prompts_after_norm=behind_norm, layers=(2,), protect="affinity"), images(1)
    (rows,) = method.activations(x).values()
    block = method.backbone.vit.blocks[2]
    trace = method.backbone.trace(x, {2}, prefixes=method._prefixes(1))[2]
    prompts = method.prompts[0]
    dev = prompts.std(-1, correction=0, keepdim=True).add(0)  # of the prompts as they are

    def scores(tokens):
        normed = tokens
        if not behind_norm:
            spread = (dev**2 + block.norm1.eps).sqrt()
            normed = (tokens - tokens.mean(-1, keepdim=True)) / spread * block.norm1.weight + block.norm1.bias
        keys = method.backbone.make_prefix(2, normed)[0]  # (H, L, d)
        return (trace.queries[0] @ keys.mT).flatten(0, 1)  # (H * N, L)

    step = torch.randn(3, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    change = scores(prompts + step) - scores(prompts)
    expected = rows.expanded[0] @ step.T
    if not behind_norm:
        expected = expected / (dev**2 + block.norm1.eps).sqrt().T
    torch.testing.assert_close(change, expected, rtol=0, atol=1e-9)


def test_tokens_are_those_that_prompts_join_before_the_norm_or_behind_it():
    x = images(2)
    for behind in (False, True):
        method = build(length=3, layers=(1,), prompts_after_norm=behind)
        (rows,) = method.activations(x).values()
        tokens = method.backbone.trace(x, {1}, prefixes=method._prefixes(2))[1].tokens
        expected = method.backbone.vit.blocks[1].norm1(tokens) if behind else tokens
        torch.testing.assert_close(rows.inputs, expected, rtol=0, atol=1e-12)


@torch.no_grad()
def test_mapping_at_the_end_is_mapping_every_row():
    method, x = build(length=3, layers=(1,), protect="affinity"), images(3)
    ends = []
    for whole in (True, False):
        projection = Orthogonal(method.protected(), Orthogonal.Config("input", 0.97, apply_to="update"))
        for space, rows in method.activations(x).items():
            projection.observe(space, rows if whole else rows._replace(inputs=rows.expanded, head_maps=None))
        projection.end_task()
        basis = projection.bases["prompts 1"]
        ends.append(basis @ basis.T)
    torch.testing.assert_close(*ends, rtol=0, atol=1e-9)


def drift(protect, config, monkeypatch=None, **settings):
    """How far a new task moves features of old images, relatively, and how far its loss falls."""
    method = build(few_tokens(), length=48, protect=protect, **settings)
    if monkeypatch:
        hold_norms(method, monkeypatch)
    return drift_of(method, config)


def hold_norms(method, monkeypatch):
    """Let LayerNorms divide prompts by what they divided them by at first."""
    backbone = method.backbone
    at_first = {layer: backbone.apply_norm(layer, tokens)[1].detach() for layer, tokens in method._prompts_by_layer()}

    def normed(layer, tokens):
        norm = backbone.vit.blocks[layer].norm1
        centred = tokens - tokens.mean(-1, keepdim=True)
        return centred / at_first[layer][:, None] * norm.weight + norm.bias, at_first[layer]

    monkeypatch.setattr(backbone, "apply_norm", normed)


EVERYTHING = Orthogonal.Config("input", 1.0, apply_to="update")


@pytest.mark.parametrize("behind_norm", [True, False])
def test_old_features_stay_if_affinity_and_aggregation_hold_and_norms_do(behind_norm, monkeypatch):
    """All energy, the update projected, free directions left: by rounding only, while a new task is learned."""
    patch = None if behind_norm else monkeypatch
    far, fall = drift("affinity+aggregation", EVERYTHING, patch, prompts_after_norm=behind_norm)
    assert far < 1e-10
    assert fall > 0.1
    affinity, _ = drift("affinity", EVERYTHING, patch, prompts_after_norm=behind_norm)
    assert affinity > 1e-3  # what is gathered from prompts changes
    free, _ = drift("affinity", None, patch, prompts_after_norm=behind_norm)
    assert free > affinity


def test_norms_that_move_let_old_features_drift_and_the_penalty_holds_them():
    far, _ = drift("affinity+aggregation", EVERYTHING)
    assert far > 1e-6
    method = build(norm_penalty=10.0)
    method.end_task(TASK)
    x, labels = images(4), torch.tensor([2, 3, 2, 3])
    assert torch.equal(method.loss(x, labels, TASK), build().loss(x, labels, TASK))
    with torch.no_grad():
        for prompts in method.prompts:
            prompts *= 2
    plain = build()
    plain.load_trainable_state_dict(method.trainable_state_dict())
    dearer = method.loss(x, labels, TASK) - plain.loss(x, labels, TASK)
    torch.testing.assert_close(dearer, 10 * method.deviations.sum(), rtol=1e-2, atol=0)  # eps stands beside variances


def test_a_first_task_has_no_norms_to_hold():
    x, labels = images(4), torch.tensor([2, 3, 2, 3])
    assert torch.equal(build(norm_penalty=3.0).loss(x, labels, TASK), build().loss(x, labels, TASK))


@pytest.mark.parametrize(
    "settings",
    [
        {"protect": "tokens"},
        {"protect": "affinity"},
        {"protect": "affinity+aggregation", "prompts_after_norm": True},
        {"protect": "affinity+aggregation", "layers": (0, 3), "norm_penalty": 0.5},
    ],
)
def test_variants_keep_the_promises_of_every_method(settings):
    conformance.keeps_its_promises(VPT.Config(**settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"length": 0}, "method.length of at least 1"),
        ({"norm_penalty": -1.0}, "norm_penalty of at least 0"),
        ({"norm_penalty": 1.0, "prompts_after_norm": True}, "norm_penalty 0 with method.prompts_after_norm, got 1.0"),
        ({"layers": (1, 1)}, "each layer once"),
        ({"layers": ()}, "each layer once"),
        ({"layers": (6,)}, "between 0 and 5"),
    ],
)
def test_settings_that_do_not_fit(settings, message):
    with pytest.raises(ValueError, match=message):
        build(**settings)


def test_a_model_that_norms_keys_has_no_affinity():
    with pytest.raises(ValueError, match="does not norm its keys"):  # before anything is trained
        build(ViT(tiny_timm(qk_norm=True)).double(), length=2, protect="affinity+aggregation")
    build(ViT(tiny_timm(qk_norm=True)).double(), length=2, protect="tokens").activations(images(1))
