"""Trials of run folders: random kills, a fault at every system call that changes something, damages of every file.

    python tests/trials.py kills 50
    python tests/trials.py faults
    python tests/trials.py damages 100

Each prints what came out, and ends with 1 if anything was lost, or wrong in silence. Commands run in forked children of
a process that has imported everything; `faults` starts itself anew with the shim `faults.c`, built by the system's cc.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file

import tiny
from pgp import train
from pgp.cli import main as cli
from pgp.datasets.folder import Folder
from pgp.runs.run import Run
from pgp.runs.statetree import pieces_in
from pgp.system.storage import RunError

KINDS = ("flip", "flip", "flip", "cut", "cut", "longer", "junk", "swap", "gone", "link", "FIFO", "folder")
COLOURS = {"ant": (200, 30, 30), "bee": (30, 200, 30), "cat": (30, 30, 200), "dog": (200, 200, 30)}
KILL, FULL = 1, 2


def photos(folder):
    for name, colour in COLOURS.items():
        (folder / name).mkdir(parents=True)
        for number in range(5):
            shades = tuple(value + 6 * number for value in colour)
            Image.new("RGB", (40, 36), shades).save(folder / name / f"{number}.png")
    return folder


def config(data, **changes):
    small = {"patch_size": 16, "embed_dim": 16, "depth": 1, "num_heads": 2}
    backbone = type(tiny.BACKBONE)("vit_tiny_patch16_224", "random", small)
    settings = {"backbone": backbone, "tasks": 2, "epochs": 1, "batch_size": 4, "log_every_steps": 1, "drift_images": 2}
    return tiny.config(dataset=Folder(data), **{**settings, "save_every_steps": 1, **changes})


def ended(folder):
    """All that a finished run has learned, bit by bit, and its table."""
    run = Run.open(folder)
    name = run.latest_checkpoint()
    record = json.loads((folder / "checkpoints" / name / "state.json").read_text())
    tensors = load_file(folder / "checkpoints" / name / "state.safetensors")
    learned = {key: tensor.numpy().tobytes() for key, tensor in tensors.items()}
    left = sorted(path.name for path in (folder / "checkpoints").iterdir() if "-replaced" not in path.name)
    pieces = sorted(pieces_in(record["state"]))
    closed = [event["task"] for event in run.events("task")]
    return name, learned, pieces, (folder / "accuracy.csv").read_bytes(), left, closed


def learn(settings, folder):
    """What a user types again and again: the same call, or --resume once there is something to go on from."""
    if (folder / "checkpoints" / "latest").exists():
        return train.resume(folder)
    return train.train(settings, folder)


def forked(work, seconds=None):
    """Run `work` in a child, which is killed after some seconds; its end, and the one line that it says."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        said, code = "", 0
        try:
            work()
        except (RunError, ValueError, OSError) as error:
            said, code = str(error), 2
        except BaseException:
            said, code = traceback.format_exc(), 1
        os.write(write, said.encode()[:60_000])
        os._exit(code)
    os.close(write)
    if seconds is not None:
        time.sleep(seconds)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    with os.fdopen(read, "rb") as pipe:
        said = pipe.read().decode(errors="replace")
    _, status = os.waitpid(child, 0)
    return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status), said


def say(line):
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


class Trials:
    """What came out of trials, and what should not have."""

    def __init__(self):
        self.outcomes, self.failures = Counter(), []

    def note(self, what, wrong=""):
        self.outcomes[what] += 1
        if wrong:
            self.failures.append(f"{what}: {wrong}")

    def end(self):
        for what, times in sorted(self.outcomes.items()):
            say(f"{times:5d}  {what}")
        for failure in self.failures[:20]:
            say(f"FAILED {failure}")
        sys.exit(bool(self.failures))


def kills(times, place):
    """Kill a run after a random time, and again, until it is through: it has to end as if nothing had happened."""
    trials, draw, settings = Trials(), random.Random(0), config(photos(place / "data"))
    train.train(settings, place / "first")  # in this process, so that its children have nothing to import
    started = time.perf_counter()
    train.train(settings, place / "whole")
    length, whole = time.perf_counter() - started, ended(place / "whole")
    for number in range(times):
        folder = place / f"run-{number}"
        killed = 0
        while True:
            code, said = forked(partial(learn, settings, folder), draw.uniform(0, 1.1 * length) if killed < 2 else None)
            if code == 0:
                break
            killed += 1
            if code != -signal.SIGKILL:
                trials.note("stopped by itself", said)
                break
        if code == 0:
            trials.note(f"killed {killed} times, ended the same", "" if ended(folder) == whole else f"{folder} differs")
        shutil.rmtree(folder)
    trials.end()


def faults(place):
    """A kill, and a full disk, at every system call that changes the run folder; then the run goes on."""
    shim = ctypes.CDLL(os.environ["LD_PRELOAD"])
    settings = config(photos(place / "data"))
    trials, folder = Trials(), place / "run"

    def learning(at, fault):
        shim.arm(str(folder).encode(), ctypes.c_long(at), fault)
        try:
            learn(settings, folder)
        finally:
            (place / "calls").write_text(str(shim.count()))

    learning(0, 0)
    shim.arm(b"", ctypes.c_long(0), 0)
    whole, calls = ended(folder), int((place / "calls").read_text())
    say(f"{calls} calls change the folder")
    for fault, name in ((KILL, "killed"), (FULL, "disk full")):
        for at in range(1, calls + 1):
            shutil.rmtree(folder)
            code, said = forked(partial(learning, at, fault))
            if fault == FULL and code == 2:
                line = said.count("\n") == 0 and "No space left on device" in said and str(folder) in said
                trials.note("disk full, told in a line", "" if line else f"call {at}: {said}")
            elif code == (-signal.SIGKILL if fault == KILL else 0):
                trials.note(f"{name}, {'ended' if code == 0 else 'died'}")
            else:
                trials.note(f"{name}, otherwise", f"call {at}: {code} {said}")
            code, said = forked(partial(learn, settings, folder))
            same = code == 0 and ended(folder) == whole
            trials.note(f"{name}, then gone on with", "" if same else f"call {at}: {code} {said or 'differs'}")
    trials.end()


def output(words):
    """Exit status, standard output and standard error of a command, in this process; a hang is ended by an alarm."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(TimeoutError("hangs")))
    signal.alarm(60)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main(words)
        except SystemExit as stop:
            code = stop.code or 0
        except BaseException:
            code = traceback.format_exc()
    signal.alarm(0)
    return code, out.getvalue(), err.getvalue()


def damage(path, kind, draw, others):
    """Do one kind of damage to a file."""
    data = path.read_bytes()
    if kind == "flip":
        changed, place = bytearray(data), draw.randrange(len(data))
        changed[place] ^= 1 << draw.randrange(8)
        path.write_bytes(changed)
    elif kind == "cut":
        path.write_bytes(data[: draw.randrange(len(data))])
    elif kind == "longer":
        path.write_bytes(data + draw.randbytes(draw.randrange(1, 50)))
    elif kind == "junk":
        path.write_bytes(draw.choice([b"[" * 100_000, b"null", b"1" * 9_999, b"\xff\xfe", b"{}", b"\n"]))
    elif kind == "swap":
        path.write_bytes(draw.choice(others).read_bytes())
    else:
        path.unlink()
        if kind == "link":
            aside = path.parent.parent / f"{path.name}-aside"
            aside.write_bytes(data)
            path.symlink_to(aside)
        elif kind == "FIFO":
            os.mkfifo(path)
        elif kind == "folder":
            path.mkdir()


def others_than(file, files, whole, twin):
    """Files to swap with `file`: the same one of another run, and any other of either."""
    others = [root / other for root in (whole, twin) for other in files if (root / other).is_file() and other != file]
    return others + [path for path in [twin / file] * len(others) if path.is_file()]


def damages(times, place):
    """Damage every file of a finished run: each command answers as before, or says what is wrong in a line."""
    trials, draw, data = Trials(), random.Random(1), photos(place / "data")
    whole = train.train(config(data, save_every_steps=0), place / "whole").folder
    twin = train.train(config(data, save_every_steps=0, seed=1), place / "twin").folder
    folder = place / "run"
    commands = {
        "predict": ["predict", str(folder), str(data), "--json"],
        "eval": ["eval", str(folder)],
        "report": ["report", str(folder), "--output", str(place / "report")],
        "--resume": ["train", "--resume", str(folder)],
    }
    shutil.copytree(whole, folder)
    answers = {name: output(words)[:2] for name, words in commands.items()}
    assert all(code == 0 for code, _ in answers.values()), answers
    files = [
        path.relative_to(whole)
        for path in sorted(whole.rglob("*"))
        if path.is_file() and path.stat().st_size and path.suffix != ".png"
    ]
    for number in range(times):
        file = files[number % len(files)]
        kind = draw.choice(KINDS)
        for name, words in commands.items():
            shutil.rmtree(folder)
            shutil.copytree(whole, folder)
            damage(folder / file, kind, random.Random(number), others_than(file, files, whole, twin))
            code, out, err = output(words)
            lines = [line for line in err.strip().splitlines() if line.startswith("pgp: ")]
            if (code, out) == answers[name]:
                trials.note(f"{name}: the same answer")
            elif code == 2 and len(lines) == 1 and not out and str(folder) in lines[0]:
                trials.note(f"{name}: one line")
            elif code == 0 and lines and file.name in lines[0]:
                trials.note(f"{name}: another answer, with a warning")
            else:
                trials.note(f"{name}: wrong", f"{kind} of {file}: {code} {err or out}")
    trials.end()


def main():
    torch.set_num_threads(1)
    what, *rest = sys.argv[1:]
    memory = Path("/dev/shm")  # where writing to a disk takes no time
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as scratch:
        place = Path(scratch).resolve()
        if what == "faults" and "LD_PRELOAD" not in os.environ:
            library = place / "faults.so"
            source = Path(__file__).with_name("faults.c")
            subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", str(library), str(source), "-ldl"], check=True)
            environment = {**os.environ, "LD_PRELOAD": str(library)}
            sys.exit(subprocess.run([sys.executable, __file__, "faults"], env=environment, check=False).returncode)
        {"kills": kills, "faults": lambda place: faults(place), "damages": damages}[what](*map(int, rest), place)


if __name__ == "__main__":
    main()
