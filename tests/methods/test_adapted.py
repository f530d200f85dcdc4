"""LoRA and adapters: against independent implementations, and what projection guarantees."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
import torch.nn.functional as F

import tiny
from conftest import golden_clip, golden_vit
from pgp import train
from pgp.backbones.base import LINEAR_MAPS, OUTPUTS, Place
from pgp.methods.adapter import Adapter
from pgp.methods.lora import LoRA
from pgp.projections.base import NoProjection
from pgp.projections.orthogonal import Orthogonal
from pgp.rng import make_generator
from pgp.scenario import Task
from prompted import few_tokens, images

EXACT = Orthogonal.Config("input", energy=1.0, apply_to="update")


def build(config, encoder=None):
    return config.build(encoder or golden_vit(), "abcdef", make_generator(0, "init")).double()


def task(number):
    return Task(number, (2 * number, 2 * number + 1), torch.arange(4), torch.arange(4))


def randomise(method, seed=0):
    """Give every part values as if it were in the middle of its second task."""
    generator = torch.Generator().manual_seed(seed)
    for number in (0, 1):
        method.begin_task(task(number))
        with torch.no_grad():
            for _, part in method.by_place():
                part.down.copy_(torch.randn(part.down.shape, dtype=torch.float64, generator=generator) / 7)
                part.up.copy_(torch.randn(part.up.shape, dtype=torch.float64, generator=generator) / 7)
        if number == 0:
            method.end_task(task(0))


def lora_oracle(method, parts, x):
    """Features of timm's own model with whole weights in place of updated ones."""
    D, weights = 48, dict(method.backbone.vit.named_parameters())
    names = {"q": "attn.qkv", "k": "attn.qkv", "v": "attn.qkv", "proj": "attn.proj", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}
    for place, (total, down, up, scale) in parts.items():
        key, delta = f"blocks.{place.layer}.{names[place.name]}.weight", total + scale * up @ down
        if place.name in "qkv":
            start = D * "qkv".index(place.name)
            delta = F.pad(delta, (0, 0, start, 2 * D - start))
        weights[key] = weights[key] + delta
    return torch.func.functional_call(method.backbone.vit, weights, (x,))


def test_lora_equals_whole_weights_in_values_and_gradients():
    method, x = build(LoRA.Config(rank=3, places=LINEAR_MAPS, layers=(0, 2, 5), alpha=6.0)), images(2)
    randomise(method)
    copies = {
        place: (part.total, *(side.detach().clone().requires_grad_() for side in (part.down, part.up)), 2.0)
        for place, part in method.by_place()
    }
    ours, expected = method.features(x), lora_oracle(method, copies, x)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-10)
    direction = torch.randn(ours.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    ((ours + expected) * direction).sum().backward()
    for place, part in method.by_place():
        _, down, up, _ = copies[place]
        torch.testing.assert_close(part.down.grad, down.grad, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(part.up.grad, up.grad, rtol=1e-6, atol=1e-9)
    assert float((ours.detach() - method.query(x)).norm()) > 0.1


def test_adapters_equal_hooks_on_the_encoders_own_modules():
    method, x = build(Adapter.Config(rank=3, layers=(1, 5), scale=0.5)), images(2)
    randomise(method)
    model = copy.deepcopy(method.backbone.vit)

    def add(part, module, inputs, output):
        both = [(part.earlier_down, part.earlier_up), (part.down, part.up)]
        return output + sum(0.5 * (output @ down.T).clamp(min=0) @ up.T for down, up in both)

    for place, part in method.by_place():
        getattr(model.blocks[place.layer], place.name).register_forward_hook(functools.partial(add, part))
    torch.testing.assert_close(method.features(x), model(x), rtol=0, atol=1e-10)
    assert all(part.earlier_down.shape == (3, 48) for _, part in method.by_place())


@torch.no_grad()
@pytest.mark.parametrize("encoder", [golden_vit, golden_clip])
def test_frozen_maps_in_their_places_change_nothing(encoder):
    backbone, x = encoder().double(), images(2)
    adapted, widths = {}, {}

    def run(place, rows):
        widths[place.name] = rows.shape[-1]
        return rows if place.name in OUTPUTS else F.linear(rows, *backbone.linear_map(place))

    for name in LINEAR_MAPS + OUTPUTS:
        adapted[Place(1, name)] = functools.partial(run, Place(1, name))
    torch.testing.assert_close(backbone(x, adapted=adapted), backbone(x), rtol=0, atol=1e-10)
    D = backbone.width
    assert widths == dict.fromkeys(("q", "k", "v", "proj", "fc1", "attn", "mlp"), D) | {"fc2": 4 * D}
    assert torch.equal(backbone(x, adapted={}), backbone(x))


@torch.no_grad()
@pytest.mark.parametrize("config", [LoRA.Config(places=LINEAR_MAPS), Adapter.Config()])
def test_before_it_learns_and_between_tasks_features_are_what_was_stored(config):
    method, x = build(config), images(2)
    torch.testing.assert_close(method.features(x), method.query(x), rtol=0, atol=1e-10)
    randomise(method)
    during = method.features(x)
    method.end_task(task(1))
    torch.testing.assert_close(method.features(x), during, rtol=0, atol=1e-10)
    again = {name: tensor.clone() for name, tensor in method.trainable_state_dict().items()}
    method.end_task(task(1))
    assert all(torch.equal(tensor, again[name]) for name, tensor in method.trainable_state_dict().items())
    other = build(config)
    other.load_trainable_state_dict(again)
    assert torch.equal(other.features(x), method.features(x))


@pytest.mark.filterwarnings("ignore:for .* copying from a non-meta parameter")
@pytest.mark.parametrize("config", [LoRA.Config(), Adapter.Config()])
def test_a_loaded_state_stays_on_the_device_of_the_method(config):
    """A checkpoint is read to the CPU, whatever computes; torch's meta device stands in for a GPU."""
    method, other = build(config), build(config)
    method.end_task(task(0))
    other.to("meta").per_class_tensors = ()  # which are copied from the device
    other.load_trainable_state_dict(method.trainable_state_dict())
    assert {tensor.device.type for tensor in other.state_dict().values()} == {"meta"}


@torch.no_grad()
def test_small_updates_of_lora_are_not_lost_in_mixed_precision():
    method = LoRA.Config(rank=3).build(golden_vit(), "abcdef", make_generator(0, "init")).float()
    weights = {place: method.backbone.linear_map(place)[0].clone() for place, _ in method.by_place()}
    method.backbone.to_mixed_(torch.bfloat16)
    method.begin_task(task(0))
    for _, part in method.by_place():
        part.up.normal_(generator=make_generator(0, "up"))
        part.up *= 1e-3 * part.weight.norm() / (part.scale * part.up @ part.down).norm()
    method.end_task(task(0))
    for place, part in method.by_place():
        assert part.merged.dtype == torch.bfloat16
        kept = (part.merged.float() - weights[place]).flatten() @ part.total.flatten() / part.total.square().sum()
        assert 0.9 < kept < 1.1


@pytest.mark.parametrize("encoder", [golden_vit, golden_clip])
def test_q_and_v_of_a_block_have_the_same_inputs(encoder):
    """In the last block of a ViT, q has only the CLS token."""
    method = build(LoRA.Config(places=("q", "v", "fc1")), encoder())
    inputs = method.activations(images(2))
    blocks = range(method.backbone.depth - (encoder is golden_vit))
    for layer in blocks:
        q, v, fc1 = (inputs[f"{name} {layer}"] for name in ("q", "v", "fc1"))
        assert (q.same_as, v.same_as, fc1.same_as) == (None, f"q {layer}", None)
        assert torch.equal(q.inputs, v.inputs)
    assert sum(one.same_as is not None for one in inputs.values()) == len(blocks)


def learn(method, projection, number, steps=20):
    """Train on one task by Adam as `pgp.train` does, and return the losses."""
    with projection.constrain():
        method.begin_task(task(number))
    optimizer = torch.optim.Adam([p for p in method.parameters() if p.requires_grad], lr=0.005)
    handle = projection.attach(optimizer)
    x, labels, losses = images(2, 16, seed=10 + number), torch.tensor(task(number).classes), []
    for _ in range(steps):
        loss = method.loss(x, labels, task(number))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    handle.remove()
    method.end_task(task(number))
    for space, inputs in method.activations(x).items():
        projection.observe(space, inputs)
    projection.end_task()
    return losses


def changes(config, projection_config):
    """By task, how far later tasks have moved the features of its images, relative to their norm; and all losses."""
    method = build(config, few_tokens(depth=3))
    for parameter in method.head.parameters():  # so that only the parts can lower the loss
        parameter.requires_grad_(False)
    projection = projection_config.build(method.protected())
    remembered, moved, losses = {}, {}, []
    for number in range(3):
        losses.append(learn(method, projection, number))
        with torch.no_grad():
            features = {old: method.features(images(2, 16, seed=10 + old)) for old in range(number + 1)}
        for old, before in remembered.items():
            moved[old] = float((features[old] - before).norm() / before.norm())
        remembered[number] = features[number]
    return moved, losses


CONFIGS = {
    **{place: LoRA.Config(rank=3, places=(place,)) for place in LINEAR_MAPS},
    "all of LoRA": LoRA.Config(rank=3, places=LINEAR_MAPS),
    "fixed input side": LoRA.Config(rank=3, train_input_side=False),
    "attn": Adapter.Config(rank=3, places=("attn",)),
    "mlp": Adapter.Config(rank=3, places=("mlp",)),
    "both adapters": Adapter.Config(rank=3),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_three_tasks_are_learned_and_old_features_do_not_move_at_all(name):
    moved, losses = changes(CONFIGS[name], EXACT)
    assert max(moved.values()) < 1e-10
    for curve in losses:
        assert curve[-1] < curve[0] - 1e-4


@pytest.mark.parametrize("name", ["v", "all of LoRA", "both adapters"])
def test_projected_gradients_of_adam_and_no_projection_move_old_features(name):
    gradients, _ = changes(CONFIGS[name], Orthogonal.Config("input", energy=1.0, apply_to="gradient"))
    nothing, _ = changes(CONFIGS[name], NoProjection.Config())
    assert min(gradients.values()) > 1e-4  # Adam rescales each coordinate, and A is drawn anywhere
    assert min(nothing.values()) > 1e-4


def test_bad_settings_say_what_was_expected():
    with pytest.raises(ValueError, match="rank of at least 1, got 0"):
        LoRA.Config(rank=0)
    with pytest.raises(ValueError, match="places with some of q, k, v, proj, fc1, fc2, each once, got q, qkv"):
        LoRA.Config(places=("q", "qkv"))
    with pytest.raises(ValueError, match="places with some of attn, mlp, each once, got mlp, mlp"):
        Adapter.Config(places=("mlp", "mlp"))
    with pytest.raises(ValueError, match="alpha above 0"):
        LoRA.Config(alpha=0.0)
    with pytest.raises(ValueError, match="scale above 0"):
        Adapter.Config(scale=-1.0)
    with pytest.raises(ValueError, match="rank of at most 48, the width at q 0, got 49"):
        build(LoRA.Config(rank=49))
    with pytest.raises(ValueError, match="layers between 0 and 5, the last of this model, got 6"):
        build(LoRA.Config(layers=(6,)))
    with pytest.raises(ValueError, match="layers with each layer once"):
        LoRA.Config(layers=())


def test_a_model_with_another_mlp_says_so():
    from timm.layers import SwiGLUPacked

    vit = golden_vit()
    for block in vit.vit.blocks:
        block.mlp = SwiGLUPacked(48, 96).double()
    with pytest.raises(ValueError, match="expected a model whose MLP is two linear layers, for the place fc1"):
        build(LoRA.Config(places=("fc1",)), vit)
    build(LoRA.Config(places=("q",)), vit)


@pytest.mark.parametrize("kind", [LoRA, Adapter])
def test_a_projection_of_gradients_that_there_are_not_is_refused(tmp_path, kind):
    """The input side is drawn and not trained, so only a projection of updates protects anything."""
    method = kind.Config(rank=2, train_input_side=False)
    with pytest.raises(ValueError, match=r"expected --projection\.apply-to update with --method\.no-train-input-side"):
        train.train(tiny.config(method=method, projection=Orthogonal.Config()), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    train.train(tiny.config(method=method, projection=NoProjection.Config(), epochs=1), tmp_path / "plain")
