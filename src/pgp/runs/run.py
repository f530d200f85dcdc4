"""A run on disk: its configuration, log, accuracy matrices and checkpoints. All files are written atomically."""

from __future__ import annotations

import contextlib
import json
import uuid
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from pgp.config import Config
from pgp.datasets.base import DatasetConfig
from pgp.datasets.own import relocate
from pgp.evaluation import metrics
from pgp.evaluation.predictions import Predictions
from pgp.runs.checkpoint import LATEST, CheckpointName, Checkpoints, Record, reading
from pgp.runs.environment import describe_environment
from pgp.runs.identity import DataDescription, Identity
from pgp.runs.lock import locked
from pgp.runs.log import EventLog
from pgp.system import platforms, storage
from pgp.system.outputs import LOCK, MARKER, WRITER, is_empty, make_output, mark
from pgp.system.outputs import make_unique_folder as make_unique_folder
from pgp.system.paths import StrPath, as_path
from pgp.system.storage import RunError as RunError

TAUGHT = "taught"
"""Folder with the photos of classes that were taught to a running service, a numbered folder for each."""
CONFIG, CLASSES, LOG, TABLE = "config.json", "classes.json", "metrics.jsonl", "accuracy.csv"
ENVIRONMENT = "environment.json"


class Run:
    """A run folder.

    It contains `config.json`, `classes.json`, `environment.json`, `metrics.jsonl` (one event per line), `accuracy.csv`
    (the full matrices) and `checkpoints/`, see `pgp.runs.checkpoint`. Each checkpoint repeats the configuration and the
    classes. The files `config.json` and `classes.json` are for people, and for the time before the first checkpoint.
    """

    def __init__(self, folder: StrPath) -> None:
        self.folder = as_path(folder, "a run folder")
        self.checkpoints = Checkpoints(self.folder / "checkpoints")
        self.log_file = EventLog(self.folder / LOG)
        self._identity: Identity | None = None
        """Identity of the run in the process that writes to it."""
        self._adds = False
        """Whether data are added to the run when the next task is finished."""
        self._is_writing = False

    @property
    def id(self) -> str:
        """Random identifier of the run, which stays the same when it is resumed."""
        return (self._identity or self.describe(None)).run

    @property
    def resume_command(self) -> str:
        """The command that resumes the run, for messages."""
        return f"pgp train --resume {platforms.quoted(self.folder)}"

    @classmethod
    def create(cls, folder: StrPath, config: Config, data: DataDescription | None = None) -> Run:
        """Create a new run in `folder`; see `start`."""
        run = cls(folder)
        run.start(config, data)
        return run

    def start(self, config: Config, data: DataDescription | None) -> None:
        """Create the files of a new run, or of a run with the same configuration that has no checkpoint yet.

        Args:
            config: The resolved configuration.
            data: Description of the data, if they are known.

        Raises:
            RunError: If anything else is in the folder, or it cannot be written.
        """
        identity = Identity(uuid.uuid4().hex, config.to_json(), data.to_json() if data else {})
        self.require_empty(self.folder, config)
        begun = storage.exists(self.folder / CONFIG)
        make_output(self.folder)
        storage.make_folder(self.checkpoints.folder)
        self._identity = identity
        self._write_identity()
        storage.write(self.folder / ENVIRONMENT, json.dumps(describe_environment(), indent=2))
        if begun:
            self.log("resumed", task=0, step=0)

    @classmethod
    def require_empty(cls, folder: Path, config: Config | None = None) -> None:
        """Raise if a new run cannot begin in `folder`. No run is ever overwritten.

        Args:
            folder: Folder, which must be missing, empty, or contain a run that was stopped before its first checkpoint.
            config: Configuration of such a run; hardware settings may differ. If None, no such run is accepted.
        """
        if not storage.exists(folder):
            return
        if not folder.is_dir():
            raise RunError(f"expected a folder or nothing at {folder}, got a file: name another --output")
        if not (is_empty(folder) or cls(folder)._is_begun(config)):
            raise RunError(f"{folder} is not empty and nothing in it will be overwritten: name another --output, or go"
                           f" on with it by {cls(folder).resume_command}")  # fmt: skip

    def require_same_start(self, config: Config) -> None:
        """Raise if this run is more than a run that was stopped before its first checkpoint."""
        if not self._is_begun(config):
            raise RunError(f"{self.checkpoints.folder / LATEST} is missing, and nothing of this run will be"
                           " overwritten: write the name of a checkpoint there, or begin another run")  # fmt: skip

    def _is_begun(self, config: Config | None) -> bool:
        """Return whether the folder contains only a run of `config` that was stopped before its first checkpoint."""
        ours = {MARKER, LOCK, WRITER}
        left = {path.name for path in self.folder.iterdir() if not platforms.UNFINISHED.fullmatch(path.name)} - ours
        if CONFIG not in left:
            return left <= {self.checkpoints.folder.name} and self.checkpoints.is_empty()
        if TABLE in left or not self.checkpoints.is_begun():
            return False
        with contextlib.suppress(RunError):
            recorded = self.config
            expected = config and replace(config, tasks=config.tasks or recorded.tasks, hardware=recorded.hardware)
            return recorded == expected
        return False

    @classmethod
    def open(cls, folder: StrPath) -> Run:
        """Return the run in `folder`."""
        run = cls(folder)
        if not storage.exists(run.folder / CONFIG) and not storage.exists(run.checkpoints.folder / LATEST):
            raise RunError(f"no run at {run.folder}: expected a folder with {CONFIG}, as pgp train writes it")
        return run

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Lock the run for writing by this process, and delete what earlier processes left unfinished.

        Raises:
            RunError: If another process writes to it.
        """
        if self._is_writing:
            yield
            return
        with locked(self.folder):
            self._is_writing = True
            try:
                if not is_empty(self.folder):
                    self._tidy()
                yield
            finally:
                self._is_writing = False

    def _tidy(self) -> None:
        if self._finished() or storage.exists(self.folder / CONFIG):
            self.describe()  # raises if the folder is not one of ours
            mark(self.folder)
            self.checkpoints.tidy()
        storage.remove_abandoned(self.folder)
        storage.remove_abandoned(self.folder / "checkpoint")

    def describe(self, name: CheckpointName | None = None) -> Identity:
        """Return the identity of the run at a checkpoint. If `name` is None, use the latest finished task.

        Raises:
            RunError: If the files were changed, or belong to another run.
        """
        files = {file: self._file(file) for file in (CONFIG, CLASSES)}
        name = name or self._finished()
        if name is None:
            if (config := files[CONFIG]) is None:
                raise RunError(f"no run at {self.folder}: {CONFIG} is missing, and no task is finished")
            classes = files[CLASSES] or {}
            classes.pop("run", None)
            return Identity(config.pop("run", ""), config, classes)
        record = self.checkpoints.record(name)
        for file, tree in files.items():
            if tree is not None and tree.get("run") != record.run:
                raise RunError(f"{self.folder / file} belongs to another run than checkpoint {name}: put back that of"
                               " this run, or remove it")  # fmt: skip
        return Identity(record.run, record.config, record.classes)

    def _file(self, file: str) -> dict[str, Any] | None:
        """Return the content of `config.json` or `classes.json`, or None if the file does not exist."""
        path = self.folder / file
        if not storage.exists(path):
            return None
        with storage.advised("Nothing of it can change: restore it; or remove it, and pgp train --resume writes it anew"
                             " from the latest checkpoint"):  # fmt: skip
            return storage.read_sealed(path)

    @property
    def config(self) -> Config:
        """The resolved configuration."""
        return self.config_of(self.describe())

    def config_of(self, known: Identity) -> Config:
        """Return the configuration of an identity."""
        try:
            return self._with_moved_photos(Config.from_json(known.config))
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            raise RunError(f"{self.folder} does not describe a run of this pgp: {error}") from error

    def _with_moved_photos(self, config: Config) -> Config:
        """Return `config` with uploaded photos where they are now: in this folder, if the run was moved or copied."""

        def moved(data: DatasetConfig) -> DatasetConfig:
            old = next(iter(data.search_paths), Path())
            new = self.folder.absolute() / TAUGHT / old.parent.name / old.name
            return relocate(data, new) if old.parent.parent.name == TAUGHT and old != new and new.is_file() else data

        return replace(config, added=tuple(map(moved, config.added)))

    def change_config(self, change: Callable[[Config], Config]) -> None:
        """Change the recorded configuration, if results do not depend on it (such as data paths).

        The process must be `writing`.
        """
        self.describe(self.checkpoints.latest())  # raises if it belongs to another run

        def changed(record: Record) -> Record:
            known = Identity(record.run, record.config, record.classes)
            return replace(record, config=change(self.config_of(known)).to_json())

        self.checkpoints.rewrite(changed)
        known = self.describe()
        self._identity = known._replace(config=change(self.config_of(known)).to_json())
        self._write_identity()

    def accept_config(self, name: CheckpointName | None) -> None:
        """Continue with the identity at a checkpoint. If `name` is None, use that of the files.

        Raises:
            RunError: If the log was changed since.
        """
        self._stamp_log()
        self._identity = known = self.describe(name)
        if name is not None and name.step is not None and len(self.data_of(known).tasks) > len(self.data.tasks):
            self._adds = True
            self.log_file.held = list(self.checkpoints.record(name).held)
        elif name is not None:
            self._write_identity()  # a crash may have come before

    def add(self, config: Config, data: DataDescription) -> None:
        """Add data to the run. Nothing is written before the task of these data is finished.

        Args:
            config: Configuration of the run with the added data.
            data: Description of all data.

        Raises:
            RunError: If the log was changed since the latest checkpoint.
        """
        self._stamp_log()
        self._identity = self.describe()._replace(config=config.to_json(), classes=data.to_json())
        self._adds = True
        self.log_file.held = []

    def discard_untaught(self) -> None:
        """Delete uploaded photos from which no task was learned: those that were undone, or whose process ended.

        A task that was being learned from such photos when its process ended is dropped. The process must be `writing`.
        """
        last = self.checkpoints.latest()
        if last and last.step and self.taught_folders(last) - self.taught_folders():
            self.checkpoints.drop_step()
        kept = self.taught_folders(self.checkpoints.latest()) | self.taught_folders()
        folder = self.folder / TAUGHT
        for path in folder.iterdir() if folder.is_dir() and not folder.is_symlink() else ():
            is_left = path.name not in kept if path.name.isdecimal() else platforms.is_abandoned(path)
            if is_left:
                storage.remove_folder(path)

    def taught_folders(self, name: CheckpointName | None = None) -> set[str]:
        """Return the names of the folders of uploaded photos from which the tasks of a checkpoint were learned.

        If `name` is None, use the latest finished task.
        """
        tables = [path for data in self.config_of(self.describe(name)).added for path in data.search_paths]
        return {path.parent.name for path in tables if path.parent.parent.name == TAUGHT}  # the run may have moved

    def can_undo(self) -> bool:
        """Return whether the last finished task was added, and the checkpoint before it was kept."""
        try:
            self._before_added()
        except RunError:
            return False
        return True

    def _before_added(self) -> CheckpointName:
        """Return the checkpoint before the task that was added last.

        Raises:
            RunError: If the last finished task was not added, or that checkpoint was not kept.
        """
        if not self.config_of(self.describe()).added:
            raise RunError(f"expected a run to which pgp add has added a task, got {self.folder}")
        before = CheckpointName(self.latest_finished().task - 1)
        if before not in self.checkpoints.finished():
            raise RunError(f"undoing a task needs the checkpoint before it, but {self.folder} keeps only the newest")
        return before

    def undo_add(self) -> str:
        """Forget the task that was added last; the run is again as it was before. Return the name of that task.

        Photos that were uploaded for it are deleted. Once the older checkpoint is the latest, the task is forgotten,
        even if an error comes afterwards.

        The process must be `writing`. The log keeps what happened.

        Raises:
            RunError: If the last finished task was not added, a task is unfinished, or the previous checkpoint was not
                kept.
        """
        if self.latest_finished() != self.checkpoints.latest():
            raise RunError(f"{self.folder} is inside a task: drop it with {self.resume_command} --drop")
        before, known = self._before_added(), self.describe()
        self._stamp_log()
        self.checkpoints.go_back(before)
        self._identity = self.describe(before)
        self._write_identity()
        self.log("undone", task=before.task, step=0)
        self.write_matrices(self.matrices())
        self.discard_untaught()
        return self.data_of(known).task_names[-1]

    def _write_identity(self) -> None:
        """Write `config.json` and `classes.json` if they are missing or differ."""
        known = self._identity
        assert known is not None
        for file, tree, indent in ((CONFIG, known.config, 2), (CLASSES, known.classes, None)):
            text = json.dumps(storage.sealed({**tree, "run": known.run}), indent=indent)
            path = self.folder / file
            if tree and not (storage.exists(path) and storage.read(path) == text.encode()):
                storage.write(path, text)

    def log(self, event: str, **values: Any) -> None:
        """Append one line to metrics.jsonl."""
        with self._going_on():
            self.log_file.append(event, **values)

    def events(self, event: str) -> list[dict[str, Any]]:
        """Return the logged events of one kind, oldest first. Of kind `task`, only those of finished tasks.

        Raises:
            RunError: If the log was changed since the latest checkpoint.
        """
        self._check_log()
        done = self._finished()
        found = [values for values in self.log_file.events() if values["event"] == event]
        return [values for values in found if event != "task" or values.get("task") in range(done.task if done else 0)]

    def _check_log(self) -> bool:
        """Return whether metrics.jsonl exists if it must, and warn if it does not.

        Raises:
            RunError: If it was changed since the latest checkpoint.
        """
        last = self.checkpoints.latest()
        there = last is None or self.log_file.check(self.checkpoints.record(last).log)
        if not there:
            warnings.warn(f"{self.log_file.path} is missing: its record of training is left out", stacklevel=3)
        return there

    def _stamp_log(self) -> None:
        """Start a new log if the old one was moved away."""
        if not self._check_log():
            stamp = self.log_file.stamp()
            self.checkpoints.rewrite(lambda record: replace(record, log=stamp))

    def write_matrices(self, matrices: Mapping[str, Tensor]) -> None:
        """Write `accuracy.csv` from the accuracy matrix `(T, T)` of each column; NaN entries are left out."""
        with self._going_on():
            storage.write(self.folder / TABLE, metrics.to_csv(matrices))

    def _going_on(self, what: str = "") -> contextlib.AbstractContextManager[None]:
        """Add advice on how to resume to errors inside a `with` block."""
        return storage.advised(f"Then resume with {self.resume_command}", what)

    def matrices(self) -> dict[str, Tensor]:
        """Return the accuracy matrices `(t, t)` of the t finished tasks, by column."""
        name, path = self._finished(), self.folder / TABLE
        if name is None:
            raise RunError(f"{self.folder} has no {TABLE} yet: no task of this run is finished")
        if storage.exists(path):
            text = storage.read(path)
            is_current = storage.digest(text) == self.checkpoints.record(name).accuracy
            if is_current and (measured := metrics.from_csv(text.decode(), len(self.data.tasks))):
                return metrics.trim(measured, name.task)
        # a crash came before the table, or nothing was measured, so that it has no rows
        return metrics.trim(self.checkpoints.load(name, {"matrices"})["matrices"], name.task)

    def predictions(self) -> Predictions | None:
        """Return what was predicted for each test image after the latest finished task; None if it was not recorded.

        Raises:
            RunError: If no task is finished, or the checkpoint is damaged.
        """
        name = self.latest_finished()
        state = self.load(name, {"predictions"}).get("predictions")
        if state is None:
            return None
        with reading(self.checkpoints.folder / str(name)):
            return Predictions.from_state(state)

    @property
    def data(self) -> DataDescription:
        """Description of the data, with class names, tasks and fingerprints."""
        return self.data_of(self.describe())

    def data_of(self, known: Identity) -> DataDescription:
        """Return the description of the data of an identity."""
        return DataDescription.from_json(known.classes, self.folder / CLASSES)

    def check_data(
        self,
        current: DataDescription,
        *,
        images: bool = True,
        tasks: int | None = None,
        recorded: DataDescription | None = None,
    ) -> None:
        """Raise if the data differ from those of the run: in classes, in tasks or, with `images`, in images.

        Args:
            current: Description of all data. Data that were added and are not recorded yet come last.
            images: Whether to compare numbers of images and fingerprints.
            tasks: Number of recorded tasks to compare. If None, all.
            recorded: Description that the run has recorded. If None, that of its latest finished task.
        """
        if reason := (recorded or self.data).difference(current, images=images, tasks=tasks):
            raise RunError(f"expected the data that {self.folder} began with, but {reason}: restore the data, or begin"
                           " another run")  # fmt: skip

    @staticmethod
    def check_encoder(expected: str, got: str) -> None:
        """Raise if the encoder's fingerprint is not the one of the checkpoint."""
        if expected != got:
            raise RunError(f"expected the encoder of this run, with weights {expected}, got weights {got}: restore the"
                           " old weights")  # fmt: skip

    def save(self, name: CheckpointName | str, state: Mapping[str, Any]) -> None:
        """Write a checkpoint atomically, make it the latest, and delete the previous checkpoint inside the same task.

        Raises:
            RunError: If the system refuses; the message says what the latest good state is.
        """
        name = CheckpointName.parse(name) if isinstance(name, str) else name
        known = self._identity = self._identity or self.describe()
        last = self.checkpoints.latest()
        kept = f"the last good state is {self.checkpoints.folder / str(last)}" if last else "there is no earlier state"
        with self._going_on(f"checkpoint {name} was not saved, {kept}: "):
            if name.step is None:
                self.log_file.release()
            accuracy, stamp = storage.digest(metrics.to_csv(state.get("matrices", {}))), self.log_file.stamp()
            record = Record(known.run, known.config, known.classes, accuracy, stamp, tuple(self.log_file.held or ()))
            self.checkpoints.save(name, state, record)
            if name.step is None and self._adds:
                self._write_identity()
                self._adds = False
            if name.step is None and (newest := self.config_of(known).kept_checkpoints):
                self.checkpoints.keep(newest)

    def copy(self, folder: StrPath, name: CheckpointName, change: Callable[[Config], Config]) -> Run:
        """Write a run that has only the state at the end of a task, without anything about this machine.

        It can be resumed and has the same identifier. Of the log, it has what was measured of finished tasks; of the
        environment, the versions; of the state, all but what is about single images: references of drift, predictions.

        Args:
            folder: Folder to write, missing or empty.
            name: Checkpoint of a finished task.
            change: Function from the recorded configuration to that of the copy; results must not depend on it.

        Returns:
            The copy.
        """
        state, known, copy = self.load(name), self.describe(name), Run(folder)
        for private in ("drift", "predictions"):
            state.pop(private, None)
        environment = self.folder / ENVIRONMENT
        make_output(copy.folder)
        storage.make_folder(copy.checkpoints.folder)
        copy._identity = known._replace(config=change(self.config_of(known)).to_json())
        copy._write_identity()
        if storage.exists(environment):
            with reading(environment):
                versions = {"versions": storage.read_json(environment)["versions"]}
            storage.write(copy.folder / ENVIRONMENT, json.dumps(versions, indent=2))
        for event in ("task", "stream"):
            for values in self.events(event):
                if values.get("task", 0) < name.task:
                    copy.log(**values)
        copy.save(name, state)
        copy.write_matrices(state["matrices"])
        return copy

    def versions(self) -> dict[str, str]:
        """Return the versions that the run was started with: of pgp, its commit and torch, as far as they are recorded.

        Raises:
            RunError: If `environment.json` is damaged.
        """
        path = self.folder / ENVIRONMENT
        if not storage.exists(path):
            return {}
        with reading(path):
            tree = storage.read_json(path)
            known = tree.get("versions", {})
            own = known.get("prompt-gradient-projection")
            found = {"pgp": own, "commit": tree.get("commit"), "torch": known.get("torch")}
            return {what: str(version) for what, version in found.items() if version}

    def _finished(self) -> CheckpointName | None:
        last = self.checkpoints.latest()
        return last.finished if last else None

    def latest_finished(self) -> CheckpointName:
        """Return the name of the newest checkpoint at the end of a task.

        Raises:
            RunError: If no task is finished.
        """
        name = self._finished()
        if name is None:
            raise RunError(f"no task of {self.folder} is finished yet: resume with {self.resume_command}")
        return name

    def latest_checkpoint(self) -> str | None:
        """Return the name of the newest checkpoint, or None."""
        last = self.checkpoints.latest()
        return str(last) if last else None

    def progress(self) -> tuple[int, int]:
        """Return the number of finished tasks, and the number of all tasks."""
        name = self._finished()
        return name.task if name else 0, len(self.data.tasks)

    def load(self, name: CheckpointName | str | None = None, parts: Collection[str] | None = None) -> dict[str, Any]:
        """Return the state of a checkpoint, or only the entries `parts`. If `name` is None, use the latest.

        Raises:
            RunError: If it is damaged, or belongs to another run.
        """
        name = CheckpointName.parse(name) if isinstance(name, str) else name or self.checkpoints.latest()
        if name is None:
            raise RunError(f"{self.folder} has no checkpoint yet: {self.resume_command} starts it anew")
        self.describe(name)
        return self.checkpoints.load(name, parts)
