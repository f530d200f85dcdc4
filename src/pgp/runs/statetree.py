"""Conversion of a state, a tree of dicts, lists, tensors and plain values, to JSON and tensors by name."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

from pgp.system import storage


class Piece(dict[str, Any]):
    """A subtree of a state that does not change in later states. Its tensors are written once for all checkpoints.

    It contains no other piece.
    """


def read_tensors(data: bytes) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file, copied to aligned memory.

    The memory of the file is not aligned, and matrix products of unaligned tensors are rounded differently.
    """
    return {name: tensor.clone() for name, tensor in load(data).items()}


def split(value: Any, path: str, tensors: dict[str, Tensor], pieces: dict[str, bytes]) -> Any:
    """Convert a tree of dicts, lists, tensors and plain values to JSON.

    Its tensors are moved to `tensors` under their path, and every `Piece` of it to `pieces` under its digest.
    """
    if isinstance(value, Tensor):
        tensors[path] = value.detach().cpu().contiguous()
        return {"tensor": path}
    if isinstance(value, Piece):
        own: dict[str, Tensor] = {}
        tree = split(dict(value), "", own, pieces)
        data = save(own, {"tree": json.dumps(tree)})
        pieces[storage.digest(data)] = data
        return {"piece": storage.digest(data), "size": len(data)}
    if isinstance(value, Mapping):
        return {"pairs": [[key, split(item, f"{path}/{key}", tensors, pieces)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        return [split(item, f"{path}/{i}", tensors, pieces) for i, item in enumerate(value)]
    return value


def join(tree: Any, tensors: Mapping[str, Tensor], piece: Callable[[str, int], Piece]) -> Any:
    """Return the tree that `split` converted."""
    if isinstance(tree, dict):
        if "tensor" in tree:
            return tensors[tree["tensor"]]
        if "piece" in tree:
            return piece(tree["piece"], tree["size"])
        return {key: join(item, tensors, piece) for key, item in tree["pairs"]}
    if isinstance(tree, list):
        return [join(item, tensors, piece) for item in tree]
    return tree


def pieces_in(tree: Any) -> Iterator[str]:
    """Yield the digests of the pieces in the JSON of a state."""
    if isinstance(tree, dict):
        if "piece" in tree:
            yield tree["piece"]
        for _, item in tree.get("pairs", ()):
            yield from pieces_in(item)
    elif isinstance(tree, list):
        for item in tree:
            yield from pieces_in(item)
