"""VPT-Deep (Jia et al., ECCV 2022): learned tokens in each block, with the conditions of NSP2 to protect them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pgp.backbones.base import Backbone, Trace
from pgp.methods.base import Method, linear_head, mask_logits
from pgp.scenario import Task
from pgp.subspace import ProtectedInputs, ProtectedParameter


class VPT(Method):
    """L learned tokens before those of the image in each block, shared by all tasks.

    A block's outputs for its prompts are dropped, so prompts act only through their keys and values, and only these are
    computed. The features of old images do not change if their attention weights S stay the same, `Q W_k dP^T = 0`
    (affinity), and so does the weighted sum over the prompts, `S dP = 0` (aggregation). These are the two conditions of
    NSP2 (Lu et al., NeurIPS 2024). They are linear as long as the standard deviation by which LayerNorm divides each
    prompt does not change.

    Differs from NSP2 in two points. The attention weights S are divided by the standard deviation of each prompt, so
    that aggregation is exact if prompts have different standard deviations. The penalty does not restrict the means of
    prompts, which LayerNorm subtracts anyway.
    """

    uses_query = False

    @dataclass(frozen=True)
    class Config(Method.Config):
        """Number and position of the prompts, and how a projection protects them."""

        tag = "vpt"

        length: int = 10
        """Number of prompts in a block, L."""
        layers: tuple[int, ...] | None = None
        """Blocks with prompts, counted from 0. If None, all."""
        protect: Literal["tokens", "affinity", "affinity+aggregation"] = "tokens"
        """What prompt updates must be orthogonal to. tokens: tokens of old images at the input of the block (PGP).
        affinity: directions that change attention scores. affinity+aggregation: also the attention weights of the
        prompts, along the prompt axis (NSP2)."""
        prompts_after_norm: bool = False
        """Learn the prompts as they are after the block's LayerNorm instead of before it. Their standard deviations
        then cannot change, so affinity and aggregation protect exactly."""
        norm_penalty: float = 0.0
        """Weight of the penalty on changes of each prompt's standard deviation since the previous task (NSP2)."""

        def __post_init__(self) -> None:
            if self.length < 1 or self.norm_penalty < 0:
                raise ValueError(f"expected method.length of at least 1 and method.norm_penalty of at least 0, got"
                                 f" {self.length} and {self.norm_penalty}")  # fmt: skip
            if self.prompts_after_norm and self.norm_penalty:
                raise ValueError("expected method.norm_penalty 0 with method.prompts_after_norm, got"
                                 f" {self.norm_penalty}: these prompts pass no norm")  # fmt: skip
            if self.layers is not None and (not self.layers or len(set(self.layers)) < len(self.layers)):
                raise ValueError(f"expected method.layers with each layer once, got {self.layers}")

        def as_expert(self) -> VPT.Config:
            """See `Method.Config.as_expert`. Nothing of an old expert changes, so nothing is penalised."""
            return replace(self, norm_penalty=0.0)

        def build(self, backbone: Backbone, class_names: Sequence[str], generator: torch.Generator) -> VPT:
            """Return untrained deep prompts."""
            return VPT(self, backbone, len(class_names), generator)

    deviations: Tensor
    """Standard deviations of the prompts of each block at the end of the previous task, `(layers, L)`; 0 before it."""

    def __init__(self, config: VPT.Config, backbone: Backbone, classes: int, generator: torch.Generator) -> None:
        super().__init__(backbone, linear_head(backbone.width, classes, generator))
        self.config = config
        self.layers = range(backbone.depth) if config.layers is None else config.layers
        backbone.check_layers(self.layers)
        if config.protect != "tokens":
            self.check_affinity(self.layers)
        bound, shape = math.sqrt(3 / backbone.width), (config.length, backbone.width)
        self.prompts = nn.ParameterList()
        for layer in self.layers:
            tokens = torch.empty(shape).uniform_(-bound, bound, generator=generator)
            if config.prompts_after_norm:
                tokens = backbone.apply_norm(layer, tokens)[0].detach().float()
            self.prompts.append(nn.Parameter(tokens))
        self.register_buffer("deviations", torch.zeros(len(self.layers), config.length))

    def features(self, images: Tensor, query: Tensor | None = None, *, by_vote: bool = False) -> Tensor:
        """Return the CLS token, `(B, D)`; see `Method.features`."""
        cls: Tensor = self.backbone(images, prefixes=self._prefixes(images.shape[0]), num_tokens=1)[:, 0]  # (B, D)
        return cls

    def can_learn(self, task: Task) -> bool:
        """See `Method.can_learn`."""
        return len(task.classes) > 1 or self.config.norm_penalty > 0

    def loss(self, images: Tensor, labels: Tensor, task: Task, prepared: dict[str, Tensor] | None = None) -> Tensor:
        """Return the cross-entropy over the classes of `task`, plus the penalty on changed standard deviations."""
        loss = F.cross_entropy(mask_logits(self(images), task.classes), labels)
        if self.config.norm_penalty:
            change = self._current_deviations() - self.deviations  # (layers, L)
            loss = loss + self.config.norm_penalty * (change.abs() * (self.deviations > 0)).sum()
        return loss

    @torch.no_grad()
    def end_task(self, task: Task) -> None:
        """Store the standard deviations of the prompts, for the penalty."""
        super().end_task(task)
        self.deviations.copy_(self._current_deviations())

    def protected(self) -> dict[str, ProtectedParameter]:
        """Return the prompts of each block; with aggregation, a second time, along the prompt axis (`shares`)."""
        protected = {f"prompts {layer}": ProtectedParameter(prompts) for layer, prompts in self._prompts_by_layer()}
        if self.config.protect == "affinity+aggregation":
            for layer, prompts in self._prompts_by_layer():
                protected[f"shares {layer}"] = ProtectedParameter(prompts, axis=-2, role="value")
        return protected

    @torch.no_grad()
    def activations(self, images: Tensor, query: Tensor | None = None) -> dict[str, ProtectedInputs]:
        """Return the inputs of the prompts of each block: tokens, or queries and attention weights.

        Which of them depends on `protect`.
        """
        traces = self.backbone.trace(images, set(self.layers), prefixes=self._prefixes(len(images)))
        return self._inputs(len(images), traces)

    @torch.no_grad()
    def activations_and_features(
        self, images: Tensor, query: Tensor | None = None
    ) -> tuple[dict[str, ProtectedInputs], Tensor]:
        """See `Method.activations_and_features`."""
        prefixes = self._prefixes(len(images))
        cls, traces = self.backbone.encode_with_traces(images, set(self.layers), prefixes=prefixes)
        return self._inputs(len(images), traces), cls

    def _inputs(self, count: int, traces: dict[int, Trace]) -> dict[str, ProtectedInputs]:
        """Return the inputs of the prompts of each block for `count` images."""
        after_norm = self.config.prompts_after_norm
        inputs = {}
        for (layer, prompts), (_, deviation) in zip(self._prompts_by_layer(), self._normed_prompts(), strict=True):
            trace = traces[layer]
            if self.config.protect == "tokens":
                tokens = self.backbone.apply_norm(layer, trace.tokens)[0] if after_norm else trace.tokens
                inputs[f"prompts {layer}"] = ProtectedInputs(tokens, prompts.expand(count, -1, -1))
                continue
            head_maps = self.backbone.affinity_maps(layer, moves="normed" if after_norm else "token")
            inputs[f"prompts {layer}"] = ProtectedInputs(trace.queries, head_maps=head_maps)
            if self.config.protect == "affinity+aggregation":
                attention = trace.prompt_attention() / deviation  # (B, H, N, L)
                inputs[f"shares {layer}"] = ProtectedInputs(attention.flatten(1, 2))  # (B, H * N, L)
        return inputs

    def _prompts_by_layer(self) -> list[tuple[int, nn.Parameter]]:
        return list(zip(self.layers, self.prompts, strict=True))

    def _normed_prompts(self) -> list[tuple[Tensor, Tensor]]:
        """Return the prompts of each layer after the norm, `(L, D)`, and their standard deviations before it, `(L,)`.

        The standard deviations are 1 for prompts that are learned after the norm.
        """
        if self.config.prompts_after_norm:
            return [(prompts, torch.ones_like(prompts[:, 0])) for prompts in self.prompts]
        return [self.backbone.apply_norm(layer, prompts) for layer, prompts in self._prompts_by_layer()]

    def _current_deviations(self) -> Tensor:
        """Return the standard deviations of the prompts as they are now, `(layers, L)`."""
        return torch.stack([deviation for _, deviation in self._normed_prompts()])

    def _prefixes(self, count: int) -> dict[int, Tensor]:
        """Return keys and values of the prompts for `count` images, `(count, 2, H, L, d)`, by layer."""
        prefixes = {}
        for layer, (tokens, _) in zip(self.layers, self._normed_prompts(), strict=True):
            prefixes[layer] = self.backbone.make_prefix(layer, tokens).expand(count, -1, -1, -1, -1)
        return prefixes
