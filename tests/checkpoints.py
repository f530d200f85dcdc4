"""Run folders with a checkpoint, made without training."""

from __future__ import annotations

import torch

import tiny
from pgp.runs.checkpoint import CheckpointName
from pgp.runs.run import Run
from pgp.runs.statetree import Piece

CLASSES = tiny.described("ab", [[0], [1]])


def state(task=1):
    """A state that remembers something of each task."""
    pieces = {number: Piece(answers=torch.full((50,), float(number))) for number in range(task)}
    matrix = torch.full((2, 2), 0.5, dtype=torch.float64)
    return {"task": task, "step": 0, "rows": torch.arange(40.0) + task, "pieces": pieces, "matrices": {"lda": matrix}}


def made(folder):
    run = Run.create(folder, tiny.config(), CLASSES)
    run.log("task", task=0, value=1.5)
    run.save(CheckpointName(1), state())
    run.write_matrices(state()["matrices"])
    return run


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
