"""Files and folders are named by paths or by texts, wherever pgp is called; anything else is refused in a line."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

import pytest

import tiny
from pgp import train
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
from pgp.datasets.own import dataset_from_path
from pgp.datasets.tiny_imagenet import TinyImageNet
from pgp.methods.head_only import HeadOnly
from pgp.projections.base import NoProjection
from pgp.runs.run import Run
from pgp.system.paths import as_path
from pgp.system.storage import RunError
from pgp.training import start


@pytest.mark.parametrize("kind", [CIFAR100, CUB200, FashionMNIST, Folder, ImageNetR, Manifest, TinyImageNet])
def test_data_are_named_by_paths_or_texts(kind):
    assert kind("some/place") == kind(Path("some/place")) == kind(PurePosixPath("some/place"))
    assert all(isinstance(place, Path) for place in kind("some/place").search_paths)
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


@pytest.mark.parametrize("name", ["class_order", "task_file"])
def test_lists_of_tasks_are_named_by_paths_or_texts(name):
    assert tiny.config(**{name: "list.txt"}) == tiny.config(**{name: Path("list.txt")})
    with pytest.raises(TypeError, match=rf"expected the path of {name}, got int: 5"):
        tiny.config(**{name: 5})


def test_runs_are_named_by_paths_or_texts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = tiny.config(epochs=1, tasks=2, method=HeadOnly.Config(), projection=NoProjection.Config())
    run = train.train(config, "runs/one")
    assert Run.open("runs/one").config == Run.open(Path("runs/one")).config == run.config
    assert train.resume("runs/one").folder == Path("runs/one")
    whole = Run.open(str(tmp_path / "runs" / "one")).matrices()
    assert whole.keys() == run.matrices().keys()


@pytest.mark.parametrize(
    ("use", "kind", "message"),
    [
        (lambda: train.train("demo"), TypeError, r"expected a Config, such as pgp\.RECIPES\['demo'\]\(\), got str$"),
        (lambda: train.train(tiny.config(), 5), TypeError, r"expected the path of a run folder, got int: 5$"),
        (lambda: train.train(tiny.config(), ""), ValueError, r"expected the path of a run folder, got ''$"),
        (lambda: train.resume(None), TypeError, r"expected the path of a run folder, got NoneType: None$"),
        (lambda: train.resume("nowhere"), RunError, r"no run at nowhere: expected a folder with config\.json"),
        (lambda: Run.open(5), TypeError, r"expected the path of a run folder, got int: 5$"),
        (lambda: Run.open(""), ValueError, r"expected the path of a run folder, got ''$"),
        (lambda: Run.open("a\0b"), ValueError, r"expected the path of a run folder, got 'a\\x00b'$"),
    ],
)
def test_what_names_no_run_is_told_in_a_line(use, kind, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(kind, match=message):
        use()
    assert not list(tmp_path.iterdir())


def test_data_that_are_added_are_named_by_paths_or_texts(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(start, "build_fabric", lambda config: seen.append(config) or pytest.skip("never trained"))
    monkeypatch.setattr(start, "dataset_from_path", lambda place: seen.append(place) or Folder(place))
    config = tiny.config(epochs=1, tasks=2, method=HeadOnly.Config(), projection=NoProjection.Config())
    Run.create(tmp_path / "run", config)
    with pytest.raises(pytest.skip.Exception):
        train.resume(tmp_path / "run", add=str(tmp_path))
    assert seen[0] == str(tmp_path)


def test_own_data_at_a_path():
    assert dataset_from_path(Path("photos")) == dataset_from_path("photos") == Folder(Path("photos"))
    assert dataset_from_path(Path("a.csv")) == Manifest(Path("a.csv"))
    assert HuggingFace(Path("some/set")).name == str(Path("some", "set"))
    for wrong, kind in ((5, TypeError), (None, TypeError), ("", ValueError)):
        with pytest.raises(kind, match="expected the path of data, or hf:NAME, got"):
            dataset_from_path(wrong)


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
