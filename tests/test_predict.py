from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import tiny
from pgp import train
from pgp.cli import main
from pgp.datasets.files import read_image
from pgp.datasets.folder import Folder
from pgp.datasets.synthetic import Synthetic
from pgp.methods.head_only import HeadOnly
from pgp.predict import Predictor, images_in
from pgp.runs.run import Run
from pgp.system.storage import RunError


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """The synthetic set as an image folder with names that a user would choose."""
    root, data = tmp_path_factory.mktemp("my photos"), Synthetic(noise=0.05).build()
    for part, split in (("train", data.train), ("test", data.test)):
        for i in range(len(split)):
            folder = root / part / f"Größe {int(split.labels[i])}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(split.image(i).permute(1, 2, 0).numpy()).save(folder / f"no {i:03d}.PNG")
    return root


@pytest.fixture(scope="module")
def run(photos, tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("predict") / "run"
    return train.train(tiny.config(dataset=Folder(photos), epochs=1), folder)


@pytest.mark.parametrize("readout", ["head", "lda"])
@pytest.mark.parametrize("size", [1, 5, 100])
def test_the_same_answers_as_evaluation(run, photos, readout, size):
    predictor, right = Predictor(run, readout), []
    for task in range(3):
        paths = images_in([photos / "test" / f"Größe {label}" for label in (2 * task, 2 * task + 1)])
        found = dict(predictor.predict_paths(paths, batch_size=size))
        right.append(np.mean([found[path].names[0] == path.parent.name for path in paths]))
    assert right == pytest.approx(run.matrices()[readout][2].tolist())


def test_a_path_given_twice_is_answered_twice(run, photos):
    path, other = images_in([photos / "test"])[:2]
    assert [each for each, _ in Predictor(run).predict_paths([path, other, path])] == [path, other, path]


def test_probabilities_are_those_of_all_classes_learned_so_far(run, photos):
    predictor, paths = Predictor(run), images_in([photos / "test"])
    shares = predictor.probabilities(paths)
    assert shares.shape == (24, 6)
    torch.testing.assert_close(shares.sum(1), torch.ones(24))
    alone = torch.cat([predictor.probabilities([path]) for path in paths])
    torch.testing.assert_close(alone, shares, rtol=1e-4, atol=1e-6)
    (best,) = predictor(paths[:1], top=99)
    assert sorted(best.names) == sorted(predictor.classes) == [f"Größe {i}" for i in range(6)]
    assert list(best.probabilities) == sorted(best.probabilities, reverse=True)
    assert predictor.probabilities([]).shape == (0, 6)


def test_needs_no_data_and_knows_only_what_was_learned(run, photos, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run.folder, copy)
    tiny.reconfigure(copy, dataset=replace(run.config.dataset, root=Path("gone")))
    (copy / "checkpoints" / "latest").write_text("task-02")
    predictor = Predictor(copy)
    assert predictor.classes == tuple(f"Größe {i}" for i in range(4))
    with pytest.raises(ValueError, match=r"a readout of this run, one of head, lda, got 'ldaa'"):
        Predictor(copy, "ldaa")
    (copy / "classes.json").unlink()  # which is for people
    assert Predictor(copy).classes == predictor.classes
    Run(copy).save("task-01-step-000002", {})
    with pytest.raises(RunError, match=r"no task of .* is finished yet"):
        Predictor(copy)


def test_another_encoder_is_refused(run, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run.folder, copy)
    config = run.config
    other = replace(config.backbone, arguments={**config.backbone.arguments, "mlp_ratio": 2})
    tiny.reconfigure(copy, backbone=other)
    with pytest.raises(RunError, match="expected the encoder of this run"):
        Predictor(copy)


def test_runs_and_images_are_named_by_paths_or_texts(run, photos):
    paths = images_in([str(photos / "test" / "Größe 1")])
    answers = [
        Predictor(given)(images, top=2)
        for given in (run, run.folder, str(run.folder), os.fspath(run.folder))
        for images in (paths, [str(path) for path in paths], [read_image(path) for path in paths])
    ]
    assert all(answer == answers[0] for answer in answers)
    texts = [str(path) for path in paths]
    assert [path for path, _ in Predictor(str(run.folder)).predict_paths(texts)] == paths


@pytest.mark.parametrize(
    ("use", "kind", "message"),
    [
        (lambda run: Predictor(5), TypeError, r"expected the path of a run folder, got int: 5$"),
        (lambda run: Predictor(b"runs"), TypeError, r"expected the path of a run folder, got bytes: b'runs'$"),
        (lambda run: Predictor(""), ValueError, r"expected the path of a run folder, got ''$"),
        (lambda run: Predictor("a\0b"), ValueError, r"expected the path of a run folder, got 'a\\x00b'$"),
        (
            lambda run: Predictor(run, device="nonsense"),
            ValueError,
            r"a device that this machine has, .* got 'nonsense': ",
        ),
        (
            lambda run: Predictor(run)("a.png"),
            TypeError,
            r"expected a list of images, got a single one: pass \['a.png'\]",
        ),
        (lambda run: Predictor(run)([5]), TypeError, r"expected the path of an image, got int: 5$"),
        (
            lambda run: Predictor(run)([np.zeros((3, 8, 8))]),
            TypeError,
            r"expected the path of an image, got ndarray: arr",
        ),
        (
            lambda run: Predictor(run)(torch.zeros(3, 8, 8).byte()),
            ValueError,
            r"an image \(3, H, W\) .* \(8, 8\) of torch.ui",
        ),
        (
            lambda run: Predictor(run)([torch.zeros(3, 8, 8)]),
            ValueError,
            r"expected an image .* of uint8, .* torch.float32$",
        ),
        (lambda run: Predictor(run)([torch.zeros(3, 0, 8).byte()]), ValueError, r"expected an image .* \(3, 0, 8\)"),
        (lambda run: Predictor(run)([], top=0), ValueError, r"expected top of at least 1, got 0"),
        (
            lambda run: list(Predictor(run).predict_paths("a.png")),
            TypeError,
            r"expected a list of paths, got a single one: pass \['a.png'\]",
        ),
        (
            lambda run: list(Predictor(run).predict_paths([], batch_size=0)),
            ValueError,
            r"expected batch_size of at least 1, got 0",
        ),
        (lambda run: images_in([5]), TypeError, r"expected the path of an image or a folder of images, got int"),
        (lambda run: images_in(["nowhere"]), ValueError, r"no file or folder at nowhere"),
    ],
)
def test_what_cannot_be_predicted_is_told_in_a_line(run, use, kind, message):
    with pytest.raises(kind, match=message) as raised:
        use(run)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("change", [{"method": HeadOnly.Config()}, {"precision": "bf16-mixed"}])
def test_every_kind_of_run(photos, tmp_path, change):
    run = train.train(tiny.config(dataset=Folder(photos), epochs=1, tasks=2, **change), tmp_path / "run")
    paths = images_in([photos / "test"])
    right = [found.names[0] == path.parent.name for path, found in Predictor(run).predict_paths(paths, batch_size=7)]
    assert np.mean(right) == pytest.approx(float(run.matrices()["head"][1].mean()))


def test_on_the_command_line(run, photos, tmp_path, capsys):
    (tmp_path / "empty.jpg").write_bytes(b"")
    odd = tmp_path / "ein Bild.JPG"
    Image.new("CMYK", (50, 20)).save(odd)
    folder = str(photos / "test" / "Größe 0")
    main.main(["predict", str(run.folder), str(odd), str(tmp_path / "empty.jpg"), folder, "--top", "2", "--json"])
    out, err = capsys.readouterr()
    lines = [json.loads(line) for line in out.splitlines()]
    assert [Path(line["image"]).name for line in lines] == [odd.name, *(f"no {i:03d}.PNG" for i in range(4))]
    assert all(len(line["classes"]) == 2 for line in lines)
    assert "skipped: cannot read the image" in err
    main.main(["predict", str(run.folder), folder])
    first = capsys.readouterr().out.splitlines()[0].split("\t")
    assert first[0].endswith("no 000.PNG")
    assert first[1].startswith("Größe ")
    assert first[1].endswith(" %")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "expected image files or folders, got none"),
        (["nowhere.jpg"], "no file or folder at nowhere.jpg"),
        (["broken.jpg"], "but none of 1 can be read"),
        (["broken.jpg", "--top", "0"], "--top and --batch-size of at least 1, got 0"),
    ],
)
def test_errors(run, tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    Path("broken.jpg").write_text("not an image")
    with pytest.raises(SystemExit) as stop:
        main.main(["predict", str(run.folder), *words])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
