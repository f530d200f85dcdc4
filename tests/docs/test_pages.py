"""Every command on every page can be typed: its recipe, its flags and their values exist."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import pytest
import tyro

from pgp.cli import parse
from pgp.cli.commands import AuditCommand, EvalCommand, PredictCommand, ReportCommand, SweepCommand
from pgp.cli.main import COMMANDS

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")] + sorted(ROOT.glob("docs/**/*.md"))
RUNS = {"eval": EvalCommand, "audit": AuditCommand, "predict": PredictCommand, "report": ReportCommand}
PLACEHOLDERS = {"RECIPE", "RUN", "FOLDER", "..."}


def commands(page):
    """Commands in code spans, in fences and in indented lines; not those that name a form, such as `pgp eval RUN`."""
    text = page.read_text(encoding="utf-8")
    spans = re.findall(r"(?<!`)`((?:pgp|python) [^`]*)`(?!`)", text)
    lines = re.findall(r"^(?: {4})?((?:pgp|python) .*)$", text, re.M)
    for command in (*spans, *lines):
        words = shlex.split(command, comments=True)
        if not PLACEHOLDERS.intersection(words) and "…" not in command:
            yield words


def check(words):
    """Raise unless the command line takes these words."""
    program, *rest = words
    if program == "python":
        script, *rest = rest
        if script == "main.py":
            assert (ROOT / script).is_file()
            parse.train_command([word for word in rest if word != "--eval"], "python main.py")
            return
        assert (ROOT / script).is_file(), script
        if script.startswith("tests/"):
            return  # a test of its own holds what it writes
        with pytest.raises(SystemExit) as ended:
            importlib.import_module(Path(script).stem).main([*rest, "--help"])
        assert ended.value.code == 0, words
        return
    name, *rest = rest
    assert name in {*COMMANDS, "--help", "--version"}
    if name == "train" and rest and "--resume" not in rest:
        parse.train_command(rest, "pgp train")
    elif name == "data" and len(rest) > 1:
        parse.train_command(rest[1:], "pgp data")
    elif name == "sweep" and rest:
        command, others = tyro.cli(SweepCommand, args=rest[1:], return_unknown_args=True)
        for choice in parse.parse_grid(command.over):
            parse.parse_point([rest[0], *others, *parse.to_flags(choice)])
        parse.parse_seeds(command.seeds)
    elif name in RUNS and len(rest) > 1:
        tyro.cli(RUNS[name], args=rest)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_of_a_page_can_be_typed(page):
    for words in commands(page):
        check(words)


def test_commands_are_found():
    assert sum(len(list(commands(page))) for page in PAGES) > 60
