"""The contract of a projection: learn the subspace of each task's inputs, and keep later steps orthogonal to it."""

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
    """Which images a projection observes of each task, and when."""

    when: Literal["before", "after"] = "after"
    """Before or after the task is trained."""
    view: Literal["train", "test"] = "test"
    """Augmented training views, or test views."""
    repeat: bool = False
    """Pass over the images again, in new views, until the projection `has_enough`."""


class HookHandle:
    """Undoes an `attach`."""

    def __init__(self, *hooks: Any) -> None:
        self._hooks = hooks

    def remove(self) -> None:
        """Let the optimizer step freely again."""
        for hook in self._hooks:
            hook.remove()


class Projection(abc.ABC):
    """Keeps the steps of an optimizer orthogonal to subspaces that old tasks need.

    Use: `attach` it to each task's optimizer, let it `observe` the task's rows, then call `end_task`. It never touches
    a model, only the parameters that it was built with.
    """

    @dataclass(frozen=True)
    class Config(abc.ABC):
        """How to make one; `build` is the factory."""

        tag: ClassVar[str]
        """Name of this kind of projection in config.json, unique among all of them; it must never change."""

        @abc.abstractmethod
        def build(self, protected: Mapping[str, ProtectedParameter], seed: int = 0) -> Projection:
            """Return a projection that has seen no task yet.

            Args:
                protected: By the name of a space, the parameter to protect, as `Method.protected` returns it.
                seed: The run's seed. All that is drawn at random depends on it.
            """

    observation: ObservationSpec | None = ObservationSpec()
    """If None, it observes nothing."""
    apply_to: Literal["gradient", "update"] = "gradient"
    """What is projected: the gradient before the step, or the change that the step made."""

    def __init__(self, protected: Mapping[str, ProtectedParameter], seed: int = 0) -> None:
        self.protected = dict(protected)
        """By space, the parameter whose steps are projected."""
        self.seed = seed
        self.bases: dict[str, Tensor] = {}
        """Orthonormal columns `(..., D, r)` by space."""

    def has_enough(self) -> bool:
        """Return whether the images observed so far are enough; asked after each batch, only if `observation.repeat`.

        Collective: every process must call it.
        """
        return False

    @abc.abstractmethod
    def observe(self, space: str, rows: ProtectedInputs) -> None:
        """Take in the rows that entered the protected parameter of `space` for a batch of images."""

    @abc.abstractmethod
    def end_task(self) -> dict[str, float]:
        """Grow the protected subspaces by what was observed of this task, and return the rank of each space.

        Collective: every process must call it.
        """

    def project(self, space: str, tensor: Tensor) -> Tensor:
        """Return the part of `tensor (..., D)` that is orthogonal to the protected subspace of `space`.

        It is computed in float64 and returned in the dtype of `tensor`.

        Raises:
            ValueError: If the width of `tensor` is not that of the subspace.
        """
        if space not in self.bases:
            return tensor
        rows = to_float64(tensor)
        self.bases[space] = self.bases[space].to(rows.device)
        basis = self.basis(space)
        if basis.shape[-2] != tensor.shape[-1]:
            raise ValueError(f"expected width {basis.shape[-2]} in space {space!r}, got {tuple(tensor.shape)}")
        return project_out(rows, basis).to(tensor)

    def basis(self, space: str) -> Tensor:
        """Return orthonormal columns `(..., D, r)` that span the protected subspace of `space`."""
        return self.bases[space]

    def rank(self, space: str) -> float:
        """Return the number of protected directions in `space`, the mean over heads; 0 leaves it free."""
        return mean_rank(self.bases[space]) if space in self.bases else 0.0

    def state_dict(self) -> dict[str, Tensor]:
        """Return all it has learned: the basis of each space."""
        return dict(self.bases)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore a `state_dict`."""
        self.bases = dict(state)

    def attach(self, optimizer: torch.optim.Optimizer) -> HookHandle:
        """Project every step of `optimizer` from now on, by torch's own step hooks, until the handle is removed.

        Spaces of rank 0 are not touched, so a projection without a basis changes no bit.
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
        """Project what is done to the parameters inside the `with` block, if updates are projected."""
        before = self._values() if self.apply_to == "update" else {}
        yield
        self._constrain(before)

    def _active(self) -> dict[str, ProtectedParameter]:
        return {space: target for space, target in self.protected.items() if self._rank(space)}

    def _rank(self, space: str) -> int:
        return self.bases[space].shape[-1] if space in self.bases else 0

    def _values(self) -> dict[nn.Parameter, Tensor]:
        held = {target.parameter for target in self._active().values()}
        return {parameter: to_float64(parameter.detach().clone()) for parameter in held}

    @torch.no_grad()
    def _constrain(self, before: Mapping[nn.Parameter, Tensor]) -> None:
        for space, target in (self._active() if self.apply_to == "update" else {}).items():
            target.parameter.copy_(self._constrained_value(space, target, before[target.parameter]))

    def _constrained_value(self, space: str, target: ProtectedParameter, before: Tensor) -> Tensor:
        """Return where a parameter may go of where the step took it from `before`, float64."""
        change = to_float64(target.parameter) - before
        return before + self._project_along(target.axis, space, change)

    def _project_along(self, axis: int, space: str, tensor: Tensor) -> Tensor:
        """Apply `project` to a parameter whose rows meet `axis`."""
        return self.project(space, tensor.transpose(axis, -1)).transpose(axis, -1)


class NoProjection(Projection):
    """Projects nothing and observes nothing."""

    @dataclass(frozen=True)
    class Config(Projection.Config):
        """It has no settings."""

        tag = "none"

        def build(self, protected: Mapping[str, ProtectedParameter], seed: int = 0) -> NoProjection:
            """Return a projection that does nothing."""
            return NoProjection(protected, seed)

    observation = None

    def observe(self, space: str, rows: ProtectedInputs) -> None:
        """Ignore the inputs."""

    def end_task(self) -> dict[str, float]:
        """Return no ranks."""
        return {}
