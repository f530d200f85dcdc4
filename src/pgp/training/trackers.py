"""Report a run to experiment trackers while it trains, from its own log."""

from __future__ import annotations

import contextlib
import importlib.util
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, get_args

from pgp.config import flatten
from pgp.progress import print_line
from pgp.runs.log import Event
from pgp.training.session import Session

PROJECT = "pgp"
"""Name of the project or experiment in which trackers show runs."""
TrackerName = Literal["tensorboard", "wandb", "mlflow", "trackio"]


class TrackedRun(NamedTuple):
    """What a tracker needs to know about a run."""

    id: str
    """Unique identifier, which stays the same when the run is resumed."""
    name: str
    folder: Path
    settings: dict[str, Any]
    """Settings by dotted path."""
    step: int
    """Number of training steps that are finished, of all tasks together."""


class Tracker(Protocol):
    """An experiment tracker."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Log values by name, such as `accuracy/lda`.

        Args:
            values: Values by name.
            step: Number of training steps so far, of all tasks together.
        """

    def finish(self, *, failed: bool) -> None:
        """Write what is left, and end the run."""


class TensorBoard:
    """Write event files into the folder `tensorboard` of the run."""

    def __init__(self, run: TrackedRun) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run.folder / "tensorboard"), purge_step=run.step + 1 if run.step else None)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """See `Tracker.log`."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def finish(self, *, failed: bool) -> None:
        """See `Tracker.finish`."""
        self._writer.close()


class WandB:
    """Log to Weights & Biases; its environment variables are respected, such as WANDB_MODE=offline."""

    def __init__(self, run: TrackedRun) -> None:
        import wandb

        self._run = wandb.init(
            project=PROJECT, id=run.id, name=run.name, dir=run.folder, config=run.settings, resume="allow"
        )

    def log(self, values: Mapping[str, float], step: int) -> None:
        """See `Tracker.log`."""
        self._run.log(dict(values), step=step)

    def finish(self, *, failed: bool) -> None:
        """See `Tracker.finish`."""
        self._run.finish(exit_code=int(failed))


class MLflow:
    """Log to the server that MLFLOW_TRACKING_URI names."""

    def __init__(self, run: TrackedRun) -> None:
        from mlflow import MlflowClient

        self._client = MlflowClient()
        experiment = self._client.get_experiment_by_name(PROJECT)
        number = experiment.experiment_id if experiment else self._client.create_experiment(PROJECT)
        found = self._client.search_runs([number], f"tags.`pgp.run` = '{run.id}'")
        if found:
            self._id = found[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
            return
        self._id = self._client.create_run(number, run_name=run.name, tags={"pgp.run": run.id}).info.run_id
        for path, value in run.settings.items():
            self._client.log_param(self._id, path, str(value)[:500])

    def log(self, values: Mapping[str, float], step: int) -> None:
        """See `Tracker.log`."""
        for name, value in values.items():
            allowed = re.sub(r"[^\w./ -]", "-", name)  # such as accuracy/lda-query
            self._client.log_metric(self._id, allowed, value, step=step)

    def finish(self, *, failed: bool) -> None:
        """See `Tracker.finish`."""
        self._client.set_terminated(self._id, "FAILED" if failed else "FINISHED")


class Trackio:
    """Log to trackio's local database."""

    def __init__(self, run: TrackedRun) -> None:
        import trackio

        name = f"{run.name}-{run.id[:8]}"  # trackio tells runs apart by their names
        with contextlib.redirect_stdout(sys.stderr):
            self._run = trackio.init(project=PROJECT, name=name, config=run.settings, resume="allow")

    def log(self, values: Mapping[str, float], step: int) -> None:
        """See `Tracker.log`."""
        self._run.log(dict(values), step=step)

    def finish(self, *, failed: bool) -> None:
        """See `Tracker.finish`."""
        with contextlib.redirect_stdout(sys.stderr):
            self._run.finish()


TRACKERS: dict[TrackerName, Callable[[TrackedRun], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "mlflow": MLflow,
    "trackio": Trackio,
}


class _Reporter:
    """Passes events of a log to trackers. One that fails gets no more events, and does not stop the run."""

    def __init__(self, session: Session, names: Sequence[TrackerName]) -> None:
        self.session, run = session, session.run
        self._steps: dict[int, int] = {}
        """Number of steps so far, by task."""
        for event in run.log_file.events():
            self._count(event)
        about = TrackedRun(run.id, run.folder.name, run.folder, flatten(session.config.to_json()), self._step)
        self.open: dict[TrackerName, Tracker] = {}
        for name in names:
            with self._guarded(name):
                self.open[name] = TRACKERS[name](about)

    def __call__(self, event: Event) -> None:
        """Pass one event on."""
        self._count(event)
        if values := scalars(event):
            for name, tracker in list(self.open.items()):
                with self._guarded(name):
                    tracker.log(values, self._step)

    def finish(self, *, failed: bool) -> None:
        """End the runs in all trackers."""
        for name, tracker in list(self.open.items()):
            with self._guarded(name):
                tracker.finish(failed=failed)

    @property
    def _step(self) -> int:
        return sum(self._steps.values())

    def _count(self, event: Event) -> None:
        if event["event"] in ("train", "stream"):
            self._steps[event["task"]] = event["step"]

    @contextlib.contextmanager
    def _guarded(self, name: TrackerName) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever it is, training continues
            self.open.pop(name, None)
            text = f"pgp: warning: {name} failed, and gets no more values of this run: {type(error).__name__}: {error}"
            print_line(self.session.progress, text)


def check_trackers(names: Sequence[str]) -> tuple[TrackerName, ...]:
    """Return the names of trackers, each once.

    Raises:
        ValueError: If one is unknown or not installed.
    """
    known: tuple[TrackerName, ...] = get_args(TrackerName)
    for name in names:
        if name not in known:
            raise ValueError(f"expected trackers among {', '.join(known)}, got {name!r}")
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"expected {name} to be installed for --tracker {name}: pip install"
                             f" 'prompt-gradient-projection[{name}]'")  # fmt: skip
    return tuple(name for name in known if name in names)


@contextlib.contextmanager
def report_to(session: Session, names: Sequence[TrackerName]) -> Iterator[None]:
    """Report what is logged within the block to trackers, from the first of several processes."""
    if not names or not session.fabric.is_global_zero:
        yield
        return
    reporter = _Reporter(session, names)
    listeners = session.run.log_file.listeners
    listeners.append(reporter)
    failed = True
    try:
        yield
        failed = False
    finally:
        listeners.remove(reporter)
        reporter.finish(failed=failed)


def scalars(event: Event) -> dict[str, float]:
    """Return the values of an event that trackers draw, by name. Other events have none.

    >>> scalars({"event": "train", "task": 0, "step": 4, "loss": 0.5, "gradient_norm": 2.0})
    {'train/loss': 0.5, 'train/gradient_norm': 2.0}
    """
    if event["event"] == "train":
        found = {f"train/{name}": event[name] for name in ("loss", "gradient_norm")}
    elif event["event"] == "stream":
        found = {"stream/accuracy": event["accuracy"], "stream/recent": event["recent"]}
    elif event["event"] == "task":
        found = {"task/finished": event["task"] + 1}
        for title, name in (("accuracy", "average_accuracy"), ("forgetting", "forgetting")):
            found |= {f"{title}/{column}": value for column, value in event[name].items()}
        found |= {f"calibration_error/{column}": bins["error"] for column, bins in event["calibration"].items()}
        found |= {f"rank/{space}": value for space, value in event["ranks"].items()}
        found |= {f"seconds/{part}": value for part, value in event["seconds"].items()}
        moved = [change for change in event.get("drift", {}).get("features", []) if change is not None]
        found |= {"drift/features": sum(moved) / len(moved)} if moved else {}
    else:
        found = {}
    return {name: float(value) for name, value in found.items() if value is not None and math.isfinite(value)}
