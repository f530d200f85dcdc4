"""Measure how long a run of 100 tasks is evaluated with each setting of `--evaluate` and `--test-images`.

    python benchmarks/evaluation.py           # write docs/results/evaluation.md and evaluation.jsonl
    python benchmarks/evaluation.py --tiny    # test with three tasks; the results mean nothing

1,000 classes of noisy patterns in 100 tasks, L2P on a tiny encoder, one epoch. All runs learn the same.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import records
import rehearsal
from pgp.config import Config
from pgp.datasets.synthetic import Synthetic
from pgp.datasets.transforms import Transforms
from pgp.evaluation import metrics
from pgp.readouts.lda import LDA
from pgp.recipes import RECIPES
from pgp.reports import tables
from pgp.runs.environment import describe_environment
from pgp.train import train

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results" / "evaluation.jsonl"
SETTINGS: dict[str, dict[str, Any]] = {
    "--evaluate every": {},
    "--evaluate every --test-images 3": {"test_images": 3},
    "--evaluate 10": {"evaluate": "10"},
    "--evaluate last": {"evaluate": "last"},
}


def base(*, tiny: bool) -> Config:
    """Return the settings of all runs."""
    tasks, classes = (3, 6) if tiny else (100, 1000)
    return replace(
        RECIPES["demo"](),
        dataset=Synthetic(classes=classes, per_class=3, noise=0.05),
        backbone=rehearsal.ENCODER,
        transforms=Transforms(size=rehearsal.SIZE, resize=rehearsal.SIZE, flip=0.0),
        readouts=(LDA.Config(),),
        tasks=tasks,
        epochs=1,
        drift_images=0,
    )


def measure(config: Config) -> dict[str, Any]:
    """Train once, in a temporary folder, and return times, sizes and results."""
    with tempfile.TemporaryDirectory() as scratch:
        started = time.perf_counter()
        run = train(config, Path(scratch) / "run")
        seconds = time.perf_counter() - started
        matrix, events = run.matrices()["lda"], run.events("task")
        measured = matrix.isfinite().sum(0).tolist()
        (row,) = tables.result_rows([run])
        return {
            "images": sum(n * images for n, images in zip(measured, run.data.test_images, strict=True)),
            "evaluation_seconds": sum(event["seconds"]["evaluation"] for event in events),
            "run_seconds": seconds,
            "average_accuracy": metrics.average_accuracy(matrix),
            "sampling_error": row.spread(tables.SAMPLING)[0] if row.has(tables.SAMPLING) else None,
            "forgetting": metrics.forgetting(matrix) if matrix.diagonal().isfinite().all() else None,
            "checkpoint_bytes": sum(
                path.stat().st_size for path in run.checkpoints.folder.rglob("*") if path.is_file()
            ),
        }


def table(results: Path = RESULTS) -> str:
    """Return the table of all settings."""
    lines = list(records.read(results))
    most = lines[0]["evaluation_seconds"]
    cells = []
    for line in lines:
        error, forgetting = line["sampling_error"], line["forgetting"]
        cells.append(
            [
                f"`{line['setting']}`",
                f"{line['images']:,}",
                f"{line['evaluation_seconds']:.1f}",
                f"{most / line['evaluation_seconds']:.1f}",
                f"{line['run_seconds']:.0f}",
                f"{100 * line['average_accuracy']:.1f}" + (f" ± {100 * error:.1f}" if error is not None else ""),
                tables.NOT_MEASURED if forgetting is None else f"{100 * forgetting:.1f}",
                f"{line['checkpoint_bytes'] / 1e6:.0f}",
            ]
        )
    head = ["flags", "evaluated images", "seconds of evaluation", "times faster", "seconds of the run",
            "average accuracy, %", "forgetting", "MB of checkpoints"]  # fmt: skip
    return f"{lines[0]['tasks']} tasks. ± is the standard error of the sample.\n\n" + tables.markdown_table(head, cells)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="test with three tasks; nothing is kept")
    tiny = parser.parse_args(argv).tiny
    with tempfile.TemporaryDirectory() as scratch:
        results = Path(scratch) / RESULTS.name if tiny else RESULTS
        results.unlink(missing_ok=True)
        about = {key: describe_environment()[key] for key in ("commit", "processor", "threads")}
        config = base(tiny=tiny)
        for setting, changes in SETTINGS.items():
            found = measure(replace(config, **changes))
            records.append(results, {"setting": setting, "tasks": config.tasks, **found, **about})
        records.write_page(results, table(results))


if __name__ == "__main__":
    main()
