"""The basis of the published PGP code, for reproducing published numbers. It does not protect old tasks.

The published code samples as many images as the model is wide, and uses their principal-component *scores* as if they
were directions in feature space. The two have the same size and nothing else in common: the basis changes with the
order of the images. It also measures energy on the fourth power of singular values, so its rank is tiny. Use
`orthogonal` to protect old tasks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pgp.distributed import all_gather_object, all_gather_rows
from pgp.projections.base import HookHandle, ObservationSpec, Projection
from pgp.subspace import ProtectedInputs, ProtectedParameter, project_out, to_float64


class ReleasedBasis(Projection):
    """The published code's basis: scores of images plus scores of prompts, with energy on fourth powers.

    For prefix keys, scores of images alone, over all heads at once.
    Differs from the published code: if a task has fewer images than the model is wide, which ends the published code
    with an error, the pass repeats in new augmented views; and the principal components are exact where the published
    ones are a randomised approximation.
    """

    @dataclass(frozen=True)
    class Config(Projection.Config):
        """The constants of the published code."""

        tag = "released"

        energy: float = 0.5
        """Share of energy to capture for prompts, on fourth powers of singular values."""
        key_energy: float = 0.97
        """The same for keys."""
        components: int = 9
        """Principal components kept for prompts."""
        key_components: int = 5
        """Principal components kept for keys."""
        when: Literal["before", "after"] = "before"
        """Observe images before each task's training (the published L2P) or after it (DualPrompt, CLIP)."""

        def __post_init__(self) -> None:
            for name in ("energy", "key_energy"):
                if not 0 <= getattr(self, name) <= 1:
                    raise ValueError(f"expected projection.{name} in [0, 1], got {getattr(self, name)}")
            for name in ("components", "key_components"):
                if getattr(self, name) < 1:
                    raise ValueError(f"expected projection.{name} of at least 1, got {getattr(self, name)}")

        def build(self, protected: Mapping[str, ProtectedParameter], seed: int = 0) -> ReleasedBasis:
            """Return a projection that has seen no task yet."""
            return ReleasedBasis(protected, self, seed)

    apply_to = "gradient"

    def __init__(
        self, protected: Mapping[str, ProtectedParameter], config: ReleasedBasis.Config | None = None, seed: int = 0
    ) -> None:
        super().__init__(protected, seed)
        if values := [space for space, target in protected.items() if target.role == "value"]:
            raise ValueError(f"the published code never protects values, got {values}: choose"
                             " another --method.protect")  # fmt: skip
        self.config = config or ReleasedBasis.Config()
        self.observation = ObservationSpec(when=self.config.when, view="train", repeat=True)
        self._images: dict[str, list[Tensor]] = {}
        self._widths: dict[str, int] = {}
        self._prompts: dict[str, Tensor] = {}

    def has_enough(self) -> bool:
        """Return whether all processes together have seen as many images as the model is wide.

        Collective: every process must call it.
        """
        seen, widths = zip(
            *all_gather_object(({s: sum(map(len, p)) for s, p in self._images.items()}, self._widths)), strict=True
        )
        return any(widths) and all(sum(n.get(s, 0) for n in seen) >= w for each in widths for s, w in each.items())

    def observe(self, space: str, rows: ProtectedInputs) -> None:
        """Store the rows of each image as one long vector."""
        inputs = _merge_heads(rows.expanded) if _has_heads(rows.expanded) else rows.expanded
        self._widths[space] = inputs.shape[-1]
        self._images.setdefault(space, []).append(inputs.detach().float().flatten(1).cpu())

    def attach(self, optimizer: torch.optim.Optimizer) -> HookHandle:
        """See `Projection.attach`; also take a snapshot of the prompts, if images are collected before the task."""
        if self.config.when == "before":
            self._prompts = {space: target.parameter.detach().clone() for space, target in self.protected.items()}
        return super().attach(optimizer)

    def end_task(self) -> dict[str, float]:
        """Add the scores of images to the scores of prompts, row by unrelated row, and grow the basis from the sum.

        Collective: every process must call it.

        Raises:
            ValueError: If fewer images were observed than the model is wide.
        """
        for space, target in self.protected.items():
            key = target.role == "key"
            components = self.config.key_components if key else self.config.components
            images = self._sample(space)
            rows = pca_scores(images, components)
            if not _has_heads(target.parameter):
                prompts = self._prompts.get(space, target.parameter.detach()).flatten(0, -2).T  # (D, M * L)
                rows += pca_scores(prompts.cpu(), components)
            energy = self.config.key_energy if key else self.config.energy
            basis = self.bases.get(space)
            self.bases[space] = extend_released_basis(None if basis is None else basis.cpu(), rows, energy)
        self._images, self._prompts = {}, {}
        return {space: self.rank(space) for space in self.protected}

    def project(self, space: str, tensor: Tensor) -> Tensor:
        """See `Projection.project`; for prefixes, the published basis spans all heads side by side."""
        if not _has_heads(tensor):
            return super().project(space, tensor)
        heads = tensor.shape[-3]
        projected: Tensor = super().project(space, _merge_heads(tensor)).unflatten(-1, (heads, -1)).transpose(-3, -2)
        return projected

    def _sample(self, space: str) -> Tensor:
        """Return as many observed images as the model is wide, `(D, N * D)`.

        Collective: every process must call it.
        """
        width = self._widths.get(space, 0)
        images = all_gather_rows(torch.cat(self._images[space])) if width else torch.empty(0)
        if not width or len(images) < width:
            raise ValueError(f"expected {width or 'the'} images of this task in space {space!r}, got {len(images)}:"
                             " call observe() until has_enough()")  # fmt: skip
        return images[:width]


def pca_scores(samples: Tensor, components: int) -> Tensor:
    """Return principal-component scores `(n, components)` of `samples (n, F)`.

    The largest entry of each component is positive.

    Raises:
        ValueError: If there are fewer samples or features than components.
    """
    if components > min(samples.shape):
        raise ValueError(f"expected at least {components} samples and features, got {tuple(samples.shape)}:"
                         " choose fewer projection components")  # fmt: skip
    samples = to_float64(samples)
    centred = samples - samples.mean(0)
    values, vectors = torch.linalg.eigh(centred @ centred.T)  # ascending; (n, n), for F is large
    values, vectors = values.flip(0)[:components].clamp(min=0), vectors.flip(1)[:, :components]
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))  # (1, components)
    signed: Tensor = vectors * largest.sign() * values.sqrt()
    return signed


def extend_released_basis(basis: Tensor | None, rows: Tensor, energy: float) -> Tensor:
    """Apply the published basis update to `rows (D, c)`: energy on S^2, with S the singular values of `rows rows^T`.

    The first call keeps one direction fewer than `energy` asks for; later calls add until it is reached.
    """
    gram = rows @ rows.T
    total = torch.linalg.svdvals(gram).square().sum()
    if basis is None:
        U, S, _ = torch.linalg.svd(gram)
        first: Tensor = U[:, : int((S.square().cumsum(0) / total < energy).sum())]
        return first
    U, S, _ = torch.linalg.svd(project_out(gram.T, basis).T)  # (I - UU^T) G, one-sided
    shares = S.square() / total
    held_before = 1 - shares.sum() + shares.cumsum(0) - shares  # before direction i is added
    return torch.cat([basis, U[:, : int((held_before < energy).sum())]], dim=1)


def _has_heads(tensor: Tensor) -> bool:
    """Return whether these are prefixes `(M, H, L, d)` or what meets them `(B, H, N, d)`: all else has fewer axes."""
    return tensor.dim() == 4


def _merge_heads(tensor: Tensor) -> Tensor:
    """Put heads side by side: `(..., H, n, d)` -> `(..., n, H * d)`."""
    return tensor.transpose(-3, -2).flatten(-2)
