"""Vision transformers of timm, with prompts and prefixes inserted between the library's own modules.

Any plain `VisionTransformer` of timm with a class token can be used.
"""

from __future__ import annotations

import copy
import difflib
import functools
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.layers import Mlp
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from pgp.backbones import weights
from pgp.backbones.base import (
    Adapted,
    Backbone,
    Place,
    Trace,
    by_name,
    check_image_size,
    drop_prompts,
    insert_prompts,
)
from pgp.backbones.weights import EncoderSource


class ViT(Backbone):
    """A frozen timm `VisionTransformer` with a class token."""

    @dataclass(frozen=True)
    class Config(Backbone.Config):
        """Model and weights of a vision transformer."""

        tag = "vit"

        model: str = "vit_base_patch16_224.orig_in21k"
        """Model name of timm with its full tag (`timm.list_models(pretrained=True)`). A name without tag stands for
        other weights in other versions of timm, so it is refused with `weights` `hub`."""
        weights: str = "hub"
        """`hub` for the tag's published weights, `random` for none, or the path of a checkpoint in timm's naming
        (.safetensors, or .pth without pickled code); `package:NAME` is a file that pgp ships."""
        arguments: dict[str, int] = field(default_factory=dict)
        """More arguments of `timm.create_model`, such as `embed_dim` or `depth` for an encoder of your own."""

        def __post_init__(self) -> None:
            object.__setattr__(self, "weights", os.fspath(self.weights))  # a Path is accepted too

        def build(self, size: int) -> ViT:
            """Return the frozen encoder for images of `size` x `size` pixels; position embeddings are resampled."""
            return ViT(_create(self, size))

        def with_absolute_paths(self) -> ViT.Config:
            """See `Backbone.Config.with_absolute_paths`."""
            if self.weights in ("hub", "random"):
                return self
            return replace(self, weights=weights.resolve_weights(self.weights))

        @property
        def local_files(self) -> tuple[str, ...]:
            """See `Backbone.Config.local_files`."""
            provided = self.weights in ("hub", "random") or weights.is_packaged(self.weights)
            return () if provided else (self.weights,)

        def source(self) -> EncoderSource:
            """See `Backbone.Config.source`."""
            if self.weights != "hub":
                return weights.PACKAGED if weights.is_packaged(self.weights) else EncoderSource()
            published = timm.get_pretrained_cfg(self.model)
            return EncoderSource(published.hf_hub_id, published.license) if published else EncoderSource()

    vit: Any

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.vit = _plain(model)
        self.freeze()
        _check_blocks(model)
        self.width, self.depth, self.first_patch = model.embed_dim, len(model.blocks), model.num_prefix_tokens
        self.heads = int(model.blocks[0].attn.num_heads)

    def patches(self, images: Tensor) -> Tensor:
        """Return patch tokens without position embedding and without CLS, `(B, N', D)`."""
        tokens: Tensor = self.vit.patch_embed(check_image_size(images, *self.vit.patch_embed.img_size))
        return tokens

    def embed(self, images: Tensor) -> Tensor:
        """See `Backbone.embed`."""
        tokens: Tensor = self.vit.norm_pre(self.vit._pos_embed(self.patches(images)))
        return tokens

    def add_position(self, prompts: Tensor) -> Tensor:
        """Add the position embedding of CLS to prompts `(..., P, D)`, as in the published L2P."""
        if self.vit.pos_embed is not None and not self.vit.no_embed_class:
            prompts = prompts + self.vit.pos_embed[0, :1]
        return prompts

    def attention_norm(self, layer: int | None) -> Any:
        """See `Backbone.attention_norm`."""
        return self.vit.norm_pre if layer is None else self.vit.blocks[layer].norm1

    def forward(
        self,
        images: Tensor,
        prompts: Mapping[int, Tensor] | None = None,
        prefixes: Mapping[int, Tensor] | None = None,
        num_tokens: int | None = None,
        adapted: Adapted | None = None,
    ) -> Tensor:
        """See `Backbone.forward`."""
        self.check_layers({*(prompts or ()), *(prefixes or ())})
        x = self.embed(images)  # (B, N, D)
        for layer, block in enumerate(self.vit.blocks):
            x = insert_prompts(x, prompts.get(layer) if prompts else None)
            prefix, functions = prefixes.get(layer) if prefixes else None, by_name(adapted, layer)
            needed = num_tokens if num_tokens is not None and layer == self.depth - 1 else x.shape[1]
            is_plain = prefix is None and needed == x.shape[1] and not functions
            if is_plain:
                x = self.block_function(_plain_block)(block, x)
            else:
                x = self.block_function(_block)(block, x, needed, prefix, functions)
        tokens: Tensor = self.vit.norm(x)
        return tokens

    @property
    def _final_norm(self) -> Any:
        return self.vit.norm

    def _traced_pass(
        self,
        images: Tensor,
        layers: Collection[int],
        prompts: Mapping[int, Tensor] | None,
        prefixes: Mapping[int, Tensor] | None,
        end: int,
    ) -> tuple[Tensor, dict[int, Trace]]:
        """Return the tokens after `end` blocks, of which the last one computes only CLS, and traces of `layers`."""
        self.check_layers({*layers, *(prompts or ()), *(prefixes or ())})
        traces = {}
        x = self.embed(images)
        for layer, block in enumerate(self.vit.blocks[: max(end, max(layers, default=-1) + 1)]):
            tokens, x = x, insert_prompts(x, prompts.get(layer) if prompts else None)
            prefix = prefixes.get(layer) if prefixes else None
            q, k, v = _heads(block, x, x.shape[1], prefix, {})
            if layer in layers:
                P = x.shape[1] - tokens.shape[1]
                image_q = drop_prompts(q, P)  # (B, H, N, D/H)
                prompt_keys = slice(1, 1 + P) if prefix is None else slice(prefix.shape[3])
                weights = functools.partial(_attention_weights, block.attn, image_q, k, prompt_keys)
                traces[layer] = Trace(tokens, image_q, weights if P or prefix is not None else None)
            if layer < end:
                needed = 1 if layer == self.depth - 1 else x.shape[1]
                x = _attend(block, x[:, :needed], q[:, :, :needed], k, v, {})
        return x, traces

    def make_prefix(self, layer: int, tokens: Tensor) -> Tensor:
        """See `Backbone.make_prefix`."""
        k, v = _keys_and_values(self.vit.blocks[layer].attn, tokens.unsqueeze(0))
        return torch.cat([k, v])  # (2, H, L, D/H)

    def key_weights(self, layer: int) -> Tensor:
        """See `Backbone.key_weights`."""
        attn, D = self.vit.blocks[layer].attn, self.width
        if not isinstance(attn.k_norm, nn.Identity):
            raise ValueError("expected a model that does not norm its keys for --method.protect affinity, got one that"
                             " does: choose another model, or --method.protect tokens")  # fmt: skip
        maps: Tensor = attn.qkv.weight[D : 2 * D].unflatten(0, (self.heads, -1))  # (H, D/H, D)
        return maps

    def linear_map(self, place: Place) -> tuple[Tensor, Tensor | None]:
        """See `Backbone.linear_map`."""
        block, name = self.vit.blocks[place.layer], place.name
        if name in _QKV:
            return _qkv(block.attn, name)
        module: Any = block.attn.proj if name == "proj" else getattr(block.mlp, name, None)
        has_gate = type(block.mlp) is not Mlp and name in ("fc1", "fc2")
        if not isinstance(module, nn.Linear) or has_gate:
            raise ValueError(f"expected a model whose MLP is two linear layers, for the place {name}, got one with"
                             f" {type(block.mlp).__name__}: choose other places, or another model")  # fmt: skip
        return module.weight, module.bias


Functions = Mapping[str, Callable[[Tensor], Tensor]]
"""Functions to use in a block, by the name of their place; see `pgp.backbones.base.Adapted`."""

_QKV = ("q", "k", "v")
_IDENTITY = nn.Identity()


def _block(block: Any, x: Tensor, num_tokens: int, prefix: Tensor | None, functions: Functions) -> Tensor:
    """Return the output of a timm block for its first `num_tokens` tokens, with a prefix in its attention if given."""
    return _attend(block, x[:, :num_tokens], *_heads(block, x, num_tokens, prefix, functions), functions)


def _plain_block(block: Any, x: Tensor) -> Tensor:
    """Return the output of a timm block for all tokens, as timm computes it."""
    out: Tensor = block(x)
    return out


def _heads(
    block: Any, x: Tensor, num_tokens: int, prefix: Tensor | None, functions: Functions
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the queries of the first `num_tokens` tokens, and the keys and values of the prefix and all tokens.

    The queries are `(B, H, num_tokens, D/H)`, keys and values `(B, H, L + N, D/H)`.
    """
    attn, x = block.attn, block.norm1(x)
    q = attn.q_norm(_project(attn, "q", x[:, :num_tokens], functions))  # (B, H, num_tokens, D/H)
    if "k" in functions or "v" in functions:
        k, v = attn.k_norm(_project(attn, "k", x, functions)), _project(attn, "v", x, functions)
    else:
        k, v = _keys_and_values(attn, x)
    if prefix is not None:
        expected = (k.shape[0], 2, k.shape[1], k.shape[3])
        if prefix.dim() != 5 or (*prefix.shape[:3], prefix.shape[4]) != expected:
            raise ValueError(
                f"expected a prefix ({k.shape[0]}, 2, {k.shape[1]}, L, {k.shape[3]}), got {tuple(prefix.shape)}"
            )
        k = torch.cat([prefix[:, 0], k], dim=2)  # (B, H, L + N, D/H)
        v = torch.cat([prefix[:, 1], v], dim=2)
    return q, k, v


def _qkv(attn: Any, name: str) -> tuple[Tensor, Tensor | None]:
    """Return the rows of the joint weight `(D, D)` and bias `(D,)` for queries, keys or values."""
    D = attn.qkv.in_features
    rows = slice(_QKV.index(name) * D, (_QKV.index(name) + 1) * D)
    return attn.qkv.weight[rows], None if attn.qkv.bias is None else attn.qkv.bias[rows]


def _project(attn: Any, name: str, x: Tensor, functions: Functions) -> Tensor:
    """Return the queries, keys or values of normed tokens `(B, N, D)`, without their own norm, `(B, H, N, D/H)`."""
    rows = functions[name](x) if name in functions else F.linear(x, *_qkv(attn, name))  # (B, N, D)
    heads: Tensor = rows.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2)
    return heads


def _keys_and_values(attn: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the keys and the values of normed tokens `(B, N, D)`, `(B, H, N, D/H)` each."""
    weight, bias, D = attn.qkv.weight, attn.qkv.bias, attn.qkv.in_features
    kv = F.linear(x, weight[D:], None if bias is None else bias[D:])
    k, v = kv.unflatten(-1, (2, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)  # 2 x (B, H, N, D/H)
    return attn.k_norm(k), v


def _attend(block: Any, x: Tensor, q: Tensor, k: Tensor, v: Tensor, functions: Functions) -> Tensor:
    """Return the output of a block for `x (B, num_tokens, D)` with these queries, keys and values."""
    attn = block.attn
    heads = F.scaled_dot_product_attention(q, k, v, scale=attn.scale)  # (B, H, num_tokens, D/H)
    attended = block.ls1(functions.get("proj", attn.proj)(heads.transpose(1, 2).flatten(2)))  # (B, num_tokens, D)
    x = x + functions.get("attn", _IDENTITY)(attended)
    out: Tensor = x + functions.get("mlp", _IDENTITY)(block.ls2(_mlp(block.mlp, block.norm2(x), functions)))
    return out


def _mlp(mlp: Any, x: Tensor, functions: Functions) -> Tensor:
    """Return the output of a block's MLP for normed tokens `(B, N, D)`."""
    if "fc1" in functions or "fc2" in functions:
        out: Tensor = functions.get("fc2", mlp.fc2)(mlp.norm(mlp.act(functions.get("fc1", mlp.fc1)(x))))
    else:
        out = mlp(x)
    return out


def _attention_weights(attn: Any, q: Tensor, k: Tensor, keys: slice) -> Tensor:
    """Return the attention weights of all queries on some of the keys, `(B, H, N, number of keys)`."""
    scores: Tensor = q @ k.mT * attn.scale
    return scores.softmax(-1)[..., keys]


def _plain(model: Any) -> Any:
    """Return `model` if it is a vision transformer that this file supports.

    Raises:
        ValueError: If it is not.
    """
    name = type(model).__name__
    if type(model) is not VisionTransformer:
        raise ValueError(f"expected a plain timm VisionTransformer, got {name}: choose a vit_*, deit_* or *dinov2* tag")
    if not len(model.blocks):
        raise ValueError("expected a vision transformer with blocks, got one without")
    if not model.has_class_token:
        raise ValueError("expected a vision transformer with a class token (it is the query), got one without")
    if isinstance(model.norm, nn.Identity):
        pooled = model.global_pool != "token"
        other = f"that averages patches ({model.global_pool!r})" if pooled else "without a final norm"
        raise ValueError(f"expected a vision transformer whose features are its class token after a final norm, got one"
                         f" {other}: choose another tag")  # fmt: skip
    for block in model.blocks:
        attn = getattr(block, "attn", None)
        if getattr(attn, "gate", None) not in (None, False):
            raise ValueError(
                f"expected attention without a gate, got {type(attn).__name__} with one: choose another tag"
            )
        if not isinstance(getattr(attn, "norm", nn.Identity()), nn.Identity):
            raise ValueError(f"expected attention whose output is not normed, got {type(attn).__name__} with a norm:"
                             " choose another tag")  # fmt: skip
    return model


@torch.no_grad()
def _check_blocks(model: Any) -> None:
    """Raise if this file computes other outputs than a block of `model`; blocks of one kind are checked once."""
    width = int(model.embed_dim)
    tokens = 0.01 * torch.arange(4 * width, dtype=torch.float64).sin().view(1, 4, width)
    for block in {_kind(block): block for block in model.blocks}.values():
        exact = copy.deepcopy(block).to(tokens)  # on the CPU, and in float64
        expected = exact(tokens)
        try:
            error = float((_block(exact, tokens, 4, None, {}) - expected).abs().max())
        except (AttributeError, TypeError, ValueError, RuntimeError) as reason:  # it is made of other parts
            raise ValueError(
                f"{_unsupported(block)}, whose modules pgp does not support ({reason}): choose another tag"
            ) from reason
        if not expected.isfinite().all():
            raise ValueError("expected weights that are finite numbers, got a model whose outputs are NaN or infinite:"
                             " its weights are damaged, choose others")  # fmt: skip
        bound = 1e-6 * float((expected - tokens).abs().max())  # relative to what the block adds to its input
        if not error <= bound:
            raise ValueError(f"{_unsupported(block)}, whose outputs differ from those by {error:.2g} (more than"
                             f" {bound:.2g}): choose another tag")  # fmt: skip


def _unsupported(block: Any) -> str:
    """Return the beginning of the message for a block that this file does not support."""
    attn = f" with {type(block.attn).__name__}" if hasattr(block, "attn") else ""
    return f"expected plain pre-norm blocks with joint qkv, got {type(block).__name__}{attn}"


def _kind(block: nn.Module) -> str:
    """Return a text that is the same for two blocks that differ only in their weights."""
    plain = (bool, int, float, str, type(None))
    settings = [
        {name: value for name, value in vars(module).items() if isinstance(value, plain)} for module in block.modules()
    ]
    return f"{block} {settings}"


def _create(config: ViT.Config, size: int) -> Any:
    """Create the timm model for images of `size` x `size` pixels, with its weights."""
    hub = config.weights == "hub"
    if not timm.is_model(config.model):
        near = difflib.get_close_matches(
            config.model.split(".")[0], timm.list_models("*vit*") + timm.list_models("deit*")
        )
        raise ValueError(f"unknown timm model {config.model!r}" + (f"; perhaps you meant {near}" if near else ""))
    if hub and "." not in config.model:
        tags = timm.list_models(config.model + ".*", pretrained=True)
        raise ValueError(
            f"the weights of {config.model!r} depend on the version of timm; name the full tag, one of {tags}"
        )
    if config.arguments.get("in_chans", 3) != 3:
        raise ValueError(f"expected an encoder of images with 3 channels, got in_chans {config.arguments['in_chans']}")
    try:
        with torch.random.fork_rng(devices=[]), weights.hub_quiet():
            torch.manual_seed(0)  # `random` weights are the same every time
            model = timm.create_model(config.model, pretrained=hub, num_classes=0, img_size=size, **config.arguments)
    except Exception as error:  # timm raises errors of many types for arguments, weights and networks
        reason = weights.first_line(error)
        if not hub or isinstance(error, (TypeError, AssertionError, ArithmeticError, LookupError)):
            arguments = f" with {config.arguments}" if config.arguments else ""
            raise ValueError(f"timm cannot make {config.model} at {size} px{arguments}: {reason}") from error
        raise ValueError(
            f"no weights for {config.model}: {reason}. Offline, download the checkpoint elsewhere and name the file:"
            " --backbone.weights PATH.safetensors; or try the small encoder that pgp ships: --backbone demo-vit"
            " --transforms.size 32"
        ) from error
    patch_size = getattr(_plain(model).patch_embed, "patch_size", (1, 1))[0]
    if size % patch_size:
        raise ValueError(f"expected an image size that is a multiple of the patch size {patch_size}, got {size}")
    if not hub and config.weights != "random":
        _load(model, weights.packaged_weights(config.weights))
    return model


def _load(model: Any, path: Path) -> None:
    """Load a checkpoint with timm's parameter names; the classifier is left out, position embeddings are resampled."""
    state = weights.read(path)
    state = {name: tensor for name, tensor in state.items() if not name.startswith(("head.", "head_dist."))}
    width, cls = model.embed_dim, state.get("cls_token")
    if cls is not None and cls.dim() and cls.shape[-1] != width:
        raise ValueError(f"expected weights of width {width}, got {cls.shape[-1]} in {path}: name the model they"
                         " belong to with --backbone.model")  # fmt: skip
    own, read = (tensors.get("patch_embed.proj.weight") for tensors in (model.state_dict(), state))
    if own is not None and read is not None and read.dim() == 4 and own.shape[2:] != read.shape[2:]:
        raise ValueError(f"expected weights for patches of {own.shape[-1]} px, got {read.shape[-1]} in {path}: name"
                         " the model they belong to with --backbone.model")  # fmt: skip  # timm would resample them
    with weights.reading(path):  # timm raises errors of many types if tensors have other shapes
        state = checkpoint_filter_fn(state, model)
    weights.fill(model, state, path)
