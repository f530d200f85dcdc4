from __future__ import annotations

import inspect
import os
import pickle
import random
import struct
import sys
import zipfile
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

import oracles
from conftest import tiny_timm
from pgp.backbones import weights
from pgp.backbones.vit import ViT

TAGS = {
    "vit_tiny_patch16_224.augreg_in21k": 32,
    "deit_tiny_patch16_224.fb_in1k": 48,
    "vit_small_patch14_reg4_dinov2.lvd142m": 28,
    "vit_small_patch14_dinov2.lvd142m": 42,
    "vit_base_patch16_clip_224.openai": 32,
}


def tiny(**arguments):
    return ViT(tiny_timm(**arguments)).double()


def images(size, count=3, dtype=torch.float64):
    return torch.rand(count, 3, size, size, dtype=dtype, generator=torch.Generator().manual_seed(1))


def prompts(width, count=3, length=4):
    return torch.randn(count, length, width, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("tag", TAGS)
@torch.no_grad()
def test_equals_timm(tag):
    vit = ViT.Config(tag, weights="random").build(TAGS[tag]).double()
    x = images(TAGS[tag], 2)
    whole = vit.vit.forward_features(x)
    assert torch.equal(vit(x), whole)
    torch.testing.assert_close(vit.encode(x), whole[:, 0], rtol=0, atol=1e-10)
    p = prompts(vit.width, 2)
    torch.testing.assert_close(vit(x, {0: p}, num_tokens=5), vit(x, {0: p})[:, :5], rtol=0, atol=1e-10)


@torch.no_grad()
def test_prompts_stand_behind_cls_and_share_its_position():
    vit = tiny()
    x, p = images(32), prompts(48)
    timms = vit.vit
    tokens = timms._pos_embed(timms.patch_embed(x))
    tokens = torch.cat([tokens[:, :1], p + timms.pos_embed[:, :1], tokens[:, 1:]], dim=1)
    placed = vit.embed_prompts(p)
    assert torch.equal(vit(x, {0: placed}), timms.norm(timms.blocks(tokens)))
    one_by_one = torch.cat([vit(x[i : i + 1], {0: placed[i : i + 1]}) for i in range(3)])
    torch.testing.assert_close(vit(x, {0: placed}), one_by_one, rtol=0, atol=1e-12)


@torch.no_grad()
def test_prefixes_against_explicit_softmax():
    vit = tiny(depth=1)
    x, block = images(32, 2), vit.vit.blocks[0]
    prefix = torch.randn(2, 2, 4, 3, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    tokens = vit.embed(x)
    qkv = block.attn.qkv(block.norm1(tokens)).view(2, 17, 3, 4, 12).permute(2, 0, 3, 1, 4)
    heads = torch.zeros(2, 17, 4, 12, dtype=torch.float64)
    for b in range(2):
        for h in range(4):
            q, k, v = (part[b, h].numpy() for part in qkv)
            out = oracles.prefix_attention(q, k, v, *prefix[b, :, h].numpy(), block.attn.scale)
            heads[b, :, h] = torch.from_numpy(out)
    tokens = tokens + block.attn.proj(heads.flatten(2))
    expected = vit.vit.norm(tokens + block.mlp(block.norm2(tokens)))
    torch.testing.assert_close(vit(x, prefixes={0: prefix}), expected, rtol=0, atol=1e-10)
    empty = prefix[:, :, :, :0]
    torch.testing.assert_close(vit(x, prefixes={0: empty}), vit(x), rtol=0, atol=1e-12)


def test_is_frozen_for_good():
    vit = tiny()
    assert not any(p.requires_grad for p in vit.parameters())
    assert not vit.train().training
    assert not vit.vit.blocks[0].training
    assert vit.fingerprint() == tiny_copy(vit).fingerprint()
    changed = tiny_copy(vit)
    changed.vit.norm.bias.data[3] += 1e-3
    assert vit.fingerprint() != changed.fingerprint()


def tiny_copy(vit):
    copy = tiny()
    copy.load_state_dict(vit.state_dict())
    return copy


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s}, lambda s: {"model": s}])
def test_pth_checkpoints_load(tmp_path, wrap):
    source = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2, num_classes=7)
    torch.save(wrap(source.state_dict()), tmp_path / "w.pth")
    vit = ViT.Config("vit_tiny_patch16_224", str(tmp_path / "w.pth"), {"depth": 2}).build(64)
    x = images(64, dtype=torch.float32)
    assert torch.equal(vit(x), source.eval().forward_features(x))


def test_safetensors_load_at_another_size(tmp_path):
    source = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2)
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    vit = ViT.Config("vit_tiny_patch16_224", str(tmp_path / "w.safetensors"), {"depth": 2}).build(32)
    assert vit.vit.pos_embed.shape == (1, 5, 192)
    assert torch.equal(vit.vit.blocks[1].mlp.fc1.weight, source.blocks[1].mlp.fc1.weight)


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_pickled_code_is_refused_and_not_run(tmp_path):
    torch.save({"x": Trap(str(tmp_path / "ran"))}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="pickled code, which is never run"):
        ViT.Config("vit_tiny_patch16_224", str(tmp_path / "w.pth")).build(32)
    assert not (tmp_path / "ran").exists()


def test_damaged_or_foreign_checkpoints(tmp_path):
    source = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=0)
    path = tmp_path / "w.safetensors"
    save_file(source.state_dict(), path)
    with pytest.raises(ValueError, match="width 96, got 192"):
        ViT.Config("vit_tiny_patch16_224", str(path), {"depth": 2, "embed_dim": 96}).build(32)
    with pytest.raises(ValueError, match=r"weights for patches of 8 px, got 16 in .*\.safetensors"):
        ViT.Config("vit_tiny_patch16_224", str(path), {"depth": 2, "patch_size": 8}).build(32)
    with pytest.raises(ValueError, match="does not fit this model: missing"):
        ViT.Config("vit_tiny_patch16_224", str(path), {"depth": 3}).build(32)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="no readable checkpoint"):
        ViT.Config("vit_tiny_patch16_224", str(path), {"depth": 2}).build(32)


@pytest.mark.parametrize(
    ("model", "size", "message"),
    [
        ("vit_tiny_patch61_224", 32, r"perhaps you meant.*vit_tiny_patch16_224"),
        ("resnet18", 32, "timm cannot make resnet18"),
        ("vit_tiny_patch16_224.nonsense", 32, "timm cannot make .* Invalid pretrained tag"),
        ("vit_small_patch16_18x2_224", 224, "joint qkv, got ParallelThingsBlock, whose modules pgp does not support"),
        ("vit_relpos_small_patch16_224", 32, "plain timm VisionTransformer, got VisionTransformerRelPos"),
        ("deit_tiny_distilled_patch16_224", 32, "got VisionTransformerDistilled"),
        ("vit_base_patch16_siglip_224", 32, "with a class token"),
        ("vit_tiny_patch16_224", 40, "multiple of the patch size 16, got 40"),
    ],
)
def test_models_that_do_not_fit(model, size, message):
    with pytest.raises(ValueError, match=message):
        ViT.Config(model, weights="random").build(size)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depth": 0}, "expected a vision transformer with blocks"),
        ({"depth": -1}, r"timm cannot make .* with {'depth': -1}: "),
        ({"num_heads": 0}, r"timm cannot make .* with {'num_heads': 0}: integer modulo by zero"),
        ({"embed_dim": -3}, r"timm cannot make .* negative dimension"),
        ({"patch_size": 0}, r"timm cannot make .* by zero"),
        ({"wrong": 1}, r"timm cannot make .* unexpected keyword argument 'wrong'"),
        ({"in_chans": 1}, "images with 3 channels, got in_chans 1"),
    ],
)
def test_arguments_that_make_no_model(arguments, message):
    with pytest.raises(ValueError, match=message):
        ViT.Config("vit_tiny_patch16_224", "random", arguments).build(32)


class Another(timm.layers.Attention):
    """Differs in what it computes, not in what it is made of."""

    def forward(self, x, **masks):
        return 1.01 * super().forward(x, **masks)


def test_attention_is_known_by_its_outputs():
    model = tiny_timm(depth=2)
    model.blocks[0].attn.heads_of_a_coming_timm = model.blocks[1].attn.another_word = 4
    before = torch.get_rng_state()
    assert ViT(model).heads == 4
    assert torch.equal(torch.get_rng_state(), before)
    model.blocks[1].attn.__class__ = Another
    with pytest.raises(
        ValueError, match=r"got Block with Another, whose outputs differ from those by .*choose another"
    ):
        ViT(model)
    model = tiny_timm(depth=3)
    model.blocks[2].attn.scale *= 2  # of which fused attention takes no note
    with pytest.raises(ValueError, match="got Block with Attention, whose outputs differ"):
        ViT(model)


@pytest.mark.parametrize("init_values", [None, 1e-5])
def test_a_layer_scale_near_zero_hides_no_difference(init_values):
    model = tiny_timm(depth=1, init_values=init_values)
    assert ViT(model).depth == 1
    model.blocks[0].attn.__class__ = Another
    with pytest.raises(ValueError, match="whose outputs differ"):
        ViT(model)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_blocks_are_compared_at_any_precision(dtype):
    assert ViT(tiny_timm(depth=2).to(dtype)).depth == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gated": True}, "expected attention without a gate, got Attention with one"),
        (
            {"scale_norm": True, "norm_layer": torch.nn.LayerNorm},
            "whose output is not normed, got Attention with a norm",
        ),
    ],
)
def test_kinds_of_attention_that_are_named(change, message):
    model = tiny_timm(depth=1)
    if not change.keys() <= inspect.signature(timm.layers.Attention.__init__).parameters.keys():
        pytest.skip("this timm has no such attention")
    model.blocks[0].attn = timm.layers.Attention(48, 4, qkv_bias=True, **change)
    with pytest.raises(ValueError, match=message):
        ViT(model)


def test_weights_that_are_not_finite(tmp_path):
    model = tiny_timm(depth=1)
    model.blocks[0].mlp.fc1.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="expected weights that are finite numbers"):
        ViT(model)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(
        ValueError, match=r"w\.safetensors is damaged: .* got NaN or infinity in \['blocks.0.mlp.fc1.weight'\]"
    ):
        tiny_config(tmp_path / "w.safetensors").build(32)


def tiny_config(weights):
    return ViT.Config(
        "vit_tiny_patch16_224", str(weights), {"patch_size": 8, "embed_dim": 48, "depth": 1, "num_heads": 4}
    )


def stored(state, path, **options):
    torch.save(state, path, **options)
    return path.read_bytes()


def zipped(path, **entries):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in entries.items():
            file.writestr(f"w/{name}", data)
    return path.read_bytes()


NOT_WEIGHTS = {
    "text.pth": (lambda _: b"weights\n" * 9, "got a text"),
    "text.safetensors": (lambda _: b"weights\n" * 9, "got a text"),
    "page.pth": (lambda _: b"<!DOCTYPE html><html>" * 9, "got a text"),
    "json.pth": (lambda _: b'{"model": 1}', "got a text"),
    "pointer.pth": (
        lambda _: b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7\n",
        "got a pointer of Git LFS",
    ),
    "empty.pth": (lambda _: b"", "got an empty file"),
    "empty.safetensors": (lambda _: b"", "got an empty file"),
    "png.pth": (lambda _: b"\x89PNG\r\n\x1a\n" + bytes(99), r"got a picture \(PNG\)"),
    "jpg.safetensors": (lambda _: b"\xff\xd8\xff\xe0" + bytes(99), r"got a picture \(JPEG\)"),
    "zeros.pth": (lambda _: bytes(999), "is no readable checkpoint .*: it is no file of weights"),
    "zeros.safetensors": (lambda _: bytes(999), "is no readable checkpoint"),
    "list.pth": (lambda _: pickle.dumps([1, 2]), "is no readable checkpoint|is no checkpoint"),
    "other.zip.pth": (lambda path: zipped(path, readme=b"hello"), "is no readable checkpoint"),
    "bomb.pth": (lambda path: zipped(path, **{"data.pkl": bytes(1 << 22)}), "it would unpack to far more than its"),
    "numbers.pth": (lambda path: stored({1: torch.ones(2)}, path), "expected tensors by name"),
    "absurd.pth": (lambda path: stored({"x": torch.ones(1).expand(1 << 20, 1 << 20)}, path), "are far larger than its"),
    "complex.pth": (lambda path: stored({"x": torch.ones(9) * 1j}, path), "plain tensors of real numbers, got another"),
    "sparse.pth": (lambda path: stored({"x": torch.eye(9).to_sparse()}, path), "is no readable|plain tensors"),
    "header.safetensors": (
        lambda _: struct.pack("<Q", 1 << 60) + b"{" * 99,
        "is no readable checkpoint .*header too large",
    ),
    "nested.safetensors": (lambda _: struct.pack("<Q", 5000) + b"[" * 5000, "is no readable checkpoint"),
}


@pytest.mark.parametrize("name", NOT_WEIGHTS)
@pytest.mark.filterwarnings("ignore:Sparse")
def test_what_is_not_weights_is_told_in_a_line(tmp_path, name):
    make, message = NOT_WEIGHTS[name]
    (tmp_path / name).write_bytes(make(tmp_path / name))
    with pytest.raises(ValueError, match=message) as raised:
        tiny_config(tmp_path / name).build(32)
    assert str(tmp_path / name) in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such pipes, and links take rights")
@pytest.mark.parametrize("kind", ["folder", "pipe", "link to a device", "link to nothing", "below a file", "NUL"])
def test_what_is_no_file_is_no_weights(tmp_path, kind):
    path = tmp_path / "w.pth"
    if kind == "below a file":
        path.write_text("")
        path = path / "w.pth"
    elif kind == "NUL":
        path = Path(f"{path}\0")
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero" if kind == "link to a device" else "nowhere")
    with pytest.raises(ValueError, match=r"no checkpoint at .*w\.pth.*: expected a \.safetensors, \.pth or \.pt file"):
        tiny_config(path).build(32)


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth", "old.pth"])
def test_random_damage_of_weights(tmp_path, name):
    """Is told in a line with the name of the file, or it changed numbers, where a format has no checksum."""
    path, state = tmp_path / name, tiny_timm(depth=1).state_dict()
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=name == "w.pth")
    whole, draw, refused = path.read_bytes(), random.Random(0), 0
    assert set(weights.read(path)) == set(state)
    for trial in range(60):
        data = bytearray(whole)
        if trial % 3 == 0:
            del data[draw.randrange(len(data)) :]
        for _ in range(draw.choice([1, 4, 50]) if data else 0):  # half of them where the format tells of itself
            place = draw.randrange(min(len(data), draw.choice([2000, len(data)])))
            data[place] = draw.randrange(256)
        path.write_bytes(data)
        try:
            weights.read(path)
        except ValueError as error:
            refused += 1
            assert str(path) in str(error)  # noqa: PT017  (a few are not refused)
            assert "\n" not in str(error)  # noqa: PT017
    assert refused > (55 if name == "w.pth" else 20)  # of which a zip has checksums


def test_hub_weights_need_a_full_tag_and_a_network(monkeypatch):
    with pytest.raises(ValueError, match=r"name the full tag, one of \['vit_tiny_patch16_224.augreg"):
        ViT.Config("vit_tiny_patch16_224").build(224)

    def offline(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(ValueError, match=r"no route to host.*--backbone.weights PATH"):
        ViT.Config("vit_tiny_patch16_224.augreg_in21k").build(224)


def test_missing_checkpoint():
    with pytest.raises(ValueError, match="no checkpoint at nowhere"):
        ViT.Config("vit_tiny_patch16_224", weights="nowhere.pth").build(32)


def test_inputs_are_checked():
    vit = tiny()
    with pytest.raises(ValueError, match=r"images \(B, 3, 32, 32\), got \(3, 3, 16, 16\)"):
        vit(images(16))
    with pytest.raises(ValueError, match=r"prompts \(3, P, 48\), got \(3, 4, 47\)"):
        vit(images(32), {0: prompts(47)})
    last = vit.depth - 1
    with pytest.raises(ValueError, match=rf"layers between 0 and {last}, the last of this model, got -1, {last + 1}$"):
        vit(images(32), {0: prompts(48), last + 1: prompts(48)}, {-1: prompts(48)})


@torch.no_grad()
def test_half_the_memory_and_the_same_results_under_autocast():
    vit, halved = tiny().float(), tiny().float()
    halved.load_state_dict(vit.state_dict())
    halved.to_mixed_(torch.bfloat16)
    assert halved.vit.blocks[0].mlp.fc1.weight.dtype == torch.bfloat16
    x = images(32, dtype=torch.float32)
    prefix = torch.randn(3, 2, 4, 3, 12, generator=torch.Generator().manual_seed(3))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(halved(x, prefixes={1: prefix}), vit(x, prefixes={1: prefix}))
        assert torch.equal(halved(x, num_tokens=1), vit(x, num_tokens=1))


def test_registers_are_no_patches():
    vit = tiny(reg_tokens=3, depth=2)
    x = images(32)
    assert torch.allclose(vit.encode_with_patches(x)[1], vit(x)[:, 4:].mean(1))
    assert vit(x).shape[1] == 4 + len(vit.patches(x)[0])


def test_models_that_read_the_mean_of_patches_are_refused():
    with pytest.raises(ValueError, match=r"averages patches \('avg'\): choose another tag"):
        ViT.Config("vit_tiny_patch16_224", "random", {"global_pool": "avg", "depth": 1}).build(224)


@pytest.mark.parametrize(
    "content", [[torch.zeros(1)], {"model": [1]}, {"model": {"weight": torch.zeros(1), "epoch": 5}}]
)
def test_what_is_no_checkpoint(tmp_path, content):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"w.pth is no checkpoint: expected tensors by name"):
        ViT.Config("vit_tiny_patch16_224", str(tmp_path / "w.pth"), {"depth": 1}).build(224)
