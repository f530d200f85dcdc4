"""What lies in a run folder is believed only if it is what pgp wrote there: names, digests, kinds of files, JSON."""

from __future__ import annotations

import json
import os
import random
import shutil
import stat
import sys

import pytest
import torch

import tiny
from checkpoints import CLASSES, contents, made, state
from pgp.reports import tables
from pgp.runs.checkpoint import CheckpointName
from pgp.runs.run import Run
from pgp.runs.statetree import Piece, split
from pgp.system import platforms, storage
from pgp.system.storage import RunError

FILES = ["config.json", "classes.json", "metrics.jsonl", "accuracy.csv", "checkpoints/latest",
         "checkpoints/task-01/state.json", "checkpoints/task-01/state.safetensors", "checkpoints/pieces/*"]  # fmt: skip


@pytest.fixture
def run(tmp_path):
    return made(tmp_path / "run")


def everything(run):
    """All that commands read of a run folder."""
    loaded = run.load()
    rows = [loaded["rows"].tolist(), *(piece["answers"].tolist() for piece in loaded["pieces"].values())]
    figures = run.matrices()["lda"].tolist()
    return run.config, run.data, list(run.events("task")), run.latest_checkpoint(), rows, figures


HOSTILE = ["task-01-step-1/../../..", "/", "..", ".", "", "task-01/", "task-1", "task-00", "task-01-step-000000"]
HOSTILE += ["task-0１", "task-01-step-000001\0", "task-999999999999", "../run/checkpoints/task-01", "pieces", "\xff"]


@pytest.mark.parametrize("text", HOSTILE)
def test_latest_is_a_name_and_never_a_path(run, tmp_path, text):
    victim = tmp_path / "task-01-step-1"
    victim.mkdir()
    (run.folder / "checkpoints" / "latest").write_text(text or "\n")
    before = contents(tmp_path)
    for use in (run.load, run.latest_checkpoint, lambda: run.save(CheckpointName(2), state(2)), run.progress):
        with pytest.raises(RunError, match=r"latest names no checkpoint: expected a checkpoint such as task-03"):
            use()
    assert contents(tmp_path) == before
    assert victim.is_dir()


def test_an_absolute_latest_deletes_no_checkpoint_of_another_run(run, tmp_path):
    other = made(tmp_path / "other")
    other.save(CheckpointName(2, 5), state(2))
    (run.folder / "checkpoints" / "latest").write_text(str(other.folder / "checkpoints" / "task-02-step-000005"))
    with pytest.raises(RunError, match="latest names no checkpoint"):
        run.save(CheckpointName(2), state(2))
    assert other.load()["task"] == 2


@pytest.mark.skipif(platforms.WINDOWS, reason="links take rights on Windows")
def test_nothing_in_a_run_folder_may_be_a_link(run, tmp_path):
    for name in ("checkpoints", "checkpoints/task-01", "checkpoints/pieces"):
        copy = Run(shutil.copytree(run.folder, tmp_path / "copy"))
        (copy.folder / name).rename(tmp_path / "aside")
        (copy.folder / name).symlink_to(tmp_path / "aside")
        with pytest.raises(RunError, match=rf"expected a folder at .*{name}, got a link"):
            everything(copy)
        shutil.rmtree(copy.folder)
        shutil.rmtree(tmp_path / "aside")
    for name in FILES:
        copy = Run(shutil.copytree(run.folder, tmp_path / "copy"))
        (path,) = copy.folder.glob(name)
        path.rename(tmp_path / "aside")
        path.symlink_to(tmp_path / "aside")
        with pytest.raises(RunError, match=rf"expected a file at .*{path.name}, got a link"):
            everything(copy)
        shutil.rmtree(copy.folder)
        (tmp_path / "aside").unlink()
    (tmp_path / "link").symlink_to(run.folder)  # the folder itself may be one
    assert everything(Run.open(tmp_path / "link")) == everything(run)


@pytest.mark.skipif(platforms.WINDOWS, reason="links take rights on Windows")
def test_a_log_that_is_a_link_is_not_appended_through(run, tmp_path):
    (tmp_path / "diary").write_text("dear diary\n")
    run.log_file.path.unlink()
    run.log_file.path.symlink_to(tmp_path / "diary")
    with pytest.raises(RunError, match=r"expected a file at .*metrics\.jsonl, got a link"):
        run.log("train", loss=1)
    assert (tmp_path / "diary").read_text() == "dear diary\n"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs FIFOs")
@pytest.mark.parametrize("kind", ["FIFO", "folder", "device"])
def test_what_is_no_file_is_refused_at_once(run, tmp_path, kind):
    for name in FILES:
        copy = Run(shutil.copytree(run.folder, tmp_path / "copy"))
        (path,) = copy.folder.glob(name)
        path.unlink()
        if kind == "FIFO":
            os.mkfifo(path)  # opening it would wait for ever
        elif kind == "folder":
            path.mkdir()
        else:
            try:
                os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 5))  # /dev/zero never ends
            except OSError:
                pytest.skip("only root makes devices")
        with pytest.raises(RunError, match=rf"expected a file at .*{path.name}, got a {kind}"):
            everything(copy)
        if name == "metrics.jsonl":
            with pytest.raises(RunError, match=rf"expected a file at .*{path.name}, got a {kind}"):
                copy.log("train", loss=1)
        shutil.rmtree(copy.folder)


def test_a_huge_file_is_not_read(run):
    for name in FILES:
        (path,) = run.folder.glob(name)
        size = path.stat().st_size
        os.truncate(path, 1 << 40)
        with pytest.raises(RunError, match=rf"{path.name} has 1,099,511,627,776 bytes, more than"):
            everything(run)
        os.truncate(path, size)
    everything(run)


def outcome(run):
    """What is read of a run folder, or the one line that says why nothing is."""
    try:
        return everything(Run(run.folder))
    except RunError as error:
        return str(error)


def test_every_change_is_noticed(run):
    """Digits, letters, tensors: whatever is changed, the answer is the same, or one line says what is wrong."""
    expected, draw, noticed = everything(run), random.Random(0), 0
    for name in FILES:
        (path,) = run.folder.glob(name)
        data = path.read_bytes()
        places = draw.sample(range(len(data)), 24)
        flipped = [data[:place] + bytes([data[place] ^ 1 << draw.randrange(8)]) + data[place + 1 :] for place in places]
        for content in (*flipped, *(data[:place] for place in places[:8])):
            path.write_bytes(content)
            found = outcome(run)
            if found != expected:
                noticed += 1
                assert path.name in found
                assert "\n" not in found
        path.write_bytes(data)
    assert noticed > 180  # all but accuracy.csv, which the checkpoint stands in for


@pytest.mark.parametrize("name", ["state.safetensors", "pieces"])
def test_every_changed_byte_of_a_tensor_is_noticed(run, name):
    (path,) = run.folder.glob("checkpoints/pieces/*" if name == "pieces" else f"checkpoints/task-01/{name}")
    data = path.read_bytes()
    for place in random.Random(1).sample(range(len(data) - 160, len(data)), 54):
        path.write_bytes(data[:place] + bytes([data[place] ^ 255]) + data[place + 1 :])
        with pytest.raises(RunError, match=rf"{path.name} was changed or damaged after pgp wrote it"):
            run.load()


def test_files_of_other_checkpoints_and_other_runs_are_told(run, tmp_path):
    run.save(CheckpointName(2), state(2))
    other = made(tmp_path / "other")
    other.save(CheckpointName(2), {**state(2), "rows": torch.ones(40)})
    before, now = (run.folder / "checkpoints" / name for name in ("task-01", "task-02"))
    theirs = other.folder / "checkpoints" / "task-02"
    swaps = [
        (before / "state.json", now / "state.json", "state.json is that of checkpoint 'task-01'"),
        (before / "state.safetensors", now / "state.safetensors", "state.safetensors was changed or damaged"),
        (theirs / "state.json", now / "state.json", "belongs to another run than checkpoint task-02"),
        (theirs / "state.safetensors", now / "state.safetensors", "state.safetensors was changed or damaged"),
        (other.folder / "config.json", run.folder / "config.json", "config.json belongs to another run"),
        (other.folder / "classes.json", run.folder / "classes.json", "classes.json belongs to another run"),
        (run.folder / "config.json", run.folder / "classes.json", None),
    ]
    expected = everything(run)
    for source, target, told in swaps:
        data = target.read_bytes()
        shutil.copy(source, target)
        if told:
            with pytest.raises(RunError, match=told):
                everything(run)
        else:  # the same run, and only for people
            assert everything(run) == expected
        target.write_bytes(data)
    shutil.rmtree(now)
    with pytest.raises(RunError, match=r"cannot read .*task-02: No such file"):
        everything(run)
    shutil.copytree(theirs, now)
    with pytest.raises(RunError, match="belongs to another run than checkpoint task-02"):
        everything(run)


def test_a_configuration_that_was_edited_is_one_clear_sentence(run):
    path = run.folder / "config.json"
    path.write_text(path.read_text().replace('"epochs": 2', '"epochs": 3'))
    with pytest.raises(RunError, match=r"config\.json was changed or damaged after pgp wrote it\. Nothing of it can"):
        _ = run.config
    path.unlink()  # as the message offers: the checkpoint knows
    assert Run.open(run.folder).config == tiny.config()


def test_a_person_may_name_another_checkpoint(run):
    run.save(CheckpointName(2), state(2))
    for text in ("task-01", "task-01\n"):
        (run.folder / "checkpoints" / "latest").write_text(text)
        assert run.load()["task"] == 1


JUNK = [
    "[" * 100_000,
    '{"a":' * 100_000,
    "1" * 10_000,
    "[]",
    "null",
    "17",
    '"x"',
    "{}",
    "\xff\xfe",
    "",
    '{"sha256": []}',
]


@pytest.mark.parametrize("text", JUNK)
def test_json_of_any_kind_is_one_line(run, text):
    for name in ("config.json", "classes.json", "checkpoints/task-01/state.json"):
        path = run.folder / name
        data = path.read_bytes()
        path.write_bytes(text.encode("latin-1"))
        with pytest.raises(RunError, match=path.name) as error:
            everything(run)
        assert "\n" not in str(error.value)
        path.write_bytes(data)


def test_a_hostile_record_with_a_true_digest_is_one_line(run):
    path = run.folder / "checkpoints" / "task-01" / "state.json"
    record = json.loads(path.read_text())
    del record["sha256"]
    deep: list = []
    for _ in range(800):
        deep = [deep]
    parts = [{"names": 5, "tasks": []}, {"names": ["a"], "tasks": [[7]]}, {"names": ["a"], "tasks": [[-1]]}]
    classes = [{}, {"names": ["a", "b"], "tasks": [[0], [1]]}, *({**CLASSES.to_json(), **part} for part in parts)]
    changes = [{"classes": value} for value in (*classes, {**CLASSES.to_json(), "images": "x"})]
    rows = [deep, {"tensor": "/nowhere"}, {"piece": "../../config", "size": 9}, {"pairs": [[[], 1]]}]
    states = [5, [], {"pairs": 7}, {"pairs": [[[], 1]]}, *({"pairs": [["rows", value]]} for value in rows)]
    changes += [{"state": value} for value in states]
    changes += [{"config": {}}, {"config": {**record["config"], "epochs": "many"}}, {"log": 5}, {"log": ["a", 5]}]
    changes += [{"size": -1}, {"size": "x"}, {"tensors": 0}, {"held": [5]}, {"format": 10**400}, {"name": None}]
    for change in changes:
        path.write_text(json.dumps(storage.sealed({**record, **change})))
        with pytest.raises(RunError, match=str(run.folder)) as error:
            everything(run)
        assert "\n" not in str(error.value), change


def test_a_log_with_lines_that_are_no_events(tmp_path):
    run = Run.create(tmp_path / "run", tiny.config(setting="oil"), CLASSES)
    good = [{"event": "stream", "task": 0, "step": 1, "images": 8, "accuracy": 0.5}]
    lines = [
        "[]",
        "5",
        "null",
        '"event"',
        "{}",
        '{"event": 5}',
        "[" * 100_000,
        '{"event": "stream',
        *map(json.dumps, good),
    ]
    run.log_file.path.write_bytes("\n".join(lines).encode() + b"\n\xff\xfe\n")
    assert run.events("stream") == good
    for value in ("x", None, [], {}):
        with run.log_file.path.open("a") as file:
            file.write(json.dumps({"event": "stream", "images": value, "accuracy": 0}) + "\n")
        with pytest.raises(RunError, match=r"metrics\.jsonl does not hold what pgp writes there"):
            tables._online_accuracy(run)
        run.log_file.path.write_text(json.dumps(good[0]) + "\n")


def test_a_log_counts_as_it_was_when_the_checkpoint_was_written(run):
    path = run.log_file.path
    data = path.read_bytes()
    path.write_bytes(data.replace(b"1.5", b"2.5"))
    with pytest.raises(RunError, match=r"metrics\.jsonl was changed or damaged .*: restore it, or move it away"):
        run.events("task")
    path.write_bytes(data + b'{"event": "task", "task": 1}\n{"event": "ta')  # whose checkpoint was never written
    assert [event["task"] for event in run.events("task")] == [0]
    path.write_bytes(data[:-5] + data[-4:])
    with pytest.raises(RunError, match="restore it, or move it away"):  # the next checkpoint would vouch for it
        run.accept_config(CheckpointName(1))
    path.unlink()
    with pytest.warns(UserWarning, match="is missing: its record of training is left out"):
        assert run.events("task") == []
    with pytest.warns(UserWarning, match="is missing"):
        run.accept_config(CheckpointName(1))  # a new log begins
    run.log("resumed", task=1, step=0)
    assert len(run.events("resumed")) == 1
    assert everything(run)[3] == "task-01"


def test_what_is_learned_anew_counts_once(tmp_path):
    run = Run.create(tmp_path / "run", tiny.config(), CLASSES)
    for task, step in ((0, 4), (0, 8), (1, 4)):
        run.log("train", task=task, step=step)
    run.log("resumed", task=0, step=4)
    run.log("train", task=0, step=8)
    assert [(event["task"], event["step"]) for event in run.events("train")] == [(0, 4), (0, 8)]


@pytest.mark.skipif(platforms.WINDOWS, reason="Windows has no umask")
def test_all_files_of_a_run_have_one_mode(tmp_path):
    before = os.umask(0o027)
    try:
        run = made(tmp_path / "run")
        with run.writing():
            pass
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in run.folder.rglob("*") if path.is_file()}
    assert set(modes.values()) == {0o640}, modes


def test_memory_of_old_tasks_is_written_once(run):
    for task in range(2, 12):
        run.save(CheckpointName(task), state(task))
    pieces = list((run.folder / "checkpoints" / "pieces").iterdir())
    assert len(pieces) == 11
    sizes = [
        sum(file.stat().st_size for file in (run.folder / "checkpoints" / name).iterdir())
        for name in ("task-02", "task-11")
    ]
    assert sizes[1] - sizes[0] < 9 * 150  # of each task a digest is added
    assert [float(piece["answers"][0]) for piece in run.load("task-05")["pieces"].values()] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(("keep", "left"), [("all", 6), ("last", 1), ("3", 3), ("99", 6)])
def test_keeps_as_many_checkpoints_as_asked_for(tmp_path, keep, left):
    run = Run.create(tmp_path / "run", tiny.config(keep_checkpoints=keep), CLASSES)
    for task in range(1, 7):
        run.save(CheckpointName(task, 5), state(task))
        run.save(CheckpointName(task), state(task))
    assert run.checkpoints.names() == [CheckpointName(task) for task in range(7 - left, 7)]
    assert run.load()["task"] == 6
    assert len(run.load()["pieces"]) == 6  # of all tasks, whatever was deleted


@pytest.mark.parametrize("keep", ["none", "0", "-1", "2.5", ""])
def test_how_many_checkpoints_to_keep_is_a_number(keep):
    with pytest.raises(ValueError, match="expected keep_checkpoints all, last or a number"):
        tiny.config(keep_checkpoints=keep)


@pytest.mark.skipif(sys.platform != "linux", reason="names of any bytes")
def test_names_of_any_kind_go_round(tmp_path):
    names = ["caf\udce9", "tab\tline\nend", "[bold]x[/bold]", "\x1b[31mred", "日本"]
    folder = tmp_path / os.fsdecode(b"caf\xe9 [x]")
    run = Run.create(folder, tiny.config(), tiny.described(names, [[0, 1, 2, 3, 4]], ["\udce9"]))
    run.log("data", warning=names[0])
    run.save(CheckpointName(1), state())
    assert (list(run.data.class_names), run.data.task_names) == (names, ("\udce9",))
    assert run.events("data")[0]["warning"] == names[0]
    storage.write(folder / "report.md", names[0])
    assert (folder / "report.md").read_text() == "caf?"


def test_a_piece_within_a_piece_is_refused(run):
    """Pieces that name others twice would take exponential time."""
    tensors, pieces = {}, {}
    split(Piece(inner=Piece(rows=torch.zeros(2))), "", tensors, pieces)
    folder = run.folder / "checkpoints" / "pieces"
    for digest, data in pieces.items():
        (folder / f"{digest}.safetensors").write_bytes(data)
    digest, data = list(pieces.items())[-1]
    with pytest.raises(ValueError, match="expected a piece without pieces"):
        run.checkpoints._piece(digest, len(data))
