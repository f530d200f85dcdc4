"""Parity with the published L2P, head by head, for both selections, in float64 and float32."""

from __future__ import annotations

import pytest
import torch

from conftest import TOLERANCE, close, columns, golden, golden_vit
from pgp.methods.base import mask_logits
from pgp.methods.l2p import L2P
from pgp.projections.orthogonal import Orthogonal
from pgp.scenario import Task

CASES = ["prompt/batchwise", "prompt/persample", "token/batchwise", "token+prompt/persample"]
NAMES = {
    "prompt.prompt": "pool.prompts",
    "prompt.prompt_key": "pool.learned_key",
    "head.weight": "head.weight",
    "head.bias": "head.bias",
}
TASK = Task(1, (2, 3), torch.tensor([]), torch.tensor([]))


@pytest.fixture(scope="module")
def arrays():
    return golden("l2p_f64.npz")


def build(arrays, case, dtype):
    reads, selection = case.split("/")
    config = L2P.Config(head_type=reads, selection="batch" if selection == "batchwise" else "image")
    method = L2P(config, golden_vit(dtype), classes=10, generator=torch.Generator()).to(dtype)
    state = {ours: arrays[f"{case}/init/{theirs}"].to(dtype) for theirs, ours in NAMES.items()}
    method.load_trainable_state_dict(state)
    return method


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_query_and_patch_tokens(arrays, dtype):
    method = build(arrays, CASES[0], dtype)
    images = arrays["x0"].to(dtype)
    close(method.query(images), arrays["cls_features0"], TOLERANCE[dtype][0])
    close(method.backbone.patches(images), arrays["memory/act_rep0"], TOLERANCE[dtype][0])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("phase", ["train", "eval"])
@pytest.mark.parametrize("case", CASES)
def test_forward(arrays, case, phase, dtype):
    tolerance = TOLERANCE[dtype][0]
    method = build(arrays, case, dtype)
    images = arrays["x0"].to(dtype)
    by_vote = case.endswith("batchwise")
    selection = method.pool.select(method.query(images), by_vote=by_vote)
    expected = arrays[f"{case}/{phase}/prompt_idx"]
    assert torch.equal(selection.indices.sort(1).values, expected.sort(1).values)
    close(selection.similarity, arrays[f"{case}/{phase}/similarity"], tolerance)
    close(selection.key_similarity, arrays[f"{case}/{phase}/reduce_sim"], tolerance)
    features = method.features(images, by_vote=by_vote)
    close(features, arrays[f"{case}/{phase}/pre_logits"], tolerance)
    close(method.head(features), arrays[f"{case}/{phase}/logits"], tolerance)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients(arrays, case, dtype):
    tolerance = TOLERANCE[dtype][0]
    method = build(arrays, case, dtype)
    loss = method.loss(arrays["x0"].to(dtype), arrays["y0"], TASK)
    close(loss, arrays[f"{case}/loss"], tolerance)
    loss.backward()
    parameters = dict(method.named_parameters())
    for theirs, ours in NAMES.items():
        close(parameters[ours].grad, arrays[f"{case}/raw_grad/{theirs}"], tolerance)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("pgp", ["nopgp", "pgp"])
@pytest.mark.parametrize("case", ["prompt/batchwise", "token/batchwise"])
def test_three_optimizer_steps(arrays, case, pgp, dtype):
    exact, after_adam = TOLERANCE[dtype]
    method = build(arrays, case, dtype)
    parameters = dict(method.named_parameters())
    optimizer = torch.optim.Adam([p for p in method.parameters() if p.requires_grad], lr=0.03)
    if pgp == "pgp":
        projection = Orthogonal(method.protected())
        projection.load_state_dict({"prompts": columns(arrays["P_prompt"]), "keys": columns(arrays["P_key"])})
        projection.attach(optimizer)
    losses = []
    for step in range(3):
        loss = method.loss(arrays[f"x{step}"].to(dtype), arrays[f"y{step}"], TASK)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in method.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        losses.append(loss.detach())
        if step == 0:
            for theirs, ours in NAMES.items():
                close(parameters[ours].grad, arrays[f"{case}/{pgp}/step0_final_grad/{theirs}"], exact)
        optimizer.zero_grad()
        for theirs, ours in NAMES.items():
            close(parameters[ours], arrays[f"{case}/{pgp}/after_step{step}/{theirs}"], after_adam)
    close(torch.stack(losses).mean(), arrays[f"{case}/{pgp}/mean_loss3"], after_adam)


def test_query_of_a_model_without_cls(arrays):
    """The published fallback, a query of the largest patch tokens, through the argument that takes any query."""
    method = build(arrays, "prompt/batchwise", torch.float64)
    query = method.backbone.patches(arrays["x0"]).amax(1)
    voted = method.pool.select(query, by_vote=True).indices
    assert torch.equal(voted.sort(1).values, arrays["no_cls/prompt_idx"].sort(1).values)
    close(method.head(method.features(arrays["x0"], query, by_vote=True)), arrays["no_cls/logits"], 1e-10)


def test_masked_cross_entropy_ignores_other_classes(arrays):
    logits = arrays["plain_logits0"]
    masked = mask_logits(logits, TASK.classes)
    assert masked.isfinite().sum() == 2 * len(logits)
