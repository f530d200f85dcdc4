"""Baselines of a recipe, with the same data and budget: without projection, without prompts, or without training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace

from pgp.config import Config
from pgp.methods.head_only import HeadOnly
from pgp.projections.base import NoProjection
from pgp.projections.orthogonal import Orthogonal
from pgp.projections.random import RandomBasis
from pgp.readouts.head import MethodHead
from pgp.readouts.lda import LDA, NCM


def unprojected(config: Config) -> Config:
    """Train without projection, as --no-pgp."""
    return replace(config, projection=NoProjection.Config())


def random(config: Config) -> Config:
    """Project onto the complement of as many random directions as the recipe's projection protects.

    The number of directions is that of `orthogonal`, with its defaults if the configuration has another projection.
    """
    projection = config.projection
    settings = asdict(projection) if type(projection) is Orthogonal.Config else {}
    return replace(config, projection=RandomBasis.Config(**settings))


def reduced_lr(config: Config) -> Config:
    """Train without projection, and with a tenth of the prompts' learning rate after the first task."""
    return _later_prompt_lr_scale(config, 0.1)


def frozen(config: Config) -> Config:
    """Train without projection, and freeze the prompts after the first task; the head continues to learn."""
    return _later_prompt_lr_scale(config, 0.0)


def _later_prompt_lr_scale(config: Config, scale: float) -> Config:
    return replace(unprojected(config), optimizer=replace(config.optimizer, later_prompt_lr_scale=scale))


def linear_probe(config: Config) -> Config:
    """Train a linear head on frozen features, without prompts; also fit LDA to them."""
    readouts = (MethodHead.Config(), LDA.Config())
    return replace(unprojected(config), method=HeadOnly.Config(), experts="none", readouts=readouts)


def ncm(config: Config) -> Config:
    """Predict the nearest class mean of frozen features, without prompts and without training."""
    method = HeadOnly.Config(learns=False)
    return replace(unprojected(config), method=method, experts="none", readouts=(NCM.Config(),))


def joint(config: Config) -> Config:
    """Train without projection on the images of all tasks at once: the upper bound."""
    return replace(unprojected(config), joint=True)


BASELINES: dict[str, Callable[[Config], Config]] = {
    "unprojected": unprojected,
    "random": random,
    "reduced-lr": reduced_lr,
    "frozen": frozen,
    "linear-probe": linear_probe,
    "ncm": ncm,
    "joint": joint,
}
"""Baselines of a recipe with the same budget; `--method NAME` trains one of them, `--baselines` all."""


def matching_baselines(config: Config) -> dict[str, Config]:
    """Return the baselines that differ from `config`, by name.

    `random` is left out unless the projection of `config` is `orthogonal`, whose ranks it uses. `joint` is left out
    with setting=til: it has a single task, whose number tells nothing, so it is no upper bound.
    """
    has_ranks = type(config.projection) is Orthogonal.Config
    left_out = {"random": not has_ranks, "joint": config.setting == "til"}
    baselines = {name: baseline(config) for name, baseline in BASELINES.items() if not left_out.get(name)}
    return {name: other for name, other in baselines.items() if other != config}
