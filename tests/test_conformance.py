"""What every method and every projection promises, whatever it is."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import oracles
from conftest import CIFAR_NAMES, golden_clip, golden_vit
from pgp import recipes
from pgp.config import Optimizer
from pgp.methods.adapter import Adapter
from pgp.methods.clip_prompt import CLIPPrompt
from pgp.methods.coda_prompt import CODAPrompt
from pgp.methods.vpt import VPT
from pgp.rng import make_generator
from pgp.scenario import Task

TASK = Task(0, (0, 1, 2), torch.arange(4), torch.arange(4))


METHODS = {name: config for name, config in recipes.METHODS.items() if name != "zero-shot"}  # which learns nothing
METHODS["coda"] = CODAPrompt.Config(pool_size=20, per_task=5)  # the encoder is narrow
METHODS["adapter"] = Adapter.Config(rank=10)  # the published basis needs 9 rows


@pytest.fixture(params=METHODS)
def method(request):
    return built(METHODS[request.param])


def built(config):
    """An untrained method at the start of its first task, on an encoder that it can use."""
    encoder = golden_clip() if isinstance(config, CLIPPrompt.Config) else golden_vit()
    method = config.build(encoder, CIFAR_NAMES[:6], make_generator(0, "init")).double()
    method.begin_task(TASK)
    return method


def images(count=16, seed=1):
    return torch.rand(count, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def learned(method):
    return [parameter for parameter in method.parameters() if parameter.requires_grad]


def test_what_is_protected_meets_what_is_observed(method):
    rows = method.activations(images(3))
    assert rows.keys() == method.protected().keys()
    for space, (parameter, axis, _role) in method.protected().items():
        assert parameter.requires_grad
        assert rows[space].expanded.shape[-1] == parameter.shape[axis]
        assert len(rows[space].expanded) == 3
        assert not rows[space].expanded.requires_grad


def test_loss_falls_and_only_the_method_learns(method):
    optimizer = torch.optim.Adam(learned(method), lr=0.01)
    labels, losses = torch.arange(16) % 3, []
    for _ in range(8):
        loss = method.loss(images(), labels, TASK)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.05
    assert all(parameter.grad is None for parameter in method.backbone.parameters())


def test_logits_of_training_are_not_rounded(method):
    """The head is trained on logits in float32, as those at test, also if the encoder computes in bfloat16."""
    kinds = []
    method.float().head.register_forward_hook(lambda module, given, logits: kinds.append(logits.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        method.loss(images().float(), torch.arange(16) % 3, TASK).backward()
    assert kinds == ([] if isinstance(method, CLIPPrompt) else [torch.float32])  # CLIP compares features with names


def test_state_goes_round_without_the_encoder(method):
    state = {name: tensor.clone() for name, tensor in method.trainable_state_dict().items()}
    assert not any("backbone" in name for name in state)
    before = method(images(4))
    with torch.no_grad():
        for parameter in learned(method):
            parameter.add_(1)
    assert not torch.equal(method(images(4)), before)
    method.load_trainable_state_dict(state)
    assert torch.equal(method(images(4)), before)
    with pytest.raises(ValueError, match="belongs to another model or run"):
        method.load_trainable_state_dict({**state, "head.bias": torch.zeros(7)})


def test_prompts_are_all_that_learns_but_the_head(method):
    prompts = method.prompt_parameters()
    whole = [parameter for parameter in learned(method) if all(parameter is not p for p in method.head.parameters())]
    if isinstance(method, CLIPPrompt):  # its context makes the classifier's rows, anew for each task
        whole = [parameter for parameter in whole if parameter is not method.context]
    assert [id(parameter) for parameter in prompts] == [id(parameter) for parameter in whole]
    assert {id(target.parameter) for target in method.protected().values()} <= {id(parameter) for parameter in prompts}


STEPPERS = {
    "sgd": Optimizer("sgd", lr=25.6, momentum=0.9, weight_decay=0.1, clip=0),
    "adam": Optimizer("adam", lr=2.56, weight_decay=0.1, clip=0),
    "adamw": Optimizer("adamw", lr=2.56, weight_decay=0.1, clip=0),
}


def steps(method, settings, count=3):
    """Gradients by name, and where they lead: of the second task, by a batch of one image's rate."""
    optimizer = settings.for_task(1).build(method, 1)
    before = {name: p.detach().clone() for name, p in method.named_parameters() if p.requires_grad}
    gradients = {name: [] for name in before}
    for _ in range(count):
        method.loss(images(4), torch.arange(4) % 3, TASK).backward()
        for name, parameter in method.named_parameters():
            if name in gradients:
                gradients[name].append(
                    torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
                )
        optimizer.step()
        optimizer.zero_grad()
    return before, gradients


@pytest.mark.parametrize("name", STEPPERS)
def test_at_a_rate_of_0_no_bit_of_a_prompt_moves(method, name):
    method = method.float()
    method.loss = lambda x, *rest, loss=method.loss: loss(x.float(), *rest)
    before, _ = steps(method, replace(STEPPERS[name], later_prompt_lr_scale=0.0))
    prompts = {id(parameter) for parameter in method.prompt_parameters()}
    for path, parameter in method.named_parameters():
        if path in before:
            same = torch.equal(parameter.detach().view(torch.int32), before[path].view(torch.int32))
            assert same == (id(parameter) in prompts), path


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_a_slower_prompt_makes_the_steps_of_a_lower_rate(method, name):
    settings = replace(STEPPERS[name], later_prompt_lr_scale=0.1)
    before, gradients = steps(method, settings)
    prompts = {id(parameter) for parameter in method.prompt_parameters()}
    for path, parameter in method.named_parameters():
        if path in before:
            rate = 0.01 * (0.1 if id(parameter) in prompts else 1.0)
            given = [gradient.numpy() for gradient in gradients[path]]
            expected = oracles.adam(before[path].numpy(), given, rate, settings.weight_decay, name == "adamw")
            torch.testing.assert_close(parameter.detach(), torch.from_numpy(expected), rtol=0, atol=1e-12)


@torch.no_grad()
def test_a_batch_with_given_queries_is_prepared_without_a_pass(method):
    x, labels = images(6), torch.arange(6) % 3
    query, alone = method.query(x), method.prepare_batch(x, TASK)
    passes = []
    method.backbone.register_forward_hook(lambda *_: passes.append(None))
    prepared = method.prepare_batch(x, TASK, query)
    assert passes == []
    assert prepared.keys() == alone.keys()
    assert ("query" in prepared) == method.uses_query
    assert all(torch.equal(prepared[name], alone[name]) for name in alone)
    if method.uses_query:
        assert torch.equal(method.prepare_batch(x, TASK, query.flip(0))["query"], query.flip(0))
    assert float(method.loss(x, labels, TASK, prepared)) == float(method.loss(x, labels, TASK, alone))


@torch.no_grad()
def test_no_image_depends_on_its_batch(method):
    x = images()
    together = method(x)
    alone = torch.cat([method(x[i : i + 1]) for i in range(16)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-10)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(method(x[order]), together[order], rtol=0, atol=1e-10)
    torch.testing.assert_close(method(x, method.query(x)), together, rtol=0, atol=1e-12)


@torch.no_grad()
def test_activations_and_features_of_one_pass_are_those_of_two(method):
    x, query = images(3), method.query(images(3))
    method.end_task(TASK)
    inputs, features = method.activations_and_features(x, query)
    alone = method.activations(x, query)
    torch.testing.assert_close(features, method.features(x, query), rtol=0, atol=1e-12)
    assert inputs.keys() == alone.keys() == method.protected().keys()
    for space, found in inputs.items():
        for ours, theirs in zip(found, alone[space], strict=True):
            assert (ours is None) == (theirs is None)
            if isinstance(theirs, torch.Tensor):
                torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_classes_may_come_again(method):
    """As in setting dil: another task with the same classes, another image of each."""
    method.end_task(TASK)
    again = Task(1, TASK.classes, torch.arange(4, 8), torch.arange(4, 8))
    method.begin_task(again)
    assert method.activations(images(3)).keys() == method.protected().keys()
    labels = torch.arange(16) % 3
    loss = method.loss(images(), labels, again)
    loss.backward()
    assert loss.isfinite()
    method.end_task(again)
    state = {name: tensor.clone() for name, tensor in method.trainable_state_dict().items()}
    method.end_task(again)  # a task may be closed again, as its accuracy along the stream asks for
    assert all(torch.equal(state[name], tensor) for name, tensor in method.trainable_state_dict().items())
    assert method(images(2))[:, list(again.classes)].isfinite().all()


def keeps_its_promises(config):
    """For variants of a method: all of the above, each on a new one."""
    for promise in (
        test_what_is_protected_meets_what_is_observed,
        test_loss_falls_and_only_the_method_learns,
        test_state_goes_round_without_the_encoder,
        test_no_image_depends_on_its_batch,
        test_activations_and_features_of_one_pass_are_those_of_two,
        test_classes_may_come_again,
    ):
        promise(built(config))


@pytest.mark.parametrize("name", recipes.PROJECTIONS)
def test_a_boundary_and_a_step_of_every_projection(method, name):
    if name == "released" and isinstance(method, VPT):
        method = built(VPT.Config(protect="tokens"))  # the published code never protects the prompts' own side
    config = recipes.PROJECTIONS[name]
    projection = config.build(method.protected(), seed=7)
    assert projection.protected == method.protected()
    assert projection.seed == 7
    seed = 0
    while not projection.has_enough() and seed < 4:
        for space, rows in method.activations(images(seed=seed)).items():
            projection.observe(space, rows)
        seed += 1
    ranks = projection.end_task()
    assert all(0 <= rank <= method.backbone.width for rank in ranks.values())
    restored = config.build(method.protected(), seed=7)
    restored.load_state_dict(projection.state_dict())
    ends = []
    for one in (projection, restored):
        twin = type(method).__name__
        optimizer = torch.optim.SGD(learned(method), lr=0.0)
        handle = one.attach(optimizer)
        method.loss(images(), torch.arange(16) % 3, TASK).backward()
        optimizer.step()
        ends.append([p.grad.clone() for p in learned(method)])
        assert all(grad.isfinite().all() for grad in ends[-1]), twin
        optimizer.zero_grad()
        handle.remove()
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
