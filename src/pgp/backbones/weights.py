"""Find files of published weights, read them without running code, and load them into a model that they fit exactly.

Every problem with the content of a file raises a `WeightsError` with one line.
"""

from __future__ import annotations

import contextlib
import json
import logging
import stat
import warnings
import zipfile
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

_CONTAINERS = ("model", "state_dict", "teacher")
"""Keys of published checkpoints under which their weights are stored."""


_STARTS = {
    b"version https://git-lfs": "a pointer of Git LFS: git lfs pull fetches the file itself",
    b"\x89PNG": "a picture (PNG)",
    b"\xff\xd8\xff": "a picture (JPEG)",
    b"GIF8": "a picture (GIF)",
    b"RIFF": "a picture (WebP)",
    b"BM": "a picture (BMP)",
    b"II*\0": "a picture (TIFF)",
    b"MM\0*": "a picture (TIFF)",
    b"%PDF": "a PDF",
    b"\x1f\x8b": "a compressed file (gzip): unpack it",
    b"\x89HDF": "an HDF5 file: convert its weights to .safetensors",
}
"""First bytes of files that are not weights, and what such a file is."""


_LARGEST_DESCRIPTION = 1 << 20
"""Maximum size in bytes of a model configuration in JSON."""


class EncoderSource(NamedTuple):
    """Where an encoder's weights come from, as far as the library that provides them says."""

    repository: str | None = None
    """Repository on the Hugging Face hub."""
    license: str | None = None


PACKAGED = EncoderSource(None, "apache-2.0")
"""The source of the weights that pgp ships."""


class WeightsError(ValueError):
    """A file of weights, or a model configuration, that cannot be used. The message names the file and the reason."""


def packaged_weights(name: str) -> Path:
    """Return the path of a file: for `package:NAME` one that pgp ships, else `name` itself as a path."""
    if name.startswith("package:"):
        return Path(str(resources.files("pgp") / "weights" / name.removeprefix("package:")))
    return Path(name).expanduser()


def is_packaged(name: str) -> bool:
    """Return whether `name` is `package:NAME` of a file that pgp ships."""
    shipped = {file.name for file in (resources.files("pgp") / "weights").iterdir()}
    return name.startswith("package:") and name.removeprefix("package:") in shipped


def resolve_weights(name: str) -> str:
    """Return `name` as an absolute path; `package:NAME` does not change."""
    return name if name.startswith("package:") else str(Path(name).expanduser().absolute())


def read(path: Path) -> dict[str, Tensor]:
    """Return the float32 tensors of a checkpoint, by name.

    Raises:
        WeightsError: If there is no file at `path`, or it contains code, is damaged or is not a checkpoint.
    """
    size = _require_file(path, "checkpoint", "a .safetensors, .pth or .pt file, 'random', or published weights by name")
    with reading(path):
        _recognize(path)
        if path.suffix == ".safetensors":
            state: Any = load_file(path)
        else:
            _check_zip(path, size)
            state = torch.load(path, "cpu", weights_only=True)
    for container in _CONTAINERS:
        state = state.get(container, state) if isinstance(state, dict) else None
    if not (isinstance(state, dict) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items())):
        raise WeightsError(f"{path} is no checkpoint: expected tensors by name, or these under one of {_CONTAINERS}")
    # a tensor may be a view that repeats a few bytes many times; tied weights repeat theirs once or twice
    if sum(tensor.numel() for tensor in state.values()) > 4 * size:
        raise WeightsError(f"{path} is no checkpoint: its tensors are far larger than its {size:,} bytes")
    for name, tensor in state.items():
        if tensor.layout is not torch.strided or tensor.is_complex() or tensor.is_quantized or tensor.is_meta:
            raise WeightsError(f"{path} is no checkpoint: expected plain tensors of real numbers, got another kind as"
                               f" {name!r}")  # fmt: skip
    return {name: tensor.float() for name, tensor in state.items()}


def read_json(path: Path) -> Any:
    """Return the content of a JSON file with a model configuration.

    Raises:
        WeightsError: If there is no file at `path`, or it cannot be read.
    """
    size = _require_file(path, "description of a model", "a JSON file")
    if size > _LARGEST_DESCRIPTION:
        raise WeightsError(f"expected a description of a model in JSON, got {size:,} bytes in {path}")
    with reading(path, "description of a model in JSON"):
        return json.loads(path.read_text(encoding="utf-8-sig"))


def fill(model: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """Load all weights of `model` from `state`.

    Raises:
        WeightsError: If names or shapes differ, or a weight is not finite. The message names `path`.
    """
    expected = model.state_dict()
    missing, extra = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    wrong = sorted(name for name in expected.keys() & state.keys() if expected[name].shape != state[name].shape)
    if missing or extra or wrong:
        raise WeightsError(f"{path} does not fit this model: missing {missing[:3]}, unexpected {extra[:3]},"
                           f" of another shape {wrong[:3]}")  # fmt: skip
    if not_finite := [name for name, tensor in state.items() if not tensor.isfinite().all()]:
        raise WeightsError(f"{path} is damaged: expected finite numbers, got NaN or infinity in {not_finite[:3]}")
    model.load_state_dict(state)


@contextlib.contextmanager
def reading(path: Path, what: str = "checkpoint") -> Iterator[None]:
    """Convert errors in the content of the file `path` inside a `with` block to a `WeightsError` that names it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # such as those about other versions of pickle
            yield
    except WeightsError:
        raise
    except Exception as error:  # pickle, zip and JSON raise errors of many types for damaged files
        if isinstance(error, OSError) and error.filename:  # the system cannot read the file, whatever its content
            raise
        if "GLOBAL" in str(error):  # torch's error for pickled code
            code = "holds pickled code, which is never run"
            raise WeightsError(f"{path} {code}; save its weights as .safetensors") from error
        reason = first_line(error)
        if "weights_only" in reason or isinstance(error, (LookupError, AttributeError, AssertionError)):
            reason = "it is no file of weights"  # torch's own message suggests to run the code, or names a byte only
        raise WeightsError(f"{path} is no readable {what} (truncated?): {reason}") from error


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or the name of its type if it has none."""
    return str(error).strip().partition("\n")[0].rstrip(". ") or type(error).__name__


@contextlib.contextmanager
def hub_quiet() -> Iterator[None]:
    """Hide the warnings of huggingface_hub about retries; the final error states the reason."""
    log = logging.getLogger("huggingface_hub")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def _require_file(path: Path, what: str, expected: str) -> int:
    """Return the size of the file at `path` in bytes.

    Raises:
        WeightsError: If there is no file, or it is a folder, a pipe or a device.
    """
    try:
        status = path.stat()
    except (OSError, ValueError) as error:
        if isinstance(error, (FileNotFoundError, NotADirectoryError, ValueError)):
            raise WeightsError(f"no {what} at {path}: expected {expected}") from error
        raise
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe or a device"
        raise WeightsError(f"no {what} at {path}, which is {kind}: expected {expected}")
    return status.st_size


def _recognize(path: Path) -> None:
    """Raise if the first bytes of the file at `path` show that it does not contain weights."""
    with path.open("rb") as file:
        start = file.read(512)
    kind = next((kind for magic, kind in _STARTS.items() if start.startswith(magic)), None)
    if not start:
        kind = "an empty file"
    elif kind is None and all(byte >= 32 or byte in b"\t\n\r\f" for byte in start):
        kind = "a text"
    if kind is not None:
        raise WeightsError(f"{path} is no checkpoint: expected a .safetensors, .pth or .pt file, got {kind}")


def _check_zip(path: Path, size: int) -> None:
    """Raise if the file at `path` is a zip file (as torch writes) that is damaged or far larger when unpacked."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as zipped:
        if sum(info.file_size for info in zipped.infolist()) > 2 * size:
            raise WeightsError(f"{path} is no checkpoint: it would unpack to far more than its {size:,} bytes")
        if damaged := zipped.testzip():  # torch does not verify checksums
            raise WeightsError(f"{path} is damaged: the checksum of {damaged!r} in it is wrong")
