from __future__ import annotations

import shutil

import pytest
from PIL import Image

from pgp import recipes, train


def photos(folder, colour, count=5):
    """Images of one colour in slightly different shades."""
    folder.mkdir(parents=True)
    for number in range(count):
        Image.new("RGB", (40, 36), tuple(value - 3 * number for value in colour)).save(folder / f"{number}.png")
    return sorted(folder.iterdir())


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A finished run of the recipe `demo-quick`; do not change it."""
    return train.train(recipes.RECIPES["demo-quick"](), tmp_path_factory.mktemp("serve") / "run").folder


@pytest.fixture
def run(finished, tmp_path):
    """A copy of a finished run."""
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture
def red(tmp_path):
    return photos(tmp_path / "photos" / "one" / "red", (200, 30, 30))


@pytest.fixture
def green(tmp_path):
    return photos(tmp_path / "photos" / "two" / "green", (30, 200, 30))
