"""DualPrompt (Wang et al., ECCV 2022): attention prefixes, general ones for all tasks and experts selected by key.

A general prefix is the paper's G-prompt, an expert its E-prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pgp.backbones.base import Backbone, Trace
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
    """General prefixes in early layers, and in later layers the experts that an image selects by key.

    The query is the CLS feature of the frozen encoder.
    The loss is the cross-entropy over the task's classes, minus `pull` times the cosine similarity of query and key,
    summed over the selected keys. Both terms are averaged over images.

    Differs from the published code: every image gets the keys and values of its own experts. The published reshape
    mixes those of different images of a batch.
    """

    selects_prompts = True

    @dataclass(frozen=True)
    class Config(Method.Config):
        """Settings of the published method; the defaults are its values for CIFAR-100."""

        tag = "dualprompt"

        general_layers: tuple[int, ...] = (0, 1)
        """Layers with a general prefix, which all tasks share, counted from 0."""
        general_length: int = 5
        """Length of a general prefix in tokens, L."""
        expert_layers: tuple[int, ...] = (2, 3, 4)
        """Layers with expert prefixes, counted from 0."""
        expert_length: int = 5
        """Length of an expert in tokens, L."""
        pool_size: int = 10
        """Number of experts, M. Each has one key for all layers."""
        top_k: int = 1
        """Number of experts that an image selects, k."""
        pull: float = 1.0
        """Weight of the key-query similarity in the loss."""
        expert_type: Literal["prefix", "token"] = "prefix"
        """What an expert is. prefix: keys and values of attention. token: tokens that are inserted before its layer."""
        same_key_and_value: bool = False
        """Use one parameter for both the keys and the values of a prefix."""
        selection: Literal["image", "batch"] = "image"
        """How experts are selected in training. image: each image selects its own. batch: all images of a batch get the
        experts that most of them select (as published). At test, each image selects its own, except where --legacy-eval
        and pgp audit say otherwise."""
        prompt_mask: bool = True
        """Give each task k experts of its own: in training, all images of task t (from 0) use experts t * k to t * k +
        k - 1. In tasks for which the pool has no experts left, images select experts by key, as without this flag. At
        test, images always select by key, from the whole pool."""
        shared_pool: bool = True
        """Before each task t > 0, copy experts (t - 1) * k to t * k - 1 over the next k experts; keys are not copied.
        With prompt_mask, the experts of a task thus start as those of the previous task, except that a copy is
        projected as an update is, with projection.apply_to=update. Without prompt_mask, no expert belongs to a task, so
        this is rarely useful."""
        protect: Literal["keys", "keys+values"] = "keys"
        """Which part of a prefix a projection protects. keys: its keys, with the attention queries of old images as
        inputs (the paper). keys+values: also its values, with the attention weights of old images as inputs; the
        attention output of old images then stays the same."""

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

        def as_expert(self) -> DualPrompt.Config:
            """Return settings with as many expert prefixes as an image selects; see `Method.Config.as_expert`."""
            return replace(self, pool_size=self.top_k, prompt_mask=False, shared_pool=False)

        def build(self, backbone: Backbone, class_names: Sequence[str], generator: torch.Generator) -> DualPrompt:
            """Return an untrained DualPrompt."""
            return DualPrompt(self, backbone, len(class_names), generator)

    def __init__(self, config: DualPrompt.Config, backbone: Backbone, classes: int, generator: torch.Generator) -> None:
        super().__init__(backbone, linear_head(backbone.width, classes, generator))
        self.config = config
        backbone.check_layers(config.general_layers + config.expert_layers)
        heads, width = backbone.heads, backbone.width // backbone.heads

        def prefix_pool(size: int, length: int) -> PrefixPool:
            return PrefixPool(size, length, heads, width, generator=generator, shared=config.same_key_and_value)

        def expert_pool() -> PrefixPool | TokenPool:
            if config.expert_type == "token":
                return TokenPool(config.pool_size, config.expert_length, backbone.width, generator=generator)
            return prefix_pool(config.pool_size, config.expert_length)

        self.general = nn.ModuleDict(
            {str(layer): prefix_pool(1, config.general_length) for layer in config.general_layers}
        )
        self.experts = nn.ModuleDict({str(layer): expert_pool() for layer in config.expert_layers})
        self.key = nn.Parameter(torch.empty(config.pool_size, backbone.width).uniform_(-1, 1, generator=generator))

    def begin_task(self, task: Task) -> None:
        """Copy the experts of the previous task, if `shared_pool`."""
        if self.config.shared_pool:
            for parameter in self.experts.parameters():
                copy_previous_slot(parameter, task.index, self.config.top_k)

    def skip_task(self, task: Task) -> None:
        """Copy nothing: the head is trained with the experts that images select at test."""

    def selected_prompts(self, query: Tensor) -> Tensor:
        """See `Method.selected_prompts`."""
        indices = select_prompts(cosine_similarity(query, self.key), self.config.top_k)
        return selection_mask(indices, self.config.pool_size)

    def features(self, images: Tensor, query: Tensor | None = None, *, by_vote: bool = False) -> Tensor:
        """Return the CLS token, `(B, D)`; see `Method.features`."""
        query = self.query(images) if query is None else query
        indices = select_prompts(cosine_similarity(query, self.key), self.config.top_k, by_vote=by_vote)
        return self._prompted_features(images, indices)

    @torch.no_grad()
    def prepare_batch(self, images: Tensor, task: Task, query: Tensor | None = None) -> dict[str, Tensor]:
        """Return the queries `(B, D)` and the `indices (B, k)` of the selected experts."""
        query = self.query(images) if query is None else query
        slot = task.index if self.config.prompt_mask and not self.trains_head_only else None
        by_vote = self.config.selection == "batch"
        indices = select_prompts(cosine_similarity(query, self.key), self.config.top_k, slot=slot, by_vote=by_vote)
        return {"query": query, "indices": indices}

    def loss(self, images: Tensor, labels: Tensor, task: Task, prepared: dict[str, Tensor] | None = None) -> Tensor:
        """Return the cross-entropy over the classes of `task`, minus the weighted similarity of the selected keys."""
        prepared = prepared or self.prepare_batch(images, task)
        selection = Selection(prepared["indices"], cosine_similarity(prepared["query"], self.key))
        logits = mask_logits(self.head_logits(self._prompted_features(images, selection.indices)), task.classes)
        return F.cross_entropy(logits, labels) - self.config.pull * selection.key_similarity

    def shared_parameters(self) -> list[nn.Parameter]:
        """Return the general prefixes."""
        return list(self.general.parameters())

    def protected(self) -> dict[str, ProtectedParameter]:
        """Return the keys for selecting experts, and the protected prefixes or tokens of each layer."""
        protected = {"keys": ProtectedParameter(self.key, role="key")}
        for name, _, pool in self._pools():
            if isinstance(pool, TokenPool):
                protected[name] = ProtectedParameter(pool.tokens)
            else:
                protected[f"{name} keys"] = ProtectedParameter(pool.keys)
                if self.config.protect == "keys+values":
                    protected[f"{name} values"] = ProtectedParameter(pool.values, axis=-2, role="value")
        return protected

    @torch.no_grad()
    def activations(self, images: Tensor, query: Tensor | None = None) -> dict[str, ProtectedInputs]:
        """Return the inputs of the protected parameters: image queries, attention queries and attention weights.

        The attention output of an old query q stays the same if the prefix keys change by dk with `q dk^T = 0`, which
        keeps its attention weights S, and the prefix values by dv with `S dv = 0`. Keys are protected for all old
        images, as in the paper. The values of an expert are protected for the images that selected it.
        """
        query = self.query(images) if query is None else query
        indices = select_prompts(cosine_similarity(query, self.key), self.config.top_k)
        prompts, prefixes = self._prompts_and_prefixes(indices)
        traces = self.backbone.trace(images, {*prompts, *prefixes}, prompts, prefixes)
        return self._inputs(query, indices, prompts, traces)

    @torch.no_grad()
    def activations_and_features(
        self, images: Tensor, query: Tensor | None = None
    ) -> tuple[dict[str, ProtectedInputs], Tensor]:
        """See `Method.activations_and_features`."""
        query = self.query(images) if query is None else query
        indices = select_prompts(cosine_similarity(query, self.key), self.config.top_k)
        prompts, prefixes = self._prompts_and_prefixes(indices)
        cls, traces = self.backbone.encode_with_traces(images, {*prompts, *prefixes}, prompts, prefixes)
        return self._inputs(query, indices, prompts, traces), cls

    def _inputs(
        self, query: Tensor, indices: Tensor, prompts: dict[int, Tensor], traces: dict[int, Trace]
    ) -> dict[str, ProtectedInputs]:
        """Return the inputs for queries `(B, D)` that select the experts `indices (B, k)`."""
        inputs = {"keys": ProtectedInputs(query.unsqueeze(1))}  # (B, 1, D)
        for name, layer, pool in self._pools():
            trace = traces[layer]
            if isinstance(pool, TokenPool):
                inputs[name] = ProtectedInputs(trace.tokens, prompts[layer])
            else:
                inputs[f"{name} keys"] = ProtectedInputs(trace.queries)
                if self.config.protect == "keys+values":
                    attention = scatter_by_prompt(trace.prompt_attention(), indices, len(pool.keys))  # (B, M, H, N, L)
                    inputs[f"{name} values"] = ProtectedInputs(attention)
        return inputs

    def _pools(self) -> Iterator[tuple[str, int, PrefixPool | TokenPool]]:
        """Yield the name, layer and pool of each layer with prompts."""
        for kind, pools in (("general", self.general), ("expert", self.experts)):
            for layer, pool in pools.items():
                assert isinstance(pool, PrefixPool | TokenPool)
                yield f"{kind} {layer}", int(layer), pool

    def _prompts_and_prefixes(self, indices: Tensor) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """Return prompts and prefixes, each by layer, for images that selected the experts `indices (B, k)`."""
        prompts, prefixes = {}, {}
        for _, layer, pool in self._pools():
            if isinstance(pool, TokenPool):
                prompts[layer] = pool(indices)
            else:
                prefixes[layer] = pool(indices if len(pool.keys) > 1 else torch.zeros_like(indices[:, :1]))
        return prompts, prefixes

    def _prompted_features(self, images: Tensor, indices: Tensor) -> Tensor:
        """Return the CLS token of images that selected the experts `indices (B, k)`, `(B, D)`."""
        prompts, prefixes = self._prompts_and_prefixes(indices)
        cls: Tensor = self.backbone(images, prompts, prefixes, num_tokens=1)[:, 0]  # (B, D)
        return cls
