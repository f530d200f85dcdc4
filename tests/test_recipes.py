"""Recipes, the configuration tree and its JSON."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace

import pytest

import tiny
from conftest import golden_vit
from pgp import cli, recipes
from pgp.baselines import BASELINES
from pgp.config import Config, Hardware, Optimizer
from pgp.datasets.cifar100 import CIFAR100
from pgp.datasets.cub200 import CUB200
from pgp.datasets.imagenet_r import ImageNetR
from pgp.datasets.tiny_imagenet import TinyImageNet
from pgp.methods.dualprompt import DualPrompt
from pgp.methods.l2p import L2P
from pgp.projections.none import NoProjection
from pgp.readouts.lda import LDA
from pgp.scenario import generator


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_recipes_build_and_go_through_json(name):
    config = recipes.RECIPES[name]()
    assert config.name == name
    assert Config.from_json(json.loads(json.dumps(config.to_json()))) == config


@pytest.mark.parametrize(
    ("name", "energy", "components", "when"),
    [
        ("10cifar100_l2p_pgp", 0.5, 9, "before"),
        ("10cifar100_dualprompt_pgp", 0.5, 50, "after"),
        ("10cifar100_clip_pgp", 0.9, 5, "after"),
    ],
)
def test_the_published_basis_of_each_method(name, energy, components, when):
    basis = recipes.published_basis(recipes.RECIPES[name]().method)
    assert (basis.energy, basis.components, basis.when) == (energy, components, when)
    assert cli._train_command([name, "--projection", "released"], "pgp train").config.projection == basis


@dataclass(frozen=True)
class Own(NoProjection.Config):
    strength: int = 3


def test_a_part_of_ones_own_goes_through_json():
    config = tiny.config(projection=Own(5))
    assert Config.from_json(config.to_json()) == config


@pytest.mark.parametrize(
    "name", ["os:PathLike", "antigravity:Config", "pgp.nowhere:Config", "pgp.methods.l2p:L2P.Config", ""]
)
def test_classes_from_elsewhere_are_refused(name):
    tree = tiny.config().to_json()
    tree["projection"]["class"] = name
    with pytest.raises(ValueError, match=r"expected the class of a Projection\.Config, got"):
        Config.from_json(tree)
    assert "antigravity" not in sys.modules


def test_trees_that_do_not_fit():
    tree = tiny.config().to_json()
    with pytest.raises(ValueError, match="sede"):
        Config.from_json({**tree, "sede": 1})
    for field, value in {"seed": "many", "epochs": 2.9, "shuffle": "False", "tasks": True, "name": 3}.items():
        with pytest.raises(ValueError, match=rf"expected a value of type \w+, got {value!r}.*{field}"):
            Config.from_json({**tree, field: value})
    assert Config.from_json({**tree, "optimizer": {**tree["optimizer"], "lr": 1}}).optimizer.lr == 1.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tiny.config(tasks=0), "tasks of at least 1, got 0"),
        (lambda: tiny.config(batch_size=0), "batch_size of at least 1"),
        (lambda: tiny.config(save_every_steps=-1), "save_every_steps of at least 0"),
        (lambda: tiny.config(readouts=()), "at least one readout"),
        (lambda: tiny.config(readouts=(LDA.Config(0.1), LDA.Config(0.2))), "readouts of different names"),
        (lambda: tiny.config(batch_size=1, hardware=Hardware(devices=2)), "batch_size of at least devices 2"),
        (lambda: tiny.config(legacy_eval=True, hardware=Hardware(devices=2)), "need devices 1"),
        (lambda: Hardware(devices=0), "devices >= 1"),
        (lambda: Optimizer(lr=0), "optimizer.lr > 0"),
        (lambda: L2P.Config(top_k=11), "top_k of at most method.pool_size 10, got 11"),
        (lambda: L2P.Config(length=0), "length of at least 1"),
        (lambda: replace(tiny.config().views, resize=16), r"views\.resize of at least views\.size 32, got 16"),
        (lambda: replace(tiny.config().views, scale=(0.9, 0.1)), r"views\.scale \(low, high\)"),
    ],
)
def test_settings_are_checked(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_rates():
    assert Optimizer(lr=0.03).rate(5, 10, 16) == pytest.approx(0.001875)
    cosine = Optimizer(lr=0.256, schedule="cosine")
    assert [cosine.rate(step, 4, 1) for step in (0, 2, 4)] == pytest.approx([0.001, 0.0005, 0])
    method = L2P.Config(top_k=2).build(golden_vit(), "abc", generator(0, "init"))
    for name in ("adam", "adamw", "sgd"):
        assert Optimizer(name=name).build(method, 256).param_groups[0]["lr"] == 0.03


def test_prompts_may_learn_at_a_share_of_the_heads_rate():
    method = L2P.Config(top_k=2).build(golden_vit(), "abc", generator(0, "init"))
    optimizer = Optimizer(lr=0.5, prompt_share=0.1, schedule="cosine").build(method, 256)
    head, rest = optimizer.param_groups
    assert {id(p) for p in head["params"]} == {id(p) for p in method.head.parameters()}
    assert {id(p) for p in rest["params"]} == {id(method.pool.prompts), id(method.pool.learned_key)}
    Optimizer(lr=0.5, prompt_share=0.1, schedule="cosine").set_rate(optimizer, 1, 2, 256)
    assert (head["lr"], rest["lr"]) == pytest.approx((0.25, 0.025))
    assert len(Optimizer().build(method, 16).param_groups) == 1
    with pytest.raises(ValueError, match="prompt_share >= 0"):
        Optimizer(prompt_share=-1)


def test_later_tasks_may_have_a_learning_rate_of_their_own_for_prompts():
    optimizer = Optimizer(prompt_share=0.5, later_prompt_lr_scale=0.1)
    assert [optimizer.of_task(index).prompt_share for index in (0, 1, 2)] == [0.5, 0.05, 0.05]
    assert [Optimizer(prompt_share=0.5).of_task(index).prompt_share for index in (0, 1)] == [0.5, 0.5]
    with pytest.raises(ValueError, match=r"expected optimizer\.later_prompt_lr_scale >= 0, got -0\.1"):
        Optimizer(later_prompt_lr_scale=-0.1)


def test_slower_and_frozen_are_learning_rates_without_projection():
    for name, scale in (("slower", 0.1), ("frozen", 0.0)):
        config = tiny.config(method=tiny.DUALPROMPT)
        expected = replace(config.optimizer, later_prompt_lr_scale=scale)
        assert BASELINES[name](config) == replace(config, projection=NoProjection.Config(), optimizer=expected)
        with pytest.raises(ValueError, match=rf"--optimizer.later-prompt-lr-scale .*, --method {name}$"):
            cli._train_command(["demo", "--projection", name], "pgp train")
        command = cli._train_command(["demo", "--method", name], "pgp train")
        assert command.config.optimizer.later_prompt_lr_scale == scale


PUBLISHED = {  # tasks, epochs, batch, lr, seed, and what the method's settings differ in
    "10cifar100_l2p_pgp": (10, 5, 16, 0.03, 42, {"reads": "prompt", "selection": "batch"}),
    "20cifar100_l2p_pgp": (20, 5, 16, 0.03, 53, {"reads": "prompt", "selection": "batch"}),
    "imr_l2p_pgp": (10, 5, 16, 0.03, 42, {"reads": "prompt", "selection": "batch"}),
    "tinyimagenet_l2p_pgp": (10, 5, 16, 0.03, 52, {"reads": "prompt", "selection": "batch"}),
    "cub200_l2p_pgp": (5, 5, 16, 0.03, 42, {"reads": "token", "selection": "batch"}),
    "10cifar100_dualprompt_pgp": (10, 20, 24, 0.03, 59, {"expert_length": 5, "selection": "batch"}),
    "20cifar100_dualprompt_pgp": (20, 20, 24, 0.03, 42, {"expert_length": 5, "selection": "batch"}),
    "imr_dualprompt_pgp": (10, 50, 24, 0.005, 43, {"expert_length": 20, "selection": "image"}),
    "tinyimagenet_dualprompt_pgp": (10, 5, 24, 0.03, 52, {"expert_length": 5, "selection": "batch"}),
    "cub200_dualprompt_pgp": (5, 10, 24, 0.03, 51, {"expert_length": 5, "selection": "batch"}),
}
SETS = {
    "cifar100": (CIFAR100, 100),
    "imr": (ImageNetR, 200),
    "tinyimagenet": (TinyImageNet, 200),
    "cub200": (CUB200, 200),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_settings(name):
    config = recipes.RECIPES[name]()
    tasks, epochs, batch_size, lr, seed, own = PUBLISHED[name]
    assert (config.tasks, config.epochs, config.batch_size, config.seed) == (tasks, epochs, batch_size, seed)
    assert config.optimizer == Optimizer(lr=lr)
    assert config.method == replace(L2P.Config() if "l2p" in name else DualPrompt.Config(), **own)
    kind, classes = SETS[name.split("_")[0].removeprefix("10").removeprefix("20")]
    assert config.dataset == kind()
    assert kind.expected.classes == classes
    assert classes % tasks == 0
