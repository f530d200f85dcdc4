"""The devices of a run and the precision on them, checked before anything is loaded."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.precision import MixedPrecision, Precision
from lightning_fabric.strategies.ddp import DDPStrategy
from lightning_fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from pgp.config import Config, Hardware
from pgp.precision import float32_products

AMPERE = (8, 0)
"""Compute capability of the first NVIDIA GPUs with bfloat16 and TF32."""


def build_fabric(config: Config) -> Fabric:
    """Return a Fabric for the hardware and precision of `config`.

    Raises:
        ValueError: If this machine does not have that hardware, or it cannot compute in that precision.
    """
    hardware, device = config.hardware, accelerator_name(config.hardware)
    if device == "cuda":
        _check_gpus(config)
    if device == "mps" and config.precision in ("tf32", "16-mixed"):
        raise ValueError(f"expected --precision 32-true or bf16-mixed with --accelerator mps, got {config.precision}")
    plugin: Precision = (
        MixedPrecision(config.precision, device)
        if config.precision in ("bf16-mixed", "16-mixed")
        else Float32(device, tf32=config.precision == "tf32")
    )
    try:
        # all processes compute the same buffers, such as weight updates of earlier tasks: none needs to be sent
        parallel = DDPStrategy(find_unused_parameters=True, broadcast_buffers=False)
        strategy = parallel if hardware.devices > 1 else "auto"
        return Fabric(accelerator=device, devices=hardware.devices, plugins=plugin, strategy=strategy)
    except (RuntimeError, ValueError, MisconfigurationException) as error:
        raise ValueError(f"this machine cannot compute with --accelerator {hardware.accelerator} --devices"
                         f" {hardware.devices} --precision {config.precision}: {error}") from error  # fmt: skip


def accelerator_name(hardware: Hardware) -> str:
    """Return Fabric's name of the accelerator. Its own `auto` may choose MPS, which has no float64."""
    if hardware.accelerator == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return "cuda" if hardware.accelerator == "gpu" else hardware.accelerator


class Float32(Precision):
    """Passes in float32, whose matrix products a GPU may round to TF32 or not; see `float32_products`."""

    def __init__(self, device: str, *, tf32: bool) -> None:
        self.device, self.tf32 = device, tf32

    def forward_context(self) -> AbstractContextManager[Any]:
        """Return what a forward pass runs in."""
        return float32_products(self.device, tf32=self.tf32)

    def backward(self, tensor: Tensor, model: nn.Module | None, *args: Any, **kwargs: Any) -> None:
        """Compute gradients with the same products."""
        with self.forward_context():
            super().backward(tensor, model, *args, **kwargs)


def _check_gpus(config: Config) -> None:
    """Raise if there are not as many CUDA GPUs as wanted, or if they have no bfloat16 or TF32 but should use it."""
    wanted, count = config.hardware.devices, torch.cuda.device_count()
    if not torch.cuda.is_available():
        raise ValueError(f"this machine cannot compute with --accelerator gpu: {_no_cuda_reason()}. --accelerator auto"
                         " takes the CPU if there is no GPU")  # fmt: skip
    if wanted > count:
        raise ValueError(
            f"expected --devices of at most {count}, the number of CUDA GPUs that torch sees, got {wanted}"
        )
    if config.precision not in ("bf16-mixed", "tf32") or torch.version.hip:
        return
    for number in range(wanted):
        if (capability := torch.cuda.get_device_capability(number)) < AMPERE:
            other = "16-mixed or 32-true" if config.precision == "bf16-mixed" else "32-true"
            raise ValueError(
                f"expected a GPU of compute capability {_dotted(AMPERE)} or newer for --precision {config.precision},"
                f" got {torch.cuda.get_device_name(number)} with {_dotted(capability)}: choose --precision {other}"
            )


def _no_cuda_reason() -> str:
    """Return why torch cannot use CUDA, such as a driver that is too old."""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:  # which of them depends on what is missing
        return str(error).partition("\n")[0].strip().rstrip(".")
    return "torch sees no CUDA GPU"


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))
