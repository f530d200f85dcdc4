"""L2P, learning to prompt (Wang et al., CVPR 2022): each image selects prompts from a pool by their keys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from pgp.backbones.base import Backbone
from pgp.methods.base import Method, linear_head, mask_logits
from pgp.methods.prompts import (
    PromptPool,
    Selection,
    copy_previous_slot,
    cosine_similarity,
    scatter_by_prompt,
    selection_mask,
)
from pgp.scenario import Task
from pgp.subspace import ProtectedInputs, ProtectedParameter


class L2P(Method):
    """A pool of prompts, from which each image selects those whose keys are most similar to its query.

    The query is the CLS feature of the frozen encoder. The selected prompts are inserted after CLS.
    The loss is the cross-entropy over the task's classes, minus `pull` times the cosine similarity of query and key,
    summed over the selected keys. Both terms are averaged over images.
    """

    selects_prompts = True

    @dataclass(frozen=True)
    class Config(Method.Config):
        """Settings of the published method; the defaults are its values for CIFAR-100."""

        tag = "l2p"

        pool_size: int = 10
        """Number of prompts in the pool, M."""
        length: int = 5
        """Number of tokens of a prompt, L."""
        top_k: int = 5
        """Number of prompts that an image selects, k."""
        pull: float = 0.1
        """Weight of the key-query similarity in the loss (L2P's lambda)."""
        head_type: Literal["prompt", "token", "token+prompt"] = "prompt"
        """Input of the head: the mean of the prompts' output tokens (prompt), CLS (token), or the mean of both
        (token+prompt)."""
        keys: Literal["learned", "mean"] = "learned"
        """Key of a prompt: a parameter of its own (learned), or the mean of the prompt's tokens (mean)."""
        selection: Literal["image", "batch"] = "image"
        """How prompts are selected in training. image: each image selects its own. batch: all images of a batch get the
        prompts that most of them select (as published). At test, each image selects its own, except where --legacy-eval
        and pgp audit say otherwise."""
        prompt_mask: bool = False
        """Give each task k prompts of its own: in training, all images of task t (from 0) use prompts t * k to t * k +
        k - 1. In tasks for which the pool has no prompts left, images select prompts by key, as without this flag. At
        test, images always select by key, from the whole pool."""
        shared_pool: bool = False
        """Before each task t > 0, copy prompts (t - 1) * k to t * k - 1 over the next k prompts; learned keys are not
        copied. With prompt_mask, the prompts of a task thus start as those of the previous task, except that a copy is
        projected as an update is, with projection.apply_to=update. Without prompt_mask, no prompt belongs to a task, so
        this is rarely useful."""
        protect: Literal["tokens", "affinity", "affinity+aggregation"] = "tokens"
        """What prompt updates must be orthogonal to. tokens: tokens of old images at the input of the first block (the
        paper). affinity: directions that change attention scores. affinity+aggregation: also the attention weights of
        the prompts, along the prompt axis. The last two are conditions of NSP2; here, they protect the first block
        only."""

        def __post_init__(self) -> None:
            for name in ("pool_size", "length", "top_k"):
                if getattr(self, name) < 1:
                    raise ValueError(f"expected method.{name} of at least 1, got {getattr(self, name)}")
            if self.top_k > self.pool_size:
                raise ValueError(
                    f"expected method.top_k of at most method.pool_size {self.pool_size}, got {self.top_k}"
                )

        def as_expert(self) -> L2P.Config:
            """See `Method.Config.as_expert`. Each expert has a pool of its own, so nothing is masked or copied."""
            return replace(self, prompt_mask=False, shared_pool=False)

        def build(self, backbone: Backbone, class_names: Sequence[str], generator: torch.Generator) -> L2P:
            """Return an untrained L2P."""
            return L2P(self, backbone, len(class_names), generator)

    def __init__(self, config: L2P.Config, backbone: Backbone, classes: int, generator: torch.Generator) -> None:
        super().__init__(backbone, linear_head(backbone.width, classes, generator))
        self.config = config
        if config.protect != "tokens":
            self.check_affinity((0,))
        self.pool = PromptPool(
            config.pool_size,
            config.length,
            backbone.width,
            top_k=config.top_k,
            keys=config.keys,
            generator=generator,
        )

    def begin_task(self, task: Task) -> None:
        """Copy the prompts of the previous task, if `shared_pool`."""
        if self.config.shared_pool:
            copy_previous_slot(self.pool.prompts, task.index, self.pool.top_k)

    def skip_task(self, task: Task) -> None:
        """Copy nothing: the head is trained with the prompts that images select at test."""

    def selected_prompts(self, query: Tensor) -> Tensor:
        """See `Method.selected_prompts`."""
        return selection_mask(self.pool.select(query).indices, self.config.pool_size)

    def features(self, images: Tensor, query: Tensor | None = None, *, by_vote: bool = False) -> Tensor:
        """See `Method.features`."""
        query = self.query(images) if query is None else query
        return self._prompted_features(images, self.pool.select(query, by_vote=by_vote))

    @torch.no_grad()
    def prepare_batch(self, images: Tensor, task: Task, query: Tensor | None = None) -> dict[str, Tensor]:
        """Return the queries `(B, D)` and the `indices (B, k)` of the selected prompts."""
        query = self.query(images) if query is None else query
        slot = task.index if self.config.prompt_mask and not self.trains_head_only else None
        selection = self.pool.select(query, slot=slot, by_vote=self.config.selection == "batch")
        return {"query": query, "indices": selection.indices}

    def loss(self, images: Tensor, labels: Tensor, task: Task, prepared: dict[str, Tensor] | None = None) -> Tensor:
        """Return the cross-entropy over the classes of `task`, minus the weighted similarity of the selected keys."""
        prepared = prepared or self.prepare_batch(images, task)
        selection = Selection(prepared["indices"], cosine_similarity(prepared["query"], self.pool.key))
        logits = mask_logits(self.head_logits(self._prompted_features(images, selection)), task.classes)
        return F.cross_entropy(logits, labels) - self.config.pull * selection.key_similarity

    def protected(self) -> dict[str, ProtectedParameter]:
        """Return the prompts, and the keys if they are learned.

        With aggregation, the prompts have a second space, `shares`: the prompt axis, with attention weights as inputs.
        """
        protected = {"prompts": ProtectedParameter(self.pool.prompts)}
        if self.config.protect == "affinity+aggregation":
            protected["shares"] = ProtectedParameter(self.pool.prompts, axis=-2, role="value")
        if self.pool.learned_key is not None:
            protected["keys"] = ProtectedParameter(self.pool.learned_key, role="key")
        return protected

    @torch.no_grad()
    def activations(self, images: Tensor, query: Tensor | None = None) -> dict[str, ProtectedInputs]:
        """Return the inputs of the prompts in the first block, and the queries as inputs of the keys.

        If `query` is given, no transformer block is computed, except for the attention scores of the first one if
        `protect` needs them.
        """
        query = self.query(images) if query is None else query
        selection = self.pool.select(query)
        prompts = self.backbone.embed_prompts(self.pool.tokens(selection))  # (B, k * L, D)
        inputs = {
            "prompts": ProtectedInputs(self.backbone.embed(images), prompts),
            "keys": ProtectedInputs(query.unsqueeze(1)),  # (B, 1, D)
        }
        if self.config.protect != "tokens":
            trace = self.backbone.trace(images, {0}, {0: prompts})[0]
            inputs["prompts"] = ProtectedInputs(trace.queries, head_maps=self.backbone.affinity_maps(0, moves="prompt"))
            attention = scatter_by_prompt(trace.prompt_attention(), selection.indices, self.config.pool_size)
            attention = attention / self.backbone.norm_scale(self.pool.prompts)[:, None, None]  # (B, M, H, N, L)
            inputs["shares"] = ProtectedInputs(attention.flatten(2, 3))  # (B, M, H * N, L)
        return {space: inputs[space] for space in self.protected()}

    def _prompted_features(self, images: Tensor, selection: Selection) -> Tensor:
        """Return the features of images with their selected prompts, `(B, D)`."""
        prompts = self.backbone.embed_prompts(self.pool.tokens(selection))  # (B, P, D), P = k * L
        head_type, P = self.config.head_type, prompts.shape[1]
        num_tokens = 1 if head_type == "token" else 1 + P
        tokens = self.backbone(images, {0: prompts}, num_tokens=num_tokens)  # CLS, then prompts
        if head_type == "prompt":
            tokens = tokens[:, 1:]  # (B, P, D)
        features: Tensor = tokens.mean(1)
        return features
