"""Second moments of old inputs, their leading directions, and the projection of updates onto the complement.

A basis spans the directions that inputs of old tasks use. It is computed from second moments, which are accumulated
batch by batch, and it grows task by task.

Shapes: `n` input vectors, one per row of a matrix, `D` width, `r` rank. Leading axes (`...`), such as attention heads,
are independent: each has a moment and a basis of its own. Everything is float64, so that a basis stays orthonormal over
many tasks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from pgp.distributed import all_reduce_sum_


def float64_device(device: torch.device) -> torch.device:
    """Return the device for float64 tensors: `device`, or the CPU for Apple's MPS, which has no float64.

    >>> float64_device(torch.device("mps")), float64_device(torch.device("cuda", 1))
    (device(type='cpu'), device(type='cuda', index=1))
    """
    return torch.device("cpu") if device.type == "mps" else device


def on_float64_device(state: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Return the tensors of a state on the device for float64 tensors of a model on `device`."""
    return {name: tensor.to(float64_device(device)) for name, tensor in state.items()}


def to_float64(tensor: Tensor) -> Tensor:
    """Return `tensor` in float64, on the CPU if its own device has no float64."""
    return tensor.to(float64_device(tensor.device), torch.float64)


class ProtectedParameter(NamedTuple):
    """A parameter that a method asks to protect, and the axis along which it is multiplied with its inputs.

    A *space* is the name under which `Method.protected` returns it, such as "prompts". Its inputs, its protected
    subspace, its rank and its drift are kept under this name. A parameter protected along two axes has two spaces.
    """

    parameter: nn.Parameter
    axis: int = -1
    """Axis of length D, the width of the inputs. Axes before the last two match the attention heads of the inputs."""
    role: Literal["prompt", "key", "value"] = "prompt"
    """Which energy threshold applies: `energy`, `key_energy` or `value_energy`."""


class ProtectedInputs(NamedTuple):
    """The inputs of a protected parameter for a batch of images: the vectors that it is multiplied with, as rows.

    The parameter's updates are kept orthogonal to the inputs of old tasks.
    """

    inputs: Tensor
    """N vectors of width D for each image, `(B, ..., N, D)`."""
    prompts: Tensor | None = None
    """Prompts in the same sequence, as they enter the block, `(B, ..., L, D)`."""
    head_maps: Tensor | None = None
    """Constant maps `(H, d, D)` from the inputs of each attention head to those of the parameter. If given, the inputs
    are `(B, H, N, d)`, and attention head h multiplies the parameter with `inputs[:, h] @ head_maps[h]`. Second moments
    are then accumulated per attention head with width `d`, and mapped at the end."""
    same_as: str | None = None
    """Another space with the same inputs, prompts and maps, so that what depends on them can be computed once."""

    @property
    def expanded(self) -> Tensor:
        """The inputs after `head_maps`, `(B, ..., N, D)`; without maps, `inputs`."""
        if self.head_maps is None:
            return self.inputs
        return (self.inputs.to(self.head_maps) @ self.head_maps).flatten(1, 2)  # (B, H * N, D)

    def sketch_shape(self, size: int) -> tuple[int, ...]:
        """Return the shape of the weights of one image in a `sketch`: `(K, N)`, or `(H, K, N)` with maps."""
        heads = () if self.head_maps is None else (self.inputs.shape[1],)
        return (*heads, size, self.inputs.shape[-2])

    def sketch(self, weights: Tensor) -> Tensor:
        """Return K weighted sums of all inputs, `(..., K, D)` float64.

        With independent standard normal weights, any linear function has the same expected squared norm on one such
        sum as on all inputs together. Without maps, a token has the same weight in every attention head, so that heads
        can be concatenated. With maps, the inputs of each attention head have their own weights.

        Args:
            weights: Weights `(B, *sketch_shape)`.
        """
        inputs = to_float64(self.inputs.detach())  # (B, ..., N, D)
        weights = weights.to(inputs)
        while weights.dim() < inputs.dim():
            weights = weights.unsqueeze(1)
        mixtures = (weights @ inputs).sum(0)  # (..., K, D)
        return mixtures if self.head_maps is None else (mixtures @ to_float64(self.head_maps.detach())).sum(0)


def flatten_images(inputs: Tensor) -> Tensor:
    """Concatenate the input vectors of all images: `(B, ..., N, D)` -> `(..., B * N, D)`."""
    return torch.movedim(inputs, 0, -3).flatten(-3, -2)  # (..., B, N, D) -> (..., B * N, D)


class SecondMoment:
    """The count, mean and second moment of vectors, the rows of matrices, accumulated batch by batch.

    It takes memory for `D * D` numbers, however many vectors there are. The result does not depend on their order or
    batching, up to rounding in float64.

    >>> moment = SecondMoment()
    >>> moment.observe(torch.tensor([[1.0, 0.0], [1.0, 2.0]]))
    >>> moment.mean
    tensor([1., 1.], dtype=torch.float64)
    >>> moment.second
    tensor([[1., 1.],
            [1., 2.]], dtype=torch.float64)
    """

    BLOCK = 96
    """Rows of a block of the sum of outer products. Only blocks on and above the diagonal are computed."""

    def __init__(self) -> None:
        self.count = 0
        self._sum: Tensor | None = None  # (..., D)
        self._products: Tensor | None = None  # (..., D, D), without the blocks below the diagonal

    def observe(self, rows: Tensor) -> None:
        """Add rows `(..., n, D)`."""
        rows = to_float64(rows.detach())
        total, width = rows.sum(-2), rows.shape[-1]
        if self._sum is None or self._products is None:
            self._sum, self._products = torch.zeros_like(total), total.new_zeros(*total.shape, width)
        elif self._sum.shape != total.shape:
            raise ValueError(f"expected rows of width {self._sum.shape[-1]} and shape (*{tuple(self._sum.shape[:-1])},"
                             f" n, D) as before, got {tuple(rows.shape)}")  # fmt: skip
        self._sum += total
        for start in range(0, width, self.BLOCK):
            stop = start + self.BLOCK
            self._products[..., start:stop, start:] += rows[..., start:stop].mT @ rows[..., start:]
        self.count += rows.shape[-2]

    @property
    def mean(self) -> Tensor:
        """The mean vector, `(..., D)`."""
        return self._observed(self._sum) / self.count

    @property
    def second(self) -> Tensor:
        """The second moment, the mean of the vectors' outer products, `(..., D, D)`."""
        upper = self._observed(self._products).triu()
        return (upper + upper.triu(1).mT) / self.count

    def all_reduce(self) -> None:
        """Merge the moments of all processes.

        Collective: in a distributed run, every process must call it.

        Raises:
            ValueError: If this process has observed no vector.
        """
        total, products = self._observed(self._sum), self._observed(self._products)
        all_reduce_sum_(total)
        all_reduce_sum_(products)
        self.count = int(all_reduce_sum_(torch.tensor(self.count, device=total.device)))

    def _observed(self, value: Tensor | None) -> Tensor:
        if value is None or self.count == 0:
            raise ValueError("expected at least one observed vector, got none: call observe() first")
        return value


def second_moment_of_sums(inputs: SecondMoment, prompts: SecondMoment) -> Tensor:
    """Return the second moment `(..., D, D)` of all sums x + p of an input x and a prompt token p.

    It is `C_x + C_p + m_x m_p^T + m_p m_x^T`, with second moments C and means m. The sums themselves are never formed,
    so both moments can be accumulated batch by batch. Unlike a sum of two sets of principal components, the result
    does not depend on the signs of eigenvectors.

    >>> x, p = SecondMoment(), SecondMoment()
    >>> x.observe(torch.tensor([[1.0, 0.0]])); p.observe(torch.tensor([[0.0, 1.0]]))
    >>> second_moment_of_sums(x, p)
    tensor([[1., 1.],
            [1., 1.]], dtype=torch.float64)
    """
    cross = inputs.mean.unsqueeze(-1) * prompts.mean.unsqueeze(-2)  # (..., D, D)
    return inputs.second + prompts.second + cross + cross.mT


def leading_basis(second: Tensor, energy: float) -> Tensor:
    """Return the fewest leading eigenvectors that capture the fraction `energy` of the trace of `second`.

    Args:
        second: Symmetric positive semi-definite matrices `(..., D, D)`.
        energy: Fraction in [0, 1]; 0 gives no column, 1 every direction that is not zero up to rounding.

    Returns:
        Orthonormal columns `(..., D, r)`, float64.

    >>> leading_basis(torch.diag(torch.tensor([9.0, 1.0, 0.0])), energy=0.9).abs()
    tensor([[1.],
            [0.],
            [0.]], dtype=torch.float64)
    >>> leading_basis(torch.diag(torch.tensor([9.0, 1.0, 0.0])), energy=1.0).shape
    torch.Size([3, 2])
    """
    return extend_basis(second.new_zeros(*second.shape[:-1], 0, dtype=torch.float64), second, energy)


def extend_basis(basis: Tensor, second: Tensor, energy: float) -> Tensor:
    """Return `basis` with the fewest columns added so that it captures the fraction `energy` of the trace of `second`.

    This is the rule of GPM (Saha et al., ICLR 2021, section 4): remove from the second moment what the basis already
    captures, and add leading eigenvectors of the rest until the fraction is reached.

    Args:
        basis: Orthonormal columns `(..., D, r)`. If leading axes differ in rank, shorter bases end in zero columns.
        second: Symmetric positive semi-definite matrices `(..., D, D)`.
        energy: Fraction in [0, 1].

    Returns:
        Orthonormal columns `(..., D, r')`, r' >= r, float64; the first columns are those of `basis`.

    Raises:
        ValueError: If `energy` is not in [0, 1].

    >>> basis = torch.tensor([[1.0], [0.0], [0.0]], dtype=torch.float64)
    >>> extend_basis(basis, torch.diag(torch.tensor([6.0, 1.0, 3.0])), energy=0.9).abs()
    tensor([[1., 0.],
            [0., 0.],
            [0., 1.]], dtype=torch.float64)
    """
    if not 0 <= energy <= 1:
        raise ValueError(f"expected an energy in [0, 1] (a fraction of the second moment's trace), got {energy}")
    second = to_float64(second)
    basis = basis.to(second)
    rest = project_out(project_out(second, basis).mT, basis)  # (I - UU^T) C (I - UU^T)
    values, vectors = torch.linalg.eigh((rest + rest.mT) / 2)  # ascending
    values, vectors = values.flip(-1).clamp(min=0), vectors.flip(-1)
    total = second.diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True)  # (..., 1)
    sums = values.flip(-1).cpu().cumsum(-1).flip(-1)  # on the CPU, because a GPU does not always add in one order
    missing = sums.to(values.device)  # (..., D): not captured before direction i is added
    rounding = second.shape[-1] * torch.finfo(torch.float64).eps * total
    needed = (missing > (1 - energy) * total + rounding) & (values > rounding)  # (..., D)
    count = int(needed.sum(-1).max())
    # eigenvectors of small eigenvalues are not exactly orthogonal to the basis, so it is projected out once more
    new = project_out(vectors[..., :count].mT, basis).mT  # (..., D, count)
    new = torch.linalg.qr(new).Q * needed[..., None, :count]
    return _zeros_last(torch.cat([basis, new], dim=-1))  # (..., D, r + count)


def project_out(tensor: Tensor, basis: Tensor) -> Tensor:
    """Return `tensor - tensor U U^T`, `(..., n, D)`: each row without its component in the span of U = `basis`.

    The basis has orthonormal columns `(..., D, r)`.

    >>> project_out(torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0], [0.0]]))
    tensor([[0., 4.]])
    """
    return tensor - (tensor @ basis) @ basis.mT


def mean_rank(basis: Tensor) -> float:
    """Return the number of columns, averaged over the leading axes; columns of zeros do not count.

    >>> mean_rank(torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [0.0, 0.0]]]))
    1.5
    """
    return float((basis != 0).any(-2).sum(-1).float().mean())


def _zeros_last(basis: Tensor) -> Tensor:
    """Move columns of zeros, which pad bases of smaller rank, to the end, and drop those that all bases share."""
    if basis.dim() == 2 or basis.shape[-1] == 0:
        return basis
    empty = ~(basis != 0).any(-2)  # (..., r)
    order = empty.to(torch.uint8).argsort(dim=-1, stable=True)
    basis = basis.gather(-1, order.unsqueeze(-2).expand_as(basis))
    return basis[..., : int((~empty).sum(-1).max())]
