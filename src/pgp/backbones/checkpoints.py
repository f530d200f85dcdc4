"""Published weights in files: found, read without running their code, and filled in only where they fit exactly."""

from __future__ import annotations

import pickle
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

_CONTAINERS = ("model", "state_dict", "teacher")
"""Keys under which published checkpoints hide their weights."""


def packaged(name: str) -> Path:
    """The path of a file: `package:NAME` is one that pgp ships, any other name a path of the user's."""
    if name.startswith("package:"):
        return Path(str(resources.files("pgp") / "weights" / name.removeprefix("package:")))
    return Path(name).expanduser()


def read(path: Path) -> dict[str, Tensor]:
    """The float32 tensors of a checkpoint, by name.

    Raises:
        ValueError: if there is none at `path`, or it holds code, is damaged or is something else.
    """
    if not path.is_file():
        raise ValueError(f"no checkpoint at {path}: expected a .safetensors, .pth or .pt file, 'random', or published"
                         " weights by name")  # fmt: skip
    try:
        state: Any = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} holds pickled code, which is never run; save its weights as .safetensors") from error
    except (SafetensorError, RuntimeError, EOFError, ValueError) as error:
        raise ValueError(f"{path} is no readable checkpoint (truncated?): {error}") from error
    for container in _CONTAINERS:
        state = state.get(container, state) if isinstance(state, dict) else None
    if not (isinstance(state, dict) and all(isinstance(tensor, Tensor) for tensor in state.values())):
        raise ValueError(f"{path} is no checkpoint: expected tensors by name, or these under one of {_CONTAINERS}")
    return {name: tensor.float() for name, tensor in state.items()}


def fill(model: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """Give `model` all its weights from `state`.

    Raises:
        ValueError: naming `path`, if names or shapes differ.
    """
    wanted = model.state_dict()
    missing, extra = sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys())
    wrong = sorted(name for name in wanted.keys() & state.keys() if wanted[name].shape != state[name].shape)
    if missing or extra or wrong:
        raise ValueError(f"{path} does not fit this model: missing {missing[:3]}, unexpected {extra[:3]},"
                         f" of another shape {wrong[:3]}")  # fmt: skip
    model.load_state_dict(state)
