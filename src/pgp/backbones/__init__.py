"""The contract of a frozen pre-trained encoder. timm and open_clip are imported in this folder and nowhere else."""

from __future__ import annotations

import abc
import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Trace(NamedTuple):
    """What one block sees of a batch of images: all that its learned prompts and prefixes meet."""

    tokens: Tensor
    """Tokens as they enter the block, `(B, N, D)`, without those that are inserted before it."""
    queries: Tensor
    """What its attention asks with, `(B, H, N, D/H)`."""
    shares: Tensor | None
    """How much of its attention each token gives to the positions of the prefix, `(B, H, N, L)`, or else of the prompts
    that are inserted before the block, `(B, H, N + P, P)`; None where there are neither."""


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

        @abc.abstractmethod
        def build(self, size: int) -> Backbone:
            """The backbone for images of `size` pixels a side."""

    @abc.abstractmethod
    def embed(self, images: Tensor) -> Tensor:
        """Tokens of `images (B, 3, S, S)` as they enter the first block, `(B, N, D)`."""

    @abc.abstractmethod
    def place(self, prompts: Tensor) -> Tensor:
        """Prompts `(B, P, D)` as they enter the first block: with the position embedding they are given."""

    @abc.abstractmethod
    def forward(
        self,
        images: Tensor,
        prompts: Mapping[int, Tensor] | None = None,
        prefixes: Mapping[int, Tensor] | None = None,
        read: int | None = None,
    ) -> Tensor:
        """Final normalised tokens: CLS, then the prompts, the latest first, then the image's other tokens.

        Args:
            images: `(B, 3, S, S)`.
            prompts: by layer number, tokens `(B, P, D)` to insert after CLS as they enter that block.
            prefixes: by layer number, keys and values `(B, 2, H, L, D/H)` that its attention sees before its own.
            read: how many leading tokens the caller reads; the last block computes no others. All, where None.

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
        """What the blocks of `layers` see in a pass with these prompts and prefixes; nothing above them is computed."""

    @abc.abstractmethod
    def normed(self, layer: int, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens `(..., L, D)` behind the LayerNorm before the attention of block `layer`, and the deviation `(..., L)`
        by which it divides each.
        """

    @abc.abstractmethod
    def prefix(self, layer: int, tokens: Tensor) -> Tensor:
        """Keys and values `(2, H, L, D/H)` that the attention of block `layer` makes of normed tokens `(L, D)`."""

    @abc.abstractmethod
    def affinity(self, layer: int, *, normed: bool) -> Tensor:
        """Maps `(H, D/H, D)` of what head h of block `layer` asks with, q, to the direction in which a token has to
        move to change its score: `q W_k`, and where tokens are not `normed`, back through the LayerNorm, whose
        deviation is taken for a constant.
        """

    def encode(self, images: Tensor) -> Tensor:
        """Final CLS token of the plain pass, `(B, D)`: the query by which prompts are chosen."""
        with torch.no_grad():
            tokens: Tensor = self(images, read=1)
            return tokens[:, 0]

    def freeze(self) -> None:
        """Stop all learning for good; `train()` no longer changes the mode."""
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> Backbone:
        """Stay in evaluation mode: a frozen encoder has no other."""
        super().train(False)
        return self

    def halve(self) -> None:
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

    joint: int
    """Width of image and text features E."""
    text_width: int
    """Width of text tokens W."""
    scale: float
    """What cosines are multiplied with to become logits."""

    @abc.abstractmethod
    def project(self, tokens: Tensor) -> Tensor:
        """Image features `(..., E)` of final tokens `(..., D)`, of no particular length."""

    @abc.abstractmethod
    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Token numbers `(n, T)`: a start token, the text, an end token with the largest number, zeros."""

    @abc.abstractmethod
    def embed_text(self, tokens: Tensor) -> Tensor:
        """Embedded tokens `(n, T, W)`, without position embedding."""

    @abc.abstractmethod
    def encode_text(self, embedded: Tensor, tokens: Tensor) -> Tensor:
        """Text features `(n, E)` of embedded tokens, read where `tokens` end; of no particular length."""


def sized(images: Tensor, height: int, width: int) -> Tensor:
    """`images`, which are `(B, 3, height, width)`, as the encoder expects them."""
    if images.dim() != 4 or images.shape[1:] != (3, height, width):
        raise ValueError(f"expected images (B, 3, {height}, {width}), got {tuple(images.shape)}")
    return images
