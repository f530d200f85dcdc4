"""Checkpoints of a run: their names, atomic writing, and reading.

`checkpoints/` holds a folder for each checkpoint, with its tensors in `state.safetensors` and its record in
`state.json`. The file `latest` names the newest checkpoint. The folder `pieces/` holds tensors that several checkpoints
share, each under its digest.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor

from pgp.runs.statetree import Piece, join, pieces_in, read_tensors, split
from pgp.system import platforms, storage
from pgp.system.storage import RunError

FORMAT = 3
"""Version of the checkpoint format."""
NAME = re.compile(r"task-([0-9]{2,9})(?:-step-([0-9]{6,12}))?")
REPLACED = re.compile(NAME.pattern + r"-replaced(?:-[0-9]+)?")
PIECE = re.compile(r"([0-9a-f]{64})\.safetensors")
STATE, RECORD, LATEST, PIECES = "state.safetensors", "state.json", "latest", "pieces"


@dataclass(frozen=True)
class CheckpointName:
    """Name of a checkpoint: after `task` tasks or, with a step, after so many steps of task number `task`.

    >>> str(CheckpointName(3)), CheckpointName.parse("task-04-step-000120")
    ('task-03', CheckpointName(task=4, step=120))
    """

    task: int
    step: int | None = None

    def __str__(self) -> str:
        return f"task-{self.task:02d}" + ("" if self.step is None else f"-step-{self.step:06d}")

    @classmethod
    def parse(cls, text: str) -> CheckpointName:
        """Return the checkpoint name that `text` spells.

        Raises:
            ValueError: If pgp writes no such name.
        """
        if found := NAME.fullmatch(text):
            name = cls(int(found[1]), int(found[2]) if found[2] else None)
            if str(name) == text and name.task and name.step != 0:
                return name
        raise ValueError(f"expected a checkpoint such as task-03 or task-03-step-000200, got {text[:60]!r}")

    @classmethod
    def at(cls, tasks: int, steps: int) -> CheckpointName:
        """Return the name of the checkpoint after so many finished tasks, and so many steps of the next one."""
        return cls(tasks + 1, steps) if steps else cls(tasks)

    @property
    def finished(self) -> CheckpointName | None:
        """The checkpoint of the last task that is finished here; None inside the first task."""
        if self.step is None:
            return self
        return CheckpointName(self.task - 1) if self.task > 1 else None


@dataclass(frozen=True)
class Record:
    """Content of `state.json` besides the state itself: what the run was when the checkpoint was written."""

    run: str
    """Identity of the run."""
    config: dict[str, Any]
    classes: dict[str, Any]
    accuracy: str
    """Digest of the `accuracy.csv` of this state."""
    log: tuple[int, str]
    """Size of `metrics.jsonl` in bytes, and its digest."""
    held: tuple[str, ...] = ()
    """Lines to be written to `metrics.jsonl` when a task that is being added is finished."""


class Checkpoints:
    """The folder `checkpoints/` of a run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def latest(self) -> CheckpointName | None:
        """Return the name of the newest checkpoint, or None if there is none.

        Raises:
            RunError: If `latest` names none, or is damaged.
        """
        path = self.folder / LATEST
        if not storage.exists(path):
            return None
        storage.require_folder(self.folder)
        text, _, check = storage.read(path, 4096).decode(errors="replace").strip().partition("\n")
        if check and check.strip() != storage.digest(text):  # a name written by hand has no digest
            raise RunError(f"{path} was damaged: write the name of one of {self._known()} there, and nothing else")
        try:
            name = CheckpointName.parse(text.strip())
        except ValueError as error:
            raise RunError(f"{path} names no checkpoint: {error}; there are {self._known()}") from error
        with storage.advised(self._advice):
            storage.require_folder(self.folder / str(name))
        return name

    def is_empty(self) -> bool:
        """Return whether the folder is empty, apart from unfinished files of a killed process."""
        return all(platforms.UNFINISHED.fullmatch(path.name) for path in self._entries())

    def is_begun(self) -> bool:
        """Return whether the run was stopped before its first checkpoint became the latest."""
        names = self.names()
        others = {path.name for path in self._entries()} - {*map(str, names), PIECES}
        ours = all(platforms.UNFINISHED.fullmatch(name) or REPLACED.fullmatch(name) for name in others)
        return ours and [name.task for name in names] in ([], [1])

    def _entries(self) -> list[Path]:
        return list(self.folder.iterdir()) if self.folder.is_dir() else []

    def names(self) -> list[CheckpointName]:
        """Return the names of all checkpoints in the folder, oldest first."""
        found = []
        for path in self._entries():
            with contextlib.suppress(ValueError):
                found.append(CheckpointName.parse(path.name))
        return sorted(found, key=lambda name: (name.task, name.step is None, name.step or 0))

    def finished(self) -> list[CheckpointName]:
        """Return the names of the checkpoints of finished tasks, oldest first."""
        last = self.latest()
        done = last.finished.task if last and last.finished else 0
        return [name for name in self.names() if name.step is None and name.task <= done]

    def written(self) -> float:
        """Return the time at which the newest checkpoint was written, in seconds since the epoch."""
        return (self.folder / LATEST).lstat().st_mtime

    def record(self, name: CheckpointName) -> Record:
        """Return the record of a checkpoint.

        Raises:
            RunError: If it is not as it was written, or not that of this checkpoint.
        """
        with storage.advised(self._advice):
            return self._read(name)[0]

    def load(self, name: CheckpointName, parts: Collection[str] | None = None) -> dict[str, Any]:
        """Return the state of a checkpoint, or only the entries named by `parts`.

        Raises:
            RunError: If a byte of it is not as it was written.
        """
        path = self.folder / str(name)
        with storage.advised(self._advice), reading(path):
            _, tree = self._read(name)
            tensors = read_tensors(_intact(path / STATE, tree["tensors"], tree["size"]))
            pairs = [(key, item) for key, item in tree["state"]["pairs"] if parts is None or key in parts]
            return {key: join(item, tensors, self._piece) for key, item in pairs}

    def save(self, name: CheckpointName, state: Mapping[str, Any], record: Record) -> None:
        """Write a checkpoint atomically, make it the latest, and delete the previous checkpoint inside the same task.

        Raises:
            RunError: If the system refuses; the previous checkpoint stays the latest.
        """
        last = self.latest()
        if name == last:
            return  # it is saved already, and the same run gives the same state
        path, partial = self.folder / str(name), platforms.unfinished_name(self.folder / str(name))
        tensors: dict[str, Tensor] = {}
        pieces: dict[str, bytes] = {}
        tree = split(state, "", tensors, pieces)
        data = save(tensors)
        header = {"format": FORMAT, "name": str(name), "size": len(data), "tensors": storage.digest(data)}
        try:
            storage.require_folder(self.folder)
            self._write_pieces(pieces)
            storage.remove_folder(partial)
            partial.mkdir()
            storage.write(partial / STATE, data)
            storage.write(partial / RECORD, json.dumps(storage.sealed({**vars(record), **header, "state": tree})))
            platforms.sync_folder(partial)
            if storage.exists(path):  # the run was rewound: keep the old checkpoint until the next process starts
                _set_aside(path)
            platforms.move_folder(partial, path)
            platforms.sync_folder(self.folder)  # must be on the disk before `latest` names it
            self._point(name)
        except OSError as error:
            raise storage.write_error("write", path, error) from error
        finally:
            storage.remove_folder(partial)
        if last and last.step is not None:
            storage.remove_folder(self.folder / str(last))

    def rewrite(self, change: Callable[[Record], Record]) -> None:
        """Change the records, but not the states, of the latest checkpoint and of all finished tasks.

        Raises:
            RunError: If the record of the latest checkpoint or of the last finished task is damaged. Older ones that
                are damaged stay as they are.
        """
        last = self.latest()
        needed = {name for name in (last, last and last.finished) if name}
        for name in needed.union(self.finished()):
            try:
                record, tree = self._read(name)
            except RunError:
                if name in needed:
                    raise
                continue
            changed = storage.sealed({**tree, **vars(change(record))})
            storage.write(self.folder / str(name) / RECORD, json.dumps(changed))

    def keep(self, newest: int) -> None:
        """Delete the checkpoints of all finished tasks except the newest ones."""
        for name in self.finished()[:-newest]:
            storage.remove_folder(self.folder / str(name))

    def drop_step(self) -> None:
        """Make the checkpoint of the last finished task the latest, if the latest is inside a task.

        Raises:
            RunError: If the former is damaged, or the system refuses; nothing has changed then.
        """
        last = self.latest()
        if last is None or last.step is None:
            return
        if last.finished:
            self.load(last.finished)  # raises if it is damaged
            self._point(last.finished)
        else:
            try:
                (self.folder / LATEST).unlink()
            except OSError as error:
                raise storage.write_error("delete", self.folder / LATEST, error) from error
        storage.remove_folder(self.folder / str(last))

    def go_back(self, name: CheckpointName) -> None:
        """Make an older checkpoint the latest, and delete the newer ones.

        Raises:
            RunError: If that checkpoint is damaged, or the system refuses; nothing has changed then.
        """
        self.load(name)  # raises if it is damaged
        self._point(name)
        for newer in self.names():
            if newer.task > name.task:
                storage.remove_folder(self.folder / str(newer))
        self._tidy_pieces()

    def tidy(self) -> None:
        """Delete what earlier processes left: unfinished and replaced checkpoints, old steps, and unused pieces.

        Only the process that has locked the run may call it.
        """
        if not storage.exists(self.folder):
            return
        last = self.latest()
        stale = {str(name) for name in self.names() if name.step is not None and name != last}
        for path in storage.require_folder(self.folder).iterdir():
            unfinished = bool(platforms.UNFINISHED.fullmatch(path.name))
            if unfinished or path.name in stale or REPLACED.fullmatch(path.name):
                _remove(path)
        self._tidy_pieces()

    def _tidy_pieces(self) -> None:
        """Delete the pieces that no checkpoint needs, unless a checkpoint cannot be read."""
        folder, needed = self.folder / PIECES, set[str]()
        try:
            for name in self.names():
                needed |= set(pieces_in(self._read(name)[1]["state"]))
            found = list(storage.require_folder(folder).iterdir()) if storage.exists(folder) else []
        except RunError:
            return
        for path in found:
            piece = PIECE.fullmatch(path.name)
            if platforms.UNFINISHED.fullmatch(path.name) or (piece and piece[1] not in needed):
                _remove(path)

    def _read(self, name: CheckpointName) -> tuple[Record, dict[str, Any]]:
        """Return the record of a checkpoint, and the whole content of its file."""
        path = storage.require_folder(storage.require_folder(self.folder) / str(name)) / RECORD
        tree = storage.read_sealed(path)
        if tree.get("format") != FORMAT:
            raise RunError(f"{path} has the format {tree.get('format')!r:.20}, expected {FORMAT}: it needs the pgp that"
                           " wrote it")  # fmt: skip
        if tree.get("name") != str(name):
            raise RunError(f"{path} is that of checkpoint {tree.get('name')!r:.40}")
        with reading(path):
            size, digest = tree["log"]
            _require(int, size, tree["size"])
            _require(str, digest, tree["run"], tree["accuracy"], tree["tensors"], *tree["held"])
            _require(dict, tree["config"], tree["classes"], tree["state"])
            record = Record(
                run=tree["run"],
                config=tree["config"],
                classes=tree["classes"],
                accuracy=tree["accuracy"],
                log=(size, digest),
                held=tuple(tree["held"]),
            )
            return record, tree

    @property
    def _advice(self) -> str:
        """What to do about a checkpoint that cannot be used."""
        return (
            f"Write the name of another checkpoint to {self.folder / LATEST}, and pgp train --resume continues from it"
        )

    def _known(self) -> str:
        return ", ".join(map(str, self.names()[-3:])) or "no checkpoints"

    def _point(self, name: CheckpointName) -> None:
        storage.write(self.folder / LATEST, f"{name}\n{storage.digest(str(name))}\n")

    def _write_pieces(self, pieces: Mapping[str, bytes]) -> None:
        folder = self.folder / PIECES
        if pieces:
            storage.make_folder(folder)
        for digest, data in pieces.items():
            path = folder / f"{digest}.safetensors"
            if not storage.exists(path) or path.lstat().st_size != len(data):
                storage.write(path, data)
                platforms.sync_folder(folder)

    def _piece(self, digest: str, size: int) -> Piece:
        if not PIECE.fullmatch(f"{digest}.safetensors"):
            raise ValueError(f"expected a digest, got {digest!r:.40}")
        folder = storage.require_folder(self.folder / PIECES)
        data = _intact(folder / f"{digest}.safetensors", digest, size)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        return Piece(join(json.loads(header["__metadata__"]["tree"]), read_tensors(data), _refuse_piece))


def _refuse_piece(digest: str, size: int) -> Piece:
    """Raise: a piece contains no other, so that files of a stranger cannot name each other over and over."""
    raise ValueError(f"expected a piece without pieces, got one of {size} bytes in it, {digest:.40}")


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Convert errors from using the content of `path` inside a `with` block to a `RunError` with one line."""
    try:
        yield
    except RunError:
        raise
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError, AssertionError, RuntimeError,
            SafetensorError) as error:  # fmt: skip
        lines = str(error).strip().splitlines() or [""]
        raise RunError(f"{path} does not hold what pgp writes there for this run ({type(error).__name__}:"
                       f" {lines[0]:.200})") from error  # fmt: skip


def _require(kind: type, *values: Any) -> None:
    for value in values:
        if type(value) is not kind:
            raise TypeError(f"expected a value of type {kind.__name__}, got {value!r:.40}")


def _set_aside(path: Path) -> None:
    """Rename a checkpoint to the first free name that matches `REPLACED`."""
    number, aside = 1, path.with_name(f"{path.name}-replaced")
    while storage.exists(aside):
        number += 1
        aside = path.with_name(f"{path.name}-replaced-{number}")
    platforms.move_folder(path, aside)


def _remove(path: Path) -> None:
    """Delete a file or folder as far as the system permits; of a link, only the link."""
    if path.is_dir() and not path.is_symlink():
        storage.remove_folder(path)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def _intact(path: Path, digest: str, size: int) -> bytes:
    """Return the content of a file, and raise a RunError if its digest or its size is wrong."""
    data = storage.read(path, size)
    if storage.digest(data) != digest:
        raise RunError(f"{path} was changed or damaged after pgp wrote it")
    return data
