"""Pools of prompts and prefixes, and the keys by which images select from them.

Shapes: `B` images, `M` prompts of length `L` and width `D`, `k` selected per image, `H` heads of width `d`.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pgp.distributed import all_reduce_sum_


def cosine_similarity(query: Tensor, key: Tensor) -> Tensor:
    """Return the cosine similarity `(B, M)` in [-1, 1] of each query `(B, D)` with each key `(M, D)`.

    >>> cosine_similarity(torch.tensor([[2.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 3.0]]))
    tensor([[1., 0.]])
    """
    return F.normalize(query, dim=-1) @ F.normalize(key, dim=-1).T


def top_k(similarity: Tensor, k: int) -> Tensor:
    """Return the indices `(B, k)` of the k most similar prompts of each image, the most similar first.

    >>> top_k(torch.tensor([[0.1, 0.9, 0.5]]), k=2)
    tensor([[1, 2]])
    """
    return similarity.topk(k, dim=-1).indices


def majority_vote(chosen: Tensor, size: int) -> Tensor:
    """Return the k prompts selected most often in a batch, for each image of it: `(B, k)` from `chosen (B, k)`.

    The published training rule. It makes an image's prompts depend on its batch, so evaluation here never uses it
    unless the published protocol is asked for by name. If processes share a batch, all of them vote. Ties go to the
    lower index.

    Collective: every process must call it.

    >>> majority_vote(torch.tensor([[0, 1], [1, 2], [1, 2]]), size=4)
    tensor([[1, 2], [1, 2], [1, 2]])
    """
    counts = all_reduce_sum_(torch.bincount(chosen.flatten(), minlength=size))
    winners = counts.argsort(descending=True, stable=True)[: chosen.shape[1]]
    return winners.expand_as(chosen)


def slot_slice(slot: int, k: int, size: int) -> slice | None:
    """Return the prompts of slot number `slot`, k to a slot, or None past the end of a pool of `size`.

    >>> slot_slice(1, k=5, size=10), slot_slice(2, k=5, size=10)
    (slice(5, 10, None), None)
    """
    stop = (slot + 1) * k
    return slice(stop - k, stop) if stop <= size else None


def select_prompts(similarity: Tensor, k: int, *, slot: int | None = None, by_vote: bool = False) -> Tensor:
    """Return the indices `(B, k)` of the prompts of each image: by default, the most similar ones.

    Args:
        similarity: Similarity of each image with each key, `(B, M)`.
        k: Prompts per image.
        slot: Give every image the prompts of this slot (the published prompt mask). Past the end of the pool, images
            select by similarity.
        by_vote: Give the whole batch the prompts selected most often in it. Collective then, see `vote`.
    """
    size = similarity.shape[1]
    block = None if slot is None else slot_slice(slot, k, size)
    if block is not None:
        return torch.arange(block.start, block.stop, device=similarity.device).expand(len(similarity), -1)
    indices = top_k(similarity, k)
    return majority_vote(indices, size) if by_vote else indices


def selection_mask(indices: Tensor, size: int) -> Tensor:
    """Return whether each image selected each prompt of a pool of `size`, `(B, M)` bool, from `indices (B, k)`.

    >>> selection_mask(torch.tensor([[2, 0]]), size=3)
    tensor([[ True, False,  True]])
    """
    return F.one_hot(indices, size).sum(1).bool()


@torch.no_grad()
def copy_previous_slot(pool: Tensor, slot: int, k: int) -> None:
    """Copy the slot before number `slot` of `pool (M, ...)` to it, in place (the published shared pool)."""
    old, new = (slot_slice(at, k, len(pool)) if at >= 0 else None for at in (slot - 1, slot))
    if old is not None and new is not None:
        pool[new] = pool[old]


class Selection(NamedTuple):
    """The prompts of each image of a batch, and how similar its query is to all keys."""

    indices: Tensor
    """`(B, k)` into the pool."""
    similarity: Tensor
    """Cosine similarity of every image with every key, `(B, M)`."""

    @property
    def key_similarity(self) -> Tensor:
        """Mean over images of the summed similarity to the selected keys. Training raises it."""
        return self.similarity.gather(1, self.indices).sum(1).mean()


def scatter_by_prompt(shares: Tensor, indices: Tensor, size: int) -> Tensor:
    """Sort attention `(B, H, N, k * L)` to the selected prompts `indices (B, k)` by prompt, `(B, M, H, N, L)`.

    It is 0 for prompts that an image did not select.

    >>> scatter_by_prompt(torch.tensor([[[[0.3, 0.7]]]]), torch.tensor([[2, 0]]), size=3).flatten()
    tensor([0.7000, 0.0000, 0.3000])
    """
    if size == 1:
        return shares.unsqueeze(1)
    B, H, N, _ = shares.shape
    parts = shares.unflatten(-1, (indices.shape[1], -1)).movedim(3, 1)  # (B, k, H, N, L)
    placed = shares.new_zeros(B, size, H, N, parts.shape[-1])
    placed[torch.arange(B, device=indices.device).unsqueeze(1), indices] = parts
    return placed


class PromptPool(nn.Module):
    """M prompts `(M, L, D)` with a key `(M, D)` each (Wang et al., CVPR 2022).

    Args:
        size: Number of prompts M.
        length: Tokens per prompt L.
        width: Token width D.
        top_k: Prompts selected per image, k.
        keys: `learned` gives each prompt a parameter as its key; `mean` uses the mean of its own tokens.
        generator: Source of the initial values, uniform in (-1, 1) as published.

    Raises:
        ValueError: If `top_k` is not between 1 and `size`.

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
        """Select prompts for queries `(B, D)`; `slot` and `by_vote` as in `choose`."""
        similarity = cosine_similarity(query, self.key)
        return Selection(select_prompts(similarity, self.top_k, slot=slot, by_vote=by_vote), similarity)

    def tokens(self, selection: Selection) -> Tensor:
        """Return the selected prompts in a row, `(B, k * L, D)`."""
        return self.prompts[selection.indices].flatten(1, 2)  # (B, k, L, D) -> (B, k * L, D)


class PrefixPool(nn.Module):
    """M prefixes for the attention of one layer: keys and values `(M, H, L, d)` that precede its own.

    Args:
        size: Number of prefixes M.
        length: Positions per prefix L.
        heads: Attention heads H.
        width: Width of a head d.
        shared: Use one parameter for both keys and values.
        generator: Source of the initial values, uniform in (-1, 1) as published.

    >>> pool = PrefixPool(size=3, length=2, heads=4, width=8, generator=torch.Generator().manual_seed(0))
    >>> pool(torch.tensor([[0, 2]])).shape
    torch.Size([1, 2, 4, 4, 8])
    """

    def __init__(
        self, size: int, length: int, heads: int, width: int, *, generator: torch.Generator, shared: bool = False
    ) -> None:
        super().__init__()
        self.keys = nn.Parameter(torch.empty(size, heads, length, width).uniform_(-1, 1, generator=generator))
        own = torch.empty(size, heads, length, width).uniform_(-1, 1, generator=generator)
        self.separate_values = None if shared else nn.Parameter(own)

    @property
    def values(self) -> nn.Parameter:
        """Values `(M, H, L, d)`."""
        return self.keys if self.separate_values is None else self.separate_values

    def forward(self, indices: Tensor) -> Tensor:
        """Return the prefixes `indices (B, k)` of each image in a row, keys and values: `(B, 2, H, k * L, d)`."""
        chosen = torch.stack([self.keys[indices], self.values[indices]], dim=1)  # (B, 2, k, H, L, d)
        return chosen.transpose(2, 3).flatten(3, 4)


class TokenPool(nn.Module):
    """M prompts `(M, L, D)` that join the sequence of tokens, initially uniform in (-1, 1)."""

    def __init__(self, size: int, length: int, width: int, *, generator: torch.Generator) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.empty(size, length, width).uniform_(-1, 1, generator=generator))

    def forward(self, indices: Tensor) -> Tensor:
        """Return the prompts `indices (B, k)` of each image in a row, `(B, k * L, D)`."""
        return self.tokens[indices].flatten(1, 2)  # (B, k, L, D) -> (B, k * L, D)
