from __future__ import annotations

import json
import sys
from dataclasses import replace

import open_clip
import pytest
import torch

import test_conformance as conformance
import tiny
from conftest import CIFAR_NAMES, golden_clip, golden_vit
from pgp import progress, train
from pgp.analysis.checkpoints import evaluate_checkpoints
from pgp.backbones import clip as clip_file
from pgp.backbones.base import insert_prompts
from pgp.backbones.clip import CLIP
from pgp.config import Hardware, Optimizer
from pgp.datasets.loader import LoaderOptions, TransformedSplit, batches, sequential_batches
from pgp.evaluation.accuracy import LEGACY
from pgp.methods.base import mask_logits
from pgp.methods.clip_prompt import CLIPPrompt, TextHead, ZeroShot
from pgp.methods.dualprompt import DualPrompt
from pgp.methods.l2p import L2P
from pgp.projections.base import NoProjection
from pgp.readouts.head import MethodHead
from pgp.rng import make_generator
from pgp.scenario import Task
from pgp.training.devices import build_fabric
from pgp.training.session import Session
from prompted import change_of_first_block, roughen

TASK = Task(0, (4, 1, 2), torch.arange(4), torch.arange(4))
ARCHITECTURE = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


@pytest.fixture
def encoder(tmp_path):
    path = tmp_path / "clip.json"
    path.write_text(json.dumps(ARCHITECTURE))
    return CLIP.Config(str(path), "random")


def images(count=6, size=32, seed=1):
    return torch.rand(count, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def build(clip=None, **settings):
    config = CLIPPrompt.Config(**{"context": 5, "image_prompt": 3, **settings})
    return config.build(clip or golden_clip(), CIFAR_NAMES[:6], make_generator(0, "init")).double()


@torch.no_grad()
def test_equals_open_clip_without_prompts():
    clip = golden_clip()
    assert torch.equal(clip.project(clip.encode(images())), clip.model.encode_image(images()))
    tokens = clip.tokenize(["a photo of a dog.", "bees"])
    assert torch.equal(clip.encode_text(clip.embed_text(tokens), tokens), clip.model.encode_text(tokens))


@pytest.mark.slow
@torch.no_grad()
def test_equals_the_published_architecture_without_prompts():
    model = open_clip.create_model("ViT-B-32", load_weights=False).double()
    torch.testing.assert_close(
        CLIP(model).project(CLIP(model).encode(images(2, 224))), model.encode_image(images(2, 224)), rtol=0, atol=1e-12
    )


@torch.no_grad()
@pytest.mark.parametrize("block", ["default", "custom"])
def test_both_attention_classes_of_open_clip_work(block):
    towers = {name: {**ARCHITECTURE[name], "block_type": block} for name in ("vision_cfg", "text_cfg")}
    model = open_clip.CLIP(**{**ARCHITECTURE, **towers}).double()
    kinds = {type(tower.resblocks[0].attn) for tower in (model.visual.transformer, model.transformer)}
    assert kinds == {torch.nn.MultiheadAttention if block == "default" else open_clip.transformer.Attention}
    clip = CLIP(model)
    assert clip.heads == 2
    torch.testing.assert_close(clip.project(clip.encode(images())), model.encode_image(images()), rtol=0, atol=1e-12)
    tokens = clip.tokenize(["a photo of a dog.", "bees"])
    ours = clip.encode_text(clip.embed_text(tokens), tokens)
    torch.testing.assert_close(ours, model.encode_text(tokens), rtol=0, atol=1e-12)
    prompted = clip(images(), {0: clip.embed_prompts(torch.zeros(6, 3, 32, dtype=torch.float64))}, num_tokens=1)
    assert prompted.shape == (6, 1, 32)
    assert not torch.allclose(prompted[:, 0], clip.encode(images()))


@pytest.mark.parametrize("protect", ["tokens", "affinity", "affinity+aggregation"])
@pytest.mark.parametrize("block", ["default", "custom"])
def test_what_old_tokens_get_in_the_first_block(protect, block):
    """0 to first order, if affinity and aggregation of the image prompt are held, and deviations are."""
    vision = {**ARCHITECTURE["vision_cfg"], "image_size": 16, "block_type": block}
    clip, old = CLIP(open_clip.CLIP(**{**ARCHITECTURE, "vision_cfg": vision}).double()), images(1, 16)
    visual = clip.model.visual
    roughen(visual.ln_pre)
    roughen(visual.transformer.resblocks[0].ln_1)
    method = build(clip, context=2, image_prompt=16, protect=protect)
    with torch.no_grad():
        method.image_prompt *= 50  # as long as other tokens

    def first(prompts):
        out = visual.transformer.resblocks[0](insert_prompts(clip.embed(old), clip.embed_prompts(prompts.unsqueeze(0))))
        return torch.cat([out[:, :1], out[:, 17:]], dim=1)  # without the prompts themselves

    change = change_of_first_block(method, old, method.image_prompt, first)
    if protect == "affinity+aggregation":
        assert change < 1e-5
    else:
        assert change > 1e-3


@pytest.mark.parametrize("protect", ["affinity", "affinity+aggregation"])
def test_affinity_keeps_the_promises_of_every_method(protect):
    conformance.keeps_its_promises(CLIPPrompt.Config(protect=protect))


def test_a_model_that_norms_keys_has_no_affinity():
    vision = {**ARCHITECTURE["vision_cfg"], "block_type": "custom", "qk_norm": True}
    clip = CLIP(open_clip.CLIP(**{**ARCHITECTURE, "vision_cfg": vision}).double())
    with pytest.raises(ValueError, match="does not norm its keys"):
        build(clip, context=2, protect="affinity").activations(images(1))
    build(clip, context=2).activations(images(1))


@torch.no_grad()
def test_a_later_block_is_traced_behind_the_first():
    clip, x = golden_clip(), images(2)
    prompts = {
        0: clip.embed_prompts(torch.ones(2, 3, clip.width, dtype=torch.float64)),
        1: torch.ones(2, 2, clip.width).double(),
    }
    traces, blocks = clip.trace(x, {0, 1}, prompts), clip.model.visual.transformer.resblocks
    entered = blocks[0](insert_prompts(clip.embed(x), prompts[0]))
    torch.testing.assert_close(traces[1].tokens, entered, rtol=0, atol=1e-12)
    assert traces[0].queries.shape == (2, clip.heads, 17, clip.width // clip.heads)
    assert traces[1].prompt_attention().shape == (2, clip.heads, 20, 2)
    sums = clip.trace(x, {1}, {1: torch.ones(2, 5, clip.width).double()})[1].prompt_attention().sum(-1)
    assert bool(((sums > 0) & (sums < 1)).all())
    with pytest.raises(ValueError, match="block with prompts or a prefix, got one without"):
        clip.trace(x, {1})[1].prompt_attention()
    cls, found = clip.encode_with_traces(x, {0, 1}, prompts)
    torch.testing.assert_close(cls, clip(x, prompts, num_tokens=1)[:, 0], rtol=0, atol=1e-12)
    assert all(torch.equal(found[layer].queries, traces[layer].queries) for layer in (0, 1))


def test_contexts_stand_where_they_are_told_to():
    method, clip = build(), golden_clip()
    for place, text in (("end", "x x x x x {}."), ("middle", "x x {}. x x x"), ("front", "{}. x x x x x")):
        method.settings = replace(method.settings, name=place)
        tokens = clip.tokenize([text.format(CIFAR_NAMES[label].replace("_", " ")) for label in TASK.classes])
        embedded = clip.embed_text(tokens)
        x = int(clip.tokenize(["x"])[0, 1])
        for row in range(3):
            embedded[row, (tokens[row] == x).nonzero().flatten()] = method.context[0]
        torch.testing.assert_close(method.text_features(TASK), clip.encode_text(embedded, tokens), rtol=0, atol=1e-12)


@torch.no_grad()
def test_contexts_of_classes():
    method = build(per_class=True)
    assert method.context.shape == (6, 5, 64)
    before = method.text_features(TASK)
    method.context[1].normal_()
    moved = (method.text_features(TASK) - before).abs().amax(1) > 1e-3
    assert moved.tolist() == [False, True, False]  # class 1 is the second of the task


def test_contexts_of_classes_keep_the_promises_of_every_method():
    def variant():
        return conformance.built(CLIPPrompt.Config(context=5, per_class=True, name="middle"))

    conformance.test_what_is_protected_meets_what_is_observed(variant())
    conformance.test_state_goes_round_without_the_encoder(variant())
    conformance.test_no_image_depends_on_its_batch(variant())
    conformance.test_a_boundary_and_a_step_of_every_projection(variant(), "orthogonal")
    method = variant()  # three times the contexts learn more slowly
    optimizer = torch.optim.Adam(conformance.learned(method), lr=0.01)
    labels, losses = torch.arange(16) % 3, []
    for _ in range(32):
        losses.append(method.loss(images(16), labels, conformance.TASK))
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.05


@torch.no_grad()
def test_closed_classes_keep_their_text():
    method = build()
    method.begin_task(TASK)
    first = method.context.clone()
    method.context += 1
    method.end_task(TASK)
    kept = method.head.text.clone()
    method.begin_task(Task(1, (0, 3), TASK.train, TASK.test))
    assert torch.equal(method.head.text[[1, 2, 4]], kept[[1, 2, 4]])
    assert not method.head.text[5].any()
    assert not torch.equal(method.context, first)
    again = build()
    again.begin_task(Task(1, (0, 3), TASK.train, TASK.test))  # draws are addressed, not streamed
    assert torch.equal(again.context, method.context)


@torch.no_grad()
def test_the_published_cut_finds_tasks_in_noise():
    """With random logits, classes cut at the batch's own task lift accuracy above chance; scores over all do not."""
    noise = torch.randn(100_000, 100, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(100_000) % 100
    cut = torch.cat([mask_logits(noise[labels // 10 == t], range(10 * t + 10)) for t in range(10)])
    order = torch.cat([labels[labels // 10 == t] for t in range(10)])
    published = float((cut.argmax(1) == order).double().mean())
    ours = float((mask_logits(noise, range(100)).argmax(1) == labels).double().mean())
    expected = sum(1 / (10 * t + 10) for t in range(10)) / 10
    assert published == pytest.approx(expected, abs=0.003)
    assert expected == pytest.approx(0.029, abs=0.001)
    assert ours == pytest.approx(0.01, abs=0.001)


def config(encoder, **changes):
    prompts = CLIPPrompt.Config(context=4, image_prompt=3)
    return tiny.config(**{"backbone": encoder, "method": prompts, "optimizer": Optimizer("sgd", lr=1.0), **changes})


def test_learns_asks_the_text_tower_once_a_task_and_resumes_bitwise(encoder, tmp_path, monkeypatch):
    calls, inside, encode_text = [], [], CLIP.encode_text

    def counted(self, embedded, tokens):
        calls.append(inside[-1] if inside else "training")
        return encode_text(self, embedded, tokens)

    end_task = train.end_task

    def watched(session, state, task):
        inside.append("closing")
        end_task(session, state, task)
        inside.pop()
        if task.index == 1 and "crash" in str(session.run.folder):
            raise KeyboardInterrupt

    monkeypatch.setattr(CLIP, "encode_text", counted)
    monkeypatch.setattr(clip_file, "_check_towers", lambda _: None)  # which asks it when an encoder is built
    monkeypatch.setattr(train, "end_task", watched)
    whole = train.train(config(encoder), tmp_path / "whole")
    assert calls.count("closing") == 3
    steps = 3 * 2 * 3  # tasks, epochs, steps of 8 of 24 images: in parts of 4, and yet once a step
    assert calls.count("training") == steps + 3  # and once as each task begins
    with pytest.raises(KeyboardInterrupt):
        train.train(config(encoder), tmp_path / "crash")
    calls.clear()
    resumed = train.resume(tmp_path / "crash")
    assert calls.count("closing") == 1
    for column, matrix in whole.matrices().items():
        torch.testing.assert_close(resumed.matrices()[column], matrix, rtol=0, atol=0, equal_nan=True)
    calls.clear()
    row = evaluate_checkpoints(resumed, resumed.config)
    torch.testing.assert_close(row["head"][2], whole.matrices()["head"][2], rtol=0, atol=0)
    assert not calls


def test_resumes_inside_a_task_bitwise(encoder, tmp_path, monkeypatch):
    whole = train.train(config(encoder), tmp_path / "whole")
    train_step, calls = train.train_step, []

    def crash(*arguments, **named):
        calls.append(None)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return train_step(*arguments, **named)

    monkeypatch.setattr(train, "train_step", crash)
    with pytest.raises(KeyboardInterrupt):
        train.train(config(encoder, save_every_steps=1), tmp_path / "run")
    monkeypatch.setattr(train, "train_step", train_step)
    resumed = train.resume(tmp_path / "run").load()
    for name, tensor in whole.load()["method"].items():
        assert torch.equal(resumed["method"][name], tensor)


def test_the_parts_of_a_batch_add_up(encoder, tmp_path):
    ends = []
    for part in (3, 8):
        run = train.train(config(encoder, hardware=Hardware(micro_batch_size=part)), tmp_path / str(part))
        ends.append(run.load()["method"])
    for name, tensor in ends[0].items():
        torch.testing.assert_close(tensor, ends[1][name], rtol=1e-4, atol=1e-5)


def test_no_image_depends_on_its_batch_or_its_neighbours_tasks(encoder, tmp_path):
    """Accuracy per image does not depend on the batch size; the published one, which cuts by task, is no lower."""
    rows = []
    for size in (1, 5, 128):
        run = train.train(config(encoder, eval_batch_size=size, legacy_eval=True), tmp_path / str(size))
        rows.append(run.matrices())
    for matrices in rows:
        torch.testing.assert_close(matrices["head"], rows[0]["head"], rtol=0, atol=0, equal_nan=True)
        plain, published = (matrices[name].nan_to_num() for name in ("head", "head" + LEGACY))
        assert (published >= plain).all()
    assert (rows[0]["head" + LEGACY].nan_to_num() > rows[0]["head"].nan_to_num()).any()


def test_neighbours_in_a_batch_decide_nothing(encoder, tmp_path):
    run = train.train(config(encoder, epochs=1), tmp_path / "run")
    session = Session(build_fabric(run.config), run.config, progress.no_progress())
    state = session.new_state()
    state.load_state_dict(run.load())
    tests = torch.arange(len(session.data.test))
    viewed = TransformedSplit(session.data.test, run.config.transforms.test(), 0, ("test",), skip_bad=False)
    (batch,) = batches(viewed, sequential_batches(tests, 1000), LoaderOptions())
    order = tests[torch.randperm(len(tests), generator=make_generator(0, "mixed"))]
    with torch.no_grad():
        mixed = state.method(batch.images[order])
        for task in session.scenario.tasks:
            own = torch.isin(order, task.test)
            alone = state.method(batch.images[order[own]])
            torch.testing.assert_close(alone, mixed[own], rtol=0, atol=1e-5)
            assert torch.equal(alone.argmax(1), mixed[own].argmax(1))


def test_zero_shot_learns_nothing(encoder, tmp_path):
    zero = config(encoder, method=ZeroShot.Config(), projection=NoProjection.Config(), readouts=(MethodHead.Config(),))
    run = train.train(zero, tmp_path / "run")
    (head,) = run.load()["method"].values()
    method = zero.method.build(encoder.build(32), run.config.dataset.build().class_names, make_generator(0, "init"))
    assert list(method.trainable_state_dict()) == ["head.text"]
    assert not [p for p in method.parameters() if p.requires_grad]
    every = Task(0, tuple(range(6)), TASK.train, TASK.test)
    method.begin_task(every)
    torch.testing.assert_close(method.head.text, head)
    assert not list(run.events("train"))


@pytest.mark.parametrize("method", [CLIPPrompt.Config(context=4), ZeroShot.Config()])
def test_mixed_precision_runs(encoder, tmp_path, method):
    mixed = config(encoder, method=method, precision="bf16-mixed", epochs=1, tasks=2)
    run = train.train(mixed, tmp_path / "run")
    again = evaluate_checkpoints(run, run.config)["head"]
    torch.testing.assert_close(again[1], run.matrices()["head"][1], rtol=0, atol=0)


def test_til_masks_to_the_task(encoder, tmp_path):
    til = train.train(config(encoder, setting="til"), tmp_path / "til").matrices()["head"]
    cil = train.train(config(encoder), tmp_path / "cil").matrices()["head"]
    assert (til.nan_to_num() >= cil.nan_to_num()).all()
    assert til[2].mean() > cil[2].mean()


def test_l2p_runs_on_clip_too(encoder, tmp_path):
    run = train.train(config(encoder, method=L2P.Config(top_k=2)), tmp_path / "run")
    assert run.matrices()["head"].diagonal().isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model": "ViT-B-16-quikgelu"},
            r"unknown open_clip model 'ViT-B-16-quikgelu'; perhaps you meant \['ViT-B-16-q",
        ),
        ({"model": "RN50"}, r"plain vision transformer with a class token .* got ModifiedResNet"),
        ({"model": "ViT-B-16-SigLIP"}, "expected a plain vision transformer|expected CLIP's own text transformer"),
        ({"model": "ViT-B-32", "weights": "nowhere"}, r"no weights 'nowhere' for ViT-B-32: expected one of \['openai'"),
        ({"model": "ViT-B-32", "weights": "nowhere.pt"}, "no checkpoint at nowhere.pt"),
        ({"model": "ViT-B-32", "weights": "."}, r"no weights '\.' for ViT-B-32: expected one of \['openai'"),
        ({"model": "missing.json"}, "no description of a model at missing.json: expected a JSON file"),
    ],
)
def test_models_that_do_not_fit(change, message):
    with pytest.raises(ValueError, match=message):
        CLIP.Config(**{"weights": "random", **change}).build(224)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"m\.json is no readable description of a model in JSON \(truncated\?\): Expecting property name"),
        ("[" * 100_000, r"m\.json is no readable description of a model in JSON .*recursion"),
        (b"\xff\xfe\x00", r"m\.json is no readable description of a model in JSON .*utf-8"),
        (" " * (1 << 21), r"expected a description of a model in JSON, got 2,097,152 bytes in .*m\.json"),
        ("[]", r"open_clip cannot make .*m\.json at 32 px: list indices must be integers"),
        ("{}", r"open_clip cannot make .*m\.json at 32 px: KeyError\('vision_cfg'\)"),
        ('{"vision_cfg": {}}', r"open_clip cannot make .*m\.json at 32 px: .*missing 2 required"),
        (ARCHITECTURE | {"embed_dim": -3}, r"open_clip cannot make .*m\.json at 32 px: "),
        (
            ARCHITECTURE | {"vision_cfg": {**ARCHITECTURE["vision_cfg"], "patch_size": 64}},
            "a multiple of the patch size 64, got 32",
        ),
        (
            ARCHITECTURE | {"vision_cfg": {**ARCHITECTURE["vision_cfg"], "pool_type": "avg"}},
            "with a class token as CLIP's",
        ),
        (
            ARCHITECTURE | {"text_cfg": {**ARCHITECTURE["text_cfg"], "vocab_size": 99}},
            "own vocabulary of 49408 tokens, got 99",
        ),
        (ARCHITECTURE | {"text_cfg": {**ARCHITECTURE["text_cfg"], "pool_type": "first"}}, "with 'first'"),
        (ARCHITECTURE | {"text_cfg": {**ARCHITECTURE["text_cfg"], "no_causal_mask": True}}, "expected CLIP's own text"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_descriptions_that_do_not_fit(tmp_path, text, message):
    content = json.dumps(text) if isinstance(text, dict) else text
    (tmp_path / "m.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        CLIP.Config(str(tmp_path / "m.json"), "random").build(32)


@pytest.mark.parametrize("part", ["images", "texts"])
def test_a_model_whose_passes_are_others_is_refused(part):
    """Known by its outputs: it has all the modules of CLIP, and uses them in another way."""
    model = open_clip.CLIP(**ARCHITECTURE)
    name = "encode_image" if part == "images" else "encode_text"
    known = getattr(model, name)
    setattr(model, name, lambda inputs: 1.01 * known(inputs))
    with pytest.raises(
        ValueError, match=rf"expected CLIP's own encoders, .* \(its features of {part} differ from open_clip"
    ):
        CLIP(model)
    setattr(model, name, lambda: known)
    with pytest.raises(ValueError, match=r"expected CLIP's own encoders, .* positional argument"):
        CLIP(model)
    setattr(model, name, known)
    before = torch.get_rng_state()
    assert CLIP(model).depth == 2  # and nothing of it was left out
    assert torch.equal(torch.get_rng_state(), before)


def test_towers_of_another_make_are_refused():
    model = open_clip.CLIP(**ARCHITECTURE)
    model.text = torch.nn.Linear(2, 2)
    with pytest.raises(
        ValueError, match=r"expected CLIP's own text transformer with features from the end token .argmax., got Linear"
    ):
        CLIP(model)
    model.text = open_clip.CLIP(**ARCHITECTURE)
    model.text.token_embedding = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"own vocabulary of 49408 tokens, got 0"):
        CLIP(model)
    with pytest.raises(ValueError, match=r"expected a plain vision transformer .* got NoneType"):
        CLIP(torch.nn.Linear(2, 2))


def test_model_libraries_that_are_missing_are_named(monkeypatch):
    def create(*_, **__):
        raise RuntimeError("Please install transformers\nfor all this")

    monkeypatch.setattr(open_clip, "create_model", create)
    with pytest.raises(ValueError, match=r"open_clip cannot make ViT-B-32 at 224 px: Please install transformers$"):
        CLIP.Config("ViT-B-32", "random").build(224)
    with pytest.raises(
        ValueError, match=r"no weights openai for ViT-B-32: Please install transformers\. Offline, download"
    ):
        CLIP.Config("ViT-B-32", "openai").build(224)


def test_attention_of_an_unknown_kind_is_refused():
    model = open_clip.CLIP(**ARCHITECTURE)
    for block in model.visual.transformer.resblocks:
        block.attn = torch.nn.Identity()
    with pytest.raises(ValueError, match="expected a plain vision transformer"):
        CLIP(model)


def test_checkpoints(encoder, tmp_path):
    clip = encoder.build(32)
    torch.save({"state_dict": clip.model.state_dict()}, tmp_path / "w.pt")
    with torch.no_grad():
        clip.model.visual.conv1.weight.add_(1)
    torch.save({"state_dict": clip.model.state_dict()}, tmp_path / "other.pt")
    loaded = [replace(encoder, weights=str(tmp_path / name)).build(32).fingerprint() for name in ("w.pt", "other.pt")]
    assert loaded == [encoder.build(32).fingerprint(), clip.fingerprint()]
    larger = replace(encoder, weights=str(tmp_path / "w.pt")).build(64)
    assert larger(torch.rand(1, 3, 64, 64)).shape == (1, 65, 32)
    (tmp_path / "bad.pt").write_bytes((tmp_path / "w.pt").read_bytes()[:1000])
    with pytest.raises(ValueError, match="no readable checkpoint"):
        replace(encoder, weights=str(tmp_path / "bad.pt")).build(32)
    state = clip.model.state_dict()
    ids = {"token_embedding.ids": torch.tensor([1, 99999]), "token_embedding.rows": torch.zeros(2, 16)}
    torch.save({**state, **ids}, tmp_path / "ids.pt")
    torch.save({**state, "visual.positional_embedding": torch.zeros(3)}, tmp_path / "places.pt")
    for name in ("ids.pt", "places.pt"):
        with pytest.raises(ValueError, match=rf"{name} (is no readable checkpoint|does not fit)"):
            replace(encoder, weights=str(tmp_path / name)).build(32)
    del state["ln_final.bias"]
    torch.save(state, tmp_path / "part.pt")
    with pytest.raises(ValueError, match=r"part.pt does not fit this model: missing \['ln_final.bias'\]"):
        replace(encoder, weights=str(tmp_path / "part.pt")).build(32)


def test_settings_that_do_not_fit(monkeypatch):
    with pytest.raises(ValueError, match=r"expected an encoder of images and texts, got ViT: choose --backbone clip"):
        build(golden_vit())
    with pytest.raises(ValueError, match=r"template with one {} for the class name, got 'a photo'"):
        ZeroShot.Config("a photo")
    with pytest.raises(ValueError, match=r"method\.image_prompt of at least 1, got 0"):
        CLIPPrompt.Config(image_prompt=0)
    with pytest.raises(ValueError, match="CLIP encoder takes prompts only; choose --backbone vit"):
        DualPrompt.Config((0,), expert_layers=(1,)).build(golden_clip(), "ab", make_generator(0, "init")).double()(
            images()
        )
    clip = golden_clip()
    with pytest.raises(ValueError, match=rf"layers between 0 and {clip.depth - 1}, .* got {clip.depth}$"):
        clip(images(), {clip.depth: torch.zeros(6, 1, clip.width)})
    with pytest.raises(ValueError, match=r"images \(B, 3, 32, 32\), got \(6, 3, 16, 16\)"):
        build().features(images(size=16))
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(ValueError, match=r"CLIP needs open_clip, which is not installed: pip install .*\[clip\]"):
        CLIP.Config().build(224)


def test_logits_are_not_rounded_to_bfloat16():
    """At 100 times the cosine similarity, the best two would often be equal."""
    head = TextHead(50, 8, 100.0)
    draws = torch.Generator().manual_seed(0)
    head.learn(range(50), torch.randn(50, 8, generator=draws))
    features = torch.randn(64, 8, generator=draws)
    with torch.autocast("cpu", torch.bfloat16):
        logits = head(features.bfloat16())
    assert torch.equal(logits, head(features.bfloat16().float()))
