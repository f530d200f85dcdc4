"""docs/architecture.md is the map of the files, and says what is there."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re

import pytest
from pages import DOCS, ROOT, text_of

import pgp
from test_architecture import LEVELS

PAGE = text_of(DOCS / "architecture.md")
SOURCE = ROOT / "src" / "pgp"


def sections():
    """Of each table of modules: its folder below src/pgp, and the files in it."""
    for part in re.split(r"^### ", PAGE, flags=re.M)[1:]:
        heading, _, rest = part.partition("\n")
        (folder,) = re.findall(r"`src/pgp/(.*?)`", heading)
        yield folder, re.findall(r"^\| `([\w.]+\.py)` \|", rest, re.M)


def test_the_tables_of_modules_are_the_tree():
    named = {f"{folder}{file}" for folder, files in sections() for file in files}
    there = {path.relative_to(SOURCE).as_posix() for path in SOURCE.rglob("*.py")}
    assert named == {path for path in there if not path.endswith("/__init__.py")}


def test_every_folder_and_file_that_is_named_exists():
    paths = re.findall(r"`((?:src|tests|docs|benchmarks|scripts)/[\w./-]*|main\.py)`", PAGE)
    assert len(paths) > 20
    for path in paths:
        assert (ROOT / path).exists(), path


def test_the_levels_are_those_that_are_held():
    rows = re.findall(r"^\| (\d) \| (.*?) \|", PAGE, re.M)
    assert [int(number) for number, _ in rows] == list(range(1, len(LEVELS) + 1))
    assert [set(re.findall(r"`(\w+)`", names)) for _, names in rows] == LEVELS


MODULES = [importlib.import_module(module.name) for module in pkgutil.walk_packages(pgp.__path__, "pgp.")
           if not module.name.endswith("__main__")]  # fmt: skip
CLASSES = {name: value for module in MODULES for name, value in vars(module).items() if inspect.isclass(value)}


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`(pgp(?:\.\w+)+)`", PAGE))))
def test_every_dotted_name_exists(name):
    module, _, attribute = name.rpartition(".")
    try:
        importlib.import_module(name)
    except ImportError:
        assert hasattr(importlib.import_module(module), attribute), name


def test_every_method_that_is_named_exists():
    names = re.findall(r"`([A-Z]\w+)((?:\.\w+)+)(?:\([^`]*\))?`", PAGE)
    assert len(names) > 15
    for first, rest in names:
        value = CLASSES[first]
        for part in rest[1:].split("."):
            assert hasattr(value, part), f"{first}{rest}"
            value = getattr(value, part)
