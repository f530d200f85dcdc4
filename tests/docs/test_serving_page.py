"""The script of docs/serving.md, as it stands on the page."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from pgp.predict import Predictor

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
COLOURS = {
    "apple": (200, 30, 30),
    "leaf": (30, 160, 40),
    "sea": (30, 60, 190),
    "sun": (240, 220, 60),
    "lamp": (250, 250, 250),
}


def photos(folder, name, count=6):
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        image = Image.new("RGB", (64, 48), COLOURS[name])
        image.paste((0, 0, 0), (4 + 6 * number, 10, 12 + 6 * number, 30))
        image.save(folder / f"{number}.jpg")


@pytest.fixture
def folder(tmp_path):
    for name in ("apple", "leaf", "sea"):
        photos(tmp_path / "photos" / name, name)
    photos(tmp_path / "more" / "sun", "sun")
    photos(tmp_path / "lamp", "lamp")
    with Image.open(tmp_path / "photos" / "leaf" / "2.jpg") as leaf:
        exif = Image.Exif()
        exif[0x0112] = 6  # as a phone that was held upright saves it: to be turned clockwise
        leaf.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "photo.jpg", exif=exif, quality=95)
        glass = leaf.convert("RGBA")
        glass.paste((0, 0, 0, 0), (0, 0, 32, 48))
        glass.save(tmp_path / "glass.png")
    shutil.copy(EXAMPLES / "classify.py", tmp_path)
    return tmp_path


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("bash") and shutil.which("curl")), reason="needs bash and curl")
def test_from_photos_to_a_service(folder):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    programs = folder / "bin"  # pgp and python of this environment
    programs.mkdir()
    for name, words in (("pgp", [sys.executable, "-m", "pgp"]), ("python", [sys.executable])):
        quoted = " ".join(f"'{word}'" for word in words)
        (programs / name).write_text(f'#!/bin/sh\nexec {quoted} "$@"\n', encoding="utf-8")
        (programs / name).chmod(0o755)
    environment = os.environ | {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "PORT": port}
    script = EXAMPLES / "photos_to_service.sh"
    done = subprocess.run(["bash", script], cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    answer, begun, known = (json.loads(line) for line in lines if line.startswith("{"))
    assert answer["predictions"][0]["classes"][0]["name"] == "leaf"
    assert (begun["photos"], begun["skipped"]) == (6, [])
    assert [one["name"] for one in known["classes"]] == ["apple", "leaf", "sea", "sun", "lamp"]
    expected = Predictor(folder / "runs" / "photos").predict([folder / "photo.jpg"])[0]
    assert expected.names == ("leaf",)
    assert lines[-1] == f"leaf: {100 * expected.probabilities[0]:.1f} %"
    words = [sys.executable, "classify.py", "exported/model.onnx", "glass.png"]
    seen = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=100, check=True).stdout
    expected = Predictor(folder / "runs" / "photos").predict([folder / "glass.png"])[0]
    assert seen == f"{expected.names[0]}: {100 * expected.probabilities[0]:.1f} %\n"
