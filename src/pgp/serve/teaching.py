"""Teach a run a class from uploaded photos, one at a time, and undo it."""

from __future__ import annotations

import contextlib
import csv
import io
import itertools
import signal
import threading
import time
import unicodedata
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Literal

import torch
from rich.console import Console
from rich.progress import Progress

from pgp import train
from pgp.runs.run import TAUGHT, Run
from pgp.serve.limits import RefusedError
from pgp.system import platforms, storage
from pgp.system.escaping import printable
from pgp.system.storage import RunError
from pgp.training import start
from pgp.training.session import Session

LONGEST_NAME = 100
"""Maximum number of characters of a class name."""
ACCELERATORS: Final[Mapping[str, Literal["cpu", "gpu", "mps"]]] = {"cpu": "cpu", "cuda": "gpu", "mps": "mps"}
"""By the type of a device, what `Hardware.accelerator` calls it."""
BLANKS = "\u115f\u1160\u2800\u3164\uffa0"
"""Letters and symbols of Unicode that nobody can see: fillers of Hangul, and a pattern of Braille without dots."""
CLOSING_SECONDS = 30.0
"""Maximum time that a service which ends waits for the current training step of a class that is being taught."""


def class_name(text: str) -> str:
    """Return a class name as it is recorded.

    Raises:
        RefusedError: If it is empty, too long, or has characters that are not visible.

    >>> class_name("  sea   lion ")
    'sea lion'
    """
    name = _tidy(text)
    if not name:
        raise RefusedError(400, "expected the name of the class, got none")
    if len(name) > LONGEST_NAME:
        raise RefusedError(400, f"expected a name of at most {LONGEST_NAME} characters, got {len(name):,}")
    is_visible = any(unicodedata.category(one)[0] in "LNPS" and one not in BLANKS for one in name)
    if printable(name) != name or not is_visible:
        raise RefusedError(400, f"expected a name of visible characters, got {name!a:.80}")
    return name


def _tidy(text: str) -> str:
    """Return a name in the form in which it is recorded."""
    return " ".join(unicodedata.normalize("NFC", text).split())


@dataclass
class Lesson:
    """A class that is being taught, or was."""

    number: int
    name: str
    photos: int
    state: Literal["learning", "finished", "failed"] = "learning"
    error: str = ""
    """Why it failed."""
    seconds: float = 0.0
    messages: list[str] = field(default_factory=list)
    """What the user should know, such as a class whose images look alike."""
    progress: Progress | None = None

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values; `progress` is a text and a fraction in [0, 1]."""
        progress = self.progress  # which the thread sets to None at the end
        bars = progress.tasks if progress else []
        bar = bars[-1] if bars else None
        return {
            "number": self.number,
            "name": self.name,
            "photos": self.photos,
            "state": self.state,
            "error": self.error,
            "seconds": round(self.seconds, 2),
            "messages": self.messages,
            "progress": {
                "doing": bar.description if bar else "",
                "done": bar.completed / bar.total if bar and bar.total else None,
            },
        }


class Teacher:
    """Teaches one class at a time, in a thread.

    The run does not change before a class is learned. A class that fails, or a process that dies, leaves it as it was.

    Args:
        folder: The run folder.
        on_change: Called in the thread after the run has changed.
        device: Name of the device to train on, such as cpu; the run's record may name one that this machine lacks. If
            None, a GPU if there is one, else the CPU.

    Raises:
        ValueError: If `device` is a GPU other than the first, on which classes are taught.
    """

    def __init__(self, folder: Path, on_change: Callable[[], object], device: str | None = None) -> None:
        self.folder, self.on_change = folder, on_change
        self.accelerator: Literal["auto", "cpu", "gpu", "mps"] = "auto"
        """Where it is trained; see `Hardware`."""
        if device:
            one = torch.device(device)
            if one.index:
                raise ValueError(
                    f"expected a device without a number, such as {one.type}, because classes are taught on the first"
                    f" one, got {device}: choose it by CUDA_VISIBLE_DEVICES={one.index}"
                )
            self.accelerator = ACCELERATORS.get(one.type, "auto")
        self.lesson: Lesson | None = None
        """The class that is being taught, or was taught last."""
        self._busy = threading.Lock()
        self._thread: threading.Thread | None = None
        self._session: Session | None = None
        self._is_closed = False
        self._numbers = itertools.count(1)
        with contextlib.suppress(RunError):  # while another process writes, nothing is left over for sure
            run = Run.open(folder)
            with run.writing():
                run.discard_untaught()

    def check(self, name: str) -> None:
        """Raise `RefusedError` if the class `name` cannot be taught now."""
        name = class_name(name)
        if self._busy.locked():
            raise RefusedError(409, self._busy_message())
        self._check_run(name)

    def teach(self, name: str, photos: Sequence[bytes]) -> Lesson:
        """Begin to teach the class `name` from image files, and return at once.

        Raises:
            RefusedError: If the class is known, another one is being taught, or the run does not take classes.
            RunError: If the photos cannot be written.
        """
        name = class_name(name)
        photos = list(dict.fromkeys(photos))  # the same photo twice says nothing new
        if not self._busy.acquire(blocking=False):
            raise RefusedError(409, self._busy_message())
        try:
            self._check_run(name)
            table = self._write(name, photos)
            self.lesson = Lesson(next(self._numbers), name, len(photos))
            self._thread = threading.Thread(target=self._learn, args=(self.lesson, table), name="teaching", daemon=True)
            self._thread.start()
        except BaseException:
            self._busy.release()
            raise
        return self.lesson

    def start(self) -> None:
        """Teach again after `close`."""
        self._is_closed = False

    def close(self) -> None:
        """Stop teaching, if a class is being taught, and wait until the run is as it was before."""
        self._is_closed = True
        if session := self._session:  # which the thread sets to None at the end
            session.stop.number = signal.SIGTERM
        if self._thread:
            self._thread.join(CLOSING_SECONDS)

    def undo(self, name: str) -> list[str]:
        """Forget the classes that were added last, and return their names. Photos that were uploaded are deleted.

        Args:
            name: One of these classes, so that nobody forgets the class of somebody else by mistake.

        Raises:
            RefusedError: If a class is being taught, none was added, or the last one is another.
            RunError: If the files cannot be written.
        """
        if not self._busy.acquire(blocking=False):
            raise RefusedError(409, self._busy_message())
        try:
            run = Run.open(self.folder)
            try:
                with run.writing():  # so that no other process changes which class is the last
                    if not run.config.added:
                        raise RefusedError(409, "expected a class that was taught, but there is none to undo")
                    names = [run.data.class_names[label] for label in run.data.tasks[-1]]
                    if not {name, _tidy(name)} & set(names):
                        raise RefusedError(
                            409, f"expected a class that was added last ({', '.join(names)}), got {name!r:.120}"
                        )
                    run.undo_add()
            finally:
                self.on_change()
            return names
        finally:
            self._busy.release()

    def _busy_message(self) -> str:
        lesson = self.lesson
        what = f"{lesson.name!r} is" if lesson and lesson.state == "learning" else "a class is"
        return f"{what} being taught: wait until it is finished"

    def _taught(self) -> Path:
        return self.folder.absolute() / TAUGHT

    def _check_run(self, name: str) -> None:
        """Raise `RefusedError` if the run cannot learn the class."""
        try:
            run = Run.open(self.folder)
            finished, tasks = run.progress()
            unfinished = run.checkpoints.latest() != run.latest_finished()
            names, setting = run.data.class_names, run.config.setting
        except RunError as error:
            raise RefusedError(503, f"the run cannot be read: {error}") from error
        if finished < tasks or unfinished:
            raise RefusedError(
                409, "the run is inside a task: resume it with pgp train --resume, then it can be taught"
            )
        if setting == "dil":
            raise RefusedError(409, "this run learns domains of the same classes, and takes no new class")
        if name in names:
            raise RefusedError(409, f"the class {name!r} is known already: choose another name, or undo it first")

    def _write(self, name: str, photos: Sequence[bytes]) -> Path:
        """Write the photos and a table of them into a new folder of the run, and return the path of the table."""
        storage.make_folder(self._taught())
        partial = platforms.unfinished_name(self._taught() / "photos")  # no other process takes it for left over
        text = io.StringIO(newline="")
        rows = csv.writer(text)
        rows.writerow(["path", "label"])
        table = f"{platforms.readable_name(name, otherwise='class')}.csv"  # it names the task
        try:
            storage.make_folder(partial)
            for number, photo in enumerate(photos, start=1):
                storage.write(partial / f"{number:04d}", photo)
                rows.writerow([f"{number:04d}", name])
            storage.write(partial / table, text.getvalue())
            numbers = [int(path.name) for path in self._taught().iterdir() if path.name.isdecimal()]
            folder = self._taught() / f"{max(numbers, default=0) + 1:04d}"
            platforms.move_folder(partial, folder)
        except OSError as error:
            raise storage.write_error("write", partial, error) from error
        finally:
            storage.remove_folder(partial)
        return folder / table

    def _learn(self, lesson: Lesson, table: Path) -> None:
        started, notes = time.perf_counter(), io.StringIO()
        lesson.progress = Progress(console=Console(file=notes, width=1000), disable=True)
        raised: list[str] = []
        try:
            hardware = Run.open(self.folder).config.hardware
            hardware = replace(hardware, accelerator=self.accelerator, devices=1, workers=0)
            resumed = start.resume(self.folder, hardware, lesson.progress, table, None, drop=False, data=())
            with _warnings_of_this_thread(raised), resumed as (session, state):
                self._session = session
                if self._is_closed:
                    session.stop.number = signal.SIGTERM
                train.fit(session, state)
        except BaseException as error:  # whatever it is, the service continues
            reason = str(error) or type(error).__name__
            if self._is_learned(table):
                raised.append(f"the class is learned, but then something failed: {reason}")
            else:
                lesson.error = reason
        if not lesson.error:
            self.on_change()
        printed = (line.partition("warning: ")[2] for line in notes.getvalue().splitlines())
        lesson.messages = [*filter(None, printed), *raised]
        lesson.seconds = time.perf_counter() - started
        lesson.progress = self._session = None
        self._busy.release()
        lesson.state = "failed" if lesson.error else "finished"

    def _is_learned(self, table: Path) -> bool:
        """Return whether a class was learned before an error came. If not, leave the run as it was before."""
        try:
            run = Run.open(self.folder)
            learned = table.parent.name in run.taught_folders()
            if not learned:
                with contextlib.suppress(RunError), run.writing():
                    run.discard_untaught()
                if table.parent.name not in run.taught_folders(run.checkpoints.latest()):
                    storage.remove_folder(table.parent)
            return learned
        except Exception:  # the photos stay, because a checkpoint may need them
            return False


@contextlib.contextmanager
def _warnings_of_this_thread(messages: list[str]) -> Iterator[None]:
    """Add the warnings that this thread raises inside the block to `messages`; others are shown as before."""
    own = threading.get_ident()
    with warnings.catch_warnings():
        show = warnings.showwarning

        def collect(message: Warning | str, *where: Any, **settings: Any) -> None:
            if threading.get_ident() == own:
                messages.append(str(message))
            else:
                show(message, *where, **settings)

        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = collect
        yield
