"""The routes of the service, without a network."""

from __future__ import annotations

import asyncio
import io
import json
import os
import re
import shutil
import socket
import struct
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from fastapi import FastAPI
from fastapi.testclient import TestClient
from PIL import Image
from starlette.datastructures import Headers

import tiny
from pgp import recipes, train
from pgp.config import Hardware
from pgp.datasets.decode import num_pixels
from pgp.predict import Predictor
from pgp.runs.run import TAUGHT, Run
from pgp.serve import Limits, app, build_app, serve
from pgp.serve.batching import Batcher
from pgp.serve.limits import NOT_STARTED, Guard, RefusedError
from pgp.serve.model import Model
from pgp.serve.teaching import Teacher
from pgp.system import storage


@pytest.fixture
def run(quick_run):
    return quick_run


def uploads(paths):
    return [("files", (path.name, path.read_bytes())) for path in paths]


def contents(folder):
    """Files of a run, but for its lock."""
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name != ".pgp-lock")
    return {path.relative_to(folder): path.read_bytes() for path in paths}


def learned(client):
    """Wait until the class is learned, and return how it ended."""
    for _ in range(600):
        lesson = client.get("/teach").json()
        if lesson["state"] != "learning":
            return lesson
        time.sleep(0.05)
    raise AssertionError(lesson)


def teach(client, name, paths):
    begun = client.post("/teach", data={"name": name}, files=uploads(paths))
    assert begun.status_code == 202, begun.text
    return learned(client)


@pytest.fixture
def client(run):
    with TestClient(build_app(run), base_url="http://localhost") as client:
        yield client


def test_predictions_are_those_of_the_predictor(client, run, red):
    expected = Predictor(run).predict(red, top=3, reject=0.05)
    answer = client.post("/predict?top=3", files=uploads(red)).json()
    assert {one["checkpoint"] for one in answer["predictions"]} == {"task-05"}
    for path, found, prediction in zip(red, answer["predictions"], expected, strict=True):
        assert (found["file"], found["unknown"]) == (path.name, prediction.unknown)
        assert tuple(one["name"] for one in found["classes"]) == prediction.names
        assert [one["probability"] for one in found["classes"]] == pytest.approx(prediction.probabilities, abs=1e-5)


def test_what_the_run_knows(client, run):
    known, described = client.get("/classes").json(), Run.open(run).data
    assert [one["name"] for one in known["classes"]] == list(Predictor(run).classes)
    assert {one["name"]: one["task"] for one in known["classes"]}["9"] == 5
    assert [task["training_images"] for task in known["tasks"]] == list(reversed(described.train_images))
    assert (known["can_undo"], known["problem"], known["detects_unknown"]) == (False, None, True)
    accuracy, matrices = client.get("/accuracy").json(), Run.open(run).matrices()
    found = torch.tensor(
        [[float("nan") if v is None else v for v in row] for row in accuracy["accuracy"]["lda+patches+normalize"]]
    )
    torch.testing.assert_close(found, matrices["lda+patches+normalize"].to(found), equal_nan=True)
    assert client.get("/health").json() == {"status": "ok"}
    assert {"/predict", "/teach", "/undo"} <= set(client.get("/openapi.json").json()["paths"])


def test_teach_predict_undo(client, run, red, green, tmp_path):
    before, files = client.post("/predict", files=uploads(red)).json(), contents(run)
    lesson = teach(client, " red  thing ", red)
    assert (lesson["state"], lesson["name"], lesson["messages"]) == ("finished", "red thing", []), lesson
    answer = client.post("/predict", files=uploads(red)).json()
    assert {one["classes"][0]["name"] for one in answer["predictions"]} == {"red thing"}
    known = client.get("/classes").json()
    assert known["can_undo"]
    assert known["tasks"][0] == {
        "number": 6,
        "name": "red thing",
        "classes": ["red thing"],
        "training_images": 4,
        "test_images": 1,
        "added": True,
    }
    other = client.post("/undo", data={"name": "green"})
    expected = "expected a class that was added last (red thing), got 'green'"
    assert (other.status_code, other.json()["error"]) == (409, expected)
    assert client.post("/undo", data={"name": " red  thing"}).json() == {"forgot": ["red thing"]}
    assert client.post("/predict", files=uploads(red)).json() == before
    log = Path("metrics.jsonl")
    assert contents(run) == files | {log: (run / log).read_bytes()}
    assert not list((run / TAUGHT).iterdir())
    again = client.post("/undo", data={"name": "red thing"})
    assert (again.status_code, again.json()["error"]) == (
        409,
        "expected a class that was taught, but there is none to undo",
    )
    # what is learned afterwards is what a run without the undone class learns
    shutil.copytree(run, tmp_path / "other")
    assert teach(client, "green", green)["state"] == "finished"
    train.resume(tmp_path / "other", add=green[0].parent.parent)
    left, right = (Predictor(folder).probabilities([*red, *green]) for folder in (run, tmp_path / "other"))
    torch.testing.assert_close(left, right)


def test_no_undo_without_the_checkpoint_before(run, red):
    tiny.reconfigure(run, keep_checkpoints="last")
    with TestClient(build_app(run), base_url="http://localhost") as client:
        assert teach(client, "red", red)["state"] == "finished"
        known = client.get("/classes").json()
        assert (known["tasks"][0]["added"], known["can_undo"]) == (True, False)
        refused = client.post("/undo", data={"name": "red"})
    assert (refused.status_code, "keeps only the newest" in refused.json()["error"]) == (409, True)


def test_teaching_is_pgp_add(client, run, finished_quick, red, tmp_path):
    table = tmp_path / "red.csv"
    table.write_text("path,label\n" + "".join(f"{path},red\n" for path in red), encoding="utf-8")
    shutil.copytree(finished_quick, tmp_path / "added")
    train.resume(tmp_path / "added", add=table)
    teach(client, "red", red)
    left, right = (Predictor(folder).probabilities(red) for folder in (run, tmp_path / "added"))
    assert left.shape[1] == 11
    torch.testing.assert_close(left, right, rtol=0, atol=0)


def bomb():
    file = io.BytesIO()
    Image.new("1", (30_000, 30_000)).save(file, "PNG")
    return file.getvalue()


def test_broken_images_do_not_harm_the_good_ones(client, red):
    files = [("files", ("a.png", b"no image")), *uploads(red[:1]), ("files", ("b.png", bomb())), ("files", ("c", b""))]
    answer = client.post("/predict", files=files)
    assert answer.status_code == 200
    found = answer.json()["predictions"]
    assert found[0]["error"].startswith("cannot read the image a.png: it is damaged, or no image")
    assert found[1]["classes"]
    assert "expected at most 50,000,000 pixels, got" in found[2]["error"]
    assert found[3]["error"] == "cannot read the image c: the file is empty"
    alone = client.post("/predict", files=files[:1])
    assert (alone.status_code, alone.json()["error"]) == (400, found[0]["error"])
    counts = client.get("/metrics").text
    assert 'pgp_images_total{result="unreadable"} 4.0' in counts
    assert 'pgp_requests_total{path="/predict",status="400"} 1.0' in counts


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "files"),  # an empty field counts as missing
        ("  ", "expected the name of the class, got none"),
        ("3", "the class '3' is known already: choose another name, or undo it first"),
        ("n" * 10_000, "expected a name of at most 100 characters, got 10,000"),
        ("a\x00b", "expected a name of visible characters, got 'a\\x00b'"),
        ("a\u202eb", "expected a name of visible characters"),
        ("\u200d", "expected a name of visible characters, got '\\u200d'"),
        ("\u3164 \u2800", "expected a name of visible characters"),
    ],
)
def test_names_that_cannot_be(client, run, red, name, message):
    before = contents(run)
    answer = client.post("/teach", data={"name": name}, files=uploads(red))
    assert answer.status_code in (400, 409, 422)
    assert message in answer.json()["error"] or answer.status_code == 422
    assert contents(run) == before
    assert client.get("/teach").json() == {"state": "none"}


@pytest.mark.parametrize(
    "name", ["<b onload=alert(1)>", "../../up", "a/b\\c", "CON", "日本 🦊", '"quoted", name', "=1+1", "%s%"]
)
def test_names_are_taken_as_they_are(client, run, red, name):
    assert teach(client, name, red)["state"] == "finished"
    assert Predictor(run).predict(red[:1])[0].names == (name,)
    assert {path.parent.parent for path in run.rglob("*.csv") if path.parent != run} == {run / TAUGHT}


def test_photos_that_cannot_be_read_are_left_out(client, run, red):
    files = [*uploads(red), ("files", ("broken.png", b"x")), *uploads(red[:2])]
    begun = client.post("/teach", data={"name": "red"}, files=files).json()
    assert begun["photos"] == 5  # each photo once
    (skipped,) = begun["skipped"]
    assert skipped.startswith("cannot read the image broken.png: it is damaged")
    assert learned(client)["state"] == "finished"
    none = client.post("/teach", data={"name": "other"}, files=[("files", ("broken.png", b"x"))])
    assert none.status_code == 400
    assert none.json()["error"].startswith("expected images of the class, but none can be read: cannot read")


def test_one_photo_is_enough(client, red):
    lesson = teach(client, "red", red[:1])
    assert lesson["state"] == "finished", lesson
    assert any("red" in message for message in lesson["messages"])  # it has no test image
    assert client.get("/classes").json()["tasks"][0]["training_images"] == 1
    assert client.get("/accuracy").json()["accuracy"]["lda+patches+normalize"][5][5] is None


def test_two_teachers(client, red, green, monkeypatch):
    begin, resume = threading.Event(), train.resume

    def slow(*args, **kwargs):
        begin.wait(20)
        return resume(*args, **kwargs)

    monkeypatch.setattr(train, "resume", slow)
    assert client.post("/teach", data={"name": "red"}, files=uploads(red)).status_code == 202
    second = client.post("/teach", data={"name": "green"}, files=uploads(green))
    undo = client.post("/undo", data={"name": "red"})
    for answer in (second, undo):
        assert (answer.status_code, answer.json()["error"]) == (409, "'red' is being taught: wait until it is finished")
    assert client.post("/predict", files=uploads(red)).status_code == 200  # meanwhile
    begin.set()
    assert learned(client)["state"] == "finished"
    assert teach(client, "green", green)["state"] == "finished"


def test_a_request_to_teach_that_is_refused_decodes_nothing(client, red, monkeypatch):
    decoded = []
    monkeypatch.setattr(client.app.state.service, "read", lambda content, name: decoded.append(name))
    known = client.post("/teach", data={"name": "3"}, files=uploads(red))
    assert (known.status_code, known.json()["error"][:30]) == (409, "the class '3' is known already")
    long = client.post("/teach", data={"name": "n" * 101}, files=uploads(red))
    assert (long.status_code, long.json()["error"]) == (400, "expected a name of at most 100 characters, got 101")
    with client.app.state.service.teacher._busy:
        busy = client.post("/teach", data={"name": "red"}, files=uploads(red))
    assert (busy.status_code, busy.json()["error"]) == (409, "a class is being taught: wait until it is finished")
    assert not decoded


@pytest.mark.parametrize("path", ["/predict", "/teach"])
def test_images_that_take_too_long_to_decode(run, red, monkeypatch, path):
    decoded = threading.Event()
    with TestClient(build_app(run, limits=Limits(seconds=0.3)), base_url="http://localhost") as client:
        monkeypatch.setattr(client.app.state.service, "read", lambda *_: decoded.wait(5) and torch.zeros(3, 8, 8))
        answer = client.post(path, data={"name": "red"}, files=uploads(red[:1]))
        decoded.set()
    assert (answer.status_code, answer.headers.get("Retry-After")) == (503, "5")
    assert answer.json() == {"error": "the service is too busy: try again in a moment"}
    assert not (run / TAUGHT).exists()


def test_no_more_images_are_decoded_at_a_time_after_a_timeout(run, red, monkeypatch):
    decoded, running, most = threading.Event(), [], []

    def read(*_):
        running.append(None)
        most.append(len(running))
        decoded.wait(5)
        running.pop()
        return torch.zeros(3, 8, 8)

    with TestClient(build_app(run, limits=Limits(seconds=0.2)), base_url="http://localhost") as client:
        monkeypatch.setattr(client.app.state.service, "read", read)
        for _ in range(3):
            assert client.post("/predict", files=uploads(red[:3])).status_code == 503
        assert client.get("/health").status_code == 200
        decoded.set()
    assert max(most) == Limits().decoders


def test_jpeg_files_with_many_scans(client):
    file = io.BytesIO()
    Image.new("RGB", (16, 16), "red").save(file, "JPEG", progressive=True)
    few = file.getvalue()
    scan = few[few.rindex(b"\xff\xda") : -2]
    many = few[:-2] + 100 * scan + few[-2:]
    assert Image.open(io.BytesIO(many)).convert("RGB").getpixel((0, 0))[0] > 200  # it can be decoded
    sent = [("files", ("few.jpg", few)), ("files", ("many.jpg", many))]
    one, other = client.post("/predict", files=sent).json()["predictions"]
    assert one["classes"]
    assert re.search(r"cannot read the image many.jpg: expected at most 100 scans, got 1\d\d", other["error"])


def test_another_process_that_writes_to_the_run(client, run, red):
    before = contents(run)
    with Run.open(run).writing():
        lesson = teach(client, "red", red)
    assert lesson["state"] == "failed"
    assert "is being written to by process" in lesson["error"]
    assert not list((run / TAUGHT).iterdir())
    assert contents(run) == before


def test_a_full_disk_while_teaching(client, run, red, monkeypatch):
    before, write = contents(run), storage.write

    def full(path, content):
        if failing in Path(path).parts or Path(path).parent.parent.name == failing:
            error = OSError(28, "No space left on device")
            raise storage.write_error("write", path, error) from error
        write(path, content)

    monkeypatch.setattr(storage, "write", full)
    failing = TAUGHT
    answer = client.post("/teach", data={"name": "red"}, files=uploads(red))
    assert answer.status_code == 507
    assert answer.json()["error"].endswith("No space left on device: make room")
    failing = "checkpoints"
    lesson = teach(client, "red", red)
    assert (lesson["state"], "No space left" in lesson["error"]) == ("failed", True)
    assert client.post("/predict", files=uploads(red)).json()["predictions"][0]["checkpoint"] == "task-05"
    same = {path: data for path, data in contents(run).items() if path.name != "metrics.jsonl"}
    assert same == {path: data for path, data in before.items() if path.name != "metrics.jsonl"}
    failing = "none"
    assert teach(client, "red", red)["state"] == "finished"


def test_a_class_that_is_learned_before_the_disk_is_full(client, run, red, monkeypatch):
    """The checkpoint is written, but not the table of accuracy."""
    write = storage.write

    def full(path, content):
        if Path(path).name == "accuracy.csv" and (run / "checkpoints" / "task-06").exists():
            error = OSError(28, "No space left on device")
            raise storage.write_error("write", path, error) from error
        write(path, content)

    monkeypatch.setattr(storage, "write", full)
    lesson = teach(client, "red", red)
    assert (lesson["state"], lesson["error"]) == ("finished", "")
    (message,) = lesson["messages"]
    assert message.startswith("the class is learned, but then something failed: cannot write ")
    assert "No space left on device: make room" in message
    assert client.get("/classes").json()["tasks"][0]["name"] == "red"
    assert len(list((run / TAUGHT / "0001").iterdir())) == 6
    monkeypatch.undo()
    assert client.post("/undo", data={"name": "red"}).json() == {"forgot": ["red"]}
    assert not list((run / TAUGHT).iterdir())


def test_a_class_that_fails_after_a_step_was_saved(tmp_path, red, monkeypatch):
    run = train.train(tiny.config(save_every_steps=1, epochs=1, batch_size=2, tasks=1), tmp_path / "run")
    before, end_task = contents(run.folder), train.end_task
    saved = []

    def fail(*_):
        saved.append(run.latest_checkpoint())
        raise storage.RunError("no room")

    def taught():
        lesson = teacher.teach("red", [path.read_bytes() for path in red])
        while lesson.state == "learning":
            time.sleep(0.02)
        return lesson.state, lesson.error

    teacher = Teacher(run.folder, lambda: None)
    monkeypatch.setattr(train, "end_task", fail)
    assert taught() == ("failed", "no room")
    assert saved == ["task-02-step-000001"]
    assert contents(run.folder) == before
    assert not list((run.folder / TAUGHT).iterdir())
    monkeypatch.setattr(train, "end_task", end_task)
    assert taught() == ("finished", "")
    assert run.latest_checkpoint() == "task-02"


def test_photos_of_one_class_at_a_time_are_in_memory(client, red, monkeypatch):
    readable, reading, at_once = app.Service.readable, [], []

    async def slowly(service, files):
        reading.append(files)
        at_once.append(len(reading))
        await asyncio.sleep(0.2)
        found = await readable(service, files)
        reading.pop()
        return found

    monkeypatch.setattr(app.Service, "readable", slowly)
    with ThreadPoolExecutor(3) as several:
        answers = several.map(
            lambda name: client.post("/teach", data={"name": name}, files=uploads(red)), ("red", "crimson", "pink")
        )
        statuses = sorted(answer.status_code for answer in answers)
    assert statuses == [202, 409, 409]
    assert max(at_once) == 1
    assert learned(client)["state"] == "finished"


def test_a_run_of_another_machine_is_taught_on_the_device_of_the_service(tmp_path, red, monkeypatch):
    run = train.train(tiny.config(epochs=1, tasks=1), tmp_path / "run")
    recorded = Hardware(accelerator="mps")  # which this machine does not have
    tiny.reconfigure(run.folder, hardware=recorded)
    for device in (None, "cpu"):
        with TestClient(build_app(run.folder, device=device), base_url="http://localhost") as service:
            lesson = teach(service, f"red on {device}", red)
        assert (lesson["state"], lesson["error"]) == ("finished", "")
    assert Run.open(run.folder).config.hardware == recorded


@pytest.fixture
def steps(tmp_path, red, monkeypatch):
    """A run that saves each step, as it is before and while it is taught; the second step of the lesson waits."""
    run = train.train(tiny.config(save_every_steps=1, epochs=3, batch_size=2, tasks=1), tmp_path / "run")
    before, step = contents(run.folder), train.train_step
    reached, goes_on = threading.Event(), threading.Event()

    def wait(session, state, *arguments):
        if state.step == 1:
            reached.set()
            goes_on.wait(20)
        return step(session, state, *arguments)

    monkeypatch.setattr(train, "train_step", wait)
    teacher = Teacher(run.folder, lambda: None)
    lesson = teacher.teach("red", [path.read_bytes() for path in red])
    assert reached.wait(60)
    assert run.latest_checkpoint() == "task-02-step-000001"
    yield run, before, teacher, lesson, goes_on
    goes_on.set()


def test_a_service_that_ends_stops_teaching(steps):
    run, before, teacher, lesson, goes_on = steps
    threading.Timer(0.2, goes_on.set).start()
    teacher.close()
    assert lesson.state == "failed"
    assert contents(run.folder) == before
    assert not list((run.folder / TAUGHT).iterdir())


def test_a_service_that_is_killed_within_a_lesson_starts_again(steps, tmp_path, red):
    run, before, _, _, _ = steps
    left = shutil.copytree(run.folder, tmp_path / "left")  # as a process leaves it that is killed now
    (left / TAUGHT / ".photos.4194304@").mkdir()
    os.utime(left / TAUGHT / ".photos.4194304@", (0, 0))  # of photos that it was writing, long ago
    teacher = Teacher(left, lambda: None)
    assert contents(left) == before
    assert not list((left / TAUGHT).iterdir())
    teacher.check("red")


def test_photos_that_another_process_writes_are_kept(run, red, monkeypatch):
    write, teacher = storage.write, Teacher(run, lambda: None)

    def another(path, content):
        write(path, content)
        if Path(path).name == "0001":
            with Run.open(run).writing():
                Run.open(run).discard_untaught()

    monkeypatch.setattr(storage, "write", another)
    lesson = teacher.teach("red", [path.read_bytes() for path in red])
    while lesson.state == "learning":
        time.sleep(0.02)
    assert (lesson.state, lesson.error) == ("finished", "")


def test_photos_of_a_run_that_moved_are_kept(client, run, red, green):
    assert teach(client, "red", red)["state"] == "finished"
    assert teach(client, "green", green)["state"] == "finished"
    moved = run.rename(run.with_name("moved"))
    (moved / TAUGHT / "0003").mkdir()  # left by a process that was killed
    Teacher(moved, lambda: None)
    folders = {path.name: len(list(path.iterdir())) for path in (moved / TAUGHT).iterdir()}
    assert folders == {"0001": 6, "0002": 6}  # photos and table
    assert Teacher(moved, lambda: None).undo("green") == ["green"]
    assert [path.name for path in (moved / TAUGHT).iterdir()] == ["0001"]


def test_a_run_folder_that_vanishes(run, red, monkeypatch):
    monkeypatch.setattr(app, "POLL_SECONDS", 0.05)
    with TestClient(build_app(run), base_url="http://localhost") as watched:
        run.rename(run.with_name("moved"))
        for _ in range(200):
            if watched.get("/health").json()["status"] == "degraded":
                break
            time.sleep(0.05)
        assert watched.get("/health").json() == {"status": "degraded"}
        assert "no run at" in watched.get("/classes").json()["problem"]
        assert watched.post("/predict", files=uploads(red)).status_code == 200
        answer = watched.post("/teach", data={"name": "red"}, files=uploads(red))
        assert (answer.status_code, "the run cannot be read: no run at" in answer.json()["error"]) == (503, True)
        assert not run.exists()
        run.with_name("moved").rename(run)
        for _ in range(200):
            if watched.get("/health").json()["status"] == "ok":
                break
            time.sleep(0.05)
        assert watched.get("/health").json() == {"status": "ok"}


def test_a_class_that_is_added_elsewhere_is_used(run, red, monkeypatch):
    monkeypatch.setattr(app, "POLL_SECONDS", 0.05)
    with TestClient(build_app(run), base_url="http://localhost") as client:
        train.resume(run, add=red[0].parent.parent)
        for _ in range(200):
            if client.get("/classes").json()["checkpoint"] == "task-06":
                break
            time.sleep(0.05)
        answer = client.post("/predict", files=uploads(red[:1])).json()
    assert answer["predictions"][0]["classes"][0]["name"] == "red"


def test_an_unfinished_run_is_not_served(tmp_path):
    with pytest.raises(storage.RunError, match="no run at"):
        build_app(tmp_path / "none")


def test_limits(run, red, tmp_path):
    limits = Limits(request_bytes=4000, files=2, teaching_files=2, pixels=100)
    with TestClient(build_app(run, limits=limits), base_url="http://localhost") as client:
        many = client.post("/predict", files=uploads(red))
        assert (many.status_code, many.json()["error"]) == (413, "expected at most 2 images at a time, got 5")
        many = client.post("/teach", data={"name": "red"}, files=uploads(red))
        assert (many.status_code, many.json()["error"]) == (413, "expected at most 2 images of a class, got 5")
        large = client.post("/predict", files=[("files", ("a.png", bytes(5000)))])
        assert large.status_code == 413
        assert large.json()["error"].startswith("expected a request of at most 4,000 bytes: send fewer")

        def chunks():
            yield b'--x\r\nContent-Disposition: form-data; name="files"; filename="a"\r\n\r\n'
            for _ in range(9):
                yield bytes(1000)

        stream = client.post("/predict", content=chunks(), headers={"Content-Type": "multipart/form-data; boundary=x"})
        assert (stream.status_code, stream.json()) == (413, large.json())
        pixels = client.post("/predict", files=uploads(red[:1]))
        assert "expected at most 100 pixels, got 1,440" in pixels.json()["error"]
    with pytest.raises(ValueError, match="expected seconds above 0, got 0"):
        Limits(seconds=0)
    with pytest.raises(ValueError, match=r"expected waiting_images of at least files=64, .* got 63"):
        Limits(waiting_images=63)


@pytest.mark.parametrize("name", ["files", "teaching_files"])
def test_more_files_than_a_form_may_hold(name):
    with pytest.raises(ValueError, match=f"expected {name} of at most 1,000, as many as a form may hold, got 1,001"):
        Limits(**{name: 1001})
    assert getattr(Limits(**{name: 1000}), name) == 1000


def test_as_many_files_as_a_form_may_hold(run):
    with TestClient(build_app(run, limits=Limits(files=1000)), base_url="http://localhost") as client:
        answer = client.post("/predict", files=1000 * [("files", ("a.png", b"no image"))])
    assert len(answer.json()["predictions"]) == 1000


def test_too_many_waiting_images(run, red, monkeypatch):
    monkeypatch.setattr(Batcher, "__len__", lambda self: 1)
    with TestClient(build_app(run, limits=Limits(files=2, waiting_images=2)), base_url="http://localhost") as client:
        answer = client.post("/predict", files=uploads(red[:2]))
        assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
        assert "wait already: try again in a moment" in answer.json()["error"]


def test_a_request_that_is_none_of_ours(client):
    for answer in (
        client.post("/predict"),
        client.post("/predict", json={"files": "x"}),
        client.post("/predict?top=0"),
    ):
        assert answer.status_code == 422
        assert answer.json()["error"].startswith("expected a request as /openapi.json describes it, got ")
    assert client.get("/nothing").status_code == 404
    assert client.get("/nothing").json() == {"error": "Not Found"}
    assert client.get("/predict").status_code == 405


def test_it_starts_again_and_inside_another_application(run, red):
    app = build_app(run)
    for _ in range(2):
        with TestClient(app, base_url="http://localhost") as client:
            assert client.post("/predict", files=uploads(red)).status_code == 200
            assert teach(client, "red", red)["state"] == "finished"
            assert client.post("/undo", data={"name": "red"}).status_code == 200
    whole = FastAPI()
    whole.mount("/pgp", app)
    with TestClient(whole, base_url="http://localhost") as client:
        for path, data in (("/pgp/predict", {}), ("/pgp/teach", {"name": "red"})):
            answer = client.post(path, files=uploads(red), data=data)
            assert (answer.status_code, answer.json()["error"]) == (503, NOT_STARTED)
    app = build_app(run, token="secret")
    whole = FastAPI(lifespan=lambda _: app.router.lifespan_context(app))
    whole.mount("/pgp", app)
    with TestClient(whole, base_url="http://localhost") as client:
        assert client.post("/pgp/predict", files=uploads(red)).status_code == 401
        headers = {"Authorization": "Bearer secret"}
        assert client.post("/pgp/predict", files=uploads(red), headers=headers).status_code == 200
        assert [client.get(f"/pgp{path}").status_code for path in ("/", "/health", "/page.js")] == [200] * 3
        counts = client.get("/pgp/metrics", headers=headers).text
        assert 'pgp_requests_total{path="/predict",status="200"} 1.0' in counts


def test_classes_are_taught_on_the_first_gpu_only(tmp_path):
    assert Teacher(tmp_path, lambda: None, "cuda:0").accelerator == "gpu"
    with pytest.raises(ValueError, match=r"such as cuda, .* got cuda:1: choose it by CUDA_VISIBLE_DEVICES=1"):
        Teacher(tmp_path, lambda: None, "cuda:1")


def test_the_token(run, red):
    with pytest.raises(ValueError, match="expected a token of visible ASCII characters"):
        build_app(run, token="söcret")
    with pytest.raises(ValueError, match="visible ASCII characters, without blanks"):
        build_app(run, token="secret ")  # a header loses blanks at its end
    with TestClient(build_app(run, token="secret"), base_url="http://localhost") as client:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "söcret".encode()}):
            for path in ("/classes", "/accuracy", "/teach", "/metrics"):
                answer = client.get(path, headers=headers)
                assert answer.status_code == 401
                assert answer.json()["error"] == "expected the token of this service, as Authorization: Bearer TOKEN"
            assert client.post("/predict", files=uploads(red), headers=headers).status_code == 401
        for path in ("/", "/page.js", "/page.css", "/health", "/openapi.json"):
            assert client.get(path).status_code == 200
        assert client.get("/classes", headers={"Authorization": "Bearer secret"}).status_code == 200


def test_other_web_sites_cannot_use_the_service(run, red):
    """A page from elsewhere in a browser of this machine can send requests, and name this machine by a domain."""
    with TestClient(build_app(run, hosts=["localhost", "::1"]), base_url="http://localhost:80") as client:
        for origin in ("http://evil.example", "null", "http://localhost:81"):
            answer = client.post("/teach", data={"name": "red"}, files=uploads(red), headers={"Origin": origin})
            assert answer.status_code == 403
            assert (
                answer.json()["error"] == f"expected a request from the page of this service, got one from {origin!r}"
            )
        assert client.post("/predict", files=uploads(red), headers={"Origin": "http://localhost"}).status_code == 200
        malformed = client.post("/predict", files=uploads(red), headers={"Origin": "http://["})
        assert malformed.status_code == 403
        for host in ("evil.example", "localhost.evil.example", "", "evil@localhost", "["):
            answer = client.get("/classes", headers={"Host": host})
            assert (answer.status_code, "expected a request to one of" in answer.json()["error"]) == (421, True)
        assert client.get("/classes", headers={"Host": "[::1]:8000"}).status_code == 200


def test_forms_in_other_encodings_are_refused(client):
    """Python's decoder of punycode takes quadratic time, and others give text that is no Unicode."""
    for charset in ("punycode", '"raw_unicode_escape"', "latin-1", "utf-8; charset=punycode", "utf-8; Charset=x"):
        kind = f"multipart/form-data; boundary=x; charset={charset}"
        answer = client.post("/teach", content=b"--x--", headers={"Content-Type": kind})
        assert (answer.status_code, answer.json()["error"][:29]) == (415, "expected a form in UTF-8, got")
    kind = "multipart/form-data; boundary=x; charset=UTF-8"
    assert client.post("/teach", content=b"--x--", headers={"Content-Type": kind}).status_code == 422


def test_tiles_of_a_tiff_count_as_pixels():
    """Ten pixels a side, in one tile of 30,000 pixels a side."""
    tags = {256: 10, 257: 10, 258: 8, 259: 1, 262: 1, 277: 1, 322: 30_000, 323: 30_000, 324: 8, 325: 8}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    content = struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + entries + bytes(4)
    assert num_pixels(content) == 30_000 * 30_000


def test_what_was_learned_is_not_reported_as_failed(client, run, red, monkeypatch):
    """The class is learned, but the service runs out of memory when it loads the new checkpoint."""

    def fail(self):
        raise MemoryError("no memory")

    monkeypatch.setattr(Model, "_load", fail)
    assert teach(client, "red", red)["state"] == "finished"
    assert client.get("/health").json() == {"status": "degraded"}
    assert client.get("/classes").json()["problem"] == "no memory"
    assert len(list((run / TAUGHT).iterdir())) == 1
    monkeypatch.undo()
    for _ in range(200):
        if client.get("/health").json()["status"] == "ok":
            break
        time.sleep(0.05)
    assert client.get("/classes").json()["tasks"][0]["name"] == "red"


def test_another_run_in_the_same_folder_is_not_used(run, tmp_path):
    model = Model(run)
    run.rename(tmp_path / "moved")
    train.train(recipes.RECIPES["demo-quick"](), run)
    assert not model.refresh()
    assert "holds another run than before: restart the service" in model.problem


def test_only_the_warnings_of_the_lesson_are_in_its_notes(client, red, monkeypatch):
    fit = train.fit

    def noisy(*args, **kwargs):
        other = threading.Thread(target=warnings.warn, args=("of another user",))
        other.start()
        other.join()
        warnings.warn("of this lesson", stacklevel=1)
        return fit(*args, **kwargs)

    monkeypatch.setattr(train, "fit", noisy)
    with pytest.warns(UserWarning, match="of another user"):
        assert teach(client, "red", red)["messages"] == ["of this lesson"]


def test_faults_are_answered_as_json(client, red):
    client.app.state.service.batcher.function = lambda images: 1 / 0
    answer = client.post("/predict", files=uploads(red))
    assert (answer.status_code, answer.json()["error"][:24]) == (500, "this is a fault of pgp, ")
    assert "content-security-policy" in answer.headers


def test_the_page_loads_nothing_from_elsewhere(client):
    page = client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    for path in ("/", "/page.js", "/page.css"):
        text = client.get(path).text.replace("http://www.w3.org/2000/svg", "")
        assert not {"http:", "https:", "innerHTML"} & set(re.findall("https?:|innerHTML", text))


def test_where_it_may_listen(run):
    with pytest.raises(
        ValueError, match=r"expected a token, because other machines can reach 0\.0\.0\.0: set PGP_TOKEN"
    ):
        serve(run, "0.0.0.0")
    with pytest.raises(ValueError, match="expected a port from 0 to 65535, got 99999"):
        serve(run, port=99999)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"cannot listen at 127.0.0.1 port {port}: Address already in use; name"):
            serve(run, port=port)
    with pytest.raises(ValueError, match="expected a readout of this run"):
        serve(run, readout="none")


def test_answers_are_json_values(client, red):
    text = client.post("/predict", files=uploads(red)).text
    assert json.loads(text, parse_constant=lambda name: pytest.fail(name))


def test_the_accuracy_says_if_the_task_was_given(tmp_path):
    config = tiny.config(setting="til", epochs=1, drift_images=0)
    train.train(config, tmp_path / "run")
    with TestClient(build_app(tmp_path / "run"), base_url="http://localhost") as client:
        assert client.get("/accuracy").json()["task_given"] is True


def test_a_content_type_that_is_slow_to_parse_is_refused(client):
    started = time.perf_counter()
    answer = client.get("/health", headers={"Content-Type": 'a/b; c="' + 60_000 * ";"})
    assert (answer.status_code, time.perf_counter() - started < 1) == (415, True)
    assert "expected a content type of at most 1,000 characters, got 60,008" in answer.json()["error"]


def test_photos_of_a_run_that_moved_are_measured(client, run, red, green):
    assert teach(client, "red", red)["state"] == "finished"
    moved = run.rename(run.with_name("moved"))
    with TestClient(build_app(moved), base_url="http://localhost") as other:
        assert teach(other, "green", green)["state"] == "finished"
    (matrix, *_) = Run.open(moved).matrices().values()
    assert bool(matrix[-1].isfinite().all())
    assert Run.open(moved).config.added[0].file == moved.absolute() / TAUGHT / "0001" / "red.csv"


def test_names_of_four_byte_letters_can_be_taught(client, run, red):
    name = 60 * "\N{FOX FACE}"
    assert teach(client, name, red)["state"] == "finished"
    assert name in Run.open(run).data.class_names


def test_open_paths_answer_although_too_many_requests_do():
    """Such as that of the health, while a request too many is being refused."""
    guard = Guard(None, Limits(requests=1), None, (), ("/health",))
    guard._in_progress = 2
    guard._check("/health", "GET", Headers())
    with pytest.raises(RefusedError, match="1 requests are being answered"):
        guard._check("/classes", "GET", Headers())
