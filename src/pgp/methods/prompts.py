"""Pools of prompts and prefixes, and the selection of prompts by the similarity of queries and keys.

Shapes: `B` images, `M` prompts of length `L` and width `D`, `k` selected per image, `H` attention heads of width `d`.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pgp.distributed import all_reduce_sum_
from pgp.precision import full_precision


def cosine_similarity(query: Tensor, key: Tensor) -> Tensor:
    """Return the cosine similarity `(B, M)` in [-1, 1] of each query `(B, D)` with each key `(M, D)`.

    It is computed in float32 under every precision: rounded to bfloat16, many keys would be equally similar.

    >>> cosine_similarity(torch.tensor([[2.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 3.0]]))
    tensor([[1., 0.]])
    """
    with full_precision(query.device):
        return F.normalize(query.to(key.dtype), dim=-1) @ F.normalize(key, dim=-1).T


def top_k(similarity: Tensor, k: int) -> Tensor:
    """Return the indices `(B, k)` of the k most similar prompts of each image, the most similar first.

    >>> top_k(torch.tensor([[0.1, 0.9, 0.5]]), k=2)
    tensor([[1, 2]])
    """
    return similarity.topk(k, dim=-1).indices


def majority_vote(selected: Tensor, size: int) -> Tensor:
    """Return the k prompts selected most often in a batch, repeated for each of its images, `(B, k)`.

    This is the published training rule. It makes the prompts of an image depend on its batch, so evaluation uses it
    only for the published protocol. If processes share a batch, all of them vote. Ties go to the lower index.

    Collective: in a distributed run, every process must call it.

    Args:
        selected: Indices of the prompts that each image selects for itself, `(B, k)`.
        size: Number of prompts in the pool, M.

    >>> majority_vote(torch.tensor([[0, 1], [1, 2], [1, 2]]), size=4)
    tensor([[1, 2], [1, 2], [1, 2]])
    """
    prompts = torch.arange(size, device=selected.device)
    counts = all_reduce_sum_((selected.flatten().unsqueeze(1) == prompts).sum(0))  # (M,); bincount waits for a GPU
    winners = counts.argsort(descending=True, stable=True)[: selected.shape[1]]  # (k,)
    return winners.expand_as(selected)


def slot_slice(slot: int, k: int, size: int) -> slice | None:
    """Return the prompts of slot number `slot`, k per slot, or None past the end of a pool of `size` prompts.

    >>> slot_slice(1, k=5, size=10), slot_slice(2, k=5, size=10)
    (slice(5, 10, None), None)
    """
    stop = (slot + 1) * k
    return slice(stop - k, stop) if stop <= size else None


def select_prompts(similarity: Tensor, k: int, *, slot: int | None = None, by_vote: bool = False) -> Tensor:
    """Return the indices `(B, k)` of the prompts of each image: by default, the most similar ones.

    Args:
        similarity: Similarity of each image with each key, `(B, M)`.
        k: Number of prompts per image.
        slot: Give every image the prompts of this slot (the published prompt mask). If the slot is past the end of the
            pool, images select by similarity.
        by_vote: Give the whole batch the prompts selected most often in it. Every process must then make the call; see
            `majority_vote`.
    """
    size = similarity.shape[1]
    of_slot = None if slot is None else slot_slice(slot, k, size)
    if of_slot is not None:
        return torch.arange(of_slot.start, of_slot.stop, device=similarity.device).expand(similarity.shape[0], -1)
    indices = top_k(similarity, k)
    return majority_vote(indices, size) if by_vote else indices


def selection_mask(indices: Tensor, size: int) -> Tensor:
    """Return which prompts of a pool of `size` each image selected, `(B, M)` bool, from their `indices (B, k)`.

    >>> selection_mask(torch.tensor([[2, 0]]), size=3)
    tensor([[ True, False,  True]])
    """
    return F.one_hot(indices, size).sum(1).bool()  # (B, k, M) -> (B, M)


@torch.no_grad()
def copy_previous_slot(pool: Tensor, slot: int, k: int) -> None:
    """Copy the prompts of slot `slot - 1` of `pool (M, ...)` to slot `slot`, in place (the published shared pool)."""
    if slot < 1:
        return
    previous, current = slot_slice(slot - 1, k, len(pool)), slot_slice(slot, k, len(pool))
    if previous is not None and current is not None:
        pool[current] = pool[previous]


class Selection(NamedTuple):
    """The selected prompts of each image of a batch, and the similarity of its query with all keys."""

    indices: Tensor
    """Indices of the selected prompts in the pool, `(B, k)`."""
    similarity: Tensor
    """Cosine similarity of every image with every key, `(B, M)`."""

    @property
    def key_similarity(self) -> Tensor:
        """Summed similarity with the selected keys, averaged over images. Training increases it."""
        return self.similarity.gather(1, self.indices).sum(1).mean()  # (B, k) -> ()


def scatter_by_prompt(attention: Tensor, indices: Tensor, size: int) -> Tensor:
    """Arrange attention weights by prompt: `(B, H, N, k * L)` -> `(B, M, H, N, L)`, with 0 for unselected prompts.

    Args:
        attention: Attention weights of the selected prompts of each image, `(B, H, N, k * L)`.
        indices: Indices of the selected prompts, `(B, k)`.
        size: Number of prompts in the pool, M.

    >>> scatter_by_prompt(torch.tensor([[[[0.3, 0.7]]]]), torch.tensor([[2, 0]]), size=3).flatten()
    tensor([0.7000, 0.0000, 0.3000])
    """
    if size == 1:
        return attention.unsqueeze(1)
    B, H, N, _ = attention.shape
    selected = attention.unflatten(-1, (indices.shape[1], -1)).movedim(3, 1)  # (B, k, H, N, L)
    by_prompt = attention.new_zeros(B, size, H, N, selected.shape[-1])
    by_prompt[torch.arange(B, device=indices.device).unsqueeze(1), indices] = selected
    return by_prompt


class PromptPool(nn.Module):
    """M prompts `(M, L, D)` with a key `(M, D)` each (Wang et al., CVPR 2022).

    Args:
        size: Number of prompts M.
        length: Number of tokens per prompt L.
        width: Token width D.
        top_k: Number of prompts selected per image, k.
        keys: `learned` gives each prompt a parameter as its key; `mean` uses the mean of the prompt's tokens.
        generator: Random generator for the initial values, which are uniform in (-1, 1) as published.

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
        """The keys of all prompts, `(M, D)`."""
        return self.prompts.mean(1) if self.learned_key is None else self.learned_key

    def select(self, query: Tensor, *, slot: int | None = None, by_vote: bool = False) -> Selection:
        """Select prompts for queries `(B, D)`; for `slot` and `by_vote`, see `select_prompts`."""
        similarity = cosine_similarity(query, self.key)
        return Selection(select_prompts(similarity, self.top_k, slot=slot, by_vote=by_vote), similarity)

    def tokens(self, selection: Selection) -> Tensor:
        """Return the tokens of the selected prompts of each image, `(B, k * L, D)`."""
        return self.prompts[selection.indices].flatten(1, 2)  # (B, k, L, D) -> (B, k * L, D)


class PrefixPool(nn.Module):
    """M prefixes for the attention of one layer: keys and values `(M, H, L, d)` that are put before its own.

    Args:
        size: Number of prefixes M.
        length: Number of positions per prefix L.
        heads: Number of attention heads H.
        width: Width of an attention head d.
        shared: Use one parameter for both keys and values.
        generator: Random generator for the initial values, which are uniform in (-1, 1) as published.

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
        """The values of all prefixes, `(M, H, L, d)`."""
        return self.keys if self.separate_values is None else self.separate_values

    def forward(self, indices: Tensor) -> Tensor:
        """Return keys and values of the prefixes `indices (B, k)` of each image, `(B, 2, H, k * L, d)`."""
        selected = torch.stack([self.keys[indices], self.values[indices]], dim=1)  # (B, 2, k, H, L, d)
        return selected.transpose(2, 3).flatten(3, 4)  # (B, 2, H, k, L, d) -> (B, 2, H, k * L, d)


class TokenPool(nn.Module):
    """M prompts `(M, L, D)` that are inserted into the sequence of tokens, initially uniform in (-1, 1)."""

    def __init__(self, size: int, length: int, width: int, *, generator: torch.Generator) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.empty(size, length, width).uniform_(-1, 1, generator=generator))

    def forward(self, indices: Tensor) -> Tensor:
        """Return the tokens of the prompts `indices (B, k)` of each image, `(B, k * L, D)`."""
        return self.tokens[indices].flatten(1, 2)  # (B, k, L, D) -> (B, k * L, D)
