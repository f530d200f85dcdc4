"""Images as people have them, from files to predictions, with no code."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import tiny
from pgp import recipes
from pgp.cli import main
from pgp.datasets import folder, hugging_face
from pgp.predict import Predictor, images_in
from pgp.runs.run import Run

COLORS = {"Größe 1": (200, 60, 20), "café au lait": (20, 200, 60), "b": (60, 20, 200)}


def odd(color):
    """One image of every kind, by file name, with what `save` needs to know."""
    rgb = Image.new("RGB", (40, 24), color)
    wide = Image.fromarray(np.full((24, 40), 257 * color[0], dtype=np.uint16))
    clear = rgb.convert("RGBA")
    clear.putalpha(200)
    exif = rgb.getexif()
    exif[0x0112] = 6
    return {
        "plain photo.jpg": (rgb, {}),
        "UPPER.JPG": (rgb, {}),
        "Mixed.JPeG": (rgb, {}),
        "ünï – 写真.png": (rgb, {}),
        "gray.png": (rgb.convert("L"), {}),
        "clear.png": (clear, {}),
        "deep.png": (wide, {}),
        "deep.TIFF": (wide, {}),
        "paper.jpg": (rgb.convert("CMYK"), {}),
        "turned.jpg": (rgb, {"exif": exif}),
        "few colors.gif": (rgb.convert("P"), {}),
        "modern.webp": (rgb, {}),
    }


BAD = {"empty.jpg": b"", "letter.jpg": "Dear Größe,\n".encode(), "cut off.png": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"}


@pytest.fixture
def photos(tmp_path):
    root = tmp_path / "my photos (2024) – ü"
    for name, color in COLORS.items():
        folder = root / name / "from my phone"
        folder.mkdir(parents=True)
        for file, (image, options) in odd(color).items():
            image.save(folder / file, **options)
        for file, content in BAD.items():
            (folder / file).write_bytes(content)
        (folder / "Thumbs.db").write_bytes(b"not an image, and not called one")
    (root / ".trash").mkdir()
    return root


@pytest.fixture(autouse=True)
def _tiny_own(monkeypatch, tmp_path):
    def own():
        """Tiny."""
        return replace(tiny.config(epochs=1, tasks=None), name="own")

    monkeypatch.setitem(recipes.RECIPES, "own", own)
    monkeypatch.chdir(tmp_path)


def as_table(photos):
    """The same photos as a table, beside them."""
    lines = [f'"{path.relative_to(photos.parent)}",{path.parts[-3]}' for path in images_in([photos])]
    table = photos.parent / "all my photos.CSV"
    table.write_text("path,label\n" + "\n".join(lines) + "\n", encoding="utf-8-sig")
    return table


@pytest.mark.parametrize("kind", [lambda photos: photos, as_table])
@pytest.mark.filterwarnings("ignore:skipped")
def test_from_files_to_predictions(photos, capsys, kind):
    data = kind(photos)
    main.main(["train", "own", "--data", data.name, "--tasks", "3", "--on-bad-image", "skip", "--output", "run"])
    run = Run.open(Path("run"))
    assert sorted(run.data.class_names) == sorted(COLORS)
    assert run.config.tasks == 3
    assert run.config.dataset.with_absolute_paths() == run.config.dataset
    capsys.readouterr()
    main.main(["predict", "run", photos.name, "--json"])
    out, err = capsys.readouterr()
    told = [json.loads(line) for line in out.splitlines()]
    assert len(told) == len(COLORS) * len(odd((0, 0, 0)))
    assert all(set(answer["classes"]) <= set(COLORS) for answer in told)
    assert len(re.findall("skipped: cannot read the image", err)) == len(COLORS) * len(BAD)
    assert {Path(answer["image"]).name for answer in told} == set(odd((0, 0, 0)))
    assert Predictor("run")([photos / "b" / "from my phone" / "plain photo.jpg"])[0].names[0] in COLORS


def test_an_error_names_the_file(photos, capsys):
    for name in ("letter.jpg", "cut off.png"):
        for path in photos.rglob(name):
            path.unlink()
    with pytest.raises(SystemExit):
        main.main(["train", "own", "--data", str(photos), "--tasks", "3"])
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.search(r"pgp: cannot read the image .*my photos \(2024\) – ü/.*/from my phone/empty\.jpg", error)


@pytest.mark.filterwarnings("ignore:skipped")
def test_words_on_the_command_line_and_files_beside_the_data(photos, capsys):
    Path("new.json").write_text(json.dumps({"drinks": ["café au lait"], "the rest": ["b", "Größe 1"]}))
    words = ["train", "own", "--data", str(as_table(photos)), "--on-bad-image", "skip"]
    main.main([*words, "--task-file", "new.json", "--output", "named"])
    assert list(Run.open(Path("named")).data.task_names) == ["drinks", "the rest"]
    assert "task 2 of 2 (the rest): average accuracy" in " ".join(capsys.readouterr().err.split())
    (photos.parent / "class_order.txt").write_text("\n".join(COLORS), encoding="utf-8")
    main.main([*words, "--output", "ordered"])
    run = Run.open(Path("ordered"))
    assert [run.data.class_names[label] for labels in run.data.tasks for label in labels] == list(COLORS)
    main.main([*words, "--output", "online", "--setting", "oil", "--order", "listed"])
    assert list(Run.open(Path("online")).events("stream"))


@pytest.mark.filterwarnings("ignore:skipped")
def test_folders_of_domains(photos):
    for domain in ("phone", "studio"):
        for name in COLORS:
            (Path("domains") / domain / name).mkdir(parents=True)
            for path in images_in([photos / name]):
                (Path("domains") / domain / name / path.name).write_bytes(path.read_bytes())
    main.main(["train", "own", "--data", "domains", "--setting", "dil", "--on-bad-image", "skip", "--output", "run"])
    run = Run.open(Path("run"))
    assert run.data.task_names == ("phone", "studio")
    assert run.data.tasks == ((0, 1, 2),) * 2
    assert run.config.dataset.domains


@pytest.mark.slow
def test_every_command_of_the_documentation_runs(monkeypatch):
    rows = ["path,label,split"]
    for name, color in COLORS.items():
        for i in range(4):
            for place in (Path("photos") / name, Path("domains") / ("art" if i < 2 else "photo") / name):
                place.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (20, 20), tuple(c + 9 * i for c in color)).save(place / f"{i}.png")
            rows.append(f"photos/{name}/{i}.png,{name},{'train' if i else 'test'}")
    Path("photos.csv").write_text("\n".join(rows), encoding="utf-8")
    monkeypatch.setattr(hugging_face.HuggingFace, "build", lambda _: folder.Folder(Path("photos")).build())
    monkeypatch.setattr(hugging_face.HuggingFace, "fetch", lambda _: None)
    text = (Path(__file__).parents[2] / "docs" / "own-data.md").read_text()
    commands = [line.split("#")[0] for line in text.splitlines() if line.startswith("pgp ")]
    assert len(commands) == 5
    for number, command in enumerate(commands):
        words = shlex.split(command)[1:]
        words += ["--tasks", "3"] if "5" in words else []  # there are three classes
        main.main([*words, "--readouts", "head", "--output", f"run{number}"])
    assert [Run.open(Path(f"run{number}")).config.tasks for number in range(5)] == [3, 1, 1, 2, 1]
