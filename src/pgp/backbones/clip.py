"""CLIP encoders of open_clip, with prompts inserted between the library's own modules.

Any model of open_clip with a plain vision transformer and CLIP's own text transformer can be used.
"""

from __future__ import annotations

import difflib
import functools
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pgp.backbones import weights
from pgp.backbones.base import (
    Adapted,
    Place,
    Trace,
    VisionLanguage,
    by_name,
    check_image_size,
    drop_prompts,
    insert_prompts,
)
from pgp.backbones.weights import EncoderSource


class CLIP(VisionLanguage):
    """A frozen open_clip model: a vision transformer with a class token, and a causal text transformer."""

    @dataclass(frozen=True)
    class Config(VisionLanguage.Config):
        """Model and weights of a CLIP encoder."""

        tag = "clip"

        model: str = "ViT-B-16-quickgelu"
        """Model name of open_clip (`open_clip.list_models()`), or the path of a JSON file with a model configuration of
        open_clip; `package:NAME` is a file that pgp ships."""
        weights: str = "openai"
        """Tag of pretrained weights (`open_clip.list_pretrained()`), `random`, or the path of a checkpoint with
        open_clip's parameter names (.safetensors, or .pt without pickled code); `package:NAME` is a file that pgp
        ships."""

        def __post_init__(self) -> None:
            for name in ("model", "weights"):  # a Path is accepted too
                object.__setattr__(self, name, os.fspath(getattr(self, name)))

        def build(self, size: int) -> CLIP:
            """Return the frozen encoders for images of `size` x `size` pixels; position embeddings are resampled."""
            return CLIP(_create(self, size))

        def with_absolute_paths(self) -> CLIP.Config:
            """See `Backbone.Config.with_absolute_paths`."""
            model = weights.resolve_weights(self.model) if _is_model_file(self.model) else self.model
            source = weights.resolve_weights(self.weights) if _is_weights_file(self.weights) else self.weights
            return replace(self, model=model, weights=source)

        @property
        def local_files(self) -> tuple[str, ...]:
            """See `Backbone.Config.local_files`."""
            files = [self.model] if _is_model_file(self.model) else []
            files += [self.weights] if _is_weights_file(self.weights) else []
            return tuple(file for file in files if not weights.is_packaged(file))

        def source(self) -> EncoderSource:
            """See `Backbone.Config.source`."""
            if weights.is_packaged(self.weights):
                return weights.PACKAGED
            published = _open_clip().pretrained.get_pretrained_cfg(self.model, self.weights)
            return EncoderSource(published.get("hf_hub", "").rstrip("/") or None)

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
        cls = visual.class_embedding.to(patches.dtype).expand(images.shape[0], 1, -1)  # (B, 1, D)
        positioned: Tensor = torch.cat([cls, patches], dim=1) + visual.positional_embedding.to(patches.dtype)
        return positioned  # (B, N, D)

    def add_position(self, prompts: Tensor) -> Tensor:
        """Return the prompts unchanged: as in the published CLIP-PGP, they have no position embedding."""
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
        adapted: Adapted | None = None,
    ) -> Tensor:
        """See `Backbone.forward`. Prefixes are not supported."""
        if prefixes:
            raise ValueError(_NO_PREFIXES)
        self.check_layers(prompts or ())
        x = self.embed(images)  # (B, N, D)
        for layer, block in enumerate(self.model.visual.transformer.resblocks):
            x, functions = insert_prompts(x, prompts.get(layer) if prompts else None), by_name(adapted, layer)
            if functions:
                x = self.block_function(_block)(block, x, functions)
            else:
                x = self.block_function(_plain_block)(block, x)
        tokens: Tensor = self.model.visual.ln_post(x[:, :num_tokens])  # (B, num_tokens, D)
        return tokens

    @property
    def _final_norm(self) -> Any:
        return self.model.visual.ln_post

    def _traced_pass(
        self,
        images: Tensor,
        layers: Collection[int],
        prompts: Mapping[int, Tensor] | None,
        prefixes: Mapping[int, Tensor] | None,
        end: int,
    ) -> tuple[Tensor, dict[int, Trace]]:
        """Return the tokens after `end` blocks, and traces of `layers`."""
        if prefixes:
            raise ValueError(_NO_PREFIXES)
        self.check_layers({*layers, *(prompts or ())})
        traces = {}
        x = self.embed(images)
        for layer, block in enumerate(self.model.visual.transformer.resblocks[: max(end, max(layers, default=-1) + 1)]):
            tokens, x = x, insert_prompts(x, prompts.get(layer) if prompts else None)
            if layer in layers:
                P = x.shape[1] - tokens.shape[1]
                q, k = _queries_and_keys(block, x)
                q = drop_prompts(q, P)  # (B, H, N, D/H)
                weights = functools.partial(_attention_weights, q, k, slice(1, 1 + P))
                traces[layer] = Trace(tokens, q, weights if P else None)
            if layer < end:
                x = block(x)
        return x, traces

    def key_weights(self, layer: int) -> Tensor:
        """See `Backbone.key_weights`."""
        attn, D = _linear_attention(self.model.visual.transformer.resblocks[layer].attn), self.width
        maps: Tensor = attn.in_proj_weight[D : 2 * D].unflatten(0, (self.heads, -1))  # (H, D/H, D)
        return maps

    def linear_map(self, place: Place) -> tuple[Tensor, Tensor | None]:
        """See `Backbone.linear_map`."""
        block, name = self.model.visual.transformer.resblocks[place.layer], place.name
        if type(block.attn) is not nn.MultiheadAttention or not hasattr(block.mlp, "c_proj"):
            raise ValueError(f"expected plain attention and a plain MLP in the image encoder, got"
                             f" {type(block.attn).__name__} and {type(block.mlp).__name__}: choose another model, or"
                             " another method")  # fmt: skip
        if name in _QKV:
            return _qkv(block.attn, name)
        module = block.attn.out_proj if name == "proj" else block.mlp.c_fc if name == "fc1" else block.mlp.c_proj
        return module.weight, module.bias

    def make_prefix(self, layer: int, tokens: Tensor) -> Tensor:
        """Raise a ValueError: prefixes are not supported."""
        raise ValueError(_NO_PREFIXES)

    def project(self, tokens: Tensor) -> Tensor:
        """See `VisionLanguage.project`."""
        projected: Tensor = tokens @ self.model.visual.proj
        return projected

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """See `VisionLanguage.tokenize`."""
        tokenizer = _tokenizer()
        for text in texts:
            if len(tokenizer.encode(text)) > self.context_length - 2:
                raise ValueError(f"expected texts of at most {self.context_length - 2} tokens, got {text!r}")
        tokens: Tensor = tokenizer(list(texts), self.context_length)
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


_QKV = ("q", "k", "v")
_IDENTITY = nn.Identity()


def _qkv(attn: Any, name: str) -> tuple[Tensor, Tensor | None]:
    """Return the rows of the joint weight `(D, D)` and bias `(D,)` for queries, keys or values."""
    D, bias = attn.embed_dim, attn.in_proj_bias
    rows = slice(_QKV.index(name) * D, (_QKV.index(name) + 1) * D)
    return attn.in_proj_weight[rows], None if bias is None else bias[rows]


def _plain_block(block: Any, x: Tensor) -> Tensor:
    """Return the output of a block for tokens `(B, N, D)`, as open_clip computes it."""
    out: Tensor = block(x)
    return out


def _block(block: Any, x: Tensor, functions: Mapping[str, Callable[[Tensor], Tensor]]) -> Tensor:
    """Return the output of a block for tokens `(B, N, D)`, with these functions at some places; see `Adapted`."""
    attn, normed = block.attn, block.ln_1(x)
    q, k, v = (
        (functions[name](normed) if name in functions else F.linear(normed, *_qkv(attn, name)))
        .unflatten(-1, (attn.num_heads, -1))
        .transpose(1, 2)
        for name in _QKV
    )  # (B, H, N, D/H) each
    heads = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # (B, N, D)
    attended = functions.get("proj", attn.out_proj)(heads)
    x = x + functions.get("attn", _IDENTITY)(block.ls_1(attended))
    hidden = block.mlp.gelu(functions.get("fc1", block.mlp.c_fc)(block.ln_2(x)))
    out: Tensor = x + functions.get("mlp", _IDENTITY)(block.ls_2(functions.get("fc2", block.mlp.c_proj)(hidden)))
    return out


def _queries_and_keys(block: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the queries and the keys of all attention heads of a block, `(B, H, N, D/H)` each."""
    attn, D = _linear_attention(block.attn), x.shape[-1]
    bias = attn.in_proj_bias
    qk = F.linear(block.ln_1(x), attn.in_proj_weight[: 2 * D], None if bias is None else bias[: 2 * D])  # (B, N, 2 * D)
    q, k = qk.unflatten(-1, (2, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)  # 2 x (B, H, N, D/H)
    return q, k


def _attention_weights(q: Tensor, k: Tensor, keys: slice) -> Tensor:
    """Return the attention weights of all queries on some of the keys, `(B, H, N, number of keys)`."""
    scores: Tensor = q @ k.mT / q.shape[-1] ** 0.5
    return scores.softmax(-1)[..., keys]


def _linear_attention(attn: Any) -> Any:
    """Return `attn` if its scores are plain inner products of queries and keys.

    Raises:
        ValueError: If it normalises its keys.
    """
    if getattr(attn, "scaled_cosine", False) or not isinstance(getattr(attn, "ln_k", nn.Identity()), nn.Identity):
        raise ValueError("expected a model that does not norm its keys for --method.protect affinity, got one that"
                         " does: choose another model, or --method.protect tokens")  # fmt: skip
    return attn


def _plain(model: Any) -> Any:
    """Return `model` if this file supports its image and text transformers.

    Raises:
        ValueError: If it does not.
    """
    visual: Any = getattr(model, "visual", None)
    text: Any = getattr(model, "text", model)
    blocks = getattr(getattr(visual, "transformer", None), "resblocks", None)
    pooled = getattr(visual, "pool_type", "tok") != "tok" or getattr(visual, "attn_pool", None) is not None
    transformer = blocks and hasattr(getattr(blocks[0], "attn", None), "num_heads")
    if not transformer or pooled or not all(_has(visual, name) for name in ("class_embedding", "proj", "ln_pre")):
        raise ValueError(f"expected a plain vision transformer with a class token as CLIP's image encoder, got"
                         f" {type(visual).__name__}: choose a ViT-* model of open_clip")  # fmt: skip
    pooling = getattr(text, "text_pool_type", getattr(text, "pool_type", "argmax"))
    modules = ("transformer", "token_embedding", "positional_embedding", "ln_final", "text_projection", "attn_mask")
    if pooling != "argmax" or not all(_has(text, name) for name in modules):
        raise ValueError(f"expected CLIP's own text transformer with features from the end token (argmax), got"
                         f" {type(text).__name__} with {pooling!r}: choose another model of open_clip")  # fmt: skip
    vocabulary = getattr(text.token_embedding, "num_embeddings", 0)
    if vocabulary != _VOCABULARY:
        raise ValueError(f"expected CLIP's own vocabulary of {_VOCABULARY} tokens, got {vocabulary}: choose another"
                         " model of open_clip")  # fmt: skip
    for tower in (visual.transformer, text.transformer):
        if not getattr(tower, "batch_first", False):
            raise ValueError("expected transformers with the batch as first axis, got others: update open_clip_torch to"
                             " 2.26 or newer")  # fmt: skip
    return model


@torch.no_grad()
def _check_towers(clip: CLIP) -> None:
    """Raise if this file computes other features than open_clip, with the first block of each transformer only."""
    model, visual = clip.model, clip.model.visual
    pixels = 3 * visual.image_size[0] * visual.image_size[1]
    image = torch.arange(pixels, device=visual.proj.device).sin().view(1, 3, *visual.image_size).to(visual.proj.dtype)
    tokens = clip.tokenize(["a"]).to(visual.proj.device)
    transformers = (visual.transformer, clip._text.transformer)
    all_blocks = [transformer.resblocks for transformer in transformers]
    try:
        for transformer, blocks in zip(transformers, all_blocks, strict=True):
            transformer.resblocks = blocks[:1]
        pairs = {
            "images": (clip.project(clip.encode(image)), model.encode_image(image)),
            "texts": (clip.encode_text(clip.embed_text(tokens), tokens), model.encode_text(tokens)),
        }
        for what, (ours, expected) in pairs.items():
            error, size = float((ours - expected).abs().max()), float(expected.abs().max())
            if not error <= torch.finfo(expected.dtype).eps ** 0.5 * size:
                raise ValueError(f"its features of {what} differ from open_clip's by {error:.2g}, and the largest is"
                                 f" {size:.2g}")  # fmt: skip
    except (AttributeError, TypeError, ValueError, RuntimeError, IndexError) as error:
        raise ValueError(f"expected CLIP's own encoders, got {type(visual).__name__} and {type(clip._text).__name__}"
                         f" ({error}): choose another model of open_clip") from error  # fmt: skip
    finally:
        for transformer, blocks in zip(transformers, all_blocks, strict=True):
            transformer.resblocks = blocks


def _has(module: Any, name: str) -> bool:
    return isinstance(getattr(module, name, None), Tensor | nn.Module)


_NO_PREFIXES = "expected a method without prefixes: a CLIP encoder takes prompts only; choose --backbone vit"
_VOCABULARY = 49408
"""Number of tokens of CLIP's byte-pair encoding."""


@functools.cache
def _tokenizer() -> Any:
    """Return CLIP's tokenizer, whose vocabulary takes 0.2 seconds to read."""
    return _open_clip().SimpleTokenizer()


def _open_clip() -> Any:
    """Import and return open_clip, an optional dependency.

    Raises:
        ValueError: If it is not installed.
    """
    try:
        import open_clip
    except ImportError as error:
        extra = "pip install 'prompt-gradient-projection[clip]'"
        raise ValueError(f"CLIP needs open_clip, which is not installed: {extra}") from error
    return open_clip


def _create(config: CLIP.Config, size: int) -> Any:
    """Create the open_clip model for images of `size` x `size` pixels, with its weights."""
    open_clip = _open_clip()
    from_file = _is_model_file(config.model)
    if not from_file and config.model not in open_clip.list_models():
        near = difflib.get_close_matches(config.model, open_clip.list_models(), n=3)
        raise ValueError(f"unknown open_clip model {config.model!r}" + (f"; perhaps you meant {near}" if near else ""))
    tag = None if config.weights == "random" or _is_weights_file(config.weights) else config.weights
    if tag is not None and (from_file or tag not in open_clip.list_pretrained_tags_by_model(config.model)):
        tags = [] if from_file else open_clip.list_pretrained_tags_by_model(config.model)
        raise ValueError(f"no weights {tag!r} for {config.model}: expected one of {tags}, 'random', or the path of a"
                         " .safetensors or .pt file")  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # `random` weights are the same every time
        try:
            if from_file:
                model_config = weights.read_json(weights.packaged_weights(config.model))
                model_config["vision_cfg"]["image_size"] = size
                model: Any = open_clip.CLIP(**model_config)
            else:
                with weights.hub_quiet():
                    model = open_clip.create_model(
                        config.model, pretrained=tag, force_image_size=size, load_weights=bool(tag)
                    )
        except weights.WeightsError:
            raise
        except Exception as error:  # open_clip raises errors of many types for models, weights and networks
            reason = weights.first_line(error)
            if tag is None or isinstance(error, (TypeError, AssertionError, ArithmeticError, LookupError)):
                reason = repr(error) if isinstance(error, LookupError) else reason
                raise ValueError(f"open_clip cannot make {config.model} at {size} px: {reason}") from error
            raise ValueError(f"no weights {tag} for {config.model}: {reason}. Offline, download the"
                             " checkpoint elsewhere and name the file: --backbone.weights PATH") from error  # fmt: skip
    patch_size = int(_plain(model).visual.patch_size[0])
    if size % patch_size:
        raise ValueError(f"expected an image size that is a multiple of the patch size {patch_size}, got {size}")
    if _is_weights_file(config.weights):
        _load(model, weights.packaged_weights(config.weights))
    return model


def _is_model_file(model: str) -> bool:
    return model.endswith(".json")


def _is_weights_file(name: str) -> bool:
    return name.startswith("package:") or name.endswith((".safetensors", ".pt", ".pth", ".bin"))


def _load(model: Any, path: Path) -> None:
    """Load a checkpoint into `model`; rows of the token embedding that it leaves out keep their initial values."""
    state = {name.removeprefix("module."): tensor for name, tensor in weights.read(path).items()}
    with weights.reading(path):  # tensors of the file may have any shape
        if "token_embedding.ids" in state:
            embedding = model.token_embedding.weight.detach().clone()
            embedding[state.pop("token_embedding.ids").long()] = state.pop("token_embedding.rows")
            state["token_embedding.weight"] = embedding
        if "visual.positional_embedding" in state:
            _open_clip().model.resize_pos_embed(state, model)
    weights.fill(model, state, path)
