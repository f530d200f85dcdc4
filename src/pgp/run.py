"""A run on disk: its configuration, log, accuracy matrices and checkpoints. Half-written files never count as whole."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pgp import platforms
from pgp.config import Config
from pgp.environment import environment
from pgp.outputs import is_empty, make_output

FORMAT = 1
"""Version of the checkpoint format."""


class RunError(RuntimeError):
    """A run folder that cannot be used, or a run that had to stop; the message says what to do."""


class Run:
    """A run folder.

    `config.json`, `classes.json`, `environment.json`, `metrics.jsonl` (one event a line), `accuracy.csv` (the full
    matrices), `checkpoints/<name>/{state.safetensors,state.json}` and `checkpoints/latest`, which names the newest.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def create(cls, folder: Path, config: Config) -> Run:
        """A new run in `folder`, which must not exist or be empty."""
        text = json.dumps(config.to_json(), indent=2)  # raises for a component that could not be read again
        cls.check_free(folder)
        make_output(folder)
        run = cls(folder)
        (folder / "checkpoints").mkdir()
        platforms.write_text(folder / "environment.json", json.dumps(environment(), indent=2))
        platforms.write_text(folder / "config.json", text)
        return run

    @staticmethod
    def check_free(folder: Path) -> None:
        """Raise unless `folder` is missing or empty: no run is ever overwritten."""
        if folder.is_dir() and not is_empty(folder):
            raise RunError(f"{folder} is not empty and nothing in it will be overwritten: name another --output, or go"
                           f" on with it by --resume {folder}")  # fmt: skip

    @classmethod
    def open(cls, folder: Path) -> Run:
        """The run that lies in `folder`."""
        if not (folder / "config.json").is_file():
            raise RunError(f"no run at {folder}: expected a folder with config.json, as pgp train writes it")
        return cls(folder)

    @property
    def config(self) -> Config:
        """The resolved configuration."""
        path = self.folder / "config.json"
        try:
            return Config.from_json(json.loads(path.read_text(encoding="utf-8")))
        except ValueError as error:
            raise RunError(f"{path} does not describe a run: {error}") from error

    def log(self, event: str, **values: Any) -> None:
        """Append one line to metrics.jsonl."""
        path = self.folder / "metrics.jsonl"
        line = json.dumps({"event": event, **values}) + "\n"
        try:
            with path.open("ab+") as file:
                if file.tell():
                    file.seek(-1, os.SEEK_END)
                    line = line if file.read(1) == b"\n" else "\n" + line  # a crash cut the last line off
                file.write(line.encode())
        except OSError as error:
            raise self._unwritable(path, error) from error

    def events(self, event: str) -> Iterator[dict[str, Any]]:
        """The logged events of one kind, oldest first; a last line that a crash cut off is left out."""
        path = self.folder / "metrics.jsonl"
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
            with contextlib.suppress(json.JSONDecodeError):
                values = json.loads(line)
                if values["event"] == event:
                    yield values

    def write_matrices(self, matrices: Mapping[str, Tensor], name: str = "accuracy.csv") -> None:
        """Write the table `name` from the accuracy matrix `(T, T)` of each column; NaN entries are left out."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["column", "after_task", "task", "accuracy"])
        for column, matrix in matrices.items():
            for t, j in matrix.isfinite().nonzero().tolist():
                writer.writerow([column, t, j, repr(float(matrix[t, j]))])
        path = self.folder / name
        try:
            platforms.write_text(path, text.getvalue())
        except OSError as error:
            raise self._unwritable(path, error) from error

    def _unwritable(self, path: Path, error: OSError) -> RunError:
        return RunError(f"cannot write {path}: {error}. Make room and go on with --resume {self.folder}")

    def matrices(self) -> dict[str, Tensor]:
        """The accuracy matrices `(T, T)` by column, as far as the run has come."""
        path = self.folder / "accuracy.csv"
        if not path.is_file():
            raise RunError(f"{self.folder} has no accuracy.csv yet: no task of this run is finished")
        size = len(self.classes()[1])
        matrices: dict[str, Tensor] = {}
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                matrix = matrices.setdefault(row["column"], torch.full((size, size), torch.nan, dtype=torch.float64))
                matrix[int(row["after_task"]), int(row["task"])] = float(row["accuracy"])
        return matrices

    def write_classes(self, description: Mapping[str, Any]) -> None:
        """Write `classes.json`: what the run remembers of its data; see `pgp.curriculum.described`."""
        platforms.write_text(self.folder / "classes.json", json.dumps(description))

    def classes(self) -> tuple[list[str], list[list[int]]]:
        """Class names by label, and the labels of each task."""
        known = self._remembered()
        return known["names"], known["tasks"]

    def task_names(self) -> list[str]:
        """What each task is called, "" for nothing."""
        known = self._remembered()
        names: list[str] = known.get("task_names") or [""] * len(known["tasks"])
        return names

    @property
    def data_fingerprint(self) -> list[str] | None:
        """What its data are known by, wherever they lie: those it began with, and each that was added; None for a run
        of pgp 0.1.
        """
        return self._remembered().get("fingerprint")

    def add(self, config: Config, description: Mapping[str, Any]) -> None:
        """Let the data that `config` added join the run; `description` is of all its data."""
        platforms.write_text(self.folder / "config.json", json.dumps(config.to_json(), indent=2))
        self.write_classes(description)

    def check_data(self, description: Mapping[str, Any], *, images: bool = True, tasks: int | None = None) -> None:
        """Raise unless the data are what the run knows: classes and tasks and, where `images`, the images too.

        Args:
            description: of all data; what was added and is not known yet comes last.
            images: whether to compare numbers of images and fingerprints.
            tasks: how many of the tasks it knows to compare; all, where None.
        """
        known = _first(self._remembered(), tasks)
        description = _first(description, len(known["tasks"])) if images else description
        keys = {"names": "classes", "tasks": "classes in each task", "task_names": "names of tasks"}
        if images:
            keys |= {"images": "number of images in each task", "fingerprint": "labels or names of images"}
        for key, what in keys.items():
            if key in known and known[key] != description[key]:
                expected, got = _difference(known[key], description[key])
                raise RunError(f"expected the data that {self.folder} began with, but the {what} differ ({expected}"
                               f" before, {got} now): restore the data, or begin another run")  # fmt: skip

    def _remembered(self) -> dict[str, Any]:
        path = self.folder / "classes.json"
        try:
            known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise RunError(
                f"{path} does not name the classes of this run ({error}): was it made by an older pgp?"
            ) from error
        if not isinstance(known, dict) or not {"names", "tasks"} <= known.keys():
            raise RunError(f"{path} does not name the classes of this run: was it made by an older pgp?")
        return known

    @staticmethod
    def check_encoder(expected: str, got: str) -> None:
        """Raise unless the encoder's fingerprint is the one that a checkpoint was learned on."""
        if expected != got:
            raise RunError(f"expected the encoder that this run was learned on, weights {expected}, got weights {got}:"
                           " restore the old ones")  # fmt: skip

    def save(self, name: str, state: Mapping[str, Any]) -> None:
        """Write checkpoint `name` in one atomic move, and make it the latest; older steps of a task are dropped."""
        checkpoints = self.folder / "checkpoints"
        last = self.latest_name()
        partial = checkpoints / f".{name}.{os.getpid()}"
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            tensors: dict[str, Tensor] = {}
            tree = _split(state, "", tensors)
            save_file(tensors, partial / "state.safetensors")
            platforms.sync_file(partial / "state.safetensors")
            platforms.write_text(
                partial / "state.json", json.dumps({"format": FORMAT, "tensors": len(tensors), "state": tree})
            )
            if (checkpoints / name).exists():  # the run was rewound: keep what it was
                platforms.move_folder(checkpoints / name, free_folder(checkpoints, f"{name}-replaced"))
            platforms.move_folder(partial, checkpoints / name)
            platforms.sync_folder(checkpoints)  # before `latest` names it
            platforms.write_text(checkpoints / "latest", name)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            kept = f"the last good state is {checkpoints / last}" if last else "there is no earlier state"
            raise RunError(f"cannot write checkpoint {name}: {error}; {kept}. Make room and go on with"
                           f" --resume {self.folder}") from error  # fmt: skip
        if last and "-step-" in last:
            shutil.rmtree(checkpoints / last)

    def latest_name(self) -> str | None:
        """Name of the newest checkpoint, or None."""
        path = self.folder / "checkpoints" / "latest"
        return path.read_text(encoding="utf-8").strip() if path.is_file() else None

    def latest_task_name(self) -> str | None:
        """Name of the newest checkpoint at the end of a task, or None."""
        name = self.latest_name()
        if name and "-step-" in name:
            number = int(name.split("-")[1]) - 1
            name = f"task-{number:02d}" if number else None
        return name

    def progress(self) -> tuple[int, int]:
        """How many tasks are finished, and how many there are."""
        name = self.latest_task_name()
        return int(name.rpartition("-")[2]) if name else 0, len(self.classes()[1])

    def load(self, name: str | None = None) -> dict[str, Any]:
        """The state of checkpoint `name`, the latest where None."""
        name = name or self.latest_name()
        if name is None:
            raise RunError(f"{self.folder} has no checkpoint yet: start it anew in another folder")
        folder = self.folder / "checkpoints" / name
        try:
            header = json.loads((folder / "state.json").read_text(encoding="utf-8"))
            # cloned: loaded tensors are not aligned as torch's own are, and matrix products would round differently
            tensors = {name: tensor.clone() for name, tensor in load_file(folder / "state.safetensors").items()}
        except (OSError, ValueError, SafetensorError) as error:
            raise RunError(f"checkpoint {folder} is damaged ({error}): name an earlier one in"
                           f" {folder.parent / 'latest'} to go on from there") from error  # fmt: skip
        if header.get("format") != FORMAT or header.get("tensors") != len(tensors):
            raise RunError(f"checkpoint {folder} has another format or is incomplete: it needs the pgp that wrote it")
        state: dict[str, Any] = _join(header["state"], tensors)
        return state


def free_folder(parent: Path, stem: str) -> Path:
    """A new folder `parent/stem`, or `parent/stem-2`, … where that is taken; made here, so no other process gets it.

    Raises:
        OSError: if `parent` cannot be written.
    """
    make_output(parent)
    number = 1
    while True:
        folder = parent / (stem if number == 1 else f"{stem}-{number}")
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            return folder
        number += 1


def _first(description: Mapping[str, Any], tasks: int | None) -> dict[str, Any]:
    """The same of the first tasks only, where those behind them were added."""
    more = len(description["tasks"]) - (len(description["tasks"]) if tasks is None else tasks)
    if more <= 0:
        return dict(description)
    kept = {key: description[key][:tasks] for key in ("tasks", "task_names") if key in description}
    classes = 1 + max(label for labels in kept["tasks"] for label in labels)
    kept |= {"names": description["names"][:classes]}
    if "images" in description:
        kept["images"] = {part: counts[:tasks] for part, counts in description["images"].items()}
    if "fingerprint" in description:
        kept["fingerprint"] = description["fingerprint"][:-more]
    return kept


def _difference(one: Any, other: Any) -> tuple[Any, Any]:
    """The first values in which two JSON values differ."""
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return next(_difference(one[key], other[key]) for key in one if one[key] != other[key])
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return next(_difference(*pair) for pair in zip(one, other, strict=True) if pair[0] != pair[1])
    if isinstance(one, list) and isinstance(other, list):
        return f"{len(one)} of them", f"{len(other)}"
    return one, other


def _split(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """JSON for a tree of dicts, lists and plain values, its tensors moved to `tensors` under their path."""
    if isinstance(value, Tensor):
        tensors[path] = value.detach().cpu().contiguous()
        return {"tensor": path}
    if isinstance(value, Mapping):
        return {"pairs": [[key, _split(item, f"{path}/{key}", tensors)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        return [_split(item, f"{path}/{i}", tensors) for i, item in enumerate(value)]
    return value


def _join(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(tree, dict):
        if "tensor" in tree:
            return tensors[tree["tensor"]]
        return {key: _join(item, tensors) for key, item in tree["pairs"]}
    if isinstance(tree, list):
        return [_join(item, tensors) for item in tree]
    return tree
