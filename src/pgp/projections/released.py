"""The basis of the published PGP code, for reproducing published numbers. It does not protect old tasks.

The published code samples as many images as the model is wide, and uses their principal-component *scores* as if they
were directions in feature space. Scores and directions have the same shape but are unrelated: the basis depends on the
order of the images. The code also measures energy on the fourth power of singular values, so the rank is tiny. Use
`orthogonal` to protect old tasks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pgp.distributed import all_gather_object
from pgp.projections.base import HookHandle, ObservationSpec, Projection
from pgp.subspace import ProtectedInputs, ProtectedParameter, project_out, to_float64


class ReleasedBasis(Projection):
    """The published code's basis: scores of images plus scores of prompts, with energy on fourth powers.

    For prefix keys, only scores of images are used, over all attention heads at once.

    Differs from the published code in two points. If a task has fewer images than the model is wide, the published code
    fails; here the images are observed again with new augmentations. The principal components are exact; the published
    ones are a randomised approximation.
    """

    @dataclass(frozen=True)
    class Config(Projection.Config):
        """Constants of the published code."""

        tag = "released"

        energy: float = 0.5
        """Fraction of energy to capture for prompts, on fourth powers of singular values."""
        key_energy: float = 0.97
        """The same fraction for keys."""
        components: int = 9
        """Number of principal components for prompts."""
        key_components: int = 5
        """Number of principal components for keys."""
        when: Literal["before", "after"] = "before"
        """Observe images before the training of each task (the published L2P) or after it (DualPrompt, CLIP)."""

        def __post_init__(self) -> None:
            for name in ("energy", "key_energy"):
                if not 0 <= getattr(self, name) <= 1:
                    raise ValueError(f"expected projection.{name} in [0, 1], got {getattr(self, name)}")
            for name in ("components", "key_components"):
                if getattr(self, name) < 1:
                    raise ValueError(f"expected projection.{name} of at least 1, got {getattr(self, name)}")

        def build(self, protected: Mapping[str, ProtectedParameter], seed: int = 0) -> ReleasedBasis:
            """Return a projection without any protected directions."""
            return ReleasedBasis(protected, self, seed)

    apply_to = "gradient"

    def __init__(
        self, protected: Mapping[str, ProtectedParameter], config: ReleasedBasis.Config | None = None, seed: int = 0
    ) -> None:
        super().__init__(protected, seed)
        if values := [space for space, target in protected.items() if target.role == "value"]:
            raise ValueError(f"expected no values to protect, got {values}: the published code never protects values;"
                             " choose another --method.protect")  # fmt: skip
        self.config = config or ReleasedBasis.Config()
        for space, target in protected.items():
            rows = target.parameter.flatten(0, -2).shape
            needed = self.config.key_components if target.role == "key" else self.config.components
            if not _has_heads(target.parameter) and needed > min(rows):
                name = "key_components" if target.role == "key" else "components"
                raise ValueError(f"expected at most {min(rows)} as projection.{name} for {rows[0]} vectors of {rows[1]}"
                                 f" numbers ({space}), got {needed}")  # fmt: skip
        self.observation = ObservationSpec(when=self.config.when, transform="train", repeat=True)
        self._images: dict[str, list[Tensor]] = {}
        self._widths: dict[str, int] = {}
        self._prompts: dict[str, Tensor] = {}

    def has_enough(self) -> bool:
        """Return whether all processes together have observed as many images as the model is wide.

        Collective: in a distributed run, every process must call it.
        """
        counts = {space: sum(len(batch) for batch in batches) for space, batches in self._images.items()}
        by_process = all_gather_object((counts, self._widths))
        widths = {space: width for _, own_widths in by_process for space, width in own_widths.items()}
        totals = {space: sum(own_counts.get(space, 0) for own_counts, _ in by_process) for space in widths}
        return bool(widths) and all(totals[space] >= width for space, width in widths.items())

    def observe(self, space: str, inputs: ProtectedInputs) -> None:
        """Store the inputs of each image as one long vector."""
        merged = _merge_heads(inputs.expanded) if _has_heads(inputs.expanded) else inputs.expanded  # (B, N, D)
        self._widths[space] = merged.shape[-1]
        self._images.setdefault(space, []).append(merged.detach().float().flatten(1).cpu())  # (B, N * D)

    def observe_nothing(self) -> None:
        """Store that this process has no image of a batch, because processes store the same number of batches."""
        for space in self.protected:
            self._images.setdefault(space, []).append(torch.empty(0, 0))

    def attach(self, optimizer: torch.optim.Optimizer) -> HookHandle:
        """Attach as `Projection.attach`, and copy the prompts if images are observed before the task."""
        if self.config.when == "before":
            self._prompts = {space: target.parameter.detach().clone() for space, target in self.protected.items()}
        return super().attach(optimizer)

    def end_task(self) -> dict[str, float]:
        """Add the scores of images and of prompts, whose rows are unrelated, and extend the basis by their sum.

        Collective: in a distributed run, every process must call it.

        Raises:
            ValueError: If fewer images were observed than the model is wide.
        """
        for space, target in self.protected.items():
            key = target.role == "key"
            components = self.config.key_components if key else self.config.components
            images = self._sample(space)
            scores = pca_scores(images, components)  # (D, components)
            if not _has_heads(target.parameter):
                prompts = self._prompts.get(space, target.parameter.detach()).flatten(0, -2).T  # (D, M * L)
                scores += pca_scores(prompts.cpu(), components)
            energy = self.config.key_energy if key else self.config.energy
            basis = self.bases.get(space)
            self.bases[space] = extend_released_basis(None if basis is None else basis.cpu(), scores, energy)
        self._images, self._prompts = {}, {}
        return {space: self.rank(space) for space in self.protected}

    def project(self, space: str, tensor: Tensor) -> Tensor:
        """Project as `Projection.project`; for prefixes, all attention heads are projected together, as published."""
        if not _has_heads(tensor):
            return super().project(space, tensor)
        heads = tensor.shape[-3]
        merged = super().project(space, _merge_heads(tensor))  # (M, L, H * d)
        projected: Tensor = merged.unflatten(-1, (heads, -1)).transpose(-3, -2)  # (M, H, L, d)
        return projected

    def _sample(self, space: str) -> Tensor:
        """Return as many observed images as the model is wide, `(D, N * D)`.

        Collective: in a distributed run, every process must call it.
        """
        width = self._widths.get(space, 0)
        processes = all_gather_object(self._images[space]) if width else []
        images = torch.cat([torch.empty(0), *map(_undealt, zip(*processes, strict=True))])
        if not width or len(images) < width:
            raise ValueError(f"expected {width or 'some'} images of this task in space {space!r}, got {len(images)}:"
                             " call observe() until has_enough()")  # fmt: skip
        return images[:width]


def _undealt(parts: tuple[Tensor, ...]) -> Tensor:
    """Return the rows of a batch in their order, of which process r of R has every R-th, beginning with number r."""
    return torch.stack([part[i] for i in range(len(parts[0])) for part in parts if i < len(part)])


def pca_scores(samples: Tensor, components: int) -> Tensor:
    """Return principal-component scores `(n, components)` of `samples (n, F)`.

    The entry of largest magnitude in each component is positive.

    Raises:
        ValueError: If there are fewer samples or features than components.
    """
    if components > min(samples.shape):
        raise ValueError(f"expected at least {components} samples and features, got {tuple(samples.shape)}:"
                         " choose fewer projection components")  # fmt: skip
    samples = to_float64(samples)
    centred = samples - samples.mean(0)
    values, vectors = torch.linalg.eigh(centred @ centred.T)  # ascending; of an (n, n) matrix, because F is large
    values, vectors = values.flip(0)[:components].clamp(min=0), vectors.flip(1)[:, :components]
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))  # (1, components)
    signed: Tensor = vectors * largest.sign() * values.sqrt()
    return signed


def extend_released_basis(basis: Tensor | None, scores: Tensor, energy: float) -> Tensor:
    """Apply the published basis update to `scores (D, c)`.

    Energy is measured on S^2, with S the singular values of `scores scores^T`. The first call adds one direction fewer
    than needed to capture `energy`; later calls add directions until it is captured.
    """
    gram = scores @ scores.T  # (D, D)
    total = torch.linalg.svdvals(gram).square().sum()
    if basis is None:
        U, S, _ = torch.linalg.svd(gram)
        first: Tensor = U[:, : int((S.square().cumsum(0) / total < energy).sum())]
        return first
    U, S, _ = torch.linalg.svd(project_out(gram.T, basis).T)  # of (I - UU^T) G, projected on one side only
    fractions = S.square() / total
    captured = 1 - fractions.sum() + fractions.cumsum(0) - fractions  # before direction i is added
    return torch.cat([basis, U[:, : int((captured < energy).sum())]], dim=1)  # (D, r')


def _has_heads(tensor: Tensor) -> bool:
    """Return whether a tensor has an axis H of attention heads, as prefixes `(M, H, L, d)` and their inputs have."""
    return tensor.dim() == 4


def _merge_heads(tensor: Tensor) -> Tensor:
    """Concatenate the attention heads: `(..., H, n, d)` -> `(..., n, H * d)`."""
    return tensor.transpose(-3, -2).flatten(-2)
