"""Every published command runs to the letter: main.py as a process, on small data in the true layouts, a small encoder.

What is added to a command, the folder of the data and a smaller encoder, stands behind it.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from archives import make_cifar100, make_cub200, make_imagenet_r, make_tiny_imagenet
from pgp.cli import main
from pgp.methods.clip_prompt import CLIPPrompt
from pgp.methods.dualprompt import DualPrompt
from pgp.methods.l2p import L2P
from pgp.projections.base import NoProjection
from pgp.runs.run import Run

ROOT = Path(__file__).parents[2]
SETS = ("10cifar100", "20cifar100", "imr", "tinyimagenet", "cub200")
PUBLISHED = "--model vit_base_patch16_224 --output_dir ./output"
TINY = "--transforms.size 32 --transforms.resize 32 --eval-batch-size 64"
VIT = f"{TINY} --backbone.weights random --backbone.arguments embed_dim 32 depth 5 num_heads 2"
CLIP = f"{TINY} --backbone.model package:demo_clip_model.json --backbone.weights package:demo_clip.safetensors"
DRIVER = """
import runpy, sys, types
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from archives import proved
proved(types.SimpleNamespace(setattr=setattr), Path(sys.argv[2]) / "cifar-100-python")
del sys.argv[:3]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""main.py, and torchvision takes the pickles of our small CIFAR-100 for the published ones."""


def commands():
    """Recipe, what is published behind its name, and what the run must be: projected, passes, seed."""
    for method in ("l2p", "dualprompt"):
        for name in SETS:
            recipe = f"{name}_{method}_pgp"
            yield recipe, f"{PUBLISHED} --epochs 5", True, 5, None
            yield recipe, f"{PUBLISHED} --epochs 5 --no_pgp", False, 5, None
            yield recipe, f"{PUBLISHED} --epochs 5 --pgp False --no_pgp", False, 5, None
    yield "10cifar100_l2p_pgp", f"{PUBLISHED} --epochs 1", True, 1, 42
    yield "20cifar100_l2p_pgp", f"{PUBLISHED} --epochs 1 --seed 42", True, 1, 42
    yield "tinyimagenet_l2p_pgp", f"{PUBLISHED} --epochs 1 --seed 50", True, 1, 50
    yield "10cifar100_clip_pgp", f"{PUBLISHED} --epochs 5", True, 5, 1997
    yield "10cifar100_clip_pgp", f"{PUBLISHED} --epochs 5 --no_pgp", False, 5, 1997
    yield "10cifar100_clip_pgp", f"{PUBLISHED} --epochs 5 --pgp False --no_pgp", False, 5, 1997
    yield "10cifar100_clip_pgp", f"{PUBLISHED} --task_inc True", True, 5, 1997


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    make_cifar100(root, 100, 2)
    make_imagenet_r(root, 20, 4)
    make_tiny_imagenet(root, 20, 3)
    make_cub200(root, 20, 3)
    return root


def run_main(data, folder, words):
    """What `python main.py words` says on its two streams, in `folder`."""
    front = ["-c", DRIVER, str(ROOT / "tests"), str(data)] if "cifar100" in words else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, *front, str(ROOT / "main.py"), *shlex.split(words)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def published(data, folder, recipe, words, projected, passes, seed):
    """One command trains what it says, and, where it projects, `--eval` finds it again."""
    small = f"--data-path {data} {CLIP if 'clip' in recipe else VIT}"
    out, err = run_main(data, folder, f"{recipe} {words} {small}")
    assert "average" in out
    full = "ViT-B-16-quickgelu openai" if "clip" in recipe else "vit_base_patch16_224.orig_in21k"
    assert f"--model vit_base_patch16_224 is {full}, the published weights" in err
    assert "the data are not as published" in err
    run = Run.open(folder / "output")
    config = run.config
    kinds = {"l2p": L2P.Config, "dualprompt": DualPrompt.Config, "clip": CLIPPrompt.Config}
    assert type(config.method) is kinds[recipe.split("_")[1]]
    assert (type(config.projection) is not NoProjection.Config) == projected
    assert config.num_passes == passes
    assert seed in (None, config.seed)
    assert config.setting == ("til" if "--task_inc" in words else "cil")
    tasks = {"20cifar100": 20, "cub200": 5}.get(recipe.split("_")[0], 10)
    left = sorted(path.name for path in (folder / "output" / "checkpoint").iterdir())
    assert left == sorted(f"task{number}_checkpoint.pth" for number in range(1, tasks + 1))
    assert torch.load(folder / "output" / "checkpoint" / "task1_checkpoint.pth", weights_only=True)["model"]
    for matrix in run.matrices().values():
        assert matrix.shape == (tasks, tasks)
        assert matrix.isfinite().sum() == tasks * (tasks + 1) / 2
    if not projected:
        return
    out, _ = run_main(data, folder, f"{recipe} --eval")
    assert out.count("yes") == tasks * len(run.matrices())


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        ("cub200_l2p_pgp", f"{PUBLISHED} --epochs 1", True, 1, 42),
        ("10cifar100_dualprompt_pgp", f"{PUBLISHED} --epochs 1 --pgp False --no_pgp", False, 1, 59),
    ],
    ids=lambda command: command[0],
)
def test_main_as_a_process(data, tmp_path, command):
    published(data, tmp_path, *command)


@pytest.mark.slow
@pytest.mark.parametrize("command", list(commands()), ids=lambda command: command[0] + command[1][len(PUBLISHED) :])
def test_published_commands(data, tmp_path, command):
    published(data, tmp_path, *command)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["demo", "--part", "4"], "unknown flag --part: it is called --micro-batch-size now"),
        (["demo", "--projection.on", "update"], "unknown flag --projection.on: it is called --projection.apply-to now"),
        (["demo", "--projection.space=union"], "unknown flag --projection.space: it is called --projection.basis now"),
        (["demo", "--no-projection.hold-norms"], "it is called --projection.preserve-key-norms now"),
        (["demo", "--views.size", "32"], "unknown flag --views.size: it is called --transforms.size now"),
        (["demo", "--method.reads", "token"], "it is called --method.head-type now"),
        (["demo", "--arrival", "listed"], "unknown flag --arrival: it is called --order now"),
        (["demo", "--method", "slower"], "unknown method 'slower': it is called 'reduced-lr' now"),
        (["demo", "--readouts", "lda", "sequential"], "unknown readout 'sequential': it is called 'head' now"),
        (["--resume", "nowhere", "--part", "4"], "unknown flag --part: it is called --micro-batch-size now"),
    ],
)
def test_an_old_spelling_is_answered_with_the_new_one(words, told, capsys):
    with pytest.raises(SystemExit):
        main.main(["train", *words])
    assert told in capsys.readouterr().err
