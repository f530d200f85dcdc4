"""Run a grid of configurations and their baselines, each exactly once, and summarise it."""

from __future__ import annotations

import contextlib
import functools
import json
import re
import time
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, NamedTuple

import filelock

from pgp import train
from pgp.baselines import matching_baselines
from pgp.config import Config, experiment_settings
from pgp.evaluation import metrics
from pgp.reports import comparison
from pgp.reports.comparison import Entry
from pgp.runs.checkpoint import CheckpointName
from pgp.runs.data_paths import resolve_paths
from pgp.runs.run import Run
from pgp.system import locks, platforms, storage
from pgp.system.outputs import make_output, make_unique_folder
from pgp.system.storage import RunError
from pgp.training.tasks import fingerprint

FILE, TABLE, FIGURE = "sweep.json", "sweep.md", "sweep.png"
FORMAT = 1
"""Version of sweep.json."""
LONGEST = 100
"""Maximum length of a folder's name in characters."""

JobStatus = Literal["kept", "resumed", "trained", "busy"]
"""How a run was completed: it was complete already (kept), resumed, or trained; busy if another sweep is running it."""


class Job(NamedTuple):
    """One run of the sweep."""

    name: str
    seed: int
    folder: Path
    config: Config


class JobResult(NamedTuple):
    """Result of a job."""

    status: JobStatus
    seconds: float
    accuracy: float
    """Average accuracy of the headline, in [0, 1]."""


@dataclass
class GridPoint:
    """A configuration of the grid or a baseline, without its seed."""

    name: str
    label: str
    config: Config
    baselines: dict[str, str] = field(default_factory=dict)
    """Names of the entries of a point's baselines, by baseline."""


class Sweep:
    """A folder with a run for each entry and seed, `<output>/<entry>/seed-<k>`, and the plan in sweep.json."""

    def __init__(self, output: Path, base: Config) -> None:
        self.output = output.expanduser().absolute()
        self.base = _bare(base)
        """The recipe with all flags except --over."""
        self.entries: dict[str, GridPoint] = {}
        """All entries that were ever planned in this folder, by name."""
        self.seeds: list[int] = []

    def plan(self, choices: Mapping[str, Config], seeds: Sequence[int], *, baselines: bool = True) -> list[Job]:
        """Return the jobs for all points, given by label, and for their baselines, and record them in sweep.json.

        Raises:
            RunError: If the folder contains other files, or runs with other settings.
        """
        make_output(self.output)
        with self._locked():
            self._read()
            asked = [self._entry(label, config) for label, config in choices.items()]
            points = list(dict.fromkeys(entry.name for entry in asked))
            if baselines:
                self._add_baselines([self.entries[name] for name in points])
            names = dict.fromkeys([*points, *(c for name in points for c in self.entries[name].baselines.values())])
            self.seeds = sorted({*self.seeds, *seeds})
            jobs = [self._job(self.entries[name], seed) for seed in seeds for name in (names if baselines else points)]
            for job in jobs:
                check(job)
            self._check_data(jobs)
            self._write()
        return jobs

    def _check_data(self, jobs: Sequence[Job]) -> None:
        """Raise if the data of a job that is left have changed since another run of this sweep was trained."""
        every = [self._job(entry, seed) for entry in self.entries.values() for seed in self.seeds]
        finished = [job for job in every if finished_result(job)]
        left = [job for job in jobs if job not in finished]
        for dataset in {repr(job.config.dataset): job.config.dataset for job in left}.values():
            trained = [Run(job.folder) for job in finished if job.config.dataset == dataset]
            if not trained:
                continue
            now = dataset.read()
            digests = fingerprint(now.train, now.test)
            for run in trained:
                if run.data.fingerprints[0] != digests:
                    raise RunError(f"the data in {dataset.place} have changed since {run.folder} was trained, and runs"
                                   " on other data cannot be compared: name another --output")  # fmt: skip

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        lock = locks.acquire(self.output / ".sweep.lock")
        try:
            yield
        finally:
            locks.release(lock)

    def members(self) -> list[Entry]:
        """Return all entries with their finished runs for a comparison: points first, then other baselines."""
        baselines: dict[str, dict[str, Entry]] = {name: {} for name in self.entries}
        members = {}
        for name, entry in self.entries.items():
            jobs = [self._job(entry, seed) for seed in self.seeds]
            finished = {job.seed: Run(job.folder) for job in jobs if _is_comparable(job)}
            members[name] = Entry(entry.label, finished, baselines[name])
        for name, entry in self.entries.items():
            baselines[name] |= {baseline: members[other] for baseline, other in entry.baselines.items()}
        points = [name for name, entry in self.entries.items() if entry.baselines]
        return [members[name] for name in dict.fromkeys([*points, *self.entries]) if members[name].runs]

    def write_report(self) -> list[Entry]:
        """Write the table and the figure if any run is finished, and return the entries that they compare.

        They also have what other processes have planned in this folder.
        """
        with self._locked():
            self._read()
            members = self.members()
            if members:
                storage.write(self.output / TABLE, comparison.markdown(members))
                comparison.draw_comparison(members, self.output / FIGURE)
        return members

    def _job(self, entry: GridPoint, seed: int) -> Job:
        folder = self.output / entry.name / f"seed-{seed}"
        return Job(entry.name, seed, folder, replace(entry.config, seed=seed))

    def _entry(self, label: str, config: Config) -> GridPoint:
        """Return the entry of a configuration; create it if there is none."""
        config = _bare(config)
        settings = experiment_settings(config)
        for entry in self.entries.values():
            if experiment_settings(entry.config) == settings:
                entry.config = config  # with other hardware, perhaps, which changes no result
                return entry
        stem, number = platforms.safe_name(label, LONGEST, otherwise="point"), 1
        name, taken = stem, {other.lower() for other in self.entries}  # some file systems ignore case
        while name.lower() in taken:
            name, number = f"{stem}-{number + 1}", number + 1
        self.entries[name] = GridPoint(name, label, config)
        return self.entries[name]

    def _add_baselines(self, points: Sequence[GridPoint]) -> None:
        """Add the baselines of points; those that are the same for the recipe and all points have no point's label."""
        known = [_bare_baselines(config) for config in (self.base, *(point.config for point in points))]
        for point, baselines in zip(points, known[1:], strict=True):
            for name, config in baselines.items():
                is_shared = all(other.get(name) == config for other in known)
                label = name if is_shared else f"{name}, {point.label}"
                point.baselines[name] = self._entry(label, config).name

    def _read(self) -> None:
        path = self.output / FILE
        if not path.is_file():
            others = sorted(path.name for path in self.output.iterdir() if not path.name.startswith("."))
            if others:
                raise RunError(f"expected a new or empty folder, or that of a sweep, got {self.output} with"
                               f" {', '.join(others[:3])}: name another --output")  # fmt: skip
            return
        try:
            tree = json.loads(path.read_text(encoding="utf-8"))
            if tree["format"] != FORMAT:
                raise ValueError(f"format {tree['format']}")
            base = Config.from_json(tree["base"])
            entries = [
                GridPoint(_folder_name(name), one["label"], Config.from_json(one["config"]), dict(one["baselines"]))
                for name, one in tree["entries"].items()
            ]
            seeds = [int(seed) for seed in tree["seeds"]]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise RunError(f"{path} does not describe a sweep of this pgp ({error}): name another --output") from error
        if diff := _difference(base, self.base):
            raise RunError(f"{self.output} holds a sweep with other settings: expected {diff} now. Give the settings of"
                           " before, sweep over this one by --over, or name another --output")  # fmt: skip
        self.entries, self.seeds = {entry.name: entry for entry in entries}, seeds

    def _write(self) -> None:
        entries = {
            one.name: {"label": one.label, "baselines": one.baselines, "config": one.config.to_json()}
            for one in self.entries.values()
        }
        tree = {"format": FORMAT, "base": self.base.to_json(), "seeds": self.seeds, "entries": entries}
        storage.write(self.output / FILE, json.dumps(tree, indent=2))


def _folder_name(name: str) -> str:
    """Return the name of an entry, and raise a ValueError if it could lead out of the folder of its sweep."""
    if not re.fullmatch(r"[\w+-][\w.+-]*", name, re.ASCII):
        raise ValueError(f"the entry {name!r:.80} is no name of a folder")
    return name


def check(job: Job) -> None:
    """Raise if the folder of a job contains something other than its run."""
    if not job.folder.exists():
        return
    if not job.folder.is_dir() or not ((job.folder / "config.json").is_file() or _is_begun(job.folder)):
        raise RunError(f"expected a run of this sweep or nothing at {job.folder}, got something else: move it away")
    if _is_begun(job.folder):
        return
    config = Run.open(job.folder).config
    expected = job.config if job.config.tasks is not None else replace(job.config, tasks=config.tasks)
    seeds = f"seed {config.seed} there, {expected.seed}" if config.seed != expected.seed else ""
    if diff := _difference(config, expected) or seeds:
        raise RunError(f"the run at {job.folder} has other settings: expected {diff} now. Nothing is overwritten: use"
                       " those settings, or name another --output")  # fmt: skip


def finished_result(job: Job) -> bool:
    """Return whether the run of a job is complete: its last checkpoint, and its table of accuracy."""
    run = Run(job.folder)
    name = run.latest_checkpoint()
    if name is None or "-step-" in name or not (job.folder / "accuracy.csv").is_file():
        return False
    tasks = len(run.data.tasks)
    return name == str(CheckpointName(tasks))


def _is_comparable(job: Job) -> bool:
    """Return whether the run of a job is complete, and still that of the job; warn if it has become another."""
    if not finished_result(job):
        return False
    try:
        check(job)
    except RunError as error:
        warnings.warn(f"left out of the table: {error}", stacklevel=3)
        return False
    return True


def run_job(job: Job, *, waits: bool = False) -> JobResult:
    """Complete the run of a job. A lock ensures that only one process works on it, also across machines.

    Args:
        job: The run and its folder.
        waits: Whether to wait for another process that is running the job. If not, return `busy`.
    """
    started = time.perf_counter()
    job.folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        lock = locks.acquire(job.folder.parent / f".{job.folder.name}.lock", timeout=-1 if waits else 0)
    except filelock.Timeout:
        return JobResult("busy", 0, 0)
    try:
        check(job)
        how = _run_job(job)
    finally:
        locks.release(lock)
    headline = next(iter(Run(job.folder).matrices().values()))
    return JobResult(how, time.perf_counter() - started, metrics.average_accuracy(headline))


def _run_job(job: Job) -> JobStatus:
    if finished_result(job):
        return "kept"
    if Run(job.folder).latest_checkpoint() is not None:
        train.resume(job.folder, job.config.hardware)
        return "resumed"
    try:
        Run.require_empty(job.folder, resolve_paths(job.config))
    except RunError:  # the run lost its checkpoints: move its other files away and start again
        platforms.move_folder(job.folder, make_unique_folder(job.folder.parent, f"{job.folder.name}-abandoned"))
    train.train(job.config, job.folder)
    return "trained"


def _is_begun(folder: Path) -> bool:
    """Return whether `folder` contains only what a run leaves if it is stopped while its folder is created."""
    if (folder / "config.json").exists():
        return False
    left = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    empty = not (folder / "checkpoints").is_dir() or not any((folder / "checkpoints").iterdir())
    return left <= {"checkpoints", "environment.json"} and empty


Results = Generator[tuple[Job, JobResult | Exception], None, None]
"""Jobs in the order in which they end, each with its result or its error."""


def run_all(jobs: Sequence[Job], spread: Callable[[Callable[[Job], JobResult], Sequence[Job]], Results]) -> Results:
    """Yield the result of each job: first of all that are free, then of those that other sweeps were running.

    Args:
        jobs: The jobs of a sweep.
        spread: Function that runs jobs, see `pgp.sweeps.pool`.
    """
    busy = []
    with contextlib.closing(spread(run_job, jobs)) as outcomes:
        for job, done in outcomes:
            if isinstance(done, JobResult) and done.status == "busy":
                busy.append(job)
            else:
                yield job, done
    if busy:
        with contextlib.closing(spread(functools.partial(run_job, waits=True), busy)) as outcomes:
            yield from outcomes


def _bare(config: Config) -> Config:
    """Return a configuration as a run records it, with seed 0."""
    return replace(resolve_paths(config), seed=0)


def _bare_baselines(config: Config) -> dict[str, Config]:
    """Return the baselines of a configuration, by name."""
    return {name: _bare(baseline) for name, baseline in matching_baselines(config).items()}


def _difference(one: Config, other: Config) -> str:
    """Describe the first setting in which two configurations differ, ignoring hardware and seed."""
    first, second = experiment_settings(one), experiment_settings(other)
    for key in dict.fromkeys([*first, *second]):
        if first.get(key) != second.get(key):
            return f"{key} {first.get(key)}, as there, got {second.get(key)}"
    return ""
