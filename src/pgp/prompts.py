"""A pool of prompts and the keys by which images choose among them.

Shapes: `B` images, `M` prompts of length `L` and width `D`, `k` chosen per image.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def match(query: Tensor, key: Tensor) -> Tensor:
    """Cosine similarity `(B, M)` in [-1, 1] of each query `(B, D)` with each key `(M, D)`.

    >>> match(torch.tensor([[2.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 3.0]]))
    tensor([[1., 0.]])
    """
    return F.normalize(query, dim=-1) @ F.normalize(key, dim=-1).T


def nearest(similarity: Tensor, k: int) -> Tensor:
    """Indices `(B, k)` of each image's most similar prompts, the most similar first: image by image.

    >>> nearest(torch.tensor([[0.1, 0.9, 0.5]]), k=2)
    tensor([[1, 2]])
    """
    return similarity.topk(k, dim=-1).indices


def vote(chosen: Tensor, size: int) -> Tensor:
    """The k prompts chosen most often in a batch, for every image of it: `(B, k)` from `chosen (B, k)`, pool of `size`.

    The published training rule. It makes an image's prompts depend on its batch, so evaluation here never uses it
    unless the published protocol is asked for by name. Ties go to the lower index.

    >>> vote(torch.tensor([[0, 1], [1, 2], [1, 2]]), size=4)
    tensor([[1, 2], [1, 2], [1, 2]])
    """
    counts = torch.bincount(chosen.flatten(), minlength=size)
    winners = counts.argsort(descending=True, stable=True)[: chosen.shape[1]]
    return winners.expand_as(chosen)


class Selection(NamedTuple):
    """Which prompts a batch of images gets, and how well they fit."""

    indices: Tensor
    """`(B, k)` into the pool."""
    similarity: Tensor
    """Cosine similarity of every image with every key, `(B, M)`."""

    @property
    def pull(self) -> Tensor:
        """Mean over images of the summed similarity to the chosen keys; training raises it, which pulls keys closer."""
        return self.similarity.gather(1, self.indices).sum(1).mean()


class PromptPool(nn.Module):
    """M prompts `(M, L, D)` with a key `(M, D)` each (Wang et al., CVPR 2022).

    Args:
        size: number of prompts M.
        length: tokens per prompt L.
        width: token width D.
        top_k: prompts chosen per image.
        keys: `learned` gives each prompt a parameter as its key; `mean` uses the mean of its own tokens.
        generator: source of the initial values, uniform in (-1, 1) as published.

    >>> pool = PromptPool(size=3, length=2, width=4, top_k=1, generator=torch.Generator().manual_seed(0))
    >>> selection = pool.select(torch.randn(5, 4, generator=torch.Generator().manual_seed(1)))
    >>> pool.tokens(selection).shape
    torch.Size([5, 2, 4])
    """

    def __init__(
        self,
        size: int,
        length: int,
        width: int,
        *,
        top_k: int,
        generator: torch.Generator,
        keys: Literal["learned", "mean"] = "learned",
    ) -> None:
        super().__init__()
        if not 1 <= top_k <= size:
            raise ValueError(f"expected top_k between 1 and the pool size {size}, got {top_k}")
        self.top_k = top_k
        self.prompts = nn.Parameter(torch.empty(size, length, width).uniform_(-1, 1, generator=generator))
        own_key = torch.empty(size, width).uniform_(-1, 1, generator=generator)
        self.learned_key = nn.Parameter(own_key) if keys == "learned" else None

    @property
    def key(self) -> Tensor:
        """Keys `(M, D)`."""
        return self.prompts.mean(1) if self.learned_key is None else self.learned_key

    def select(self, query: Tensor, *, slot: int | None = None, by_vote: bool = False) -> Selection:
        """Prompts for queries `(B, D)`: those nearest to each, unless told otherwise.

        Args:
            query: one row per image.
            slot: force block number `slot` of top_k prompts on every image (the published prompt mask); a slot past the
                end of the pool means a free match.
            by_vote: give the whole batch the prompts chosen most often in it.
        """
        similarity = match(query, self.key)
        block = None if slot is None else self.block(slot)
        if block is not None:
            indices = torch.arange(block.start, block.stop, device=query.device).expand(len(query), -1)
        else:
            indices = nearest(similarity, self.top_k)
            if by_vote:
                indices = vote(indices, len(self.prompts))
        return Selection(indices, similarity)

    def tokens(self, selection: Selection) -> Tensor:
        """The chosen prompts in a row, `(B, k * L, D)`."""
        return self.prompts[selection.indices].flatten(1, 2)  # (B, k, L, D) -> (B, k * L, D)

    def block(self, slot: int) -> slice | None:
        """The prompts of slot number `slot`, or None past the end of the pool."""
        stop = (slot + 1) * self.top_k
        return slice(stop - self.top_k, stop) if stop <= len(self.prompts) else None

    @torch.no_grad()
    def inherit(self, slot: int) -> None:
        """Start slot number `slot` as a copy of the one before it (the published shared pool)."""
        old, new = (self.block(slot - 1), self.block(slot)) if slot > 0 else (None, None)
        if old is not None and new is not None:
            self.prompts[new] = self.prompts[old]
