"""Base class of LoRA and adapters: small trainable parts at places inside the blocks of a frozen encoder."""

from __future__ import annotations

import abc
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pgp.backbones.base import Backbone, Place
from pgp.methods.base import Method, linear_head, mask_logits
from pgp.rng import make_generator
from pgp.scenario import Task
from pgp.subspace import ProtectedInputs, ProtectedParameter


class Part(nn.Module, abc.ABC):
    """A trainable function at one place, with an input side A `(r, in)` and an output side B `(out, r)`.

    Both are 0 outside the training of a task; what earlier tasks have learned is kept elsewhere.
    """

    def __init__(self, inputs: int, outputs: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.zeros(rank, inputs))
        self.up = nn.Parameter(torch.zeros(outputs, rank))

    @abc.abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Return what is computed at this place instead, for inputs `(B, N, in)`: `(B, N, out)`."""

    @abc.abstractmethod
    def store(self) -> None:
        """Add what the current task has learned to what earlier tasks have learned."""


class AdaptedEncoder(Method):
    """A frozen encoder with a `Part` at some places. Each task has new A and B in each part.

    Old outputs of a part stay exactly the same if `A x = 0` for its old inputs x, whatever B is. Therefore A is
    protected, and B is not. A is 0 when a task begins, and drawn inside `Projection.constrain`: if updates are
    projected, it is drawn outside the subspace of old inputs, and stays there.
    """

    uses_query = False
    kind: ClassVar[str]
    """Name of this kind of part in the address of random draws."""

    def __init__(self, backbone: Backbone, classes: int, generator: torch.Generator) -> None:
        super().__init__(backbone, linear_head(backbone.width, classes, generator))
        self.seed = int(torch.randint(2**62, (), generator=generator))
        self.parts = nn.ModuleDict()

    def features(self, images: Tensor, query: Tensor | None = None, *, by_vote: bool = False) -> Tensor:
        """Return the CLS token, `(B, D)`; see `Method.features`."""
        cls: Tensor = self.backbone(images, num_tokens=1, adapted=dict(self.by_place()))[:, 0]  # (B, D)
        return cls

    def can_learn(self, task: Task) -> bool:
        """See `Method.can_learn`."""
        return len(task.classes) > 1

    def loss(self, images: Tensor, labels: Tensor, task: Task, prepared: dict[str, Tensor] | None = None) -> Tensor:
        """Return the cross-entropy over the classes of `task`."""
        return F.cross_entropy(mask_logits(self(images), task.classes), labels)

    @torch.no_grad()
    def begin_task(self, task: Task) -> None:
        """Draw the input side of each part, as torch draws a linear layer. The output side is 0."""
        generator = make_generator(self.seed, self.kind, task.index)
        for _, part in self.by_place():
            bound = 1 / math.sqrt(part.down.shape[1])
            part.down.copy_(torch.empty(part.down.shape).uniform_(-bound, bound, generator=generator))
            part.up.zero_()

    def skip_task(self, task: Task) -> None:
        """Do nothing: there are no new parts."""

    @torch.no_grad()
    def end_task(self, task: Task) -> None:
        """Add what was learned in `task` to what was learned before."""
        super().end_task(task)
        for _, part in self.by_place():
            part.store()
            part.down.zero_()
            part.up.zero_()

    def protected(self) -> dict[str, ProtectedParameter]:
        """Return the input side A of each part."""
        return {str(place): ProtectedParameter(part.down) for place, part in self.by_place()}

    @torch.no_grad()
    def activations(self, images: Tensor, query: Tensor | None = None) -> dict[str, ProtectedInputs]:
        """Return the inputs of each part, `(B, N, in)`."""
        return self.activations_and_features(images)[0]

    @torch.no_grad()
    def activations_and_features(
        self, images: Tensor, query: Tensor | None = None
    ) -> tuple[dict[str, ProtectedInputs], Tensor]:
        """See `Method.activations_and_features`."""
        inputs: dict[str, Tensor] = {}

        def run(place: Place, part: Part, x: Tensor) -> Tensor:
            inputs[str(place)] = x
            y: Tensor = part(x)
            return y

        adapted = {place: partial(run, place, part) for place, part in self.by_place()}
        cls: Tensor = self.backbone(images, num_tokens=1, adapted=adapted)[:, 0]  # (B, D)
        return protected_inputs(inputs), cls

    def by_place(self) -> Iterator[tuple[Place, Part]]:
        """Yield all places with their part."""
        for name, part in self.parts.items():
            assert isinstance(part, Part)
            yield Place.parse(name), part


def protected_inputs(tensors: Mapping[str, Tensor]) -> dict[str, ProtectedInputs]:
    """Return the inputs of each space, with the first other space that has the same tensor, such as q and v of a block.

    >>> x = torch.ones(1, 2, 3)
    >>> [space.same_as for space in protected_inputs({"q 0": x[:, :2], "v 0": x, "fc1 0": x + 1}).values()]
    [None, 'q 0', None]
    """
    first: dict[tuple[int, torch.Size, tuple[int, ...]], str] = {}
    found = {}
    for space, x in tensors.items():
        source = first.setdefault((x.data_ptr(), x.shape, x.stride()), space)
        found[space] = ProtectedInputs(x, same_as=None if source == space else source)
    return found


def check_part_settings(rank: int, places: Sequence[str], known: Sequence[str], layers: Sequence[int] | None) -> None:
    """Raise a ValueError if the rank is below 1, or if places or layers are none, unknown or repeated."""
    if rank < 1:
        raise ValueError(f"expected method.rank of at least 1, got {rank}")
    if not places or len(set(places)) < len(places) or not set(places) <= set(known):
        raise ValueError(f"expected method.places with some of {', '.join(known)}, each once, got {', '.join(places)}")
    if layers is not None and (not layers or len(set(layers)) < len(layers)):
        raise ValueError(f"expected method.layers with each layer once, got {layers}")


def select_places(backbone: Backbone, names: Sequence[str], layers: Sequence[int] | None) -> list[Place]:
    """Return the places of these names in these blocks, by default in all.

    Raises:
        ValueError: If the encoder does not have one of them.
    """
    places = [Place(layer, name) for layer in (range(backbone.depth) if layers is None else layers) for name in names]
    backbone.check_places(places)
    return places


def check_rank(rank: int, width: int, place: Place) -> None:
    """Raise a ValueError if `rank` is above the width of the narrower side of a place."""
    if rank > width:
        raise ValueError(f"expected method.rank of at most {width}, the width at {place}, got {rank}")
