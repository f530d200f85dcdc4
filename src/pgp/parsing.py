"""From words to a command: the flags of pgp train, which several commands understand."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import tyro

from pgp import published, recipes
from pgp.commands import TrainCommand
from pgp.config import Config
from pgp.datasets.own import own_data
from pgp.projections.none import NoProjection
from pgp.projections.released import Released


def train_command(words: list[str], program: str) -> TrainCommand:
    """What `RECIPE --flags` asks for."""
    if not words or words[0].startswith("-"):
        raise ValueError(f"expected a recipe, one of {', '.join(recipes.RECIPES)}; or --resume RUN")
    recipe = named(recipes.RECIPES, words[0], "recipe", "pgp list")
    config = _shelved(recipe(), words[1:])
    command = tyro.cli(
        TrainCommand,
        args=published.translated(words[1:], config),
        prog=f"{program} {words[0]}",
        description=inspect.getdoc(recipe),
        default=TrainCommand(config),
    )
    if command.twin and command.baselines:
        raise ValueError("expected --twin or --baselines, got both: the baselines hold the twin, as sequential")
    if command.twin and (not command.pgp or isinstance(command.config.projection, NoProjection.Config)):
        raise ValueError("expected a projection beside --twin: a run without one has no other twin than itself")
    return command


def named(table: dict[str, Callable[..., Any]], name: str, what: str, where: str) -> Callable[..., Any]:
    """What `table` holds under `name`; raises with the nearest name that it has, where it has none."""
    if name not in table:
        near = difflib.get_close_matches(name, table, n=1, cutoff=0.4)
        hint = f"perhaps you meant {near[0]!r}; " if near else ""
        raise ValueError(f"unknown {what} {name!r}: {hint}see {where}")
    return table[name]


def _shelved(config: Config, words: list[str]) -> Config:
    """`config` with the parts that flags like `--projection none` name, so that the flags of those parts are known."""
    for name in values(words, "--method"):
        if name in recipes.BASELINES:
            config = recipes.BASELINES[name](config)
    for field, shelf in recipes.SHELVES.items():
        parts = [shelf[name] for name in values(words, f"--{field}") if name in shelf]
        part: Any = tuple(parts) if field == "readouts" else parts[-1:]
        if parts:
            config = replace(config, **{field: part if field == "readouts" else part[0]})
        if field == "projection" and isinstance(config.projection, Released.Config):
            config = replace(config, projection=recipes.published_basis(config.method))
    if places := values(words, "--data"):  # the recipe's number of tasks was that of its own data
        config = replace(config, dataset=own_data(places[-1]), tasks=None)
    return config


def values(words: list[str], wanted: str) -> list[str]:
    """What stands behind `wanted`, as `--data a b` or `--data=a`."""
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
