"""What a recipe is to be compared with: the same data and budget, less what is to be shown."""

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
    """Learn the recipe's prompts without projection, as --no-pgp."""
    return replace(config, projection=NoProjection.Config())


def random(config: Config) -> Config:
    """Project the recipe's updates out of random directions, as many as its projection would protect.

    Of a projection other than `orthogonal`, no ranks are known: as many as `orthogonal` would protect by its defaults.
    """
    own = config.projection
    settings = asdict(own) if type(own) is Orthogonal.Config else {}
    return replace(config, projection=RandomBasis.Config(**settings))


def reduced_lr(config: Config) -> Config:
    """Learn the recipe's prompts at a tenth of the learning rate after the first task, without projection."""
    return _later_prompt_lr_scale(config, 0.1)


def frozen(config: Config) -> Config:
    """Freeze the recipe's prompts after the first task, without projection; the head learns on."""
    return _later_prompt_lr_scale(config, 0.0)


def _later_prompt_lr_scale(config: Config, scale: float) -> Config:
    return replace(unprojected(config), optimizer=replace(config.optimizer, later_prompt_lr_scale=scale))


def linear_probe(config: Config) -> Config:
    """Learn a linear head on frozen features, and LDA of them, without prompts."""
    return replace(unprojected(config), method=HeadOnly.Config(), readouts=(MethodHead.Config(), LDA.Config()))


def ncm(config: Config) -> Config:
    """Classify frozen features by the nearest class mean; nothing is trained."""
    return replace(unprojected(config), method=HeadOnly.Config(learns=False), readouts=(NCM.Config(),))


def joint(config: Config) -> Config:
    """Learn the recipe's prompts on the images of all tasks at once, without projection: an upper bound."""
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
"""What a recipe is to be compared with, under the same budget; `--method NAME` trains one, `--baselines` all."""


def matching_baselines(config: Config) -> dict[str, Config]:
    """Return by name what `config` is compared with.

    A baseline that equals `config` is left out, and `random` if the number of its directions is unknown.
    """
    counted = type(config.projection) is Orthogonal.Config
    made = {name: baseline(config) for name, baseline in BASELINES.items() if counted or name != "random"}
    return {name: other for name, other in made.items() if other != config}
