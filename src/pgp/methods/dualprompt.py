"""DualPrompt (Wang et al., ECCV 2022): attention prefixes, general ones for all tasks and experts selected by key."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pgp.backbones.base import Backbone
from pgp.methods.base import Method, linear_head, mask_logits
from pgp.methods.prompts import (
    PrefixPool,
    Selection,
    TokenPool,
    copy_previous_slot,
    cosine_similarity,
    scatter_by_prompt,
    select_prompts,
    selection_mask,
)
from pgp.scenario import Task
from pgp.subspace import ProtectedInputs, ProtectedParameter


class DualPrompt(Method):
    """General prefixes in early layers, and in later ones the experts that an image selects by key.

    The query is the CLS feature of the frozen encoder.
    Loss: cross-entropy over the task's classes - `pull` * cosine similarity of the query and the selected keys.
    Differs from the published code: every image gets the keys and values of its own experts, where the published
    reshape mixes those of a batch.
    """

    @dataclass(frozen=True)
    class Config(Method.Config):
        """The published method's settings; the defaults are its values for CIFAR-100."""

        tag = "dualprompt"

        general_layers: tuple[int, ...] = (0, 1)
        """Layers with a general prefix, which all tasks share. Layers count from 0."""
        general_length: int = 5
        """Positions of a general prefix, L."""
        expert_layers: tuple[int, ...] = (2, 3, 4)
        """Layers with expert prefixes."""
        expert_length: int = 5
        """Positions of an expert, L."""
        pool_size: int = 10
        """Experts, M. Each has one key for all layers."""
        top_k: int = 1
        """Experts that an image selects, k."""
        pull: float = 1.0
        """Weight of the term that pulls the selected keys toward the queries."""
        expert_type: Literal["prefix", "token"] = "prefix"
        """Whether experts are keys and values of attention, or tokens that join the sequence at their layer."""
        same_key_and_value: bool = False
        """Use one parameter for both the keys and the values of a prefix."""
        selection: Literal["image", "batch"] = "image"
        """Whether each training image selects its own experts, or the batch by majority vote (published). At test each
        image always selects its own."""
        prompt_mask: bool = True
        """Train task t with experts kt to kt + k - 1 only, and by selection once the pool is used up."""
        shared_pool: bool = True
        """Start the experts of task t as a copy of those of task t - 1."""
        protect: Literal["keys", "keys+values"] = "keys"
        """What a projection protects of a prefix: its keys, by the attention queries of old images (the paper), or also
        its values, by the attention weights of old images. With both, the attention output of old images stays."""

        def __post_init__(self) -> None:
            for name in ("general_length", "expert_length", "pool_size", "top_k"):
                if getattr(self, name) < 1:
                    raise ValueError(f"expected method.{name} of at least 1, got {getattr(self, name)}")
            if self.top_k > self.pool_size:
                raise ValueError(
                    f"expected method.top_k of at most method.pool_size {self.pool_size}, got {self.top_k}"
                )
            layers = self.general_layers + self.expert_layers
            if len(set(layers)) < len(layers) or not self.expert_layers:
                raise ValueError(f"expected method.expert_layers, and each layer at most once in them and in"
                                 f" method.general_layers {self.general_layers}, got {self.expert_layers}")  # fmt: skip

        def build(self, backbone: Backbone, class_names: Sequence[str], generator: torch.Generator) -> DualPrompt:
            """Return an untrained DualPrompt."""
            return DualPrompt(self, backbone, len(class_names), generator)

    def __init__(self, config: DualPrompt.Config, backbone: Backbone, classes: int, generator: torch.Generator) -> None:
        super().__init__(backbone, linear_head(backbone.width, classes, generator))
        self.config = config
        if not all(0 <= layer < backbone.depth for layer in config.general_layers + config.expert_layers):
            raise ValueError(f"expected layers between 0 and {backbone.depth - 1}, the last of this model, got"
                             f" {config.general_layers} and {config.expert_layers}")  # fmt: skip
        heads, width = backbone.heads, backbone.width // backbone.heads

        def prefixes(size: int, length: int) -> PrefixPool:
            return PrefixPool(size, length, heads, width, generator=generator, shared=config.same_key_and_value)

        def expert() -> PrefixPool | TokenPool:
            if config.expert_type == "token":
                return TokenPool(config.pool_size, config.expert_length, backbone.width, generator=generator)
            return prefixes(config.pool_size, config.expert_length)

        self.general = nn.ModuleDict(
            {str(layer): prefixes(1, config.general_length) for layer in config.general_layers}
        )
        self.experts = nn.ModuleDict({str(layer): expert() for layer in config.expert_layers})
        self.key = nn.Parameter(torch.empty(config.pool_size, backbone.width).uniform_(-1, 1, generator=generator))

    def begin_task(self, task: Task) -> None:
        """Copy the experts of the last task, if `shared_pool`."""
        if self.config.shared_pool:
            for parameter in self.experts.parameters():
                copy_previous_slot(parameter, task.index, self.config.top_k)

    def selected_prompts(self, query: Tensor) -> Tensor:
        """See `Method.selected_prompts`."""
        return selection_mask(
            select_prompts(cosine_similarity(query, self.key), self.config.top_k), self.config.pool_size
        )

    def features(self, images: Tensor, query: Tensor | None = None, *, by_vote: bool = False) -> Tensor:
        """Return CLS; see `Method.features`."""
        query = self.query(images) if query is None else query
        return self._read(
            images, select_prompts(cosine_similarity(query, self.key), self.config.top_k, by_vote=by_vote)
        )

    @torch.no_grad()
    def prepare_batch(self, images: Tensor, task: Task) -> dict[str, Tensor]:
        """Return the queries `(B, D)` and the `indices (B, k)` of the selected experts."""
        query = self.query(images)
        slot = task.index if self.config.prompt_mask else None
        by_vote = self.config.selection == "batch"
        indices = select_prompts(cosine_similarity(query, self.key), self.config.top_k, slot=slot, by_vote=by_vote)
        return {"query": query, "indices": indices}

    def loss(self, images: Tensor, labels: Tensor, task: Task, prepared: dict[str, Tensor] | None = None) -> Tensor:
        """Return the cross-entropy over the classes of `task`, minus the weighted similarity of the selected keys."""
        prepared = prepared or self.prepare_batch(images, task)
        selection = Selection(prepared["indices"], cosine_similarity(prepared["query"], self.key))
        logits = mask_logits(self.head(self._read(images, selection.indices)), task.classes)
        return F.cross_entropy(logits, labels) - self.config.pull * selection.key_similarity

    def protected(self) -> dict[str, ProtectedParameter]:
        """Return the keys of the experts, and by layer the keys of prefixes and, if asked for, values; or tokens."""
        spaces = {"keys": ProtectedParameter(self.key, role="key")}
        for name, _, pool in self._pools():
            if isinstance(pool, TokenPool):
                spaces[name] = ProtectedParameter(pool.tokens)
            else:
                spaces[f"{name} keys"] = ProtectedParameter(pool.keys)
                if self.config.protect == "keys+values":
                    spaces[f"{name} values"] = ProtectedParameter(pool.values, axis=-2, role="value")
        return spaces

    @torch.no_grad()
    def activations(self, images: Tensor, query: Tensor | None = None) -> dict[str, ProtectedInputs]:
        """Return the attention queries of each layer by head, the attention weights of prefixes, and the image queries.

        The attention output of an old query q stays if the prefix keys move by `q dk^T = 0`, which keeps its weights S,
        and the prefix values by `S dv = 0`. Keys are protected for all old images, as in the paper; the values of an
        expert for the images that selected it.
        """
        query = self.query(images) if query is None else query
        indices = select_prompts(cosine_similarity(query, self.key), self.config.top_k)
        prompts, prefixes = self._inputs(indices)
        traces = self.backbone.trace(images, {*prompts, *prefixes}, prompts, prefixes)
        rows = {"keys": ProtectedInputs(query.unsqueeze(1))}
        for name, layer, pool in self._pools():
            trace = traces[layer]
            if isinstance(pool, TokenPool):
                rows[name] = ProtectedInputs(trace.tokens, prompts[layer])
            else:
                rows[f"{name} keys"] = ProtectedInputs(trace.queries)
                if self.config.protect == "keys+values":
                    assert trace.prompt_attention is not None
                    rows[f"{name} values"] = ProtectedInputs(
                        scatter_by_prompt(trace.prompt_attention, indices, len(pool.keys))
                    )
        return rows

    def _pools(self) -> Iterator[tuple[str, int, PrefixPool | TokenPool]]:
        """Yield the name, layer and pool of each layer with prompts."""
        for kind, pools in (("general", self.general), ("expert", self.experts)):
            for layer, pool in pools.items():
                assert isinstance(pool, PrefixPool | TokenPool)
                yield f"{kind} {layer}", int(layer), pool

    def _inputs(self, indices: Tensor) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """Return by layer the tokens, and the prefixes, of images that selected the experts `indices (B, k)`."""
        prompts, prefixes = {}, {}
        for _, layer, pool in self._pools():
            if isinstance(pool, TokenPool):
                prompts[layer] = pool(indices)
            else:
                prefixes[layer] = pool(indices if len(pool.keys) > 1 else torch.zeros_like(indices[:, :1]))
        return prompts, prefixes

    def _read(self, images: Tensor, indices: Tensor) -> Tensor:
        prompts, prefixes = self._inputs(indices)
        cls: Tensor = self.backbone(images, prompts, prefixes, num_tokens=1)[:, 0]
        return cls
