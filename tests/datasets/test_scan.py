"""A run on folders of the user's own, from the first look at them to the answers: what is said before training."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import tiny
from conftest import golden_clip
from pgp import recipes, train
from pgp.cli import main
from pgp.datasets.base import BadImageError, Dataset
from pgp.datasets.folder import Folder
from pgp.methods.clip_prompt import CLIPPrompt, ZeroShot
from pgp.methods.head_only import HeadOnly
from pgp.rng import make_generator
from pgp.scenario import split_by_class
from pgp.training.tasks import check_readable
from photos import fill, tree

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="names of any bytes")


@pytest.fixture(autouse=True)
def _tiny_own(monkeypatch, tmp_path):
    def own():
        """Tiny."""
        return replace(tiny.config(epochs=1, tasks=1, method=HeadOnly.Config(), drift_images=0), name="own")

    monkeypatch.setitem(recipes.RECIPES, "own", own)
    monkeypatch.chdir(tmp_path)


def config(root, **changes):
    return replace(recipes.RECIPES["own"](), dataset=Folder(Path(root)), **changes)


def damage(folder):
    for path in folder.iterdir():
        path.write_bytes(b"")


def test_a_class_without_a_sound_image_is_told_before_training(tmp_path):
    tree(tmp_path / "photos", "train", "test")
    damage(tmp_path / "photos" / "train" / "dog")
    with pytest.raises(
        ValueError, match=r"training images of every class that can be read, got none of \['dog'\], 1 in"
    ):
        train.train(config(tmp_path / "photos", on_bad_image="skip"), tmp_path / "run")
    with pytest.raises(BadImageError, match=r"dog/0\.png: the file is empty\. --on-bad-image skip leaves"):
        train.train(config(tmp_path / "photos"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_image_that_is_deleted_after_the_run_began(tmp_path, monkeypatch):
    tree(tmp_path / "photos", "train", "test")
    gone, fit = tmp_path / "photos" / "train" / "dog" / "1.png", train.fit
    content = gone.read_bytes()

    def delete(*arguments):
        gone.unlink()
        return fit(*arguments)

    monkeypatch.setattr(train, "fit", delete)
    with pytest.raises(BadImageError, match=r"dog/1\.png: No such file or directory\. Put the file back and resume"):
        train.train(config(tmp_path / "photos"), tmp_path / "run")
    monkeypatch.undo()
    gone.write_bytes(content)
    assert train.resume(tmp_path / "run").progress() == (1, 1)


def test_a_task_without_a_sound_test_image_is_told_before_training(tmp_path):
    tree(tmp_path / "photos", "train", "test", classes=("ant", "bee", "cat", "dog"))
    for name in ("cat", "dog"):
        damage(tmp_path / "photos" / "test" / name)
    with pytest.raises(ValueError, match=r"test images in every task that can be read, got none of 6 in task 2 of 2"):
        train.train(config(tmp_path / "photos", tasks=2, on_bad_image="skip"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


class Counted:
    """A split that counts how often an image is asked for."""

    def __init__(self, split):
        self.split, self.labels, self.asked = split, split.labels, []

    def image(self, index):
        self.asked.append(index)
        return self.split.image(index)


def test_a_look_at_the_data_costs_one_image_of_each_class_and_task(tmp_path):
    data = Folder(tree(tmp_path, "train", "test", count=9)).build()
    scenario = split_by_class(data.train.labels, data.test.labels, 2, [1, 0])
    train_split, test_split = Counted(data.train), Counted(data.test)
    both = Dataset(train_split, test_split, data.class_names)
    check_readable(both, scenario, skip_bad=True)
    assert (len(train_split.asked), len(test_split.asked)) == (2, 2)
    check_readable(both, scenario, skip_bad=True, learned=2)
    assert (len(train_split.asked), len(test_split.asked)) == (2, 2)


def test_a_class_name_that_is_too_long_for_clip_is_told_before_training():
    encoder, names = golden_clip(), ["dog", "a very long name of a class " * 20]
    for method in (CLIPPrompt.Config(context=5), ZeroShot.Config()):
        with pytest.raises(ValueError, match=r"a class name is too long for the text encoder: .*names\.txt"):
            method.build(encoder, names, make_generator(0, "init"))
        method.build(encoder, names[:1], make_generator(0, "init"))


def test_a_run_in_the_photo_folder_is_not_learned(tmp_path, capsys):
    fill(tmp_path / "cat")
    fill(tmp_path / "dog")
    main.main(["train", "own", "--data", "."])
    assert (tmp_path / "runs" / "own-seed42" / "accuracy.png").is_file()
    run = train.train(config(tmp_path, seed=7))
    assert run.folder == Path("runs/own-seed7")
    assert list(run.data.class_names) == ["cat", "dog"]
    (event,) = [event["ignored"] for event in run.events("data") if "ignored" in event]
    assert event == [{"folder": str(tmp_path), "output": {"count": 1, "examples": ["runs"]}}]
    assert "ignored: 1 folders that pgp wrote: runs" in [event.get("warning") for event in run.events("data")]
    main.main(["eval", "runs/own-seed42"])
    assert "yes" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main.main(["report", "runs/own-seed42", "runs/own-seed7", "--output", "cat"])
    assert "expected an output folder outside the images of" in capsys.readouterr().err
    main.main(["report", "runs/own-seed42", "runs/own-seed7", "--output", "cat/report"])
    assert (tmp_path / "cat" / "report" / "report.png").is_file()
    train.train(config(tmp_path), tmp_path / "dog" / "run")
    data = Folder(tmp_path).build()
    assert (len(data.train), len(data.test)) == (4, 2)
    assert data.messages() == ("ignored: 3 folders that pgp wrote: runs, cat/report, dog/run",)


def test_folders_are_named_on_the_command_line(tmp_path, capsys):
    tree(tmp_path / "photos", "", classes=("car", "plane", "train"))
    with pytest.raises(SystemExit):
        main.main(["data", "check", "own", "--data", "photos"])
    assert "--dataset.train-folder . takes every folder for a class" in capsys.readouterr().err
    main.main(["data", "check", "own", "--data", "photos", "--dataset.train-folder", "."])
    assert "6 training and 3 test images of 3 classes" in capsys.readouterr().out.splitlines()


@LINUX
def test_names_that_are_not_utf8_end_neither_training_nor_predict(tmp_path, capsys):
    tree(tmp_path / "photos", "", classes=(os.fsdecode(b"caf\xe9"), "dog"))
    fill(tmp_path / "photos" / "dog", 1, os.fsdecode(b"caf\xe9{}.png"))
    train.train(config("photos"), tmp_path / "run")
    (tmp_path / "photos" / os.fsdecode(b"bad\xff.png")).write_bytes(b"")
    (tmp_path / "photos" / "dog" / "a.heic").write_bytes(b"?")
    capsys.readouterr()
    main.main(["predict", "run", "photos", "--top", "2"])
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 7
    assert r"photos/dog/caf\udce90.png" in out
    assert "caf\N{REPLACEMENT CHARACTER} " in out
    assert r"pgp: skipped: cannot read the image photos/bad\udcff.png: the file is empty" in err.splitlines()
    assert "pgp: ignored: 1 files whose suffix is not that of an image (.heic 1): dog/a.heic" in err.splitlines()
    main.main(["predict", "run", "photos", "--json"])
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert os.fsencode(told[0]["image"]).startswith(b"photos/caf\xe9/")
