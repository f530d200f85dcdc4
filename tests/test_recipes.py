"""Recipes, the configuration tree and its JSON."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import asdict, dataclass, replace

import pytest
import torch
from torch import nn

import tiny
from conftest import golden_vit
from pgp import baselines, recipes
from pgp.backbones.base import Backbone
from pgp.baselines import BASELINES, matching_baselines
from pgp.cli import main
from pgp.config import Config, Hardware, Optimizer, components, experiment_settings
from pgp.datasets.base import DatasetConfig
from pgp.datasets.cifar100 import CIFAR100
from pgp.datasets.cub200 import CUB200
from pgp.datasets.imagenet_r import ImageNetR
from pgp.datasets.tiny_imagenet import TinyImageNet
from pgp.methods.base import Method
from pgp.methods.clip_prompt import ZeroShot
from pgp.methods.coda_prompt import CODAPrompt
from pgp.methods.dualprompt import DualPrompt
from pgp.methods.l2p import L2P
from pgp.projections.base import NoProjection, Projection
from pgp.projections.released import ReleasedBasis
from pgp.readouts.base import Readout
from pgp.readouts.lda import LDA
from pgp.readouts.logistic import Logistic
from pgp.reports import tables
from pgp.rng import make_generator
from pgp.runs.run import Run
from pgp.system import storage
from pgp.system.storage import RunError
from pgp.train import train


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
    assert main._train_command([name, "--projection", "released"], "pgp train").config.projection == basis


def test_a_published_basis_with_other_constants_stays():
    config = replace(recipes.RECIPES["demo"](), projection=ReleasedBasis.Config(energy=0.9, components=3))
    assert recipes.configure(config, {"seed": 1}).projection == config.projection
    assert recipes.configure(config, {"projection": "released"}).projection == recipes.published_basis(config.method)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"setting": "dill"}, "expected one of cil, til, dil, oil, got dill @ [$].setting"),
        ({"precision": "bf16"}, "expected one of 32-true, tf32, bf16-mixed, 16-mixed, got bf16 @ [$].precision"),
    ],
)
def test_a_run_with_a_setting_that_is_none_of_the_choices_does_not_start(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        train(replace(tiny.config(), **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_components_that_stay_as_they_are_allow_no_weight_decay():
    config = tiny.config(method=CODAPrompt.Config(layers=(0,), pool_size=6, per_task=2))
    for name in ("weight_decay", "first_weight_decay"):
        with pytest.raises(ValueError, match=r"expected no weight decay with the method coda, got 0\.1"):
            replace(config, optimizer=replace(config.optimizer, **{name: 0.1}))


def test_a_first_step_that_is_left_out_leaves_momentum_at_zero():
    """With 16-mixed, torch does not fill the buffers of a fused SGD if it skips the first step."""
    method = nn.Linear(3, 2)
    optimizer = Optimizer("sgd", lr=1.0, momentum=0.9).build(method, 256, fused=True)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(1.0), torch.tensor(1.0)
    before = method.weight.detach().clone()
    for found in (1.0, 0.0):
        optimizer.found_inf = torch.tensor(found)
        method.weight.grad, method.bias.grad = torch.full((2, 3), 0.5), torch.zeros(2)
        optimizer.step()
    torch.testing.assert_close(method.weight.detach(), before - 0.5)


def test_settings_are_finite():
    config = tiny.config()
    with pytest.raises(ValueError, match=r"expected a finite optimizer\.lr, got inf"):
        replace(config, optimizer=replace(config.optimizer, lr=math.inf))
    with pytest.raises(ValueError, match=r"expected a finite transforms\.mean\.1, got nan"):
        replace(config, transforms=replace(config.transforms, mean=(0.5, math.nan, 0.5)))
    with pytest.raises(ValueError, match=r"expected a finite readouts\.0\.decay, got inf"):
        replace(config, readouts=(Logistic.Config(decay=math.inf),))


def test_joint_training_is_no_upper_bound_for_til():
    """Its only task has all classes, so to know the task of an image is to know nothing."""
    config = tiny.config(setting="til")
    assert "joint" in matching_baselines(tiny.config())
    assert "joint" not in matching_baselines(config)
    with pytest.raises(ValueError, match="expected setting cil with joint, got til"):
        baselines.joint(config)


TAGS = {
    DatasetConfig: {"cifar100", "cub200", "digits", "fashion-mnist", "folder", "hugging-face", "imagenet-r", "manifest"}
    | {"in-memory", "synthetic", "tiny-imagenet"},
    Backbone.Config: {"vit", "clip"},
    Method.Config: {"l2p", "dualprompt", "coda", "vpt", "lora", "adapter", "clip", "zero-shot", "head-only"},
    Projection.Config: {"orthogonal", "soft", "released", "random", "none"},
    Readout.Config: {"head", "lda", "ncm", "logistic", "ranpac", "experts"},
}


@pytest.mark.parametrize("shelf", TAGS)
def test_tags_never_change(shelf):
    own = {tag: kind for tag, kind in components(shelf).items() if kind.__module__.startswith("pgp.")}
    assert own.keys() == TAGS[shelf]
    for tag, kind in own.items():
        assert kind.tag == tag
        assert issubclass(kind, shelf)


def test_components_are_named_by_their_tags():
    tree = tiny.config().to_json()
    assert tree["version"] == 2
    assert (tree["dataset"]["tag"], tree["backbone"]["tag"], tree["method"]["tag"]) == ("synthetic", "vit", "l2p")
    assert tree["projection"] == {"tag": "orthogonal", **asdict(tiny.config().projection)}
    assert [one["tag"] for one in tree["readouts"]] == ["head", "lda"]
    assert "pgp." not in json.dumps(tree)


def test_recipes_call_components_by_their_tags():
    for shelf in (recipes.METHODS, recipes.PROJECTIONS, recipes.DATASETS):
        assert all(part.tag == name for name, part in shelf.items())


@pytest.mark.parametrize(("version", "got"), [(None, "none"), (0, "none"), (1, "1"), (3, "3"), ("2", "2")])
def test_another_version_is_refused(tmp_path, version, got):
    run = Run.create(tmp_path / "run", tiny.config())
    tree = {key: value for key, value in tiny.config().to_json().items() if key != "version"}
    tree |= {} if version is None else {"version": version}
    (run.folder / "config.json").write_text(json.dumps(storage.sealed(tree)))
    with pytest.raises(
        RunError, match=rf"does not describe .*: expected a configuration of version 2, got {got}: only"
    ):
        _ = run.config


@dataclass(frozen=True)
class Own(NoProjection.Config):
    tag = "own"
    strength: int = 3


def test_a_component_of_ones_own_goes_through_json():
    config = tiny.config(projection=Own(5))
    assert config.to_json()["projection"] == {"tag": "own", "strength": 5}
    assert Config.from_json(config.to_json()) == config


@pytest.mark.slow
def test_a_component_of_another_module_works_once_that_is_imported(tmp_path):
    module = (
        "from dataclasses import dataclass\nfrom pgp.projections.base import NoProjection\n"
        "@dataclass(frozen=True)\nclass Config(NoProjection.Config):\n    tag = 'elsewhere'\n"
    )
    (tmp_path / "elsewhere.py").write_text(module)
    Run.create(tmp_path / "run", tiny.config())
    path = tmp_path / "run" / "config.json"
    tree = tiny.config().to_json() | {"projection": {"tag": "elsewhere"}}
    path.write_text(json.dumps(storage.sealed(tree)))
    code = "from pathlib import Path; from pgp.runs.run import Run; print(Run(Path('run')).config.projection.tag)"
    here = {"env": os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}, "cwd": tmp_path}
    for first, fails in (("", True), ("import elsewhere; ", False)):
        done = subprocess.run([sys.executable, "-c", first + code], check=False, capture_output=True, text=True, **here)
        assert (done.returncode != 0) == fails
        known = "none, orthogonal, random, released, soft"
        expected = f"one of {known}, got 'elsewhere': if it is your own, import its module first"
        assert expected in done.stderr if fails else done.stdout == "elsewhere\n"


def test_a_module_that_is_loaded_again_replaces_its_component():
    def loaded():
        @dataclass(frozen=True)
        class Again(NoProjection.Config):
            tag = "again"

        return Again

    old, new = loaded(), loaded()
    assert components(Projection.Config)["again"] is new
    assert type(Config.from_json(tiny.config(projection=old()).to_json()).projection) is new
    del old.tag, new.tag  # off the shelf, for other tests


def test_components_without_a_tag_or_with_that_of_another_are_refused(tmp_path):
    class Nameless(NoProjection.Config):
        pass

    with pytest.raises(ValueError, match=r"expected a tag in .*Nameless, such as `tag = \"mine\"`: config.json names"):
        Run.create(tmp_path / "run", tiny.config(projection=Nameless()))
    assert not (tmp_path / "run").exists()

    honest = tiny.config().to_json()

    class Thief(NoProjection.Config):
        tag = "released"

    try:
        with pytest.raises(
            ValueError,
            match=r"'released' in .*Thief.* and pgp\.projections\.released\.ReleasedBasis\.Config: rename one",
        ):
            tiny.config(projection=Thief()).to_json()
        with pytest.raises(ValueError, match="to have its own tag"):
            Config.from_json(honest)
    finally:
        del Thief.tag


@pytest.mark.parametrize("tag", ["os:PathLike", "pgp.methods.l2p:L2P.Config", "l2p", "", None])
def test_unknown_tags_name_the_known_ones(tag):
    tree = tiny.config().to_json()
    tree["projection"]["tag"] = tag
    expected = r"expected the tag of a Projection\.Config, one of .*none, orthogonal, .*random, released, soft, got"
    with pytest.raises(ValueError, match=expected):
        Config.from_json(tree)


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
        (lambda: tiny.config(readouts=(LDA.Config(0.1), LDA.Config(0.2))), "readouts with different names"),
        (lambda: tiny.config(batch_size=1, hardware=Hardware(devices=2)), "batch_size of at least devices 2"),
        (lambda: tiny.config(legacy_eval=True, hardware=Hardware(devices=2)), "expected devices 1 with"),
        (lambda: Hardware(devices=0), "devices >= 1"),
        (lambda: Optimizer(lr=0), "optimizer.lr > 0, got 0"),
        (lambda: Optimizer(first_lr=-1), "optimizer.first_lr > 0, got -1"),
        (lambda: Optimizer(first_weight_decay=-1), "optimizer.first_weight_decay >= 0, got -1"),
        (lambda: Optimizer(betas=(0.9, 1.0)), r"optimizer.betas in \[0, 1\), got"),
        (lambda: L2P.Config(top_k=11), "top_k of at most method.pool_size 10, got 11"),
        (lambda: L2P.Config(length=0), "length of at least 1"),
        (
            lambda: replace(tiny.config().transforms, resize=16),
            r"transforms\.resize of at least transforms\.size 32, got 16",
        ),
        (lambda: replace(tiny.config().transforms, scale=(0.9, 0.1)), r"transforms\.scale \(low, high\)"),
    ],
)
def test_settings_are_checked(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_rates():
    assert Optimizer(lr=0.03).rate(5, 10, 16) == pytest.approx(0.001875)
    cosine = Optimizer(lr=0.256, schedule="cosine")
    assert [cosine.rate(step, 4, 1) for step in (0, 2, 4)] == pytest.approx([0.001, 0.0005, 0])
    method = L2P.Config(top_k=2).build(golden_vit(), "abc", make_generator(0, "init"))
    for name in ("adam", "adamw", "sgd"):
        assert Optimizer(name=name).build(method, 256).param_groups[0]["lr"] == 0.03


def test_prompts_may_learn_at_a_share_of_the_heads_rate():
    method = L2P.Config(top_k=2).build(golden_vit(), "abc", make_generator(0, "init"))
    optimizer = Optimizer(lr=0.5, prompt_lr_scale=0.1, schedule="cosine").build(method, 256)
    head, rest = optimizer.param_groups
    assert {id(p) for p in head["params"]} == {id(p) for p in method.head.parameters()}
    assert {id(p) for p in rest["params"]} == {id(method.pool.prompts), id(method.pool.learned_key)}
    Optimizer(lr=0.5, prompt_lr_scale=0.1, schedule="cosine").set_rate(optimizer, 1, 2, 256)
    assert (head["lr"], rest["lr"]) == pytest.approx((0.25, 0.025))
    assert len(Optimizer().build(method, 16).param_groups) == 1
    with pytest.raises(ValueError, match="prompt_lr_scale >= 0"):
        Optimizer(prompt_lr_scale=-1)


def test_later_tasks_may_have_a_learning_rate_of_their_own_for_prompts():
    optimizer = Optimizer(prompt_lr_scale=0.5, later_prompt_lr_scale=0.1)
    assert [optimizer.for_task(index).prompt_lr_scale for index in (0, 1, 2)] == [0.5, 0.05, 0.05]
    assert [Optimizer(prompt_lr_scale=0.5).for_task(index).prompt_lr_scale for index in (0, 1)] == [0.5, 0.5]
    with pytest.raises(ValueError, match=r"expected optimizer\.later_prompt_lr_scale >= 0, got -0\.1"):
        Optimizer(later_prompt_lr_scale=-0.1)


def test_slower_and_frozen_are_learning_rates_without_projection():
    for name, scale in (("reduced-lr", 0.1), ("frozen", 0.0)):
        config = tiny.config(method=tiny.DUALPROMPT)
        expected = replace(config.optimizer, later_prompt_lr_scale=scale)
        assert BASELINES[name](config) == replace(config, projection=NoProjection.Config(), optimizer=expected)
        with pytest.raises(ValueError, match=rf"--optimizer.later-prompt-lr-scale .* --method {name}$"):
            main._train_command(["demo", "--projection", name], "pgp train")
        command = main._train_command(["demo", "--method", name], "pgp train")
        assert command.config.optimizer.later_prompt_lr_scale == scale


PUBLISHED = {  # tasks, epochs, batch, lr, seed, and what the method's settings differ in
    "10cifar100_l2p_pgp": (10, 5, 16, 0.03, 42, {"head_type": "prompt", "selection": "batch"}),
    "20cifar100_l2p_pgp": (20, 5, 16, 0.03, 53, {"head_type": "prompt", "selection": "batch"}),
    "imr_l2p_pgp": (10, 5, 16, 0.03, 42, {"head_type": "prompt", "selection": "batch"}),
    "tinyimagenet_l2p_pgp": (10, 5, 16, 0.03, 52, {"head_type": "prompt", "selection": "batch"}),
    "cub200_l2p_pgp": (5, 5, 16, 0.03, 42, {"head_type": "token", "selection": "batch"}),
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


def test_reports_tell_components_apart_by_their_tags():
    clip = recipes.RECIPES["demo-clip"]()
    trees = [experiment_settings(config) for config in (clip, replace(clip, method=ZeroShot.Config()))]
    assert tables._labels(trees) == ["method clip", "method zero-shot"]


def test_settings_of_a_list_are_named_by_their_place():
    config = recipes.configure("demo", {"readouts": ["lda", "ncm"], "readouts.0.shrinkage": 0.3})
    assert config.readouts[0].shrinkage == 0.3
    for path in ("readouts.2.shrinkage", "readouts.lda.shrinkage"):
        with pytest.raises(ValueError, match=f"unknown setting '{path}'"):
            recipes.configure("demo", {"readouts": ["lda", "ncm"], path: 0.3})
    for settings, message in (
        ({"readouts": []}, r"expected names of readouts, got \[\]"),
        ({"backbone": {"model": "x"}}, "expected the name of a backbone, got {'model': 'x'}"),
        ({"optimizer": {"lr": 0.1}}, r"expected single settings, such as optimizer.name, got {'lr': 0.1}"),
        ({"epochs": "5"}, r"expected a value of type int, got '5' @ \$\.epochs"),
    ):
        with pytest.raises(ValueError, match=message):
            recipes.configure("demo", settings)


@pytest.mark.parametrize(("name", "value"), [("epochs", "5"), ("tasks", 2.5), ("views", True)])
def test_a_number_of_the_wrong_type_is_named(name, value):
    with pytest.raises(TypeError, match=rf"expected {name} as an integer, got {value!r}"):
        replace(recipes.RECIPES["demo"](), **{name: value})
