"""What reaches a terminal, a pipe and a file: results on standard output, the rest on standard error, nothing raw."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import select
import struct
import sys
import unicodedata
import warnings
from dataclasses import replace

import pytest
import torch
from PIL import Image

import tiny
from pgp import recipes, train
from pgp.cli import main
from pgp.datasets.folder import Folder
from pgp.methods.head_only import HeadOnly
from pgp.projections.base import NoProjection
from pgp.reports import figures, tables
from pgp.system.escaping import JOINERS, UNSAFE

ESCAPES = "\x1b]0;owned\x07\x1b[2J\x9b31m"
CLASSES = [f"cat {ESCAPES}", "[red]do\tg[bold] | :boom:", "b\u202eird\n2\\n", "Größe 1"]
TASKS = {f"[/bold]first {ESCAPES}": CLASSES[:2], "second\n\t|x|": CLASSES[2:]}
RUN = f"run {ESCAPES}[x]\n\t$y$ |"
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="names of any bytes")


def head_only(**changes):
    base = tiny.config(epochs=1, tasks=None, method=HeadOnly.Config(), projection=NoProjection.Config(), drift_images=2)
    return replace(base, name="own", **changes)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Images in folders with hostile names; one file has a name that is not UTF-8."""
    root = tmp_path_factory.mktemp("data") / f"photos {ESCAPES}"
    for label, name in enumerate(CLASSES):
        (root / name).mkdir(parents=True)
        for number in range(4):
            file = root / name / (os.fsdecode(b"caf\xe9.png") if number == 3 else f"{number}\x1b[31m\t\n.png")
            Image.new("RGB", (20, 20), (60 * label, 50 * number, 0)).save(file, format="png")
    (root / "tasks.json").write_text(json.dumps(TASKS), encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def run(photos, tmp_path_factory):
    torch.set_num_threads(1)
    return train.train(
        head_only(dataset=Folder(photos)), tmp_path_factory.mktemp("a run" + " of a long name" * 6) / RUN
    )


@pytest.fixture(autouse=True)
def _own(monkeypatch, tmp_path):
    monkeypatch.setitem(recipes.RECIPES, "own", head_only)
    monkeypatch.chdir(tmp_path)


def raw(text):
    """The characters of a text that no terminal should see."""
    return {c for c in text if c not in {"\n", *JOINERS} and unicodedata.category(c) in UNSAFE}


COMMANDS = {
    "train": ["train", "own", "--data", "PHOTOS", "--output", "NEW"],
    "eval": ["eval", "RUN"],
    "eval every task": ["eval", "RUN", "--every-task"],
    "audit": ["audit", "RUN", "--oracle"],
    "report": ["report", "RUN"],
    "list": ["list"],
    "data check": ["data", "check", "own", "--data", "PHOTOS"],
    "sweep": [
        "sweep",
        "own",
        "--data",
        "PHOTOS",
        "--output",
        "NEW",
        "--seeds",
        "1",
        "--workers",
        "1",
        "--no-baselines",
    ],
    "published eval": ["main.py", "own", "--eval", "--output_dir", "RUN"],
    "no run": ["eval", "NEW"],
    "no such command": [ESCAPES],
    "no such flag": ["predict", "RUN", "--" + ESCAPES],
    "no such setting": ["train", "own", "--" + ESCAPES],
}


@pytest.mark.parametrize("words", COMMANDS.values(), ids=COMMANDS)
def test_hostile_names_are_shown_as_escapes(words, photos, run, tmp_path, capsys):
    places = {"PHOTOS": str(photos), "RUN": str(run.folder), "NEW": str(tmp_path / RUN)}
    words = [places.get(word, word) for word in words]
    wrong = places["NEW"] in words[:2] or words[-1] in (ESCAPES, f"--{ESCAPES}")
    fails = pytest.raises(SystemExit) if wrong else contextlib.nullcontext()
    with fails:
        if words[0] == "main.py":
            main.published_main(words[1:])
        else:
            main.main(words)
    out, err = capsys.readouterr()
    assert raw(out + err) == set()
    if wrong or places["NEW"] in words or str(run.folder) in words:
        assert "\\x1b" in out + err
    if words[0] == "report":
        text = (run.folder / "report.md").read_text(encoding="utf-8")
        assert raw(text) == set()
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in text.split("\n\n")[0].splitlines()}) == 1


def test_predict_prints_one_line_for_each_image(run, photos, capsys):
    main.main(["predict", str(run.folder), str(photos), "--top", "3"])
    out, err = capsys.readouterr()
    assert raw(out.replace("\t", "")) | raw(err) == set()
    lines = [line.split("\t") for line in out.splitlines()]
    assert len(lines) == 16
    assert {len(line) for line in lines} == {4}
    paths = {line[0].encode("latin-1", "backslashreplace").decode("unicode_escape") for line in lines}
    assert paths == {str(path) for path in photos.glob("*/*.png")}
    main.main(["predict", str(run.folder), str(photos), "--json"])
    out, err = capsys.readouterr()
    assert raw(out) | raw(err) == set()
    told = [json.loads(line) for line in out.splitlines()]
    assert {one["image"] for one in told} == {str(path) for path in photos.glob("*/*.png")}
    assert {name for one in told for name in one["classes"]} <= set(CLASSES)


def test_a_terminal_with_ascii_only(run, photos, monkeypatch):
    for words in (["predict", "RUN", "PHOTOS", "--json"], ["predict", "RUN", "PHOTOS"], ["eval", "RUN"], ["list"]):
        streams = [io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True) for _ in range(2)]
        monkeypatch.setattr(sys, "stdout", streams[0])
        monkeypatch.setattr(sys, "stderr", streams[1])
        main.main([{"RUN": str(run.folder), "PHOTOS": str(photos)}.get(word, word) for word in words])
        out = streams[0].buffer.getvalue().decode("ascii")
        if "--json" in words:
            assert {name for line in out.splitlines() for name in json.loads(line)["classes"]} <= set(CLASSES)


def test_figures_draw_dollars_and_unknown_characters(run, tmp_path):
    (line, *_) = tables.result_rows([run])
    figures.draw_accuracy([line._replace(label="$x$ 猫 \x1b"), line._replace(label="y$")], tmp_path / "figure.png")


def in_terminal(words, *, out="terminal", err="terminal", read=None):
    """Exit status, standard output and standard error of a command, each of the two a terminal or a pipe."""
    termios, fcntl, pty = (pytest.importorskip(name) for name in ("termios", "fcntl", "pty"))
    ours, theirs = zip(*(pty.openpty() if kind == "terminal" else os.pipe() for kind in (out, err)), strict=True)
    for fd, kind in zip(theirs, (out, err), strict=True):
        if kind == "terminal":
            fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # no other thread does anything
        child = os.fork()
    if not child:
        status = 99
        try:
            for fd in (1, 2):
                os.dup2(theirs[fd - 1], fd)
            for fd in (*ours, *theirs):
                os.close(fd)
            sys.stdout, sys.stderr = (io.TextIOWrapper(io.FileIO(fd, "w"), encoding="utf-8") for fd in (1, 2))
            main.main([str(word) for word in words])
            status = 0
        except SystemExit as stop:
            status = stop.code or 0
        finally:
            os._exit(status)
    for fd in theirs:
        os.close(fd)
    texts, open_ends = dict.fromkeys(ours, b""), set(ours)
    while open_ends:
        for fd in select.select(list(open_ends), [], [])[0]:
            try:
                data = os.read(fd, 1 << 16)
            except OSError:  # how a terminal ends
                data = b""
            texts[fd] += data
            if not data or (fd == ours[0] and read is not None and len(texts[fd]) >= read):
                os.close(fd)
                open_ends.remove(fd)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), *(texts[fd].decode().replace("\r\n", "\n") for fd in ours)


def plain(text):
    """A text without the sequences that move a cursor or colour what follows."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def test_answers_go_where_they_are_sent(run, photos):
    (photos / "broken.png").write_bytes(b"no image")
    words = ["predict", run.folder, photos, "--json"]
    try:
        code, out, err = in_terminal(words, out="pipe")  # pgp predict … > file, typed in a terminal
        assert (code, len([json.loads(line) for line in out.splitlines()])) == (0, 16)
        assert "images" in err  # the bar
        assert "skipped: cannot read the image" in plain(err)
        code, shown, err = in_terminal(words, err="pipe")
        assert (code, shown) == (0, out)
        ignored, skipped = err.splitlines()  # not wrapped
        assert ignored.startswith("pgp: ignored: ")
        assert skipped.startswith("pgp: skipped: cannot read the image")
        code, shown, err = in_terminal(words)  # both on one terminal: no bar comes between
        assert (code, plain(shown)) == (0, out)
        assert plain(err).splitlines() == [ignored, skipped]
        code, shown, err = in_terminal(words, out="pipe", err="pipe")
        assert (code, shown) == (0, out)
    finally:
        (photos / "broken.png").unlink()


@pytest.mark.parametrize(
    "words",
    [["eval", "RUN"], ["audit", "RUN"], ["data", "check", "own", "--data", "PHOTOS"], ["list"]],
    ids=lambda words: words[0],
)
def test_results_are_the_same_in_a_pipe_and_never_wrapped_there(words, run, photos):
    words = [{"RUN": run.folder, "PHOTOS": photos}.get(word, word) for word in words]
    code, out, err = in_terminal(words, out="pipe")
    assert code == 0
    assert not raw(out)
    assert "\x1b[2J" not in err
    assert in_terminal(words, out="pipe", err="pipe")[1] == out
    if words[0] != "list":  # a long path is on one line
        assert any(len(line) > 120 for line in out.splitlines()) or words[0] == "data"


def test_a_reader_that_has_seen_enough(run, photos):
    code, out, err = in_terminal(
        ["predict", run.folder, *[photos] * 3, "--batch-size", "1"], out="pipe", err="pipe", read=1
    )
    assert code in (0, 141)
    assert out
    assert all(line.startswith("pgp: ignored: ") for line in err.splitlines())


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (ValueError("expected\nx, got y"), 2, "pgp: expected\\nx, got y"),
        (ValueError(), 2, "pgp: ValueError"),
        (FileNotFoundError(2, "No such file or directory", "a/\x1bb"), 2, "pgp: a/\\x1bb: No such file or directory"),
        (RecursionError("maximum recursion depth exceeded"), 2, "nested too deeply"),
        (MemoryError(), 2, "memory ran out: try a smaller --micro-batch-size"),
        (
            torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
            2,
            "memory ran out: try a smaller",
        ),
        (RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"), 2, "memory ran out: try a smaller"),
        (KeyError("x"), 70, "this is a fault of pgp, please report it: KeyError: 'x'; PGP_DEBUG=1 shows where"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (BrokenPipeError(), 141, ""),
    ],
    ids=lambda value: type(value).__name__,
)
def test_whatever_ends_a_command_ends_in_one_line(monkeypatch, capsys, error, code, told):
    def command(_):
        raise error

    monkeypatch.setitem(main.COMMANDS, "list", command)
    monkeypatch.setattr(os, "dup2", lambda *_: None)
    with pytest.raises(SystemExit) as stop:
        main.main(["list"])
    out, err = capsys.readouterr()
    assert stop.value.code == code
    assert told in err
    assert (out, err.count("\n")) == ("", int(bool(told)))
    if isinstance(error, Exception) and code != 141:
        monkeypatch.setenv("PGP_DEBUG", "1")
        with pytest.raises(type(error)):
            main.main(["list"])
