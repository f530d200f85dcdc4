"""The published command line, `python main.py RECIPE --flags`, in words of ours; and the files that it used to leave.

A published flag is an alias: it means one of ours, which one depends on the method. Booleans take a value, as they did,
and `--task_inc False` is false.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path

import torch

from pgp.backbones.clip import CLIP
from pgp.backbones.vit import ViT
from pgp.config import Config
from pgp.methods.clip_prompt import CLIPPrompt
from pgp.methods.dualprompt import DualPrompt
from pgp.methods.l2p import L2P
from pgp.run import Run, RunError

RENAMED = {
    "data-path": "dataset.root",
    "imagenet-r-split": "dataset.split",
    "num-tasks": "tasks",
    "lr": "optimizer.lr",
    "opt": "optimizer.name",
    "clip-grad": "optimizer.clip",
    "num-workers": "workers",
    "output-dir": "output",
}
"""Published flag, with hyphens: ours."""
OF_METHODS: dict[type, dict[str, str]] = {
    L2P.Config: {"size": "pool-size", "length": "length", "top-k": "top-k", "pull-constraint-coeff": "pull"},
    DualPrompt.Config: {
        "size": "pool-size",
        "length": "expert-length",
        "top-k": "top-k",
        "pull-constraint-coeff": "pull",
    },
    CLIPPrompt.Config: {"length": "image-prompt"},
}
"""By method: published flag, and what it sets of `--method`."""
SWITCHES = {
    "pgp": ("--pgp", "--no-pgp"),
    "task-inc": ("--setting til", "--setting cil"),
    "shuffle": ("--shuffle", "--no-shuffle"),
    "pin-mem": ("--pin-memory", "--no-pin-memory"),
}
"""Published flag: ours where it is true, and where it is false."""
MODELS: dict[type, dict[str, tuple[str, ...]]] = {
    ViT.Config: {"vit_base_patch16_224": ("--backbone.model", "vit_base_patch16_224.orig_in21k")},
    CLIP.Config: {
        "vit_base_patch16_224": ("--backbone.model", "ViT-B-16-quickgelu", "--backbone.weights", "openai"),
        "ViT-B/16": ("--backbone.model", "ViT-B-16-quickgelu", "--backbone.weights", "openai"),
    },
}
"""By encoder: what a published `--model` means."""


def translated(words: Sequence[str], config: Config) -> list[str]:
    """`words` with every published flag in ours; all else stays as it is.

    Args:
        words: arguments behind the recipe's name.
        config: the recipe's configuration, whose method and encoder decide what some flags mean.

    Raises:
        ValueError: if a flag lacks its value, is no boolean, or sets what this method does not have.
    """
    out: list[str] = []
    for written, name, value in _pairs(words):
        if name.removeprefix("no-") in SWITCHES:
            out += _switched(name, value)
        elif name == "device":
            out += ["--accelerator", _accelerator(_given(name, value))]
        elif name == "model":
            out += _model(_given(name, value), config)
        elif name in RENAMED:
            out += [f"--{RENAMED[name]}", _given(name, value)]
        elif any(name in names for names in OF_METHODS.values()):
            out += [f"--method.{_of_method(name, config)}", _given(name, value)]
        else:
            out += written
    return out


def says(words: Sequence[str], config: Config) -> str | None:
    """What `--model` among `words` means, where it says less than it means."""
    for _, name, value in _pairs(words):
        if name == "model" and value in MODELS.get(type(config.backbone), {}):
            return f"--model {value} is {' '.join(_model(value, config)[1::2])}, the published weights"
    return None


def newest(recipe: str, folder: Path) -> Run:
    """The run of `recipe` that was written last in `folder` or in the folders that stand in for it, `folder-2`, ….

    Raises:
        RunError: if there is none.
    """
    places = [folder, *sorted(folder.parent.glob(f"{folder.name}-*"))]
    found = [Run.open(place) for place in places if (place / "config.json").is_file()]
    fitting = [run for run in found if run.config.name == recipe and run.latest_task_name()]
    if not fitting:
        raise RunError(f"no finished task of {recipe} in {folder}: train it first, by python main.py {recipe}")
    return max(fitting, key=lambda run: (run.folder / "checkpoints" / "latest").stat().st_mtime)


def changed(asked: Config, recipe: Config, trained: Config) -> list[str]:
    """Names of the settings that `asked` changes in `recipe`, that decide a training, and that are not as `trained`."""
    free = {"dataset", "hardware", "eval_batch_size", "legacy_eval"}
    names = [field.name for field in fields(Config) if field.name not in free]
    return [n for n in names if getattr(recipe, n) != getattr(asked, n) != getattr(trained, n)]


def leave_checkpoints(run: Run) -> list[Path]:
    """The files `checkpoint/task{N}_checkpoint.pth` in the run folder, one for each finished task.

    Each holds `{"model": learned tensors by name, "task": N}` for `torch.load`; ours, in `checkpoints/`, hold more and
    are the ones that runs go on from.
    """
    last, left = run.latest_task_name(), []
    for number in range(1, int(last.split("-")[1]) + 1 if last else 1):
        path = run.folder / "checkpoint" / f"task{number}_checkpoint.pth"
        path.parent.mkdir(exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            torch.save({"model": run.load(f"task-{number:02d}")["method"], "task": number}, partial)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        left.append(path)
    return left


def _pairs(words: Sequence[str]) -> Iterator[tuple[list[str], str, str | None]]:
    """Word by word: what stands there, its flag without hyphens in front, and the one value behind that, or None.

    A word that is no flag and no such value has the flag "".
    """
    rest = list(words)
    while rest:
        word = rest.pop(0)
        flag, equals, value = word.partition("=")
        name = flag[2:].replace("_", "-") if flag.startswith("--") else ""
        if equals:
            yield [word], name, value
        elif name and rest and not rest[0].startswith("--"):
            value = rest.pop(0)
            yield [word, value], name, value
        else:
            yield [word], name, None


def _given(name: str, value: str | None) -> str:
    if value is None:
        raise ValueError(f"expected a value behind --{name}, got none")
    return value


def _switched(name: str, value: str | None) -> list[str]:
    values = {"true": True, "false": False}
    if value is not None and value.lower() not in values:
        raise ValueError(f"expected --{name} True or --{name} False, got {value!r}")
    yes = value is None or values[value.lower()]
    if name not in SWITCHES:  # --no-pgp
        name, yes = name.removeprefix("no-"), not yes
    return SWITCHES[name][0 if yes else 1].split()


def _accelerator(device: str) -> str:
    names = {"cpu": "cpu", "cuda": "gpu", "gpu": "gpu"}
    if device not in names:
        raise ValueError(f"expected --device cuda or cpu, got {device!r}; set CUDA_VISIBLE_DEVICES to choose a GPU")
    return names[device]


def _model(name: str, config: Config) -> list[str]:
    known = MODELS.get(type(config.backbone), {})
    return list(known.get(name, ("--backbone.model", name)))


def _of_method(name: str, config: Config) -> str:
    names = OF_METHODS.get(type(config.method), {})
    if name not in names:
        method = type(config.method).__qualname__.partition(".")[0]
        known = ", ".join(f"--{other}" for other in names) or "no such flags"
        raise ValueError(f"--{name} means nothing to {method}, which has {known}")
    return names[name]
