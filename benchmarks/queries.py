"""Compare clean queries with those of augmented views (`--query`), on two data sets: accuracy, and seconds of training.

    python benchmarks/queries.py run --data emoji kanji     # run rows and seeds that are not in the results
    python benchmarks/queries.py run --data emoji --part 1/2 &
    python benchmarks/queries.py table                      # write docs/results/queries.md
    python benchmarks/queries.py run --tiny                 # test every row on noise

Data, encoder and methods are those of benchmarks/emoji.py (56 px, 3 epochs); `kanji` are the 200 characters of
benchmarks/kanji_data.py (2 epochs). Both need files in ../shared, which are not part of the project.

Each finished run is one line of docs/results/queries.jsonl, and is not run again. The two runs of a pair have the same
seed, so the same tasks, batches and augmentation.
"""

from __future__ import annotations

import argparse
import itertools
import math
import shutil
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import emoji
import protection
import records
import rehearsal
from pgp.config import Config, Optimizer
from pgp.evaluation import metrics
from pgp.methods.dualprompt import DualPrompt
from pgp.reports.tables import markdown_table
from pgp.runs.environment import describe_environment
from pgp.train import train

RESULTS = emoji.ROOT / "docs" / "results" / "queries.jsonl"
DATA = ("emoji", "kanji")
QUERIES = ("augmented", "clean")
ROWS: dict[str, dict[str, Any]] = {
    "L2P": {},
    "DualPrompt": {"method": emoji.METHODS["dualprompt"], "optimizer": Optimizer(lr=0.3)},
    "DualPrompt, selected by key": {
        "method": DualPrompt.Config(prompt_mask=False, shared_pool=False),
        "optimizer": Optimizer(lr=0.3),
    },
}
"""What each row changes in `emoji.base`. With its prompt mask, DualPrompt selects by the query only at test."""
Line = dict[str, Any]


def config(data: str, root: Path, row: str, query: str, seed: int, *, tiny: bool = False) -> Config:
    """Return the settings of one run."""
    base = replace(emoji.base(root, seed), name=data, epochs=3 if data == "emoji" else 2)
    base = rehearsal.tiny(base, root) if tiny else base
    return replace(base, query=query, drift_images=0, **ROWS[row])  # type: ignore[arg-type]


def measure(settings: Config) -> Line:
    """Run once, in a temporary folder, and return the figures by readout, in [0, 1], and the seconds of training."""
    scratch = Path(tempfile.mkdtemp())
    try:
        run = train(settings, scratch / "run")
        seconds = sum(event["seconds"]["train"] for event in run.events("task"))
        figures = {
            column: {
                "average_accuracy": metrics.average_accuracy(matrix),
                "forgetting": metrics.forgetting(matrix),
            }
            for column, matrix in run.matrices().items()
        }
    finally:
        shutil.rmtree(scratch)
    about = describe_environment()
    kept = {key: about[key] for key in ("commit", "processor", "threads")}
    return {"figures": figures, "train_seconds": round(seconds, 1), **kept}


def run(
    data: str, root: Path, results: Path, part: int, parts: int, seeds: Sequence[int], rows: Sequence[str], tiny: bool
) -> None:
    """Run every row, query and seed that is not in the results yet, both runs of a pair one after the other."""
    pairs = list(itertools.product(seeds, rows))
    for (seed, row), query in itertools.product(pairs[part - 1 :: parts], QUERIES):
        job = {"data": data, "row": row, "query": query, "seed": seed}
        if not any(job.items() <= line.items() for line in map(_named, records.read(results))):
            records.append(results, {**job, **measure(config(data, root, row, query, seed, tiny=tiny))})


def _named(line: Line) -> Line:
    """Return what tells a line from others."""
    return {name: line[name] for name in ("data", "row", "query", "seed")}


def table(results: Path = RESULTS) -> str:
    """Return means ± standard deviations over the seeds with both runs, and the paired difference of each readout."""
    lines = {tuple(_named(line).values()): line for line in records.read(results)}
    cells = []
    for data, row in itertools.product(DATA, ROWS):
        own = {
            query: {key[3]: line for key, line in lines.items() if key[:3] == (data, row, query)} for query in QUERIES
        }
        both = {query: {seed: own[query][seed] for seed in sorted(own["augmented"].keys() & own["clean"].keys())}
                for query in QUERIES}  # fmt: skip
        if not both["clean"]:
            continue
        seconds = {query: [line["train_seconds"] for line in lines.values()] for query, lines in both.items()}
        ratios = [clean / augmented if augmented else math.nan
                  for clean, augmented in zip(seconds["clean"], seconds["augmented"], strict=True)]  # fmt: skip
        for readout in next(iter(both["clean"].values()))["figures"]:
            accuracies = (
                emoji.spread([100 * line["figures"][readout]["average_accuracy"] for line in both[query].values()])
                for query in QUERIES
            )
            differences = (
                protection.less(both["clean"], both["augmented"], readout, readout, figure)
                for figure in ("average_accuracy", "forgetting")
            )
            seeds, ratio = str(len(ratios)), f"{statistics.median(ratios):.2f}"
            cells.append([data, row, readout, seeds, *accuracies, *differences, ratio])
    head = ["data", "method", "readout", "seeds", "accuracy, augmented", "accuracy, clean", "clean less augmented",
            "of forgetting", "seconds of training, clean / augmented"]  # fmt: skip
    return f"{EXPLANATION}\n\n{markdown_table(head, cells)}\n"


EXPLANATION = (
    "Average accuracy in %, mean ± standard deviation over seeds. Differences are paired by seed, ± standard error, in"
    " points. Seconds are the median ratio."
)


def main(argv: Sequence[str] | None = None) -> None:
    """Run or draw the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "table"))
    parser.add_argument("--data", choices=DATA, nargs="+", default=list(DATA))
    parser.add_argument("--part", type=emoji.share, default=(1, 1), help="which share of the pairs, such as 1/2")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(5)))
    parser.add_argument(
        "--rows", nargs="+", default=list(ROWS), choices=list(ROWS), metavar="ROW", help="names of rows"
    )
    parser.add_argument("--tiny", action="store_true", help="rehearse on noise with a tiny encoder; nothing is kept")
    options = parser.parse_args(argv)
    part, parts = options.part
    if options.what == "table":
        records.write_page(RESULTS, table())
    elif options.tiny:
        with tempfile.TemporaryDirectory() as scratch:
            root, results = rehearsal.pictures(Path(scratch) / "pictures"), Path(scratch) / RESULTS.name
            run("emoji", root, results, part, parts, options.seeds[:1], options.rows, True)
            records.write_page(results, table(results))
    else:
        emoji.get_ready(emoji.WEIGHTS, *([emoji.IMAGES] if "emoji" in options.data else []))
        for data in options.data:
            run(data, protection.folder(data, tuning=False), RESULTS, part, parts, options.seeds, options.rows, False)


if __name__ == "__main__":
    main()
