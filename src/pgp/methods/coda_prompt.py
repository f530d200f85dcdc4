"""CODA-Prompt (Smith et al., CVPR 2023): prefixes composed of components, weighted by attention to the query."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pgp.backbones.base import Backbone, Trace
from pgp.methods.base import Method, linear_head, mask_logits
from pgp.rng import make_generator
from pgp.scenario import Task
from pgp.subspace import ProtectedInputs, ProtectedParameter, to_float64

NONE = slice(0, 0)
"""No components."""


class CODAPrompt(Method):
    """Each image gets a weighted sum of M prefix components `P_m` in some layers.

    The weight of a component is `cos(q * A_m, K_m)`, with the query q of the image (CLS of the frozen encoder), an
    attention vector A_m and a key K_m, both learned. There is no selection, so all of it is trained end to end.
    Each task learns some of the components; those of earlier tasks are frozen, and those of later tasks are not used.
    New components begin orthonormal to earlier ones, and a penalty keeps components orthonormal.
    """

    @dataclass(frozen=True)
    class Config(Method.Config):
        """Settings of the published method; the defaults are its values."""

        tag = "coda"
        allows_weight_decay = False

        layers: tuple[int, ...] = (0, 1, 2, 3, 4)
        """Layers with prefixes, counted from 0."""
        length: int = 4
        """Length of a prefix in tokens, L. The paper counts its keys and values together, 8."""
        pool_size: int = 100
        """Number of components of a layer, M."""
        per_task: int = 10
        """Number of components that each task learns. When all are learned, later tasks train only the head."""
        penalty: float = 0.1
        """Weight of the orthogonality penalty `|X X^T - I|^2`, for X the components, attention vectors and keys."""
        protect: Literal["keys", "keys+values"] = "keys"
        """Which part of the components a projection protects. keys: their keys, with the attention queries of old
        images as inputs. keys+values: also their values, with the attention weights of old images as inputs; the
        attention output of old images then stays the same."""

        def __post_init__(self) -> None:
            if self.length < 1 or not 1 <= self.per_task <= self.pool_size:
                raise ValueError("expected method.length of at least 1, and method.per_task between 1 and pool_size"
                                 f" {self.pool_size}, got {self.length} and {self.per_task}")  # fmt: skip
            if not self.penalty >= 0:
                raise ValueError(f"expected method.penalty of at least 0, got {self.penalty}")
            if not self.layers or len(set(self.layers)) < len(self.layers):
                raise ValueError(f"expected method.layers with at least one layer, each once, got {self.layers}")

        def build(self, backbone: Backbone, class_names: Sequence[str], generator: torch.Generator) -> CODAPrompt:
            """Return untrained components."""
            return CODAPrompt(self, backbone, len(class_names), generator)

    used: Tensor
    """Number of components of the tasks so far, `()`, for checkpoints."""
    num_used: int = 0
    """The same number, for which the CPU need not wait."""

    def __init__(self, config: CODAPrompt.Config, backbone: Backbone, classes: int, generator: torch.Generator) -> None:
        super().__init__(backbone, linear_head(backbone.width, classes, generator))
        self.config = config
        backbone.check_layers(config.layers)
        if config.pool_size > backbone.width:
            raise ValueError(f"expected method.pool_size of at most {backbone.width}, the width of this model, got"
                             f" {config.pool_size}: more components cannot be orthogonal")  # fmt: skip
        self.seed = int(torch.randint(2**62, (), generator=generator))
        self.pools = nn.ModuleDict({str(layer): ComponentPool(config, backbone) for layer in config.layers})
        self.register_buffer("used", torch.tensor(0))

    @torch.no_grad()
    def begin_task(self, task: Task) -> None:
        """Draw the components of the task, orthonormal to those of earlier tasks."""
        self.num_used = min((task.index + 1) * self.config.per_task, self.config.pool_size)
        self.used.fill_(self.num_used)
        for layer, pool in self._pools():
            pool.draw(self._components_of(task), make_generator(self.seed, "coda", layer, task.index))

    def skip_task(self, task: Task) -> None:
        """Do nothing: there are no new components."""

    def load_trainable_state_dict(self, state: dict[str, Tensor]) -> None:
        """See `Method.load_trainable_state_dict`."""
        super().load_trainable_state_dict(state)
        self.num_used = int(self.used)

    def _components_of(self, task: Task) -> slice:
        """Return the components that `task` trains; none, if the pool was used up or the task was skipped."""
        stop = min((task.index + 1) * self.config.per_task, self.num_used)
        return slice(min(task.index * self.config.per_task, stop), stop)

    def features(self, images: Tensor, query: Tensor | None = None, *, by_vote: bool = False) -> Tensor:
        """Return the CLS token, `(B, D)`; see `Method.features`."""
        query = self.query(images) if query is None else query
        return self._prompted_features(images, self._prefixes(query))

    def loss(self, images: Tensor, labels: Tensor, task: Task, prepared: dict[str, Tensor] | None = None) -> Tensor:
        """Return the cross-entropy over the classes of `task`, plus the orthogonality penalty."""
        query = (prepared or self.prepare_batch(images, task))["query"]
        learned = self._components_of(task)
        features = self._prompted_features(images, self._prefixes(query, learned))
        cross_entropy = F.cross_entropy(mask_logits(self.head_logits(features), task.classes), labels)
        penalties = [pool.penalty(learned) for _, pool in self._pools()]
        return cross_entropy + self.config.penalty * torch.stack(penalties).sum()

    def protected(self) -> dict[str, ProtectedParameter]:
        """Return the keys of the components of each layer, and their values if asked for."""
        protected = {}
        for layer, pool in self._pools():
            protected[f"components {layer} keys"] = ProtectedParameter(pool.prefix_keys)
            if self.config.protect == "keys+values":
                protected[f"components {layer} values"] = ProtectedParameter(pool.prefix_values, axis=-2, role="value")
        return protected

    @torch.no_grad()
    def activations(self, images: Tensor, query: Tensor | None = None) -> dict[str, ProtectedInputs]:
        """Return attention queries `(B, H, N, D/H)`, and attention weights `(B, H, N, L)` of the prefixes."""
        query = self.query(images) if query is None else query
        return self._inputs(self.backbone.trace(images, set(self.config.layers), prefixes=self._prefixes(query)))

    @torch.no_grad()
    def activations_and_features(
        self, images: Tensor, query: Tensor | None = None
    ) -> tuple[dict[str, ProtectedInputs], Tensor]:
        """See `Method.activations_and_features`."""
        prefixes = self._prefixes(self.query(images) if query is None else query)
        cls, traces = self.backbone.encode_with_traces(images, set(self.config.layers), prefixes=prefixes)
        return self._inputs(traces), cls

    def _inputs(self, traces: dict[int, Trace]) -> dict[str, ProtectedInputs]:
        inputs = {}
        for layer, trace in traces.items():
            inputs[f"components {layer} keys"] = ProtectedInputs(trace.queries)
            if self.config.protect == "keys+values":
                inputs[f"components {layer} values"] = ProtectedInputs(trace.prompt_attention())
        return inputs

    def _pools(self) -> list[tuple[int, ComponentPool]]:
        return [(int(layer), pool) for layer, pool in self.pools.items() if isinstance(pool, ComponentPool)]

    def _prefixes(self, query: Tensor, learned: slice = NONE) -> dict[int, Tensor]:
        """Return the keys and values of the prefixes for queries `(B, D)`, `(B, 2, H, L, D/H)`, by layer.

        Only the components `learned` get gradients.
        """
        return {layer: pool(query, self.num_used, learned) for layer, pool in self._pools()}

    def _prompted_features(self, images: Tensor, prefixes: dict[int, Tensor]) -> Tensor:
        """Return the CLS token of images with these prefixes, `(B, D)`."""
        cls: Tensor = self.backbone(images, prefixes=prefixes, num_tokens=1)[:, 0]  # (B, D)
        return cls


class ComponentPool(nn.Module):
    """The components of one layer: M prefixes with an attention vector and a key each."""

    def __init__(self, config: CODAPrompt.Config, backbone: Backbone) -> None:
        super().__init__()
        size, heads = config.pool_size, backbone.heads
        shape = (size, heads, config.length, backbone.width // heads)
        self.prefix_keys, self.prefix_values = nn.Parameter(torch.zeros(shape)), nn.Parameter(torch.zeros(shape))
        self.attention = nn.Parameter(torch.zeros(size, backbone.width))
        self.key = nn.Parameter(torch.zeros(size, backbone.width))

    @torch.no_grad()
    def draw(self, rows: slice, generator: torch.Generator) -> None:
        """Draw the components `rows`, orthonormal to one another and to those before them."""
        for parameter in self.parameters():
            vectors = parameter.flatten(1)
            vectors[rows] = draw_orthonormal(vectors[: rows.start], rows.stop - rows.start, generator)

    def forward(self, query: Tensor, used: int, learned: slice) -> Tensor:
        """Return the weighted sum of the first `used` components, `(B, 2, H, L, d)`, for queries `(B, D)`.

        Only the components `learned` get gradients.
        """
        keys, values, attention, key = (freeze_rows(p[:used], learned) for p in self.parameters())
        attended = F.normalize(query.unsqueeze(1) * attention, dim=-1)  # (B, used, D)
        weights = (attended * F.normalize(key, dim=-1)).sum(-1)  # (B, used)
        prefixes = torch.stack([keys, values], dim=1)  # (used, 2, H, L, d)
        return torch.einsum("bm,mphld->bphld", weights.to(prefixes), prefixes)

    def penalty(self, learned: slice) -> Tensor:
        """Return the sum of `|X X^T - I|^2` over prefixes, attention vectors and keys, each one row of X, as `()`."""
        total = self.key.new_zeros(())
        prefixes = torch.cat([self.prefix_keys.flatten(1), self.prefix_values.flatten(1)], dim=1) / 2**0.5
        for rows in (prefixes, self.attention, self.key):
            rows = freeze_rows(rows[: learned.stop], learned)
            total = total + (rows @ rows.T - torch.eye(len(rows), dtype=rows.dtype, device=rows.device)).square().sum()
        return total


def freeze_rows(parameter: Tensor, learned: slice) -> Tensor:
    """Return `parameter (M, ...)` with gradients for the rows `learned` only."""
    return torch.cat([parameter[: learned.start].detach(), parameter[learned], parameter[learned.stop :].detach()])


def draw_orthonormal(earlier: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Return `count` random orthonormal rows `(count, D)` that are orthogonal to the rows of `earlier (m, D)`.

    >>> rows = draw_orthonormal(torch.eye(4)[:2], 2, torch.Generator().manual_seed(0))
    >>> (rows @ rows.T).round(decimals=5).abs()
    tensor([[1., 0.],
            [0., 1.]])
    >>> rows[:, :2].abs().max() < 1e-6
    tensor(True)
    """
    draws = torch.randn(count, earlier.shape[1], generator=generator).to(earlier)
    rows = to_float64(torch.cat([earlier, draws]))
    orthonormal: Tensor = torch.linalg.qr(rows.T).Q.T
    return orthonormal[len(earlier) :].to(earlier)
