"""Every command on every page can be typed, those of the user's pages run, and every internal link resolves."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from pages import DOCS, ROOT, anchors, check, commands, fences, lines, links, python_blocks, text_of
from PIL import Image

import hub_server
import tiny
from pgp import recipes
from pgp.cli import main, parse
from pgp.datasets.hugging_face import HuggingFace
from pgp.datasets.published import DownloadableDataset
from pgp.methods.clip_prompt import CLIPPrompt
from pgp.methods.dualprompt import DualPrompt

PAGES = [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")] + sorted(DOCS.glob("**/*.md"))
RUN_PAGES = {"command-line.md": 27, "start.md": 6, "reading-a-run.md": 4, "methods.md": 3, "../README.md": 4}
"""Pages whose commands are run, and how many there are. Those of own-data.md: tests/datasets/test_own.py."""
FIGURES = {"command-line.md": 3 * 15 + 1}  # all but list, eval, audit, predict, export and data; of a sweep, one


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_of_a_page_can_be_typed(page):
    for words in commands(page):
        check(words)


def test_commands_are_found():
    assert sum(len(list(commands(page))) for page in PAGES) > 90


WRONG = ("pgp trian", "pgp train demo --projection.space sum", "pgp train --resume runs/x --seed 1", "python -m pig")


@pytest.mark.parametrize("command", WRONG)
def test_a_wrong_command_is_found(command):
    with pytest.raises((AssertionError, ValueError)):
        check(shlex.split(command))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_internal_link_resolves(page):
    for link in links(page):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_every_page_is_linked_from_the_index():
    toctree = text_of(DOCS / "index.md").split("\n") + text_of(DOCS / "api" / "index.md").split("\n")
    for page in (page for page in [*DOCS.glob("*.md"), *DOCS.glob("api/*.md")] if page != DOCS / "index.md"):
        name = page.stem if page.stem != "index" else "api/index"
        assert name in toctree, f"{name} is in no toctree"


@pytest.mark.parametrize("package", ["backbones", "methods", "projections", "readouts", "evaluation"])
def test_every_public_module_is_in_the_reference(package):
    page = text_of(DOCS / "api" / f"{package}.md")
    modules = [path.stem for path in (DOCS.parent / "src" / "pgp" / package).glob("*.py") if path.stem != "__init__"]
    assert [module for module in modules if f".. automodule:: pgp.{package}.{module}\n" not in page] == []


def needs_download(command):
    """Whether a command fetches data or an encoder if they are not there."""
    words = shlex.split(command, comments=True)
    if words[:2] == ["python", "main.py"]:
        words = ["pgp", "train", *(word for word in words[2:] if word != "--eval")]
    if words[1] == "data":
        config = parse.train_command(words[3:], "pgp data").config
        return isinstance(config.dataset, DownloadableDataset | HuggingFace)
    if words[:2] != ["pgp", "train"] or "--resume" in words:
        return False
    config = parse.train_command(words[2:], "pgp train").config
    encoder = not getattr(config.backbone, "weights", "package:").startswith("package:")
    return encoder or isinstance(config.dataset, DownloadableDataset | HuggingFace)


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted(DOCS.glob("*.md"))], ids=lambda page: page.name)
def test_what_needs_a_download_says_so(page):
    """In its comment, or in the paragraph before or after."""
    for block, around in fences(page):
        for line in block:
            if line.startswith(("pgp ", "python ")) and needs_download(line):
                _, _, comment = line.partition("#")
                assert "download" in comment or "download" in around or "runs above" in comment, line


def test_a_download_is_recognised():
    assert needs_download("pgp train 10cifar100_l2p_pgp")
    assert needs_download("pgp data get 10cifar100_l2p_pgp")
    assert needs_download("pgp train own --data PHOTOS")
    assert not needs_download("pgp train own --data PHOTOS --backbone demo-vit")
    assert not needs_download("pgp train demo --twin")


@pytest.fixture
def tiny_recipes(monkeypatch, tmp_path):
    """Every recipe in seconds and offline, in a folder with PHOTOS of three classes, and NEW ones."""
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
            for number in (1, 2, 3):
                colour = (ord(label) % 50 * 5, 20 * number, 90)
                Image.new("RGB", (40, 40), colour).save(tmp_path / "PHOTOS" / part / label / f"{number}.jpg")
    (tmp_path / "NEW" / "d").mkdir(parents=True)
    for number in (1, 2):
        Image.new("RGB", (40, 40), (0, 100 * number, 90)).save(tmp_path / "NEW" / "d" / f"{number}.jpg")
    Image.new("RGB", (40, 40)).save(tmp_path / "photo.jpg")
    with hub_server.connected(tmp_path / "cache"):
        yield


def expanded(word):
    """What a shell makes of a word."""
    if "*" not in word:
        return [word]
    return sorted(str(path) for path in Path().glob(word) if not path.name.startswith("."))


@pytest.mark.slow
@pytest.mark.parametrize("name", RUN_PAGES)
def test_every_command_of_a_page_runs(name, tiny_recipes, capsys):
    page = DOCS / name
    found = [words for words in (shlex.split(line, comments=True) for line in lines(page)) if words[0] == "pgp"]
    assert len(found) == RUN_PAGES[name]
    for words in found:
        words = [part for word in words[1:] for part in expanded(word)]
        if words[:2] == ["train", "own"]:
            words += ["--readouts", "lda", "head"]
        if "sweep" in words:
            words += ["--seeds", "1", "--workers", "1", "--no-baselines"]
        main.main(words)
    out = capsys.readouterr().out
    assert out.count("figure: ") == FIGURES.get(name, out.count("figure: "))
    for code in python_blocks(page):
        exec(code, {})
