"""The published command line, `python main.py RECIPE --flags`, translated to pgp flags, and its output files.

A published flag is an alias: it means one of ours, which one depends on the method. Booleans take a value, as they did,
and `--task_inc False` is false.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pgp.backbones.clip import CLIP
from pgp.backbones.vit import ViT
from pgp.baselines import BASELINES
from pgp.config import Config
from pgp.methods.clip_prompt import CLIPPrompt
from pgp.methods.dualprompt import DualPrompt
from pgp.methods.l2p import L2P
from pgp.runs.data_paths import resolve_paths
from pgp.runs.run import Run
from pgp.system import storage
from pgp.system.platforms import safe_name
from pgp.system.storage import RunError

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
METHOD_FLAGS: dict[type, dict[str, str]] = {
    L2P.Config: {"size": "pool-size", "length": "length", "top-k": "top-k", "pull-constraint-coeff": "pull"},
    DualPrompt.Config: {
        "size": "pool-size",
        "length": "expert-length",
        "top-k": "top-k",
        "pull-constraint-coeff": "pull",
    },
    CLIPPrompt.Config: {"length": "image-prompt"},
}
"""Published flags of each method, and the fields of `--method` that they set."""


SWITCHES = {
    "pgp": ("--pgp", "--no-pgp"),
    "task-inc": ("--setting til", "--setting cil"),
    "shuffle": ("--shuffle", "--no-shuffle"),
    "pin-mem": ("--pin-memory", "--no-pin-memory"),
}
"""Published switches, and our flags for true and for false."""


MODELS: dict[type, dict[str, tuple[str, ...]]] = {
    ViT.Config: {"vit_base_patch16_224": ("--backbone.model", "vit_base_patch16_224.orig_in21k")},
    CLIP.Config: {
        "vit_base_patch16_224": ("--backbone.model", "ViT-B-16-quickgelu", "--backbone.weights", "openai"),
        "ViT-B/16": ("--backbone.model", "ViT-B-16-quickgelu", "--backbone.weights", "openai"),
    },
}
"""Values of the published `--model`, and the encoder that each selects."""


def translate_flags(words: Sequence[str], config: Config) -> list[str]:
    """Return `words` with every published flag translated to ours; other words do not change.

    Args:
        words: Arguments after the recipe's name.
        config: The recipe's configuration, whose method and encoder decide what some flags mean.

    Raises:
        ValueError: If a flag lacks its value, is no boolean, or sets what this method does not have.
    """
    out: list[str] = []
    for written, name, value in _pairs(words):
        if name.removeprefix("no-") in SWITCHES:
            out += _switched(name, value)
        elif name == "device":
            out += ["--accelerator", _accelerator(_given(name, value))]
        elif name == "model":
            out += _model(_given(name, value), config)
        elif name == "lr" and isinstance(config.method, CLIPPrompt.Config):
            raise ValueError("expected --optimizer.lr and --optimizer.first-lr for CLIP, which has a rate for later"
                             " tasks and one for the first, per 256 images; got --lr")  # fmt: skip
        elif name in RENAMED:
            out += [f"--{RENAMED[name]}", _given(name, value)]
        elif any(name in names for names in METHOD_FLAGS.values()):
            out += [f"--method.{_method_flag(name, config)}", _given(name, value)]
        else:
            out += written
    return out


def explain_model_flag(words: Sequence[str], config: Config) -> str | None:
    """Return a note on the weights that `--model` in `words` selects, or None if none is needed."""
    for _, name, value in _pairs(words):
        if name == "model" and value in MODELS.get(type(config.backbone), {}):
            return f"--model {value} is {' '.join(_model(value, config)[1::2])}, the published weights"
    return None


def find_latest_run(asked: Config, words: Sequence[str], folder: Path) -> tuple[Run, Config]:
    """Return the newest run of a recipe that fits all given flags, and the configuration to evaluate it.

    Of runs that fit, those with the recipe's own components come before its baselines.

    Args:
        asked: The recipe's configuration under all flags.
        words: These flags. Flags for the evaluation and for the path of the data are not compared.
        folder: The run, or a folder of runs. Runs in `folder-2`, `folder-3`, ... are searched as well.

    Raises:
        RunError: If there is none.
    """
    asked = resolve_paths(asked)
    further = re.compile(re.escape(safe_name(folder.name)) + r"(-\d+)?")  # as make_unique_folder names them
    beside = folder.parent.iterdir() if folder.parent.is_dir() else ()
    bases = dict.fromkeys([folder, *(one for one in beside if further.fullmatch(one.name))])
    folders = [one for base in bases if base.is_dir() for one in (base, *base.iterdir())]
    found, unusable = _runs_of(asked.name, folders)
    if not found:
        where = folder if folder.exists() else f"{folder}, which does not exist"
        why = f"{unusable[0]}; or " if unusable else ""
        raise RunError(f"no finished task of {asked.name} in {where}: {why}name another --output_dir, or train it"
                       f" first, by python main.py {asked.name}")  # fmt: skip
    pairs = list(_pairs(translate_flags(words, asked)))
    given = {name for _, name, _ in pairs if name}
    if any(name == "method" and value in BASELINES for _, name, value in pairs):
        given |= COMPONENTS
    fitting = [run for run in found if not _other(asked, run.config, given)]
    if not fitting:
        other = ", ".join(_other(asked, found[0].config, given))
        raise RunError(f"the runs of {asked.name} in {folder} were trained with other settings of {other}, which --eval"
                       " cannot change: leave those flags out, or train again")  # fmt: skip
    own = [run for run in fitting if not _other(asked, run.config, COMPONENTS)]
    run = max(own or fitting, key=lambda one: one.checkpoints.written())
    config = replace(run.config, legacy_eval=asked.legacy_eval)
    config = replace(config, hardware=replace(asked.hardware, devices=1))
    if "eval-batch-size" in given:
        config = replace(config, eval_batch_size=asked.eval_batch_size)
    data: Any = config.dataset
    if "data" in given:
        config = replace(config, dataset=asked.dataset)
    elif "dataset.root" in given:
        config = replace(config, dataset=replace(data, root=_lookup_path(asked, "dataset.root")))
    return run, config


def _runs_of(recipe: str, folders: Iterable[Path]) -> tuple[list[Run], list[RunError]]:
    """Return the runs of a recipe in some folders that have a finished task, and why others cannot be used."""
    runs, errors = [], []
    for folder in folders:
        if (folder / "config.json").is_file():
            try:
                run = Run.open(folder)
                if run.config.name == recipe and run.progress()[0]:
                    runs.append(run)
            except RunError as error:
                errors.append(error)
    return runs, errors


COMPONENTS = {"method", "projection", "joint", "optimizer.later-prompt-lr-scale"}
"""Settings in which the baselines of a recipe differ from it."""


def _other(asked: Config, trained: Config, given: set[str]) -> list[str]:
    """Return the flags among `given` that ask for a training different from `trained`."""
    free = {"eval-batch-size", "legacy-eval", "dataset.root"}
    names = {name.removeprefix("no-") for name in given} - free
    names = {"projection" if name == "pgp" else name for name in names}
    return sorted(name for name in names if _lookup_path(asked, name) != _lookup_path(trained, name))


def _lookup_path(config: Config, name: str) -> Any:
    """Return the setting that a flag changes, such as `optimizer.lr`, or None if it changes none."""
    value: Any = config
    for part in name.replace("-", "_").split("."):
        value = value[int(part)] if part.isdecimal() else getattr(value, part, None)
    return value


def export_checkpoints(run: Run) -> list[Path]:
    """Write `checkpoint/task{N}_checkpoint.pth` in the run folder, one for each checkpoint of a finished task.

    Each holds `{"model": learned tensors by name, "task": N}` for `torch.load`; ours, in `checkpoints/`, hold more and
    are those from which runs are resumed.
    """
    left, folder = [], run.folder / "checkpoint"
    for name in run.checkpoints.finished():
        content = io.BytesIO()
        torch.save({"model": run.load(name, {"method"})["method"], "task": name.task}, content)
        storage.make_folder(folder)
        left.append(folder / f"task{name.task}_checkpoint.pth")
        storage.write(left[-1], content.getvalue())
    return left


def _pairs(words: Sequence[str]) -> Iterator[tuple[list[str], str, str | None]]:
    """Yield each word with its flag, without leading hyphens, and the single value after it (or None).

    A word that is no flag and no such value has the flag "".
    """
    rest = list(words)
    while rest:
        word = rest.pop(0)
        front, equals, value = word.partition("=")
        name = front[2:].replace("_", "-") if front.startswith("--") else ""
        if equals:
            yield [word], name, value
        elif name and rest and not rest[0].startswith("--"):
            value = rest.pop(0)
            yield [word, value], name, value
        else:
            yield [word], name, None


def _given(name: str, value: str | None) -> str:
    if value is None:
        raise ValueError(f"expected a value after --{name}, got none")
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


def _method_flag(name: str, config: Config) -> str:
    names = METHOD_FLAGS.get(type(config.method), {})
    if name not in names:
        method = type(config.method).__qualname__.partition(".")[0]
        known = ", ".join(f"--{other}" for other in names) or "no such flags"
        raise ValueError(f"--{name} means nothing to {method}, which has {known}")
    return names[name]
