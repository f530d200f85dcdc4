"""What README says, works."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

import tiny
from pgp import recipes
from pgp.cli import main
from pgp.methods.clip_prompt import CLIPPrompt
from pgp.methods.dualprompt import DualPrompt

README = (Path(__file__).parents[2] / "README.md").read_text()


def test_the_loop_of_ones_own_runs():
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    names: dict = {}
    exec(code, names)
    names["prompts"].sum().backward()
    before = names["prompts"].detach().clone()
    names["optimizer"].step()
    moved = names["prompts"].detach() - before
    basis = names["projection"].bases["prompts"].float()
    assert moved.norm() > 0
    assert (moved @ basis).norm() < 1e-4 * moved.norm()


@pytest.mark.slow
def test_every_command_runs(tmp_path, monkeypatch, capsys):
    small = {"backbone": tiny.BACKBONE, "epochs": 1}
    for name, recipe in list(recipes.RECIPES.items()):
        whole = recipe()
        if isinstance(whole.method, CLIPPrompt.Config):
            own = {"backbone": recipes.BACKBONES["demo-clip"], "method": whole.method}
        else:
            own = {"method": tiny.DUALPROMPT if isinstance(whole.method, DualPrompt.Config) else tiny.config().method}
        config = replace(tiny.config(), **{**small, **own}, name=name, projection=whole.projection)
        monkeypatch.setitem(recipes.RECIPES, name, lambda config=config: config)
    monkeypatch.chdir(tmp_path)
    for part in ("train", "test"):
        for label in "abc":
            (tmp_path / "PHOTOS" / part / label).mkdir(parents=True)
            Image.new("RGB", (40, 40), (ord(label) % 50 * 5, 0, 90)).save(tmp_path / "PHOTOS" / part / label / "1.jpg")
    (tmp_path / "NEW" / "d").mkdir(parents=True)
    for number in (1, 2):
        Image.new("RGB", (40, 40), (0, 100 * number, 90)).save(tmp_path / "NEW" / "d" / f"{number}.jpg")
    commands = [line.split("#")[0] for line in README.splitlines() if line.startswith("pgp ")]
    assert len(commands) == 17
    for command in commands:
        words = shlex.split(command)[1:]
        if "own" in words:
            words += ["--readouts", "head"]  # LDA needs more than one picture of a class
        if "sweep" in words:
            words += ["--seeds", "1", "--workers", "1", "--no-controls"]
        main.main(words)
    out = capsys.readouterr().out
    assert out.count("figure: ") == 2 * 13 + 1  # all but list, eval and predict; of a sweep, one
