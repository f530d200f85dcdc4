"""Any open_clip model with two plain transformer towers, used as a library: its own modules, with prompts let in."""

from __future__ import annotations

import difflib
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pgp.backbones import weights
from pgp.backbones.base import Trace, VisionLanguage, check_image_size, drop_prompts, insert_prompts


class CLIP(VisionLanguage):
    """A frozen open_clip model: a vision transformer with a class token, and a causal text transformer."""

    @dataclass(frozen=True)
    class Config(VisionLanguage.Config):
        """Which model, and with which weights."""

        tag = "clip"

        model: str = "ViT-B-16-quickgelu"
        """open_clip's name (`open_clip.list_models()`), or the path of a model configuration in open_clip's JSON;
        `package:NAME` is one that pgp ships."""
        weights: str = "openai"
        """A tag of `open_clip.list_pretrained()`, `random`, or the path of a checkpoint in open_clip's naming
        (.safetensors, or .pt without pickled code); `package:NAME` is one that pgp ships."""

        def __post_init__(self) -> None:
            for name in ("model", "weights"):  # paths, too, are taken for their names
                object.__setattr__(self, name, os.fspath(getattr(self, name)))

        def build(self, size: int) -> CLIP:
            """Return the frozen encoders for images of `size` pixels a side, with resampled position embeddings."""
            return CLIP(_create(self, size))

        def with_absolute_paths(self) -> CLIP.Config:
            """See `Backbone.Config.located`."""
            model, source = (
                weights.resolve_weights(name) if is_file else name
                for name, is_file in ((self.model, _is_description(self.model)), (self.weights, _is_file(self.weights)))
            )
            return replace(self, model=model, weights=source)

    model: Any

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = _plain(model)
        self._text = getattr(model, "text", model)
        visual = model.visual
        self.width, self.depth = int(visual.class_embedding.shape[0]), len(visual.transformer.resblocks)
        self.heads = int(visual.transformer.resblocks[0].attn.num_heads)
        self.embed_dim, self.text_width = int(visual.proj.shape[1]), int(self._text.token_embedding.embedding_dim)
        self.context_length = int(self._text.positional_embedding.shape[0])
        self.logit_scale = float(model.logit_scale.detach().exp())
        self._tokenizer = _open_clip().SimpleTokenizer(context_length=self.context_length)
        self.freeze()
        _check_towers(self)

    def embed(self, images: Tensor) -> Tensor:
        """See `Backbone.embed`."""
        tokens: Tensor = self.model.visual.ln_pre(self.positioned(images))
        return tokens

    def positioned(self, images: Tensor) -> Tensor:
        """Return CLS and patches with their position embeddings, before the first norm, `(B, N, D)`."""
        visual = self.model.visual
        patches = visual.conv1(check_image_size(images, *visual.image_size)).flatten(2).mT  # (B, N - 1, D)
        cls = visual.class_embedding.to(patches.dtype).expand(len(images), 1, -1)
        positioned: Tensor = torch.cat([cls, patches], dim=1) + visual.positional_embedding.to(patches.dtype)
        return positioned

    def add_position(self, prompts: Tensor) -> Tensor:
        """Return the prompts as they are, without position embedding, as in the published CLIP-PGP."""
        return prompts

    def attention_norm(self, layer: int | None) -> Any:
        """See `Backbone.attention_norm`."""
        visual = self.model.visual
        return visual.ln_pre if layer is None else visual.transformer.resblocks[layer].ln_1

    def forward(
        self,
        images: Tensor,
        prompts: Mapping[int, Tensor] | None = None,
        prefixes: Mapping[int, Tensor] | None = None,
        num_tokens: int | None = None,
    ) -> Tensor:
        """See `Backbone.forward`; takes no prefixes."""
        if prefixes:
            raise ValueError(_NO_PREFIXES)
        x = self.embed(images)  # (B, N, D)
        for layer, block in enumerate(self.model.visual.transformer.resblocks):
            x = block(insert_prompts(x, prompts.get(layer) if prompts else None))
        read_tokens: Tensor = self.model.visual.ln_post(x[:, :num_tokens])
        return read_tokens

    def trace(
        self,
        images: Tensor,
        layers: Collection[int],
        prompts: Mapping[int, Tensor] | None = None,
        prefixes: Mapping[int, Tensor] | None = None,
    ) -> dict[int, Trace]:
        """See `Backbone.trace`; takes no prefixes."""
        if prefixes:
            raise ValueError(_NO_PREFIXES)
        seen = {}
        x, last = self.embed(images), max(layers, default=-1)
        for layer, block in enumerate(self.model.visual.transformer.resblocks[: last + 1]):
            tokens, x = x, insert_prompts(x, prompts.get(layer) if prompts else None)
            if layer in layers:
                P = x.shape[1] - tokens.shape[1]
                q, k = _queries_and_keys(block, x)
                q = drop_prompts(q, P)  # (B, H, N, D/H)
                scores = q @ k.mT / q.shape[-1] ** 0.5
                seen[layer] = Trace(tokens, q, scores.softmax(-1)[..., 1 : 1 + P] if P else None)
            if layer < last:
                x = block(x)
        return seen

    def key_weights(self, layer: int) -> Tensor:
        """See `Backbone.key_weights`."""
        attn, D = _linear(self.model.visual.transformer.resblocks[layer].attn), self.width
        maps: Tensor = attn.in_proj_weight[D : 2 * D].unflatten(0, (self.heads, -1))  # (H, D/H, D)
        return maps

    def make_prefix(self, layer: int, tokens: Tensor) -> Tensor:
        """See `Backbone.make_prefix`; not to be had here."""
        raise ValueError(_NO_PREFIXES)

    def project(self, tokens: Tensor) -> Tensor:
        """See `VisionLanguage.project`."""
        projected: Tensor = tokens @ self.model.visual.proj
        return projected

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """See `VisionLanguage.tokenize`."""
        for text in texts:
            if len(self._tokenizer.encode(text)) > self.context_length - 2:
                raise ValueError(f"expected texts of at most {self.context_length - 2} tokens, got {text!r}")
        tokens: Tensor = self._tokenizer(list(texts))
        return tokens

    def embed_text(self, tokens: Tensor) -> Tensor:
        """See `VisionLanguage.embed_text`."""
        embedded: Tensor = self._text.token_embedding(tokens)
        return embedded

    def encode_text(self, embedded: Tensor, tokens: Tensor) -> Tensor:
        """See `VisionLanguage.encode_text`."""
        x = embedded + self._text.positional_embedding.to(embedded.dtype)
        x = self._text.ln_final(self._text.transformer(x, attn_mask=self._text.attn_mask))
        ends = x[torch.arange(len(x), device=x.device), tokens.argmax(-1)]  # the end token has the largest number
        encoded: Tensor = ends @ self._text.text_projection
        return encoded


def _queries_and_keys(block: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the queries and the keys of all heads of a block, `(B, H, N, D/H)` each."""
    attn, D = _linear(block.attn), x.shape[-1]
    bias = attn.in_proj_bias
    both = F.linear(block.ln_1(x), attn.in_proj_weight[: 2 * D], None if bias is None else bias[: 2 * D])
    q, k = both.unflatten(-1, (2, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)  # 2 x (B, H, N, D/H)
    return q, k


def _linear(attn: Any) -> Any:
    """Return `attn`.

    Raises:     ValueError: If its scores are not plain products of queries and keys.
    """
    if getattr(attn, "scaled_cosine", False) or not isinstance(getattr(attn, "ln_k", nn.Identity()), nn.Identity):
        raise ValueError("expected a model that does not norm its keys for --method.protect affinity, got one that"
                         " does: choose another model, or --method.protect tokens")  # fmt: skip
    return attn


def _plain(model: Any) -> Any:
    """Return `model`.

    Raises:     ValueError: If this file does not know its towers.
    """
    visual: Any = getattr(model, "visual", None)
    text: Any = getattr(model, "text", model)
    blocks = getattr(getattr(visual, "transformer", None), "resblocks", None)
    pooled = getattr(visual, "pool_type", "tok") != "tok" or getattr(visual, "attn_pool", None) is not None
    known = blocks and hasattr(getattr(blocks[0], "attn", None), "num_heads")
    if not known or pooled or not all(_has(visual, name) for name in ("class_embedding", "proj", "ln_pre")):
        raise ValueError(f"expected a plain vision transformer with a class token in CLIP's place for images, got"
                         f" {type(visual).__name__}: choose a ViT-* model of open_clip")  # fmt: skip
    pooling = getattr(text, "text_pool_type", getattr(text, "pool_type", "argmax"))
    parts = ("transformer", "token_embedding", "positional_embedding", "ln_final", "text_projection", "attn_mask")
    if pooling != "argmax" or not all(_has(text, name) for name in parts):
        raise ValueError(f"expected CLIP's own text transformer, read at the end token, got {type(text).__name__}"
                         f" read at {pooling!r}: choose another model of open_clip")  # fmt: skip
    words = getattr(text.token_embedding, "num_embeddings", 0)
    if words != _VOCABULARY:
        raise ValueError(f"expected CLIP's own vocabulary of {_VOCABULARY} tokens, got {words}: choose another model of"
                         " open_clip")  # fmt: skip
    for tower in (visual.transformer, text.transformer):
        if not getattr(tower, "batch_first", False):
            raise ValueError("expected transformers that take the batch first: update open_clip_torch to 2.26 or newer")
    return model


@torch.no_grad()
def _check_towers(clip: CLIP) -> None:
    """Raise unless open_clip's own passes, cut to the first block of each tower, give what this file's give."""
    model, visual = clip.model, clip.model.visual
    pixels = 3 * visual.image_size[0] * visual.image_size[1]
    image = torch.arange(pixels, device=visual.proj.device).sin().view(1, 3, *visual.image_size).to(visual.proj.dtype)
    tokens = clip.tokenize(["a"]).to(visual.proj.device)
    towers = (visual.transformer, clip._text.transformer)
    whole = [tower.resblocks for tower in towers]
    try:
        for tower, blocks in zip(towers, whole, strict=True):
            tower.resblocks = blocks[:1]
        pairs = {
            "images": (clip.project(clip.encode(image)), model.encode_image(image)),
            "texts": (clip.encode_text(clip.embed_text(tokens), tokens), model.encode_text(tokens)),
        }
        for what, (ours, expected) in pairs.items():
            error, size = float((ours - expected).abs().max()), float(expected.abs().max())
            if not error <= torch.finfo(expected.dtype).eps ** 0.5 * size:
                raise ValueError(f"its features of {what} differ from open_clip's by {error:.2g}, where the largest is"
                                 f" {size:.2g}")  # fmt: skip
    except (AttributeError, TypeError, ValueError, RuntimeError, IndexError) as error:
        raise ValueError(f"expected CLIP's own towers, got {type(visual).__name__} and {type(clip._text).__name__}"
                         f" ({error}): choose another model of open_clip") from error  # fmt: skip
    finally:
        for tower, blocks in zip(towers, whole, strict=True):
            tower.resblocks = blocks


def _has(module: Any, name: str) -> bool:
    return isinstance(getattr(module, name, None), Tensor | nn.Module)


_NO_PREFIXES = "expected a method without prefixes: a CLIP encoder takes prompts only; choose --backbone vit"
_VOCABULARY = 49408
"""Tokens of CLIP's byte-pair encoding."""


def _open_clip() -> Any:
    """Import the library, which is an optional extra."""
    try:
        import open_clip
    except ImportError as error:
        extra = "pip install 'prompt-gradient-projection[clip]'"
        raise ValueError(f"CLIP needs open_clip, which is not installed: {extra}") from error
    return open_clip


def _create(config: CLIP.Config, size: int) -> Any:
    open_clip = _open_clip()
    own = _is_description(config.model)
    if not own and config.model not in open_clip.list_models():
        near = difflib.get_close_matches(config.model, open_clip.list_models(), n=3)
        raise ValueError(f"unknown open_clip model {config.model!r}" + (f"; perhaps you meant {near}" if near else ""))
    tag = None if config.weights == "random" or _is_file(config.weights) else config.weights
    if tag is not None and (own or tag not in open_clip.list_pretrained_tags_by_model(config.model)):
        tags = [] if own else open_clip.list_pretrained_tags_by_model(config.model)
        raise ValueError(f"no weights {tag!r} for {config.model}: expected one of {tags}, 'random', or the path of a"
                         " .safetensors or .pt file")  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # `random` weights are the same every time
        try:
            if own:
                description = weights.read_json(weights.packaged_weights(config.model))
                description["vision_cfg"]["image_size"] = size
                model: Any = open_clip.CLIP(**description)
            else:
                with weights.hub_quiet():
                    model = open_clip.create_model(
                        config.model, pretrained=tag, force_image_size=size, load_weights=bool(tag)
                    )
        except weights.WeightsError:
            raise
        except Exception as error:  # open_clip raises almost anything of models, weights and networks
            said = weights.first_line(error)
            if tag is None or isinstance(error, (TypeError, AssertionError, ArithmeticError, LookupError)):
                said = repr(error) if isinstance(error, LookupError) else said
                raise ValueError(f"open_clip cannot make {config.model} at {size} px: {said}") from error
            raise ValueError(f"no weights {tag} for {config.model}: {said}. Offline, download the"
                             " checkpoint elsewhere and name the file: --backbone.weights PATH") from error  # fmt: skip
    side = int(_plain(model).visual.patch_size[0])
    if size < side:
        raise ValueError(f"expected an image size of at least the patch size {side}, got {size}")
    if _is_file(config.weights):
        _load(model, weights.packaged_weights(config.weights))
    return model


def _is_description(model: str) -> bool:
    return model.endswith(".json")


def _is_file(weights: str) -> bool:
    return weights.startswith("package:") or weights.endswith((".safetensors", ".pt", ".pth", ".bin"))


def _load(model: Any, path: Path) -> None:
    """Fill `model` with a checkpoint; rows of the token embedding that it leaves out keep their initial values."""
    state = {name.removeprefix("module."): tensor for name, tensor in weights.read(path).items()}
    with weights.reading(path):  # what is found may have any shape
        if "token_embedding.ids" in state:
            whole = model.token_embedding.weight.detach().clone()
            whole[state.pop("token_embedding.ids").long()] = state.pop("token_embedding.rows")
            state["token_embedding.weight"] = whole
        if "visual.positional_embedding" in state:
            _open_clip().model.resize_pos_embed(state, model)
    weights.fill(model, state, path)
