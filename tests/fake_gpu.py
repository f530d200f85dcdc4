"""A stand-in for a GPU: a device whose tensors have values, but cannot meet those of the CPU.

Its tensors are tensors of the CPU, whose storage is remembered as that of the device. `FakeGPU` says that they are on
the device, and raises errors where torch does on a real one: if tensors of two devices meet in a function, if a tensor
of the device is converted to NumPy, if a random generator of the CPU draws on the device, and if a tensor on MPS is
float64. It does not test numbers, speed and kernels of a real GPU.
"""

from __future__ import annotations

import contextlib
import io
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from lightning_fabric import Fabric
from lightning_fabric.accelerators import CPUAccelerator
from lightning_fabric.strategies import SingleDeviceStrategy
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode, resolve_name

from pgp import distributed

MAY_MIX = {"copy_", "to", "data.__set__", "_has_compatible_shallow_copy_type"}
"""Functions of which tensors of the CPU and the device may both be arguments."""
TO_NUMPY = {"numpy", "__array__"}


class FakeGPU(TorchFunctionMode):
    """While active, `torch.device(kind)` exists.

    Args:
        kind: Type of the device, `cuda` or `mps`.

    >>> with FakeGPU("cuda"):
    ...     torch.ones(2, device="cuda").device
    device(type='cuda', index=0)
    """

    def __init__(self, kind: str = "cuda") -> None:
        super().__init__()
        self.device = torch.device(kind, 0)
        self.storages: dict[int, StorageWeakRef] = {}
        """By address, the storages on the device. References keep addresses from being used again."""
        self.functions = 0
        """Number of functions that computed on the device."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = _name(function)
        if function in (torch.device, torch._C._nn._parse_to):  # which return a device
            return function(*args, **kwargs)
        if name in ("device", "is_cuda", "is_mps", "is_cpu") and args and isinstance(args[0], Tensor):
            device = self.device if self.holds(args[0]) else torch.device("cpu")
            return device if name == "device" else device.type == name.removeprefix("is_")
        if name in ("pin_memory", "is_pinned"):
            return args[0] if name == "pin_memory" else False
        mine = [self.holds(tensor) for tensor in tensors_of((args, kwargs))]
        if name in TO_NUMPY and any(mine):
            raise TypeError(f"can't convert {self.device} device type tensor to numpy")
        target = self._target(name, args, kwargs)
        self._check(name, function, args, kwargs)
        args, kwargs = [self._on_cpu(value) for value in args], {key: self._on_cpu(kwargs[key]) for key in kwargs}
        if name in ("cpu", "cuda"):
            result = args[0] if self.holds(args[0]) == (name == "cuda") else args[0].clone()
        else:
            result = function(*args, **kwargs)
        on_device = any(mine) if target is None else target == self.device.type
        if target is not None and name in ("to", "cpu", "cuda") and self.holds(result) != on_device:
            result = result.clone()  # another memory
        if on_device:
            self.functions += 1
            for tensor in tensors_of(result):
                self._hold(tensor, name)
        return result

    def holds(self, tensor: Tensor) -> bool:
        """Return whether a tensor is on the device."""
        return tensor.untyped_storage()._cdata in self.storages

    def _hold(self, tensor: Tensor, name: str) -> None:
        if self.device.type == "mps" and tensor.dtype == torch.float64:
            raise TypeError(f"cannot convert a MPS Tensor to float64 dtype: {name}")
        storage = StorageWeakRef(tensor.untyped_storage())
        self.storages.setdefault(storage.cdata, storage)

    def _target(self, name: str, args: Any, kwargs: dict[str, Any]) -> str | None:
        """Return the type of the device that a call names, or None."""
        if name in ("cpu", "cuda"):
            return name
        named = kwargs.get("device")
        if name == "to" and named is None:
            for argument in args[1:]:
                if isinstance(argument, Tensor):
                    return self.device.type if self.holds(argument) else "cpu"
                if isinstance(argument, str | torch.device):
                    named = argument
        return None if named is None else torch.device(named).type

    def _on_cpu(self, argument: Any) -> Any:
        """Return the CPU if an argument is the device, else the argument."""
        if isinstance(argument, torch.device):
            return torch.device("cpu") if argument.type == self.device.type else argument
        is_name = isinstance(argument, str) and argument.partition(":")[0] == self.device.type
        return "cpu" if is_name else argument

    def _check(self, name: str, function: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """Raise if tensors of both devices meet, or if a generator of the CPU draws on the device."""
        if name in ("__getitem__", "index", "__setitem__", "index_put_"):  # indices may be on the CPU
            args = (args[0], *args[2:])
        tensors = tensors_of((args, kwargs))
        mine = [tensor for tensor in tensors if self.holds(tensor)]
        others = [tensor for tensor in tensors if not self.holds(tensor) and tensor.dim()]
        if mine and others and name not in MAY_MIX:
            raise RuntimeError(
                f"expected all tensors on the same device, got {self.device} and cpu in {resolve_name(function)}"
            )
        drawn_on = bool(mine) or self._target(name, args, kwargs) == self.device.type
        if drawn_on and any(isinstance(value, torch.Generator) for value in (*args, *kwargs.values())):
            raise RuntimeError(f"expected a {self.device.type!r} device type for generator but found 'cpu' in {name}")


def tensors_of(tree: Any) -> list[Tensor]:
    """Return the tensors in a tree of lists, tuples and dictionaries."""
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, dict):
        tree = tree.values()
    elif not isinstance(tree, list | tuple):
        return []
    return [tensor for branch in tree for tensor in tensors_of(branch)]


def _name(function: Any) -> str:
    """Return the name of a function, or of the attribute that it reads."""
    name = getattr(function, "__name__", "")
    owner = getattr(function, "__self__", None)
    if name == "__get__":
        return str(getattr(owner, "__name__", name))
    return f"{getattr(owner, '__name__', '')}.__set__" if name == "__set__" else name


class _CPUPickler(pickle.Pickler):
    """Raises an error if an object contains a tensor of the device."""

    def __init__(self, gpu: FakeGPU) -> None:
        super().__init__(io.BytesIO())
        self.gpu = gpu

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, Tensor) and self.gpu.holds(value):
            raise RuntimeError("expected objects to gather whose tensors are on the CPU, got one of the GPU")
        return NotImplemented


@contextlib.contextmanager
def fake_gpu(kind: str) -> Iterator[FakeGPU]:
    """Let Fabric compute on a stand-in for a GPU.

    On CUDA, the process is the only one of a distributed run. As with NCCL, sums are of tensors on the device. Gathered
    objects have tensors on the CPU only: others would come to the devices of other processes.
    """
    gpu = FakeGPU(kind)

    def all_reduce(tensor: Tensor, *arguments: Any) -> None:
        if not gpu.holds(tensor):
            raise RuntimeError("expected a tensor of the GPU to add up, got one of the CPU")

    def all_gather_object(values: list[Any], value: Any) -> None:
        _CPUPickler(gpu).dump(value)
        values[:] = [value]

    with pytest.MonkeyPatch.context() as patch, gpu:
        patch.setattr(Fabric, "device", property(lambda _: gpu.device))
        patch.setattr(SingleDeviceStrategy, "root_device", property(lambda _: gpu.device))
        patch.setattr(CPUAccelerator, "setup_device", lambda _, device: None)
        if kind == "cuda":
            patch.setattr(distributed, "is_distributed", lambda: True)
            patch.setattr(torch.distributed, "get_world_size", lambda: 1)
            patch.setattr(torch.distributed, "get_rank", lambda: 0)
            patch.setattr(torch.distributed, "all_reduce", all_reduce)
            patch.setattr(torch.distributed, "all_gather_object", all_gather_object)
        yield gpu
