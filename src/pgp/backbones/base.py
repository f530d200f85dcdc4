"""The contract of a frozen pre-trained encoder. timm and open_clip are imported in this folder and nowhere else."""

from __future__ import annotations

import abc
import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from pgp.backbones.norms import norm_std, pull_back


class Trace(NamedTuple):
    """What one block sees of a batch of images: all that its learned prompts and prefixes meet."""

    tokens: Tensor
    """Tokens as they enter the block, `(B, N, D)`, without those that are inserted before it."""
    queries: Tensor
    """What its attention asks with for these tokens, `(B, H, N, D/H)`."""
    prompt_attention: Tensor | None
    """How much of its attention each of them gives to the positions of the prefix, `(B, H, N, L)`, or else of the
    prompts that are inserted before the block, `(B, H, N, P)`; None where there are neither."""


class Backbone(nn.Module, abc.ABC):
    """A frozen encoder: one copy in memory serves the plain pass and the prompted one.

    Shapes: `B` images, `N` tokens that an image becomes (CLS first), `P` inserted prompt tokens, `D` width, `H` heads.
    """

    width: int
    """Token width D."""
    depth: int
    """Number of blocks."""
    heads: int
    """Attention heads per block H."""

    @dataclass(frozen=True)
    class Config(abc.ABC):
        """How to make one; `build` is the factory."""

        tag: ClassVar[str]
        """Name of this kind of backbone in config.json, unique among all of them; it must never change."""

        @abc.abstractmethod
        def build(self, size: int) -> Backbone:
            """Return the backbone for images of `size` pixels a side."""

        def with_absolute_paths(self) -> Backbone.Config:
            """Return the same with absolute paths of files; what a run records, for it may go on from elsewhere."""
            return self

    @abc.abstractmethod
    def embed(self, images: Tensor) -> Tensor:
        """Return the tokens of `images (B, 3, S, S)` as they enter the first block, `(B, N, D)`."""

    @abc.abstractmethod
    def add_position(self, prompts: Tensor) -> Tensor:
        """Add the position embedding of prompts to prompts `(..., P, D)` that enter before the first block."""

    @abc.abstractmethod
    def attention_norm(self, layer: int | None) -> Any:
        """Return the norm before the attention of block `layer`.

        If `layer` is None, return the norm before the first block, an identity if there is none.
        """

    @abc.abstractmethod
    def key_weights(self, layer: int) -> Tensor:
        """Return the weights `W_k (H, D/H, D)` of the keys of each head of block `layer`.

        Raises:
            ValueError: For attention whose scores are not linear in its keys.
        """

    @abc.abstractmethod
    def forward(
        self,
        images: Tensor,
        prompts: Mapping[int, Tensor] | None = None,
        prefixes: Mapping[int, Tensor] | None = None,
        num_tokens: int | None = None,
    ) -> Tensor:
        """Return the final normalised tokens: CLS, then the prompts, the latest first, then the image's other tokens.

        Args:
            images: `(B, 3, S, S)`.
            prompts: By layer number, tokens `(B, P, D)` to insert after CLS as they enter that block.
            prefixes: By layer number, keys and values `(B, 2, H, L, D/H)` that its attention sees before its own.
            num_tokens: How many leading tokens the caller reads; the last block computes no others. All, where None.

        Returns:
            `(B, read, D)`, or `(B, N + P, D)` where `read` is None.
        """

    @abc.abstractmethod
    def trace(
        self,
        images: Tensor,
        layers: Collection[int],
        prompts: Mapping[int, Tensor] | None = None,
        prefixes: Mapping[int, Tensor] | None = None,
    ) -> dict[int, Trace]:
        """Return what the blocks of `layers` compute in a pass with these prompts and prefixes. No later block runs."""

    @abc.abstractmethod
    def make_prefix(self, layer: int, tokens: Tensor) -> Tensor:
        """Return the keys and values `(2, H, L, D/H)` of block `layer` for normed tokens `(L, D)`."""

    def embed_prompts(self, prompts: Tensor) -> Tensor:
        """Return prompts `(..., P, D)` as they enter the first block."""
        placed: Tensor = self.attention_norm(None)(self.add_position(prompts))
        return placed

    def apply_norm(self, layer: int, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return tokens `(..., L, D)` behind the norm of block `layer`, and the norm's divisors `(..., L)`."""
        norm = self.attention_norm(layer)
        tokens = tokens.to(norm.weight.dtype)
        return norm(tokens), norm_std(norm, tokens)

    def norm_scale(self, prompts: Tensor) -> Tensor:
        """Return the product of the divisors of all norms before the attention of the first block, `(..., P)`.

        The prompts `(..., P, D)` are not embedded yet.
        """
        first = norm_std(self.attention_norm(None), self.add_position(prompts))
        return first * self.apply_norm(0, self.embed_prompts(prompts))[1]

    def affinity_maps(self, layer: int, *, moves: Literal["prompt", "token", "normed"]) -> Tensor:
        """Return the maps `(H, D/H, D)` from queries to the directions in which a token changes their attention scores.

        For head h of block `layer` this is `q W_k`, pulled back through the norms, whose divisors are taken as
        constants.

        Args:
            layer: Number of the block.
            moves: A token behind the block's norm; one that enters the block; or a prompt that is yet to be placed
                before the block, which is the first.
        """
        maps = self.key_weights(layer)
        if moves == "normed":
            return maps
        maps = pull_back(self.attention_norm(layer), maps)
        return pull_back(self.attention_norm(None), maps) if moves == "prompt" else maps

    def encode(self, images: Tensor) -> Tensor:
        """Return the final CLS token of a pass without prompts, `(B, D)`: the query by which prompts are selected."""
        with torch.no_grad():
            tokens: Tensor = self(images, num_tokens=1)
            return tokens[:, 0]

    def freeze(self) -> None:
        """Stop all learning for good; `train()` no longer changes the mode."""
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> Backbone:
        """Stay in evaluation mode: a frozen encoder has no other."""
        super().train(False)
        return self

    def to_bfloat16_(self) -> None:
        """Hold the weights of matrix products in bfloat16, to which autocast would cast them at every use.

        Under autocast all results are the same, in half the memory; outside of it the encoder is of no use any more.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                module.to(torch.bfloat16)

    def fingerprint(self) -> str:
        """Hash of all weights, by which a checkpoint knows the encoder it was learned on."""
        digest = hashlib.sha256()
        for name, tensor in self.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().float().numpy().tobytes())
        return digest.hexdigest()[:16]


class VisionLanguage(Backbone):
    """An image encoder with a text encoder beside it; features of both have one width `E` and compare by cosine.

    Shapes: `n` texts of `T` tokens, `W` text width.
    """

    embed_dim: int
    """Width of image and text features E."""
    text_width: int
    """Width of text tokens W."""
    logit_scale: float
    """What cosines are multiplied with to become logits."""

    @abc.abstractmethod
    def project(self, tokens: Tensor) -> Tensor:
        """Return image features `(..., E)` of final tokens `(..., D)`, not normalised."""

    @abc.abstractmethod
    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Return token numbers `(n, T)`: a start token, the text, an end token with the largest number, zeros."""

    @abc.abstractmethod
    def embed_text(self, tokens: Tensor) -> Tensor:
        """Return embedded tokens `(n, T, W)`, without position embedding."""

    @abc.abstractmethod
    def encode_text(self, embedded: Tensor, tokens: Tensor) -> Tensor:
        """Return text features `(n, E)` of embedded tokens, read where `tokens` end, not normalised."""


def check_image_size(images: Tensor, height: int, width: int) -> Tensor:
    """Return `images`, which must be `(B, 3, height, width)`.

    Raises:     ValueError: If they are not.
    """
    if images.dim() != 4 or images.shape[1:] != (3, height, width):
        raise ValueError(f"expected images (B, 3, {height}, {width}), got {tuple(images.shape)}")
    return images


def insert_prompts(tokens: Tensor, prompts: Tensor | None) -> Tensor:
    """Insert prompts `(B, P, D)` behind CLS into tokens `(B, N, D)`, and return `(B, N + P, D)`."""
    if prompts is None:
        return tokens
    if prompts.dim() != 3 or prompts.shape[::2] != tokens.shape[::2]:
        raise ValueError(f"expected prompts ({len(tokens)}, P, {tokens.shape[2]}), got {tuple(prompts.shape)}")
    return torch.cat([tokens[:, :1], prompts, tokens[:, 1:]], dim=1)


def drop_prompts(rows: Tensor, count: int) -> Tensor:
    """Return the rows of the tokens, without those of the `count` prompts behind CLS, from `(B, H, N + count, ...)`."""
    return torch.cat([rows[:, :, :1], rows[:, :, 1 + count :]], dim=2) if count else rows
