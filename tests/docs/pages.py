"""The pages of the documentation as tests read them: their commands, code and links."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import pytest
import tyro

from pgp.cli import parse
from pgp.cli.commands import (
    AuditCommand,
    EvalCommand,
    ExportCommand,
    PredictCommand,
    PullCommand,
    PushCommand,
    ReportCommand,
    ServeCommand,
    SweepCommand,
    UndoCommand,
)
from pgp.cli.main import COMMANDS

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
RUNS = {
    "eval": EvalCommand,
    "audit": AuditCommand,
    "predict": PredictCommand,
    "export": ExportCommand,
    "serve": ServeCommand,
    "undo": UndoCommand,
    "push": PushCommand,
    "pull": PullCommand,
    "report": ReportCommand,
}
PLACEHOLDERS = {"RECIPE", "RUN", "FOLDER", "..."}


def text_of(page):
    return page.read_text(encoding="utf-8")


def commands(page):
    """Commands in code spans, in fences and in indented lines; not those that name a form, such as `pgp eval RUN`."""
    spans = re.findall(r"(?<!`)`((?:pgp|python) [^`]*)`(?!`)", without_fences(page))
    for command in (*spans, *lines(page)):
        words = shlex.split(command, comments=True)
        if not PLACEHOLDERS.intersection(words) and "…" not in command:
            yield words


def lines(page):
    """Commands that stand on a line of their own, with their comments."""
    indented = re.findall(r"^ {4}((?:pgp|python) .*)$", without_fences(page), re.M)
    return [line for block, _ in fences(page) for line in block if re.match("(pgp|python) ", line)] + indented


def parts(page):
    """The text of a page in turn: what is no fence, with the language None, and each fence, with its own or ""."""
    found, language, block = [], None, []
    for line in text_of(page).splitlines():
        fence = re.match(r" *```(\S*)", line)
        if fence:
            found.append((language, "\n".join(block)))
            language, block = (fence[1] if language is None else None), []
        else:
            block.append(line)
    assert language is None, f"a fence of {page} is not closed"
    return [*found, (None, "\n".join(block))]


def fences(page):
    """The lines of each fence without a language, and the paragraphs before and after it."""
    found = parts(page)
    for (_, before), (language, block), (_, after) in zip(found, found[1:], found[2:], strict=False):
        if language == "":
            yield block.splitlines(), before.strip().rsplit("\n\n", 1)[-1] + "\n" + after.strip().split("\n\n", 1)[0]


def python_blocks(page):
    return [block for language, block in parts(page) if language == "python"]


def without_fences(page):
    return "\n\n".join(block for language, block in parts(page) if language is None)


def links(page):
    """The targets of links and pictures."""
    return re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", without_fences(page)))


def anchors(page):
    """The anchors of headings, as GitHub and MyST make them."""
    headings = re.findall(r"^#+ (.*)$", without_fences(page), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def check(words):
    """Raise unless the command line takes these words."""
    program, *rest = words
    if program == "python" and rest[0] != "-m":
        script, *rest = rest
        if script == "main.py":
            assert (ROOT / script).is_file()
            if rest:
                parse.train_command([word for word in rest if word != "--eval"], "python main.py")
            return
        assert (ROOT / script).is_file(), script
        if script.startswith("tests/"):
            return  # a test of its own holds what it writes
        with pytest.raises(SystemExit) as ended:
            importlib.import_module(Path(script).stem).main([*rest, "--help"])
        assert ended.value.code == 0, words
        return
    if program == "python":
        assert rest[:2] == ["-m", "pgp"], words
        rest = rest[2:] or ["--help"]
    name, *rest = rest
    assert name in {*COMMANDS, "--help", "--version"}
    if name == "train" and "--resume" in rest:
        parse.check_resumable(rest)
    elif name == "train" and rest:
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
