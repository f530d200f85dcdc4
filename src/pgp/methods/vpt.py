"""VPT-Deep (Jia et al., ECCV 2022): learned tokens of each block, with the conditions of NSP2 for protecting them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pgp.backbones.base import Backbone
from pgp.methods.base import Method, linear_head, mask_logits
from pgp.scenario import Task
from pgp.subspace import ProtectedInputs, ProtectedParameter


class VPT(Method):
    """L learned tokens before those of the image in each block; all tasks share them.

    The output of a block for its prompts is dropped, so they act through their keys and values alone, and nothing else
    of them is computed. The features of old images stay if attention keeps its weights S, `Q W_k dP^T = 0` (affinity),
    and its sum over the prompts, `S dP = 0` (aggregation). These are the two conditions of NSP2 (Lu et al., NeurIPS
    2024); they are linear as long as the standard deviations by which LayerNorm divides the prompts stay.
    Differs from NSP2: the rows S are divided by the deviation of each prompt, so that aggregation is exact if prompts
    have different deviations; and the penalty leaves means free, which LayerNorm subtracts anyway.
    """

    uses_query = False

    @dataclass(frozen=True)
    class Config(Method.Config):
        """How many prompts there are, and what a projection protects of them."""

        tag = "vpt"

        length: int = 10
        """Prompts of a block, L."""
        layers: tuple[int, ...] | None = None
        """Blocks with prompts, counted from 0. If None, all."""
        protect: Literal["tokens", "affinity", "affinity+aggregation"] = "tokens"
        """What updates of the prompts must be orthogonal to: the tokens of old images in that block (PGP); the
        directions that change their attention scores; or these, and the old attention weights along the prompts
        (NSP2)."""
        prompts_after_norm: bool = False
        """Learn the prompts behind the block's LayerNorm instead of before it. Their deviations then cannot change, so
        affinity and aggregation protect exactly."""
        norm_penalty: float = 0.0
        """Weight of the penalty on changes of each prompt's LayerNorm deviation since the last task (NSP2)."""

        def __post_init__(self) -> None:
            if self.length < 1 or self.norm_penalty < 0:
                raise ValueError(f"expected method.length of at least 1 and method.norm_penalty of at least 0, got"
                                 f" {self.length} and {self.norm_penalty}")  # fmt: skip
            if self.prompts_after_norm and self.norm_penalty:
                raise ValueError("expected method.norm_penalty 0 beside behind_norm: there is no norm to hold")
            if self.layers is not None and (not self.layers or len(set(self.layers)) < len(self.layers)):
                raise ValueError(f"expected method.layers with each layer once, got {self.layers}")

        def build(self, backbone: Backbone, class_names: Sequence[str], generator: torch.Generator) -> VPT:
            """Return untrained deep prompts."""
            return VPT(self, backbone, len(class_names), generator)

    deviations: Tensor
    """LayerNorm deviations of the prompts of each block at the end of the last task, `(layers, L)`; 0 before that."""

    def __init__(self, config: VPT.Config, backbone: Backbone, classes: int, generator: torch.Generator) -> None:
        super().__init__(backbone, linear_head(backbone.width, classes, generator))
        self.config = config
        self.layers = range(backbone.depth) if config.layers is None else config.layers
        if strange := [layer for layer in self.layers if not 0 <= layer < backbone.depth]:
            raise ValueError(f"expected method.layers between 0 and {backbone.depth - 1}, the last of this model, got"
                             f" {strange}")  # fmt: skip
        reach, shape = math.sqrt(3 / backbone.width), (config.length, backbone.width)
        self.prompts = nn.ParameterList()
        for layer in self.layers:
            tokens = torch.empty(shape).uniform_(-reach, reach, generator=generator)
            if config.prompts_after_norm:
                tokens = backbone.apply_norm(layer, tokens)[0].detach().float()
            self.prompts.append(nn.Parameter(tokens))
        self.register_buffer("deviations", torch.zeros(len(self.layers), config.length))

    def features(self, images: Tensor, query: Tensor | None = None, *, by_vote: bool = False) -> Tensor:
        """Return CLS; see `Method.features`."""
        cls: Tensor = self.backbone(images, prefixes=self._prefixes(len(images)), num_tokens=1)[:, 0]
        return cls

    def loss(self, images: Tensor, labels: Tensor, task: Task, prepared: dict[str, Tensor] | None = None) -> Tensor:
        """Return the cross-entropy over the classes of `task`, plus the penalty on changed deviations."""
        loss = F.cross_entropy(mask_logits(self(images), task.classes), labels)
        if self.config.norm_penalty:
            moved = torch.stack([deviation for _, deviation in self._normed()]) - self.deviations
            loss = loss + self.config.norm_penalty * (moved.abs() * (self.deviations > 0)).sum()
        return loss

    @torch.no_grad()
    def end_task(self, task: Task) -> None:
        """Store the deviations, for the penalty."""
        super().end_task(task)
        self.deviations.copy_(torch.stack([deviation for _, deviation in self._normed()]))

    def protected(self) -> dict[str, ProtectedParameter]:
        """Return the prompts of each block, and again along their other axis if `protect` names aggregation."""
        spaces = {f"prompts {layer}": ProtectedParameter(prompts) for layer, prompts in self._each()}
        if self.config.protect == "affinity+aggregation":
            spaces |= {f"shares {layer}": ProtectedParameter(prompts, -2, "value") for layer, prompts in self._each()}
        return spaces

    @torch.no_grad()
    def activations(self, images: Tensor, query: Tensor | None = None) -> dict[str, ProtectedInputs]:
        """Return by block its tokens and prompts, or the queries of its heads, and the attention weights of prompts."""
        traces = self.backbone.trace(images, set(self.layers), prefixes=self._prefixes(len(images)))
        rows = {}
        for (layer, prompts), (_, deviation) in zip(self._each(), self._normed(), strict=True):
            trace = traces[layer]
            if self.config.protect == "tokens":
                behind = self.config.prompts_after_norm
                tokens = self.backbone.apply_norm(layer, trace.tokens)[0] if behind else trace.tokens
                rows[f"prompts {layer}"] = ProtectedInputs(tokens, prompts.expand(len(images), -1, -1))
                continue
            through = self.backbone.affinity_maps(layer, moves="normed" if self.config.prompts_after_norm else "token")
            rows[f"prompts {layer}"] = ProtectedInputs(trace.queries, head_maps=through)
            if self.config.protect == "affinity+aggregation":
                assert trace.prompt_attention is not None
                rows[f"shares {layer}"] = ProtectedInputs(
                    (trace.prompt_attention / deviation).flatten(1, 2)
                )  # (B, H * N, L)
        return rows

    def _each(self) -> list[tuple[int, nn.Parameter]]:
        return list(zip(self.layers, self.prompts, strict=True))

    def _normed(self) -> list[tuple[Tensor, Tensor]]:
        """Return by layer the prompts behind the norm and their deviations `(L,)`, 1 if they are learned there."""
        if self.config.prompts_after_norm:
            return [(prompts, torch.ones_like(prompts[:, 0])) for prompts in self.prompts]
        return [self.backbone.apply_norm(layer, prompts) for layer, prompts in self._each()]

    def _prefixes(self, count: int) -> dict[int, Tensor]:
        """Return by layer the keys and values for `count` images, `(count, 2, H, L, d)`."""
        made = zip(self.layers, self._normed(), strict=True)
        return {
            layer: self.backbone.make_prefix(layer, tokens).expand(count, -1, -1, -1, -1) for layer, (tokens, _) in made
        }
