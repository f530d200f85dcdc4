"""Parity with the published CLIP prompts on a tiny model, in float64 and float32."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from conftest import CIFAR_NAMES as NAMES
from conftest import GOLDENS, TOLERANCE, close, golden, golden_clip
from pgp.methods.base import mask_logits
from pgp.methods.clip_prompt import CLIPPrompt
from pgp.scenario import Task

TASKS = [Task(t, tuple(range(10 * t, 10 * t + 10)), torch.tensor([]), torch.tensor([])) for t in range(3)]


@pytest.fixture(scope="module")
def arrays():
    return golden("clip_f64.npz")


def build(arrays, dtype, learned=()):
    config = CLIPPrompt.Config(context=4, image_prompt=5)
    method = config.build(golden_clip(dtype), NAMES, torch.Generator().manual_seed(0)).to(dtype)
    with torch.no_grad():
        method.image_prompt.copy_(arrays["image_prompt"])
        for task in learned:
            method.begin_task(TASKS[task])
            method.context[0] = arrays[f"ctx{task}"]
            method.end_task(TASKS[task])
    return method


def test_tokens(arrays):
    clip = golden_clip()
    with np.load(GOLDENS / "clip_f64.npz") as strings:
        assert torch.equal(clip.tokenize(strings["bpe/texts"].tolist()), arrays["bpe/tokens"])
    for t, task in enumerate(TASKS):
        names = [NAMES[label].replace("_", " ") for label in task.classes]
        assert torch.equal(clip.tokenize([f"x x x x {name}." for name in names]), arrays[f"tokens{t}"])
    with pytest.raises(ValueError, match="texts of at most 75 tokens, got 'x x"):
        clip.tokenize(["x " * 76])


@pytest.mark.parametrize("dtype", TOLERANCE)
@torch.no_grad()
def test_features(arrays, dtype):
    exact = TOLERANCE[dtype][0]
    method, x = build(arrays, dtype, learned=[1]), arrays["images"].to(dtype)
    clip = method.backbone
    close(clip.positioned(x), arrays["query_rep"], exact)
    close(clip.project(clip.encode(x)), arrays["image_features_plain"], exact)
    close(method.features(x), arrays["image_features_prompted"], exact)
    close(method.text_features(TASKS[1]), arrays["text_features1"], exact)
    assert abs(clip.logit_scale - float(arrays["logit_scale_exp"])) < 1e-5 * clip.logit_scale


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_loss_and_gradients(arrays, dtype):
    exact = TOLERANCE[dtype][0]
    method, x = build(arrays, dtype, learned=[1]), arrays["images"].to(dtype)
    close(method(x)[:, 10:20], arrays["train_logits_task1"], exact)
    loss = method.loss(x, arrays["labels_in_task"] + 10, TASKS[1])
    close(loss, arrays["loss"], exact)
    loss.backward()
    close(method.context.grad[0], arrays["grad_ctx1"], exact)
    close(method.image_prompt.grad, arrays["grad_image_prompt"], exact)


@torch.no_grad()
def test_published_scopes(arrays):
    """Task-incremental logits agree; the published class-incremental ones are ours, cut by the batch's largest task."""
    method, x = build(arrays, torch.float64, learned=[0, 1, 2]), arrays["images"]
    logits = method(x)
    for tasks in ("000000", "110011", "222222"):
        cut = arrays[f"interface/CIL/tasks{tasks}"]
        close(logits[:, : cut.shape[1]], cut, 1e-10)
        assert cut.shape[1] == 10 * (int(max(tasks)) + 1)
    for image, task in enumerate((0, 1, 2, 0, 1, 2)):
        own = mask_logits(logits, TASKS[task].classes)[image]
        close(own[own.isfinite()], arrays["interface/TIL/tasks012012"][image], 1e-10)
    text = torch.nn.functional.normalize(arrays["all_text_features"], dim=-1)
    close(method.head.text, text, 1e-6)  # kept in float32, as in a checkpoint
