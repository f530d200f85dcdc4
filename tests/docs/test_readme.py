"""What README says, works."""

from __future__ import annotations

import re
from pathlib import Path

from pages import ROOT, check, commands

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


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


def test_readme_is_short():
    assert len(README.split()) < 700


def test_every_command_can_be_typed():
    found = list(commands(ROOT / "README.md"))
    assert len(found) == 6  # list, train on photos twice, train a recipe, predict; and one published command
    for words in found:
        check(words)


def test_the_picture_is_there_and_described():
    ((text, path),) = re.findall(r"!\[(.*?)\]\((.*?)\)", README, re.S)
    assert len(text.split()) > 5
    assert (ROOT / path).is_file()
