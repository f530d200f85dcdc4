"""Base classes of frozen pre-trained encoders. Only this folder imports timm and open_clip."""

from __future__ import annotations

import abc
import contextlib
import functools
import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from pgp.backbones.norms import norm_std, pull_back
from pgp.backbones.weights import EncoderSource


@dataclass(frozen=True)
class Trace:
    """Activations of one block for a batch of images: the inputs of its prompts and prefixes."""

    tokens: Tensor
    """Tokens as they enter the block, without the prompts that are inserted before it, `(B, N, D)`."""
    queries: Tensor
    """Attention queries of these tokens, `(B, H, N, D/H)`."""
    compute_attention: Callable[[], Tensor] | None
    """What computes `prompt_attention`, which most projections do not need; None without prompts and prefix."""

    def prompt_attention(self) -> Tensor:
        """Return the attention weights of these tokens on the prefix, `(B, H, N, L)`, or on the prompts.

        Without a prefix, they are those on the prompts that are inserted before the block, `(B, H, N, P)`.

        Raises:
            ValueError: If there are neither.
        """
        if self.compute_attention is None:
            raise ValueError("expected a trace of a block with prompts or a prefix, got one without")
        return self.compute_attention()


LINEAR_MAPS = ("q", "k", "v", "proj", "fc1", "fc2")
"""The linear maps of a block: queries, keys, values and output of the attention, and the two layers of the MLP."""
OUTPUTS = ("attn", "mlp")
"""The outputs of a block's attention and of its MLP, before they are added to the tokens."""


class Place(NamedTuple):
    """A place in an encoder where a method can change what is computed."""

    layer: int
    """Number of the block."""
    name: str
    """One of `LINEAR_MAPS` or `OUTPUTS`."""

    def __str__(self) -> str:
        return f"{self.name} {self.layer}"

    @classmethod
    def parse(cls, text: str) -> Place:
        """Return the place that `str` has written.

        >>> Place.parse(str(Place(3, "fc1")))
        Place(layer=3, name='fc1')
        """
        name, layer = text.split()
        return cls(int(layer), name)


Adapted = Mapping[Place, Callable[[Tensor], Tensor]]
"""Functions `(B, N, in) -> (B, N, out)` by place: each replaces a linear map, or is applied to an output."""


class Backbone(nn.Module, abc.ABC):
    """A frozen encoder. The same weights compute features without prompts and with them.

    Shapes: `B` images, `N` tokens of an image (CLS first), `P` inserted prompt tokens, `D` width, `H` attention heads.
    """

    width: int
    """Token width D."""
    depth: int
    """Number of blocks."""
    first_patch: int = 1
    """Position of the first patch among the tokens; registers, if there are any, come between it and CLS."""
    heads: int
    """Attention heads per block H."""
    compiles_blocks: bool = False
    """Whether blocks are compiled when they are first used."""

    @dataclass(frozen=True)
    class Config(abc.ABC):
        """Settings of an encoder; `build` creates it."""

        tag: ClassVar[str]
        """Name of this kind of backbone in config.json. It must be unique among backbones and never change."""

        @abc.abstractmethod
        def build(self, size: int) -> Backbone:
            """Return the encoder for images of `size` x `size` pixels."""

        def with_absolute_paths(self) -> Backbone.Config:
            """Return the same settings with absolute paths, so that a run can be resumed from another directory."""
            return self

        @property
        def local_files(self) -> tuple[str, ...]:
            """Paths of files that the encoder needs and that neither pgp nor its library provides."""
            return ()

        def source(self) -> EncoderSource:
            """Return where the weights come from, as far as their library says; it needs no network."""
            return EncoderSource()

    @abc.abstractmethod
    def embed(self, images: Tensor) -> Tensor:
        """Return the tokens of `images (B, 3, S, S)` as they enter the first block, `(B, N, D)`."""

    @abc.abstractmethod
    def add_position(self, prompts: Tensor) -> Tensor:
        """Add the position embedding of prompts `(..., P, D)` that are inserted before the first block."""

    @abc.abstractmethod
    def attention_norm(self, layer: int | None) -> Any:
        """Return the norm before the attention of block `layer`.

        If `layer` is None, return the norm before the first block, or an identity if the encoder has none.
        """

    @abc.abstractmethod
    def key_weights(self, layer: int) -> Tensor:
        """Return the key weights `W_k (H, D/H, D)` of each attention head of block `layer`.

        Raises:
            ValueError: If the attention scores are not linear in the keys.
        """

    @abc.abstractmethod
    def linear_map(self, place: Place) -> tuple[Tensor, Tensor | None]:
        """Return the frozen weight `(out, in)` and bias `(out,)` of a linear map.

        Raises:
            ValueError: If this encoder does not have it, or not in a form that can be replaced.
        """

    @abc.abstractmethod
    def forward(
        self,
        images: Tensor,
        prompts: Mapping[int, Tensor] | None = None,
        prefixes: Mapping[int, Tensor] | None = None,
        num_tokens: int | None = None,
        adapted: Adapted | None = None,
    ) -> Tensor:
        """Return the final tokens after the last norm: CLS, then prompts, then the other tokens of the image.

        If prompts are inserted before several blocks, those inserted last come first.

        Args:
            images: Images `(B, 3, S, S)`.
            prompts: Tokens `(B, P, D)` to insert after CLS, by the number of the block that they enter.
            prefixes: Keys and values `(B, 2, H, L, D/H)` to put before those of the attention, by block number.
            num_tokens: Number of leading tokens to return; the last block computes no others. If None, all.
            adapted: Functions to use at some places. Without them, the tokens are bitwise those of the frozen encoder.

        Returns:
            Tokens `(B, num_tokens, D)`, or `(B, N + P, D)` if `num_tokens` is None.
        """

    def trace(
        self,
        images: Tensor,
        layers: Collection[int],
        prompts: Mapping[int, Tensor] | None = None,
        prefixes: Mapping[int, Tensor] | None = None,
    ) -> dict[int, Trace]:
        """Return the activations of the blocks `layers` in a pass with these prompts and prefixes.

        Later blocks are not computed. For the arguments, see `forward`.
        """
        return self._traced_pass(images, layers, prompts, prefixes, max(layers, default=-1))[1]

    def encode_with_traces(
        self,
        images: Tensor,
        layers: Collection[int],
        prompts: Mapping[int, Tensor] | None = None,
        prefixes: Mapping[int, Tensor] | None = None,
    ) -> tuple[Tensor, dict[int, Trace]]:
        """Return the final CLS token `(B, D)` of a pass with these prompts and prefixes, and the result of `trace`.

        It computes both in one pass. For the arguments, see `forward`.
        """
        tokens, traces = self._traced_pass(images, layers, prompts, prefixes, self.depth)
        cls: Tensor = self._final_norm(tokens[:, 0])
        return cls, traces

    @abc.abstractmethod
    def _traced_pass(
        self,
        images: Tensor,
        layers: Collection[int],
        prompts: Mapping[int, Tensor] | None,
        prefixes: Mapping[int, Tensor] | None,
        end: int,
    ) -> tuple[Tensor, dict[int, Trace]]:
        """Return the tokens after `end` blocks, at least CLS, and the activations of the blocks `layers`."""

    @property
    @abc.abstractmethod
    def _final_norm(self) -> Any:
        """The norm after the last block."""

    @abc.abstractmethod
    def make_prefix(self, layer: int, tokens: Tensor) -> Tensor:
        """Return the keys and values `(2, H, L, D/H)` of normed tokens `(L, D)` in the attention of block `layer`."""

    def check_layers(self, layers: Iterable[int]) -> None:
        """Raise a ValueError if this encoder does not have one of `layers`."""
        outside = sorted({layer for layer in layers if not 0 <= layer < self.depth})
        if outside:
            raise ValueError(f"expected layers between 0 and {self.depth - 1}, the last of this model, got"
                             f" {', '.join(map(str, outside))}")  # fmt: skip

    def check_places(self, places: Collection[Place]) -> None:
        """Raise a ValueError if this encoder does not have one of `places`."""
        self.check_layers(place.layer for place in places)
        for place in places:
            if place.name not in LINEAR_MAPS + OUTPUTS:
                raise ValueError(f"expected places among {', '.join(LINEAR_MAPS + OUTPUTS)}, got {place.name!r}")
            self.linear_map(place if place.name in LINEAR_MAPS else Place(place.layer, "fc1"))

    def embed_prompts(self, prompts: Tensor) -> Tensor:
        """Return prompts `(..., P, D)` as they enter the first block, with position embedding and norm."""
        embedded: Tensor = self.attention_norm(None)(self.add_position(prompts))
        return embedded

    def apply_norm(self, layer: int, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Apply the norm before the attention of block `layer` to tokens `(..., L, D)`.

        Returns:
            The normed tokens `(..., L, D)`, and the standard deviation of each token that the norm divides by,
            `(..., L)`.
        """
        norm = self.attention_norm(layer)
        tokens = tokens.to(norm.weight.dtype)
        return norm(tokens), norm_std(norm, tokens)

    def norm_scale(self, prompts: Tensor) -> Tensor:
        """Return the product of the standard deviations that norms divide prompts `(..., P, D)` by, `(..., P)`.

        These are the norms between the prompts and the attention of the first block.
        """
        first = norm_std(self.attention_norm(None), self.add_position(prompts))
        return first * self.apply_norm(0, self.embed_prompts(prompts))[1]

    def affinity_maps(self, layer: int, *, moves: Literal["prompt", "token", "normed"]) -> Tensor:
        """Return maps `(H, D/H, D)` from a query to the direction in which a token changes its attention score.

        For a query q of attention head h, the direction is `q W_k`, mapped back through the norms. Their standard
        deviations are treated as constants.

        Args:
            layer: Number of the block.
            moves: What changes. `normed`: a token after the block's norm. `token`: a token that enters the block.
                `prompt`: a prompt before `embed_prompts`, for the first block only.
        """
        maps = self.key_weights(layer)
        if moves == "normed":
            return maps
        maps = pull_back(self.attention_norm(layer), maps)
        return pull_back(self.attention_norm(None), maps) if moves == "prompt" else maps

    def encode(self, images: Tensor) -> Tensor:
        """Return the final CLS token without prompts, `(B, D)`: the query for the selection of prompts."""
        with torch.no_grad():
            tokens: Tensor = self(images, num_tokens=1)
            return tokens[:, 0]

    def encode_with_patches(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the final CLS token and the mean of the final patch tokens without prompts, each `(B, D)`."""
        with torch.no_grad():
            tokens: Tensor = self(images)
            return tokens[:, 0].clone(), tokens[:, self.first_patch :].mean(1)  # a view would keep all tokens in memory

    def block_function(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Return `function`, which computes a block, as it is or compiled. Its results differ by rounding only."""
        return _compiled(function) if self.compiles_blocks else function

    @contextlib.contextmanager
    def uncompiled(self) -> Iterator[None]:
        """Leave blocks uncompiled inside a `with` block."""
        compiles, self.compiles_blocks = self.compiles_blocks, False
        try:
            yield
        finally:
            self.compiles_blocks = compiles

    def freeze(self) -> None:
        """Stop training of all weights and switch to evaluation mode."""
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> Backbone:
        """Stay in evaluation mode, whatever `mode` is."""
        super().train(False)
        return self

    def to_mixed_(self, dtype: torch.dtype) -> None:
        """Convert the weights of linear and convolution layers to bfloat16 or float16, as autocast does at every use.

        Under autocast, results do not change and the weights take half the memory. Without autocast, the encoder no
        longer works.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                module.to(dtype)

    def fingerprint(self) -> str:
        """Return a hash of all weights, with which a checkpoint recognises its encoder."""
        digest = hashlib.sha256()
        for name, tensor in self.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().float().numpy().tobytes())
        return digest.hexdigest()[:16]


class VisionLanguage(Backbone):
    """An image encoder and a text encoder, whose features have the same width `E` and are compared by cosine.

    Shapes: `n` texts of `T` tokens, `W` text width.
    """

    embed_dim: int
    """Width of image and text features E."""
    text_width: int
    """Width of text tokens W."""
    logit_scale: float
    """Factor that turns cosine similarities into logits."""

    @abc.abstractmethod
    def project(self, tokens: Tensor) -> Tensor:
        """Return the image features `(..., E)` of final tokens `(..., D)`, not normalised."""

    @abc.abstractmethod
    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Return token numbers `(n, T)`: a start token, the text, an end token, and zeros.

        The end token has the largest number.
        """

    @abc.abstractmethod
    def embed_text(self, tokens: Tensor) -> Tensor:
        """Return embedded tokens `(n, T, W)`, without position embedding."""

    @abc.abstractmethod
    def encode_text(self, embedded: Tensor, tokens: Tensor) -> Tensor:
        """Return the text features `(n, E)` of embedded tokens, not normalised.

        They are computed from the end token, whose position is found in `tokens`.
        """


@functools.cache
def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a function that torch compiles when it is called; once for all blocks and numbers of images and tokens."""
    return torch.compile(function, dynamic=True)


def by_name(adapted: Adapted | None, layer: int) -> dict[str, Callable[[Tensor], Tensor]]:
    """Return the functions for block `layer`, by the name of their place."""
    return {place.name: function for place, function in (adapted or {}).items() if place.layer == layer}


def check_image_size(images: Tensor, height: int, width: int) -> Tensor:
    """Return `images` if they are `(B, 3, height, width)`, as the encoder expects.

    Raises:
        ValueError: If they have another shape.
    """
    if images.dim() != 4 or images.shape[1:] != (3, height, width):
        raise ValueError(f"expected images (B, 3, {height}, {width}), got {tuple(images.shape)}")
    return images


def insert_prompts(tokens: Tensor, prompts: Tensor | None) -> Tensor:
    """Insert prompts `(B, P, D)` after CLS into tokens `(B, N, D)`, `(B, N + P, D)`."""
    if prompts is None:
        return tokens
    if prompts.dim() != 3 or prompts.shape[::2] != tokens.shape[::2]:
        raise ValueError(f"expected prompts ({tokens.shape[0]}, P, {tokens.shape[2]}), got {tuple(prompts.shape)}")
    return torch.cat([tokens[:, :1], prompts, tokens[:, 1:]], dim=1)  # (B, N + P, D)


def drop_prompts(rows: Tensor, count: int) -> Tensor:
    """Remove the rows of the `count` prompts after CLS: `(B, H, N + count, ...)` -> `(B, H, N, ...)`."""
    if not count:
        return rows
    return torch.cat([rows[:, :, :1], rows[:, :, 1 + count :]], dim=2)  # (B, H, N, ...)
