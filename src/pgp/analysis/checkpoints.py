"""Accuracy of the checkpoints of a run, evaluated again."""

from __future__ import annotations

import warnings

from rich.progress import Progress
from torch import Tensor

from pgp.config import Config
from pgp.evaluation import metrics
from pgp.progress import no_progress
from pgp.runs.checkpoint import CheckpointName
from pgp.runs.run import Run
from pgp.training.start import load_latest


def evaluate_checkpoints(
    run: Run, config: Config, progress: Progress | None = None, *, every_task: bool = False
) -> dict[str, Tensor]:
    """Return the accuracy matrices `(T, T)` by column, evaluated again on one device; NaN if nothing was measured.

    Args:
        run: A run with at least one finished task.
        config: The run's own, perhaps with other evaluation settings.
        progress: Where to draw progress bars. If None, nowhere.
        every_task: Evaluate the checkpoint of every finished task. If False, that of the latest only.

    Raises:
        RunError: If no task is finished, or the data have changed.
    """
    session, state = load_latest(run, config, progress or no_progress())
    last = state.task
    names = run.checkpoints.finished() if every_task else [CheckpointName(last)]
    if every_task and len(names) < last:
        kept = ", ".join(str(name.task) for name in names)
        warnings.warn(f"{run.folder} has checkpoints of {len(names)} of {last} finished tasks, and is evaluated after"
                      f" tasks {kept}; see --keep-checkpoints of pgp train", stacklevel=2)  # fmt: skip
    matrices: dict[str, Tensor] = {}
    for name in names:
        if every_task:
            session.load(state, name)
        row = session.evaluator.evaluate(state.method, state.readouts, name.task - 1, session.progress)
        metrics.write_row(matrices, row.accuracy, name.task - 1, len(session.scenario))
    return matrices
