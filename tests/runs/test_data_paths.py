"""Data that moved: each command that needs them takes --data, proves that they are the same and records the place."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

import tiny
from pgp import recipes, train
from pgp.backbones.clip import CLIP
from pgp.backbones.vit import ViT
from pgp.cli import main
from pgp.datasets.cifar100 import CIFAR100
from pgp.datasets.folder import Folder
from pgp.datasets.hugging_face import HuggingFace
from pgp.datasets.manifest import Manifest
from pgp.datasets.synthetic import Synthetic
from pgp.methods.head_only import HeadOnly
from pgp.projections.base import NoProjection
from pgp.runs.data_paths import resolve_paths, with_data_paths
from pgp.runs.run import Run
from pgp.system.storage import RunError


def config(folder, **changes):
    base = tiny.config(epochs=1, tasks=2, method=HeadOnly.Config(), projection=NoProjection.Config(), drift_images=2)
    return replace(base, dataset=Folder(folder, test_share=0.5), **changes)


def photos(folder, *names):
    for place, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for number in range(4):
            Image.new("RGB", (20, 20), (60 * place, 50 * number, 0)).save(folder / name / f"{number}.png")
    return folder


@pytest.fixture
def run(tmp_path, monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    run = train.train(config(photos(tmp_path / "old", "ant", "bee", "cat", "dog")), tmp_path / "run")
    shutil.move("old", "new")
    return run


def fails(capsys, *words):
    with pytest.raises(SystemExit) as stop:
        main.main(list(words))
    assert stop.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("command", ["eval", "audit"])
def test_eval_and_audit_find_data_that_moved(run, capsys, command):
    assert "no data folder at" in (told := fails(capsys, command, "run"))
    assert "name another, by --data" in told
    main.main([command, "run", "--data", "new"])
    assert "yes" in capsys.readouterr().out or command == "audit"
    main.main([command, "run"])  # it has been recorded
    assert Run.open(run.folder).config == replace(run.config, dataset=Folder(Path("new").absolute(), test_share=0.5))


def test_training_goes_on_with_data_that_moved(run, monkeypatch, capsys):
    whole = (run.folder / "accuracy.csv").read_bytes()
    (run.folder / "checkpoints" / "latest").write_text("task-01")
    assert "name another, by --data" in fails(capsys, "train", "--resume", "run")
    main.main(["train", "--resume", "run", "--data", "new"])
    assert (run.folder / "accuracy.csv").read_bytes() == whole
    photos(Path("more"), "eel", "fox")
    shutil.move("new", "newer")
    main.main(["train", "--resume", "run", "--add", "more", "--data", "newer"])
    shutil.move("newer", "newest")
    shutil.move("more", "called otherwise")
    main.main(["eval", "run", "--data", "newest", "--data", "called otherwise"])
    main.main(["train", "--resume", "run"])
    again = Run.open(run.folder)
    assert again.config.dataset.root == Path("newest").absolute()
    assert again.config.added == (Folder(Path("called otherwise").absolute()),)
    assert list(again.data.task_names) == ["", "", "more"]
    photos(Path("last"), "gnu", "hen")
    main.main(["train", "--resume", "run", "--add", "last"])
    assert list(Run.open(run.folder).data.task_names) == ["", "", "more", "last"]


def test_a_run_that_learned_nothing_yet_goes_on(tmp_path, monkeypatch, capsys):
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    photos(Path("old"), "ant", "bee", "cat", "dog")
    with monkeypatch.context() as patch:
        patch.setattr(train, "fit_task", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train.train(config(Path("old")), Path("run"))
    shutil.move("old", "new")
    shutil.copytree("new", "other")
    Path("other/ant/0.png").unlink()
    assert "expected the data that run began with, but" in fails(capsys, "train", "--resume", "run", "--data", "other")
    main.main(["train", "--resume", "run", "--data", "new"])
    assert Run.open(Path("run")).progress() == (2, 2)


@pytest.mark.filterwarnings("default")
def test_a_run_that_cannot_be_written_is_evaluated_all_the_same(run, monkeypatch, capsys):
    def refuse(*_):
        raise RunError("cannot write run/config.json: Read-only file system")

    monkeypatch.setattr(Run, "change_config", refuse)
    main.main(["eval", "run", "--data", "new"])
    out, err = capsys.readouterr()
    assert "yes" in out
    assert "the run does not record where its data lie now: cannot write run/config.json: Read-only file system" in err


@pytest.mark.filterwarnings("default")
def test_other_images_in_the_same_place_are_told(run, capsys):
    Path("new/ant/0.png").unlink()
    shutil.move("new", "old")
    main.main(["eval", "run"])
    assert "pgp: evaluated on other images: expected the data that run began with, but" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["eval", "audit"])
def test_other_data_are_refused(run, capsys, command):
    shutil.copytree("new", "other")
    Path("other/ant/0.png").unlink()
    assert "expected the data that run began with, but" in fails(capsys, command, "run", "--data", "other")
    assert "at most 1 paths with --data" in fails(capsys, command, "run", "--data", "new", "--data", "new")


def test_paths_are_those_of_every_data_set_in_order(tmp_path):
    known = config(tmp_path / "a", added=(Manifest(tmp_path / "b.csv"), HuggingFace(str(tmp_path / "c"))))
    now = with_data_paths(known, ["x", "y.csv", "hf:z"])
    assert now.dataset == Folder(Path("x").absolute(), test_share=0.5)
    assert now.added == (Manifest(Path("y.csv").absolute()), HuggingFace("z"))
    assert with_data_paths(known, ["x"]).added == known.added
    assert with_data_paths(known, ["x.csv"]).dataset == Manifest(Path("x.csv").absolute())
    published = with_data_paths(replace(known, dataset=CIFAR100(tmp_path)), ["x"])
    assert published.dataset == CIFAR100(Path("x").absolute())
    beside = with_data_paths(replace(known, task_file=tmp_path / "a" / "tasks.json"), ["x"])
    assert beside.task_file == Path("x/tasks.json").absolute()
    assert with_data_paths(replace(known, task_file=tmp_path / "t.json"), ["x"]).task_file == tmp_path / "t.json"
    table = replace(known, dataset=Manifest(tmp_path / "a" / "table.csv"), class_order=tmp_path / "a" / "order.txt")
    assert with_data_paths(table, ["x/table.csv"]).class_order == Path("x/order.txt").absolute()
    with pytest.raises(ValueError, match="expected no --data for data that need no files, got x"):
        with_data_paths(replace(known, dataset=Synthetic()), ["x"])


@pytest.mark.parametrize(
    ("backbone", "wanted"),
    [
        (ViT.Config(weights="w.pth"), ViT.Config(weights=str(Path("/here/w.pth")))),
        (ViT.Config(weights="hub"), ViT.Config(weights="hub")),
        (ViT.Config(weights="random"), ViT.Config(weights="random")),
        (recipes.BACKBONES["demo-vit"], recipes.BACKBONES["demo-vit"]),
        (recipes.BACKBONES["demo-clip"], recipes.BACKBONES["demo-clip"]),
        (CLIP.Config(weights="openai"), CLIP.Config(weights="openai")),
        (CLIP.Config("m.json", "d/w.pt"), CLIP.Config(str(Path("/here/m.json")), str(Path("/here/d/w.pt")))),
    ],
)
def test_files_of_an_encoder_are_recorded_by_absolute_paths(backbone, wanted, monkeypatch):
    monkeypatch.setattr(Path, "absolute", lambda path: path if path.is_absolute() else Path("/here") / path)
    assert resolve_paths(tiny.config(backbone=backbone)).backbone == wanted


def test_a_run_whose_weights_were_named_from_another_folder_goes_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    model = tiny.BACKBONE.build(32)
    torch.save(model.vit.state_dict(), "weights.pth")
    run = train.train(
        tiny.config(
            backbone=replace(tiny.BACKBONE, weights="weights.pth"),
            epochs=1,
            method=HeadOnly.Config(),
            projection=NoProjection.Config(),
        ),
        tmp_path / "run",
    )
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert Run.open(run.folder).config.backbone.weights == str(tmp_path / "weights.pth")
    main.main(["eval", str(run.folder)])
