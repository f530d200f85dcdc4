"""Base class of projections, which learn the subspace of each task's inputs, and keep later steps orthogonal to it."""

from __future__ import annotations

import abc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from pgp.subspace import ProtectedInputs, ProtectedParameter, mean_rank, project_out, to_float64


class ObservationSpec(NamedTuple):
    """Which images of each task a projection observes, and when."""

    when: Literal["before", "after"] = "after"
    """Before or after the task is trained."""
    transform: Literal["train", "test"] = "test"
    """Which transform the images get: that of training, with augmentation, or that of testing."""
    repeat: bool = False
    """Repeat with new augmentations until `has_enough()` returns True."""


class HookHandle:
    """Removes the hooks of `Projection.attach`."""

    def __init__(self, *hooks: Any) -> None:
        self._hooks = hooks

    def remove(self) -> None:
        """Remove the hooks, so that steps of the optimizer are no longer projected."""
        for hook in self._hooks:
            hook.remove()


class Projection(abc.ABC):
    """Keeps the steps of an optimizer orthogonal to the inputs of old tasks.

    Use: `attach` it to each task's optimizer, `observe` the inputs of the task, then call `end_task`. It changes only
    the parameters that it was built with.
    """

    @dataclass(frozen=True)
    class Config(abc.ABC):
        """Settings of a projection; `build` creates it."""

        tag: ClassVar[str]
        """Name of this kind of projection in config.json. It must be unique among projections and never change."""

        @abc.abstractmethod
        def build(self, protected: Mapping[str, ProtectedParameter], seed: int = 0) -> Projection:
            """Return a projection without any protected directions.

            Args:
                protected: The parameters to protect, by space (name), as returned by `Method.protected`.
                seed: The run's seed. Every random draw depends on it.
            """

    observation: ObservationSpec | None = ObservationSpec()
    """Which images to observe. If None, the projection observes nothing."""
    apply_to: Literal["gradient", "update"] = "gradient"
    """What is projected: the gradient before the step, or the change of the parameter by the step."""

    def __init__(self, protected: Mapping[str, ProtectedParameter], seed: int = 0) -> None:
        self.protected = dict(protected)
        """The protected parameters, by space: the name of each, see `ProtectedParameter`."""
        self.seed = seed
        self.bases: dict[str, Tensor] = {}
        """Orthonormal columns `(..., D, r)` that span the protected subspace, by space."""

    def has_enough(self) -> bool:
        """Return whether enough images of this task have been observed.

        It is called after each batch, and only if `observation.repeat`.

        Collective: in a distributed run, every process must call it.
        """
        return False

    @abc.abstractmethod
    def observe(self, space: str, inputs: ProtectedInputs) -> None:
        """Observe the inputs of one protected parameter for a batch of images.

        Args:
            space: Name of the parameter, a key of `protected`; see `ProtectedParameter`.
            inputs: The vectors that the parameter is multiplied with, as returned by `Method.activations`.
        """

    def observe_nothing(self) -> None:
        """Pass over a batch of which other processes have images, but this one has none. By default, do nothing."""
        return

    @abc.abstractmethod
    def end_task(self) -> dict[str, float]:
        """Extend the protected subspaces by the inputs observed in this task, and return the rank of each space.

        Collective: in a distributed run, every process must call it.
        """

    def project(self, space: str, tensor: Tensor) -> Tensor:
        """Return the component of `tensor (..., D)` that is orthogonal to the protected subspace of `space`.

        It is computed in float64 and returned in the dtype of `tensor`.

        Raises:
            ValueError: If `tensor` and the subspace have different widths D.
        """
        if space not in self.bases:
            return tensor
        vectors = to_float64(tensor)
        self.bases[space] = self.bases[space].to(vectors.device)
        basis = self.basis(space)
        if basis.shape[-2] != tensor.shape[-1]:
            raise ValueError(f"expected width {basis.shape[-2]} in space {space!r}, got {tuple(tensor.shape)}")
        return project_out(vectors, basis).to(tensor)

    def basis(self, space: str) -> Tensor:
        """Return orthonormal columns `(..., D, r)` that span the protected subspace of `space`."""
        return self.bases[space]

    def rank(self, space: str) -> float:
        """Return the number of protected directions in `space`, averaged over attention heads."""
        return mean_rank(self.bases[space]) if space in self.bases else 0.0

    def full_spaces(self) -> list[str]:
        """Return the spaces without any free direction, whose parameters cannot change any more."""
        return [space for space, basis in self.bases.items() if self.rank(space) == basis.shape[-2]]

    def state_dict(self) -> dict[str, Tensor]:
        """Return the basis of each space."""
        return dict(self.bases)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore a `state_dict`."""
        self.bases = dict(state)

    def attach(self, optimizer: torch.optim.Optimizer) -> HookHandle:
        """Project every step of `optimizer` with torch's own step hooks, until the returned handle is removed.

        Parameters of spaces with rank 0 are not changed, not even by rounding.
        """
        before: dict[nn.Parameter, Tensor] = {}

        @torch.no_grad()
        def begin_step(*_: Any) -> None:
            if self.apply_to == "update":
                before.update(self._values())
                return
            for space, (parameter, axis, _role) in self._active().items():
                if parameter.grad is not None:
                    parameter.grad.copy_(self._project_along(axis, space, parameter.grad))

        return HookHandle(
            optimizer.register_step_pre_hook(begin_step),
            optimizer.register_step_post_hook(lambda *_: self._constrain(before)),
        )

    @contextmanager
    def constrain(self) -> Iterator[None]:
        """Project the changes of the protected parameters inside the `with` block, if updates are projected."""
        before = self._values() if self.apply_to == "update" else {}
        yield
        self._constrain(before)

    def _active(self) -> dict[str, ProtectedParameter]:
        return {space: target for space, target in self.protected.items() if self._rank(space)}

    def _rank(self, space: str) -> int:
        return self.bases[space].shape[-1] if space in self.bases else 0

    def _values(self) -> dict[nn.Parameter, Tensor]:
        """Return float64 copies of the parameters of all active spaces."""
        active_parameters = {target.parameter for target in self._active().values()}
        return {parameter: to_float64(parameter.detach().clone()) for parameter in active_parameters}

    @torch.no_grad()
    def _constrain(self, before: Mapping[nn.Parameter, Tensor]) -> None:
        """Replace each change of a parameter since `before` by its projection, if updates are projected."""
        if self.apply_to != "update":
            return
        for space, target in self._active().items():
            target.parameter.copy_(self._constrained_value(space, target, before[target.parameter]))

    def _constrained_value(self, space: str, target: ProtectedParameter, before: Tensor) -> Tensor:
        """Return `before` plus the projected change of the parameter since then, float64."""
        change = to_float64(target.parameter) - before
        return before + self._project_along(target.axis, space, change)

    def _project_along(self, axis: int, space: str, tensor: Tensor) -> Tensor:
        """Apply `project` along `axis` of a parameter or its gradient."""
        return self.project(space, tensor.transpose(axis, -1)).transpose(axis, -1)


class NoProjection(Projection):
    """A projection that changes no step and observes no image."""

    @dataclass(frozen=True)
    class Config(Projection.Config):
        """No projection; there are no settings."""

        tag = "none"

        def build(self, protected: Mapping[str, ProtectedParameter], seed: int = 0) -> NoProjection:
            """Return a projection that changes no step."""
            return NoProjection(protected, seed)

    observation = None

    def observe(self, space: str, inputs: ProtectedInputs) -> None:
        """Ignore the inputs."""

    def end_task(self) -> dict[str, float]:
        """Return an empty dictionary."""
        return {}
