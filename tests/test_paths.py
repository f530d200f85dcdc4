"""Files and folders are named by paths or by texts, wherever pgp is called; anything else is refused in a line."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

import pytest

import tiny
from pgp.backbones.clip import CLIP
from pgp.backbones.vit import ViT
from pgp.config import Config
from pgp.datasets.cifar100 import CIFAR100
from pgp.datasets.cub200 import CUB200
from pgp.datasets.fashion_mnist import FashionMNIST
from pgp.datasets.folder import Folder
from pgp.datasets.hugging_face import HuggingFace
from pgp.datasets.imagenet_r import ImageNetR
from pgp.datasets.manifest import Manifest
from pgp.datasets.own import own_data
from pgp.datasets.tiny_imagenet import TinyImageNet
from pgp.paths import as_path


@pytest.mark.parametrize("kind", [CIFAR100, CUB200, FashionMNIST, Folder, ImageNetR, Manifest, TinyImageNet])
def test_data_are_named_by_paths_or_texts(kind):
    assert kind("some/place") == kind(Path("some/place")) == kind(PurePosixPath("some/place"))
    assert all(isinstance(place, Path) for place in kind("some/place").places)
    with pytest.raises(TypeError, match=r"expected the path of dataset\.\w+, got NoneType: None$"):
        kind(None)
    with pytest.raises(ValueError, match=r"expected the path of dataset\.\w+, got ''$"):
        kind("")


def test_settings_are_still_checked():
    for wrong in (
        lambda: Folder("a", test_share=2),
        lambda: Manifest("a", test_share=2),
        lambda: ImageNetR("a", "odd"),
    ):
        with pytest.raises(ValueError, match=r"expected dataset\.(test_share|split)"):
            wrong()


def test_a_configuration_with_texts_is_the_one_with_paths():
    one, other = (tiny.config(dataset=Folder(place)) for place in ("photos", Path("photos")))
    assert one == other == Config.from_json(one.to_json())


def test_own_data_at_a_path():
    assert own_data(Path("photos")) == own_data("photos") == Folder(Path("photos"))
    assert own_data(Path("a.csv")) == Manifest(Path("a.csv"))
    assert HuggingFace(Path("some/set")).name == str(Path("some", "set"))
    for wrong, kind in ((5, TypeError), (None, TypeError), ("", ValueError)):
        with pytest.raises(kind, match="expected the path of data, or hf:NAME, got"):
            own_data(wrong)


def test_weights_are_named_by_paths_or_texts(tmp_path):
    weights = tmp_path / "w.pth"
    assert ViT.Config("vit_tiny_patch16_224", weights) == ViT.Config("vit_tiny_patch16_224", str(weights))
    with pytest.raises(ValueError, match=rf"no checkpoint at {weights}"):
        ViT.Config("vit_tiny_patch16_224", weights).build(32)
    model = tmp_path / "m.json"
    assert CLIP.Config(model, weights) == CLIP.Config(str(model), str(weights))
    with pytest.raises(ValueError, match=rf"no description of a model at {model}"):
        CLIP.Config(model, weights).build(32)
    for config in (ViT.Config, CLIP.Config):
        with pytest.raises(TypeError, match="not int"):
            config("x", 5)


class Strange:
    def __fspath__(self):
        return b"bytes"


@pytest.mark.parametrize("place", [b"runs", Strange(), None, 5, ["runs"]])
def test_what_is_no_path(place):
    with pytest.raises(TypeError, match=rf"expected the path of a run, got {type(place).__name__}"):
        as_path(place, "a run")
