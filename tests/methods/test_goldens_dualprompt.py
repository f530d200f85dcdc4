"""Parity with the published DualPrompt where its reshape is put right, for both selections, in float64 and float32."""

from __future__ import annotations

import pytest
import torch

from conftest import TOLERANCE, close, columns, golden, golden_vit
from pgp.methods.dualprompt import DualPrompt
from pgp.projections.released import ReleasedBasis
from pgp.scenario import Task

CASES = ["batchwise", "persample"]
TASK = Task(1, (2, 3), torch.tensor([]), torch.tensor([]))


@pytest.fixture(scope="module")
def arrays():
    return golden("dualprompt_f64.npz")


def ours(arrays, at):
    """The published tensors `at/...` under our names: heads come before positions, and each layer is by itself."""
    g, e = arrays[f"{at}/g_prompt"], arrays[f"{at}/e_prompt.prompt"]
    state = {"key": arrays[f"{at}/e_prompt.prompt_key"], "head.weight": arrays[f"{at}/head.weight"]}
    state["head.bias"] = arrays[f"{at}/head.bias"]
    for part, name in enumerate(("keys", "separate_values")):
        for layer in range(2):
            state[f"general.{layer}.{name}"] = g[layer, part].transpose(0, 1)[None]  # (1, H, L, d)
        for layer in range(3):
            state[f"experts.{layer + 2}.{name}"] = e[layer, part].transpose(1, 2)  # (M, H, L, d)
    return state


def build(arrays, case, dtype, vit=None, **settings):
    config = DualPrompt.Config(selection="batch" if case == "batchwise" else "image", **settings)
    method = DualPrompt(config, vit or golden_vit(dtype), classes=10, generator=torch.Generator()).to(dtype)
    method.load_trainable_state_dict(
        {name: value.to(dtype) for name, value in ours(arrays, f"fixed/{case}/init").items()}
    )
    return method


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("phase", ["train", "eval"])
@pytest.mark.parametrize("case", CASES)
def test_forward(arrays, case, phase, dtype):
    tolerance = TOLERANCE[dtype][0]
    method, x, at = build(arrays, case, dtype), arrays["x0"].to(dtype), f"fixed/{case}/{phase}"
    query = method.query(x)
    prepared = method.prepare_batch(
        x, TASK if phase == "train" else Task(99, (), TASK.train, TASK.test)
    )  # past the pool
    assert torch.equal(prepared["indices"], arrays[f"{at}/prompt_idx"])
    for layer in range(3):
        prefix = arrays[f"{at}/batched_prompt"][layer].permute(0, 1, 3, 2, 4)  # (B, 2, H, L, d)
        close(method.experts[str(layer + 2)](prepared["indices"]), prefix, tolerance)
    features = method._prompted_features(x, prepared["indices"])
    close(features, arrays[f"{at}/pre_logits"], tolerance)
    close(method.head(features), arrays[f"{at}/logits"], tolerance)
    if phase == "eval":
        close(method.head(method.features(x, query, by_vote=case == "batchwise")), arrays[f"{at}/logits"], tolerance)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients(arrays, case, dtype):
    tolerance = TOLERANCE[dtype][0]
    method = build(arrays, case, dtype)
    loss = method.loss(arrays["x0"].to(dtype), arrays["y0"], TASK)
    close(loss, arrays[f"fixed/{case}/loss"], tolerance)
    loss.backward()
    parameters = dict(method.named_parameters())
    for name, expected in ours(arrays, f"fixed/{case}/raw_grad").items():
        close(parameters[name].grad, expected, tolerance)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("pgp", ["nopgp", "pgp"])
@pytest.mark.parametrize("case", CASES)
def test_three_optimizer_steps(arrays, case, pgp, dtype):
    """With the published bases over heads side by side; only the expert of the task gets a gradient to project."""
    exact, after_adam = TOLERANCE[dtype]
    method = build(arrays, case, dtype)
    parameters = dict(method.named_parameters())
    learned = [p for p in method.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(learned, lr=0.03)
    if pgp == "pgp":
        projection = ReleasedBasis(method.protected())
        spaces = {f"general {i} keys": f"P_g{i}" for i in (0, 1)} | {f"expert {i} keys": f"P_e{i}" for i in (2, 3, 4)}
        projection.load_state_dict({space: columns(arrays[name]) for space, name in spaces.items()})
        projection.attach(optimizer)
    losses = []
    for step in range(3):
        loss = method.loss(arrays[f"x{step}"].to(dtype), arrays[f"y{step}"], TASK)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        losses.append(loss.detach())
        if step == 0:
            for name, expected in ours(arrays, f"fixed/{case}/{pgp}/step0_final_grad").items():
                close(parameters[name].grad, expected, exact)
        optimizer.zero_grad()
        for name, expected in ours(arrays, f"fixed/{case}/{pgp}/after_step{step}").items():
            close(parameters[name], expected, after_adam)
    close(torch.stack(losses).mean(), arrays[f"fixed/{case}/{pgp}/mean_loss3"], after_adam)


@torch.no_grad()
def test_queries_of_attention(arrays):
    """The published arrays were collected with the last expert, whatever the image; ours use the one that it picks."""
    method, x = build(arrays, "persample", torch.float64), arrays["x0"]
    picked = method.prepare_batch(x, Task(99, (), TASK.train, TASK.test))["indices"]
    for indices in (torch.full_like(picked, 9), picked):
        traces = method.backbone.trace(x, range(5), *method._prompts_and_prefixes(indices))
        for layer in range(5 if indices is not picked else 3):  # the first expert speaks in layer 2
            close(traces[layer].queries, arrays[f"fixed/memory_q/layer{layer}"], 1e-10)
    rows = method.activations(x)
    for layer, trace in traces.items():
        assert torch.equal(rows[f"{'general' if layer < 2 else 'expert'} {layer} keys"].inputs, trace.queries)


@torch.no_grad()
def test_the_published_reshape_hands_out_prefixes_of_other_images(arrays):
    """The released arrays follow from reading `(2, B, ...)` memory as `(B, 2, ...)`; ours, image by image, do not."""
    method, x = build(arrays, "persample", torch.float64), arrays["x0"]
    indices = arrays["fixed/persample/eval/prompt_idx"]

    def released(prefix):  # (B, 2, H, L, d), as released
        return prefix.transpose(0, 1).reshape(prefix.shape)

    _, prefixes = method._prompts_and_prefixes(indices)
    scrambled = {layer: released(prefix) if layer > 1 else prefix for layer, prefix in prefixes.items()}
    logits = method.head(method.backbone(x, None, scrambled, num_tokens=1)[:, 0])
    close(logits, arrays["released/persample/eval/logits"], 1e-10)
    alone = torch.cat([method(image[None]) for image in x])
    close(method(x), alone, 1e-12)
    close(alone, arrays["fixed/persample/eval/logits"], 1e-10)
    assert (logits - alone).abs().max() > 0.01
    close(method(x[:1]), arrays["fixed/single/logits"], 1e-10)
    assert (arrays["released/single/logits"] - arrays["released/persample/eval/logits"][:1]).abs().max() > 0.01
