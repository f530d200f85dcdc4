"""Parsing of the command line: the flags of pgp train, which several commands share, and grids of values."""

from __future__ import annotations

import contextlib
import inspect
import io
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

import tyro

from pgp import recipes
from pgp.baselines import BASELINES, unprojected
from pgp.cli import published, show
from pgp.cli.commands import ResumeCommand, TrainCommand
from pgp.cli.help_texts import REGISTRY
from pgp.cli.parse_errors import shorten
from pgp.cli.renamed import refuse_old_spellings
from pgp.config import Config, Hardware
from pgp.datasets.own import dataset_from_path
from pgp.projections.base import NoProjection
from pgp.runs.run import Run

Command = TypeVar("Command")


def parse(command: type[Command], words: Sequence[str], program: str, **settings: Any) -> Command:
    """Return the command for `words`. An error ends the process, with one line on standard error."""
    with _short_errors():
        found: Command = tyro.cli(command, args=words, prog=program, registry=REGISTRY, **settings)
    return found


def parse_known(command: type[Command], words: Sequence[str], program: str) -> tuple[Command, list[str]]:
    """Return the command for `words`, and the words that it does not know."""
    with _short_errors():
        return tyro.cli(command, args=words, prog=program, return_unknown_args=True, registry=REGISTRY)


@contextlib.contextmanager
def _short_errors() -> Iterator[None]:
    """Print what tyro writes to standard error as one line that is safe for a terminal."""
    messages = io.StringIO()
    try:
        with contextlib.redirect_stderr(messages):
            yield
    finally:
        if text := messages.getvalue().strip():
            show.print_note(shorten(text))


def refuse_empty(words: list[str]) -> None:
    """Raise if a word, or the value of a flag, is empty: as a path, it would mean the working directory."""
    for before, word in zip(["pgp", *words], words, strict=False):
        if not word or (word.startswith("--") and word.find("=") == len(word) - 1):
            where = f"after {before}" if not word else f"in {word}"
            raise ValueError(f"expected a value {where}, got an empty text: was a variable of the shell empty?")


def train_command(words: list[str], program: str) -> TrainCommand:
    """Return the command for `RECIPE --flags`."""
    recipe = recipes.lookup(recipes.RECIPES, recipe_name(words, program), "recipe", "pgp list")
    refuse_old_spellings(words[1:])
    _require_values(words, "--readouts", "--tracker")
    if len(words) > 1 and not words[1].startswith("-"):
        raise ValueError(f"expected flags after {words[0]}, got {words[1]}: for images, use --data {words[1]}")
    if flag_values(words, "--add"):
        raise ValueError(f"expected --add with --resume, got it without: it adds a task to an existing run. For the"
                         f" images of a new run, use --data {flag_values(words, '--add')[0]}")  # fmt: skip
    config = _choose_components(recipe(), words[1:])
    command = parse(
        TrainCommand,
        published.translate_flags(words[1:], config),
        f"{program} {words[0]}",
        description=inspect.getdoc(recipe),
        default=TrainCommand(config),
    )
    if command.twin and command.baselines:
        raise ValueError("expected --twin or --baselines, got both: the baselines include the twin, as unprojected")
    if command.twin and (not command.pgp or isinstance(command.config.projection, NoProjection.Config)):
        raise ValueError("expected a projection with --twin, got none: the twin would be the same run")
    return command


def recipe_name(words: Sequence[str], program: str) -> str:
    """Return the name of the recipe, which comes before all flags."""
    if not words or words[0].startswith("-"):
        resume = ", or --resume RUN" if program == "pgp train" else ""
        raise ValueError(f"expected a recipe, as in {program} demo{resume}, got {words[0] if words else 'none'}:"
                         " pgp list names all recipes")  # fmt: skip
    return words[0]


def _require_values(words: Sequence[str], *flags: str) -> None:
    """Raise if one of `flags`, which tyro takes with any number of values, has none."""
    for word, following in zip(words, [*words[1:], "--"], strict=True):
        if word in flags and following.startswith("--"):
            raise ValueError(f"expected a value after {word}, got none")


def resume_defaults(words: list[str]) -> ResumeCommand:
    """Return the command for the run that `--resume` names, with the run's own settings."""
    folders = flag_values(words, "--resume")
    if not folders:
        raise ValueError("expected a run folder after --resume, such as runs/own-seed42, got none")
    folder = Path(folders[0])
    return ResumeCommand(folder, hardware=Run.open(folder).config.hardware)


def check_resumable(words: list[str]) -> None:
    """Raise if a flag is given with --resume that can only be given when a run begins."""
    refuse_old_spellings(words)
    _require_values(words, "--tracker")
    allowed = {field.name.replace("_", "-") for kind in (ResumeCommand, Hardware) for field in fields(kind)}
    for word in words:
        name = word.partition("=")[0].removeprefix("--").replace("_", "-")
        if word.startswith("--") and name.removeprefix("no-") not in allowed | {"help"}:
            flags = ", ".join(f"--{flag}" for flag in sorted(allowed - {"hardware", "resume"}))
            raise ValueError(f"expected with --resume only {flags}, got --{name}: settings that decide results are"
                             " fixed when a run begins")  # fmt: skip


def _choose_components(config: Config, words: list[str]) -> Config:
    """Return `config` with the components that flags like `--projection none` name.

    The flags of these components are then known to the parser.
    """
    for name in flag_values(words, "--projection"):
        if name in ("slower", "reduced-lr", "frozen"):
            baseline, scale = ("frozen", "0") if name == "frozen" else ("reduced-lr", "0.1")
            raise ValueError(f"expected a projection after --projection, got {name}: use"
                             f" --optimizer.later-prompt-lr-scale {scale}, or the baseline --method"
                             f" {baseline}")  # fmt: skip
    for name in flag_values(words, "--method"):
        if name in BASELINES:
            config = BASELINES[name](config)
    config = recipes.with_components(
        config,
        {
            field: [name for name in flag_values(words, f"--{field}") if name in choices]
            for field, choices in recipes.CHOICES.items()
        },
    )
    if paths := flag_values(words, "--data"):  # the recipe's number of tasks is for its own data
        dataset = dataset_from_path(paths[-1])
        if named := [name for name in flag_values(words, "--dataset") if name not in ("", dataset.tag)]:
            raise ValueError(f"expected --data or --dataset, got both: --data {paths[-1]} is a data set of kind"
                             f" {dataset.tag}, not {named[-1]}")  # fmt: skip
        for flag in PATH_FLAGS:
            if others := flag_values(words, flag):
                raise ValueError(f"expected --data or {flag}, got both: --data {paths[-1]} and {flag} {others[-1]} name"
                                 " different data")  # fmt: skip
        config = replace(config, dataset=dataset, tasks=None)
    return config


PATH_FLAGS = ("--dataset.root", "--dataset.file", "--dataset.name", "--data-path")
"""Flags that say where the data are, as `--data` does."""


def flag_values(words: list[str], wanted: str) -> list[str]:
    """Return the values after the flag `wanted`, as in `--data a b` or `--data=a`."""
    out: list[str] = []
    taking = False
    for word in words:
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            taking = name.replace("_", "-") == wanted
            if taking and equals:
                out.append(value)
        elif taking:
            out.append(word)
    return out


def parse_point(words: list[str]) -> Config:
    """Return the configuration of one point of a grid."""
    command = train_command(words, "pgp sweep")
    if command.output:
        raise ValueError(f"expected --output for the folder of a sweep, got --output-dir {command.output}")
    if command.twin or flag_values(words, "--seed"):
        raise ValueError("expected pgp sweep without --twin and --seed: baselines are run by default,"
                         " and seeds are --seeds")  # fmt: skip
    if command.tracker:
        raise ValueError(
            "expected pgp sweep without --tracker: it reports single runs; sweep.md compares those of a sweep"
        )
    if command.config.hardware.devices > 1:
        raise ValueError(f"expected --devices 1 in a sweep, whose runs are spread over all devices as they are, got"
                         f" {command.config.hardware.devices}")  # fmt: skip
    return command.config if command.pgp else unprojected(command.config)


def parse_seeds(text: str) -> list[int]:
    """Return the seeds of `--seeds`, which is a number of seeds from 0, or a list.

    >>> parse_seeds("3"), parse_seeds("3,7")
    ([0, 1, 2], [3, 7])
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isdecimal() for part in parts) or ("," not in text and int(text) < 1):
        raise ValueError(f"expected --seeds 10, for seeds 0 to 9, or --seeds 3,7,11, got {text!r}")
    return list(dict.fromkeys(map(int, parts))) if "," in text else list(range(int(text)))


def check_over(words: list[str], over: Sequence[str]) -> None:
    """Raise if a word after `--over` is not in `over`, because it was separated by a blank."""
    if loose := [word for word in flag_values(words, "--over") if word not in over]:
        raise ValueError(f"expected --over PATH=VALUE,VALUE without blanks, got {loose[0]!r} after one: put quotes"
                         " around it all, or repeat --over for another setting")  # fmt: skip


def parse_grid(over: Sequence[str]) -> list[dict[str, str]]:
    """Return every combination of the values in `PATH=v1,v2,...`, as values by path.

    >>> parse_grid(["a=1,2", "b=x"])
    [{'a': '1', 'b': 'x'}, {'a': '2', 'b': 'x'}]
    """
    axes: dict[str, list[str]] = {}
    for text in over:
        path, equals, values = text.removeprefix("--").partition("=")
        path = path.strip().replace("-", "_")
        parts = [part.strip() for part in values.split(",")]
        if not path or not equals or not all(parts):
            raise ValueError(f"expected --over PATH=VALUE,VALUE, such as projection.energy=.9,.99, got {text!r}")
        if path in ("seed", "output", "output_dir", "twin", "baselines"):
            raise ValueError(f"expected a setting of the runs in --over, got {path}: seeds are --seeds, and"
                             " baselines are run by default")  # fmt: skip
        axes.setdefault(path, []).extend(parts)
    return [dict(zip(axes, chosen, strict=True)) for chosen in itertools.product(*axes.values())]


def to_flags(choice: Mapping[str, str]) -> list[str]:
    """Return the flags of `pgp train` for a combination of values; true and false become switches."""
    words = []
    for path, value in choice.items():
        front, dot, last = path.rpartition(".")
        switch = {"true": last, "false": f"no_{last}"}.get(value.lower())
        words += [f"--{front}{dot}{switch}"] if switch else [f"--{path}", *value.split()]
    return words


def label_choices(choices: Sequence[Mapping[str, str]], configs: Sequence[Config], recipe: str) -> dict[str, Config]:
    """Return the configurations of a grid by label, without duplicates.

    A label consists of settings, each with as much of its path as is needed to be unique, and its value.
    """
    paths = list(choices[0]) if choices else []
    short = {path: path.rpartition(".")[2] for path in paths}
    names = {path: last if list(short.values()).count(last) == 1 else path for path, last in short.items()}
    out: dict[str, Config] = {}
    for choice, config in zip(choices, configs, strict=True):
        if config not in out.values():
            label = ", ".join(f"{names[path]} {_value(config, path, text)}" for path, text in choice.items())
            out[label or recipe] = config
    return out


def _value(config: Config, path: str, text: str) -> Any:
    """Return the value at a path of the configuration if it is plain (.9 and 0.90 are the same), else its text."""
    value: Any = config
    for part in path.split("."):
        value = value[int(part)] if part.isdecimal() else getattr(value, part, None)
    return value if isinstance(value, bool | int | float | str) else text
