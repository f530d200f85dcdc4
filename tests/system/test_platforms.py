"""What other systems do is simulated: names that `os` and `signal` lack there, and renames that Windows refuses."""

from __future__ import annotations

import ast
import errno
import multiprocessing
import os
import pathlib
import pickle
import re
import signal
import sys

import pytest
import torch
from PIL import Image

import datasets as hub
import tiny
from pgp.datasets.base import ArraySplit, ConcatSplit
from pgp.datasets.files import FileSplit
from pgp.datasets.hugging_face import HubSplit
from pgp.datasets.loader import LoaderOptions, SampleKey, TransformedSplit, batches, sequential_batches
from pgp.datasets.transforms import Transforms
from pgp.runs.run import Run
from pgp.sweeps.sweep import Job, Sweep, run_job
from pgp.system import platforms, storage
from pgp.system.storage import RunError
from test_architecture import MODULES, SOURCE, imports


@pytest.fixture
def windows(monkeypatch):
    """No POSIX calls, no rename over a folder, no sync of what is open for reading only."""
    if sys.platform == "win32":
        return
    import fcntl

    fsync, replace, rename = os.fsync, pathlib.Path.replace, pathlib.Path.rename

    def fsync_there(descriptor):
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(9, "Bad file descriptor")
        fsync(descriptor)

    def replace_there(source, target):
        if pathlib.Path(target).is_dir():
            raise PermissionError(13, "Access is denied", str(target))
        return replace(source, target)

    def rename_there(source, target):
        if pathlib.Path(target).exists():
            raise FileExistsError(17, "Cannot create a file when that file already exists", str(target))
        return rename(source, target)

    for name in ("pread", "sync", "sched_getaffinity", "fork"):
        monkeypatch.delattr(os, name, raising=False)
    for name in ("SIGHUP", "SIGKILL"):
        monkeypatch.delattr(signal, name)
    monkeypatch.setattr(os, "fsync", fsync_there)
    monkeypatch.setattr(pathlib.Path, "replace", replace_there)
    monkeypatch.setattr(pathlib.Path, "rename", rename_there)
    monkeypatch.setattr(platforms, "WINDOWS", True)
    monkeypatch.setattr(platforms, "PAUSES", (0.0, 0.0))


@pytest.mark.usefixtures("windows")
def test_a_run_is_written_where_posix_is_missing(tmp_path):
    run = Run.create(tmp_path / "run", tiny.config())
    run.log("train", task=0)
    with (run.folder / "metrics.jsonl").open("a") as file:
        file.write('{"event": "tr')
    run.log("train", task=1)
    assert [event["task"] for event in run.events("train")] == [0, 1]
    for name in ("task-01", "task-02-step-000005", "task-02"):
        run.save(name, {"name": name, "rows": torch.arange(3)})
    (run.folder / "checkpoints" / "latest").write_text("task-01")
    run.save("task-02", {"name": "again", "rows": torch.arange(3)})
    assert run.load()["name"] == "again"
    assert (run.folder / "checkpoints" / "task-02-replaced").is_dir()


@pytest.mark.usefixtures("windows")
def test_a_sweep_keeps_an_abandoned_run_where_folders_cannot_be_replaced(tmp_path):
    config = tiny.config(tasks=1, epochs=1)
    job = Job("point", 0, tmp_path / "point" / "seed-0", config)
    Run.create(job.folder, config).write_matrices({})  # and its checkpoints were lost
    assert run_job(job).status == "trained"
    assert (tmp_path / "point" / "seed-0-abandoned" / "accuracy.csv").is_file()


@pytest.mark.usefixtures("windows")
def test_a_folder_moves_to_a_place_that_is_free_or_empty(tmp_path):
    for name in ("one", "two", "full", "empty"):
        (tmp_path / name).mkdir()
    (tmp_path / "full" / "file").touch()
    platforms.move_folder(tmp_path / "one", tmp_path / "free")
    platforms.move_folder(tmp_path / "full", tmp_path / "empty")
    assert (tmp_path / "empty" / "file").is_file()
    with pytest.raises(OSError, match="empty"):
        platforms.move_folder(tmp_path / "two", tmp_path / "empty")
    assert (tmp_path / "two").is_dir()


@pytest.mark.parametrize(("there", "tries"), [(True, 3), (False, 1)])
def test_a_rename_waits_for_whoever_holds_the_file_open_on_windows(tmp_path, monkeypatch, there, tries):
    asked = []

    def refuse(*_):
        asked.append(1)
        raise PermissionError(13, "The process cannot access the file")

    monkeypatch.setattr(pathlib.Path, "replace", refuse)
    monkeypatch.setattr(platforms, "WINDOWS", there)
    monkeypatch.setattr(platforms, "PAUSES", (0.0, 0.0))
    (tmp_path / "latest").write_text("before")
    with pytest.raises(RunError, match="latest: The process cannot access the file"):
        storage.write(tmp_path / "latest", "after")
    assert len(asked) == tries
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("latest", "before")]


def test_what_windows_says_otherwise(monkeypatch):
    assert platforms.is_broken_pipe(BrokenPipeError(errno.EPIPE, "Broken pipe"))
    assert not platforms.is_broken_pipe(OSError(errno.EINVAL, "Invalid argument"))
    assert platforms.quoted(pathlib.Path("a run's")) == "'a run'\"'\"'s'"
    monkeypatch.setattr(platforms, "WINDOWS", True)
    assert platforms.is_broken_pipe(OSError(errno.EINVAL, "Invalid argument"))
    assert not platforms.is_broken_pipe(OSError(errno.EINVAL, "Invalid argument", "what?.txt"))
    assert platforms.quoted(pathlib.Path("a run's")) == '"a run\'s"'


def test_images_on_two_drives_have_names(tmp_path, monkeypatch):
    paths = [tmp_path / "one" / "1.png", tmp_path / "two" / "1.png"]
    assert FileSplit(paths, [0, 1]).names() == ["one/1.png", "two/1.png"]

    def two_drives(paths):
        raise ValueError("Paths don't have the same drive")

    monkeypatch.setattr(os.path, "commonpath", two_drives)
    assert FileSplit(paths, [0, 1]).names() == [path.as_posix() for path in paths]


def test_text_is_the_same_on_every_system(tmp_path):
    storage.write(tmp_path / "text", "café\nβ\n")
    assert (tmp_path / "text").read_bytes() == b"caf\xc3\xa9\n\xce\xb2\n"


def test_what_a_system_lacks_is_not_asked_for(monkeypatch):
    for place, name in ((signal, "SIGHUP"), (signal, "SIGBREAK"), (os, "sched_getaffinity"), (os, "sync")):
        monkeypatch.delattr(place, name, raising=False)
    assert platforms.ending_signals() == [signal.SIGTERM]
    assert platforms.cores() == os.cpu_count()
    platforms.sync_all()


@pytest.mark.parametrize(("default", "start"), [("fork", "fork"), ("forkserver", "fork"), ("spawn", None)])
def test_loaders_are_forked_on_linux_unless_a_program_spawns(monkeypatch, default, start):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(multiprocessing, "get_start_method", lambda: default)
    assert platforms.loader_start() == start


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("method.length 5, optimizer.lr .1", "method.length-5_optimizer.lr-.1"),
        ("a:b/c\\d*e?", "a-b-c-d-e"),
        ("trailing. ", "trailing"),
        ("../..", "unnamed"),
        ("CON", "_CON"),
        ("nul.txt", "_nul.txt"),
        ("com1", "_com1"),
        ("console", "console"),
        ("café\x1b[31m\n", "caf-31m"),
    ],
)
def test_names_are_safe_on_every_file_system(text, name):
    assert platforms.safe_name(text) == name
    assert len(platforms.safe_name(text * 50)) <= 100
    assert platforms.safe_name("a" * 101) != platforms.safe_name("a" * 102)


def test_points_that_differ_in_case_have_folders_of_their_own(tmp_path):
    base = tiny.config()
    choices = {"rate x": base, "rate X": tiny.config(epochs=3)}
    jobs = Sweep(tmp_path, base).plan(choices, [0], baselines=False)
    assert len({str(job.folder).lower() for job in jobs}) == 2


EVERYWHERE = re.compile(
    r"os\.(DirEntry|O_WRONLY|PathLike|SEEK_END|_exit|cpu_count|devnull|dup2|environ|fspath|fstat|getpid|open|path)"
    r"|os\.(scandir|stat|write)"
    r"|signal\.(SIGINT|SIGTERM|SIG_DFL|SIG_IGN|Signals|default_int_handler|getsignal|signal)|sys\.(?!platform).*"
)
"""What modules may use of `os` and `signal`; what other systems lack, or do otherwise, belongs into `platforms`."""
OF_ONE_SYSTEM = {"ctypes", "fcntl", "grp", "msvcrt", "pty", "pwd", "resource", "termios", "tty", "winreg"}
ASKING = {"system/platforms.py", "datasets/free_memory.py"}
"""Modules that ask which system they run on; the second reads what Linux tells of memory."""


def test_one_module_asks_which_system_it_runs_on():
    wrong = []
    for path, tree in MODULES.items():
        if path.relative_to(SOURCE).as_posix() in ASKING:
            continue
        wrong += [f"{path} imports {name}" for name in imports(tree) if name in OF_ONE_SYSTEM]
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                used = ast.unparse(node)
                if node.value.id in ("os", "signal", "sys") and not EVERYWHERE.fullmatch(used):
                    wrong.append(f"{path}:{node.lineno}: {used}")
            if isinstance(node, ast.Constant) and str(node.value).startswith(("/proc", "/sys", "/dev", "/tmp")):
                wrong.append(f"{path}:{node.lineno}: {node.value}")
    assert not wrong


def mode_of(call):
    """The mode in which a call of `open(path, mode)` or `path.open(mode)` opens a file; "" for other calls."""
    name = ast.unparse(call.func)
    if name != "open" and not name.endswith(".open"):
        return ""
    if name in {"Run.open", "Image.open", "tarfile.open", "gzip.open", "os.open", "member.open"}:
        return ""
    given = [word.value for word in call.keywords if word.arg == "mode"] or call.args[name == "open" :][:1]
    return ast.unparse(given[0]) if given else "r"


@pytest.mark.parametrize("folder", ["src", "benchmarks", "scripts"])
def test_text_files_are_the_same_on_every_system(folder):
    """In UTF-8, with line ends of one byte; by default, Windows has neither."""
    wrong = []
    for path in (SOURCE.parent.parent / folder).rglob("*.py"):
        nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        for call in (node for node in nodes if isinstance(node, ast.Call)):
            name, words, mode = ast.unparse(call.func), {word.arg for word in call.keywords}, mode_of(call)
            if name == "platforms.write_text":
                continue
            text = bool(mode) and "b" not in mode
            writes = name.endswith(".write_text") or (text and not set("wax").isdisjoint(mode))
            reads = name.endswith(".read_text") or text or "text" in words
            if ((reads or writes) and "encoding" not in words) or (writes and "newline" not in words):
                wrong.append(f"{path}:{call.lineno}: {ast.unparse(call)[:80]}")
    assert not wrong


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    """Splits of every kind, of two images each."""
    folder = tmp_path_factory.mktemp("images")
    pixels = torch.arange(2 * 3 * 40 * 40).view(2, 3, 40, 40) % 256
    array = ArraySplit(pixels.to(torch.uint8), torch.tensor([0, 1]))
    paths = [folder / f"{number}.png" for number in range(2)]
    for path, image in zip(paths, array.images, strict=True):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    rows = hub.Dataset.from_dict({"image": [str(path) for path in paths]}).cast_column("image", hub.Image())
    table = HubSplit("table", rows, "image", array.labels)
    return [array, FileSplit(paths, [0, 1]), ConcatSplit(array, FileSplit(paths, [0, 1]), array.labels), table]


def test_splits_go_to_processes_that_are_spawned(splits):
    for split in splits:
        viewed = TransformedSplit(split, Transforms(size=32).train(), 0, ("view", 0), skip_bad=False)
        sample = viewed[SampleKey(1, 0)]
        again = pickle.loads(pickle.dumps(viewed))[SampleKey(1, 0)]
        assert torch.equal(again.image, sample.image)
        assert again[1:] == sample[1:]


@pytest.mark.slow
def test_spawned_processes_load_the_same_images(splits, monkeypatch):
    monkeypatch.setattr(platforms, "loader_start", lambda: "spawn")
    together = splits[0]
    for split in splits[1:]:
        together = ConcatSplit(together, split, split.labels)
    viewed = TransformedSplit(together, Transforms(size=32).train(), 0, ("view", 0), skip_bad=False)
    plan = sequential_batches(torch.arange(len(together)), 3)
    for one, other in zip(
        batches(viewed, plan, LoaderOptions(0)), batches(viewed, plan, LoaderOptions(1)), strict=True
    ):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.indices, other.indices)
