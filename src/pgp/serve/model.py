"""The predictor of a run, replaced when the run has learned more."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pgp.predict import Prediction, Predictor
from pgp.runs.checkpoint import RECORD
from pgp.runs.identity import DataDescription
from pgp.runs.run import Run
from pgp.system.storage import RunError

REJECT = 0.05
"""Fraction of images of learned classes that may be called unknown."""


class Snapshot(NamedTuple):
    """A run as one of its checkpoints left it."""

    version: tuple[str, int, int]
    """Name of the checkpoint, and time and inode of its record, which tell it from a later one of the same name."""
    predictor: Predictor
    data: DataDescription
    """Description of all data. Tasks after the first `finished` ones are not learned yet."""
    finished: int
    matrices: dict[str, Tensor]
    """Accuracy matrices `(T, T)` by column."""
    added: int
    """Number of the last tasks that were added to the run."""
    can_undo: bool
    """Whether the last task can be undone."""
    reject: float | None
    """Fraction of images that may be called unknown; None if the readout cannot tell."""
    task_given: bool
    """Whether the matrices were measured among the classes of each image's own task (`--setting til`)."""

    def learned_classes(self) -> list[dict[str, Any]]:
        """Return the learned classes with the number of their task, from 1, as JSON values."""
        task_of = {self.data.class_names[label]: number for number, task in self._tasks() for label in task}
        return [{"name": name, "task": task_of[name]} for name in self.predictor.classes]

    def learned_tasks(self) -> list[dict[str, Any]]:
        """Return the learned tasks as JSON values."""
        return [
            {
                "number": number,
                "name": self.data.task_names[number - 1],
                "classes": [self.data.class_names[label] for label in labels],
                "training_images": self.data.train_images[number - 1],
                "test_images": self.data.test_images[number - 1],
                "added": number > len(self.data.tasks) - self.added,
            }
            for number, labels in self._tasks()
        ]

    def _tasks(self) -> list[tuple[int, tuple[int, ...]]]:
        """Return number, from 1, and labels of each learned task, the latest first."""
        return [(number, self.data.tasks[number - 1]) for number in range(self.finished, 0, -1)]


class Model:
    """What a run has learned so far, for many threads.

    Args:
        folder: The run folder.
        readout: Name of one of the run's readouts. If None, the first.
        device: Name of the device; see `Predictor`.
    """

    def __init__(self, folder: Path, readout: str | None = None, device: str | None = None) -> None:
        self.folder, self.readout, self.device = folder, readout, device
        self.problem: str | None = None
        """Why the latest state of the run cannot be used, if so. The previous state is used."""
        self._loading = threading.Lock()
        self._run_id = ""
        self.snapshot = self._load()
        self._run_id = Run.open(folder).id

    def _load(self) -> Snapshot:
        run = Run.open(self.folder)
        if self._run_id not in ("", run.id):
            raise RunError(f"{self.folder} holds another run than before: restart the service to use it")
        version = self._version(run)
        predictor = Predictor(run, self.readout, self.device)
        reject = None
        if predictor.detects_unknown:
            with contextlib.suppress(ValueError):  # too few images to tell
                predictor.unknown_threshold(REJECT)
                reject = REJECT
        finished, _ = run.progress()
        config = run.config
        snapshot = Snapshot(
            version=version,
            predictor=predictor,
            data=run.data,
            finished=finished,
            matrices=run.matrices(),
            added=len(config.added),
            can_undo=run.can_undo(),
            reject=reject,
            task_given=config.setting == "til",
        )
        if self._version(run) != version:
            raise RunError(f"{self.folder} changed while it was read: try again")
        return snapshot

    @staticmethod
    def _version(run: Run) -> tuple[str, int, int]:
        name = run.latest_finished()
        try:
            found = (run.checkpoints.folder / str(name) / RECORD).stat()
        except OSError as error:
            raise RunError(f"checkpoint {name} of {run.folder} cannot be read: {error.strerror}") from error
        return str(name), found.st_mtime_ns, found.st_ino

    def refresh(self) -> bool:
        """Load the latest state of the run if it is another one. Return whether it was.

        If it cannot be loaded, the old one stays, and `problem` says why.
        """
        with self._loading:
            try:
                if self._version(Run.open(self.folder)) == self.snapshot.version:
                    self.problem = None
                    return False
                self.snapshot = self._load()
            except Exception as error:  # whatever it is, the old one still works; to run out of memory is one
                self.problem = str(error) or type(error).__name__
                return False
            self.problem = None
            return True

    def predict(self, images: list[Tensor]) -> list[tuple[Prediction, Snapshot]]:
        """Return the prediction of preprocessed images `(3, S, S)`, all classes of each, and what predicted them."""
        snapshot = self.snapshot
        predictor = snapshot.predictor
        predictions = predictor.predict_preprocessed(torch.stack(images), len(predictor.classes), snapshot.reject)
        return [(prediction, snapshot) for prediction in predictions]
