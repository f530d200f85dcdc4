"""Train L2P and DualPrompt on 200 emoji drawn by 9 vendors: 10 tasks of 20 classes, two vendors held out for testing.

    python benchmarks/emoji.py tune                 # tune the learning rate, without projection, on another vendor
    python benchmarks/emoji.py run --part 1/2 &     # run every row of the table with every seed, in two processes
    python benchmarks/emoji.py run --part 2/2
    python benchmarks/emoji.py table                # write docs/results/emoji.md from docs/results/emoji.jsonl
    python benchmarks/emoji.py run --tiny           # test a few rows on noise; the results mean nothing

It needs two files that are not part of the project: ../shared/data/emoji_renditions_200.npz and
../shared/backbones/vit_small_patch14_imgfocus.safetensors.

Each finished run is one line of docs/results/emoji.jsonl, and is not run again.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from PIL import Image
from rich.progress import Progress

import records
import rehearsal
from pgp.backbones.vit import ViT
from pgp.config import Config, Optimizer
from pgp.datasets.folder import Folder
from pgp.datasets.loader import LoaderOptions, batches, sequential_batches
from pgp.datasets.transforms import Transforms
from pgp.evaluation import metrics
from pgp.methods.base import Method
from pgp.methods.dualprompt import DualPrompt
from pgp.methods.head_only import HeadOnly
from pgp.methods.l2p import L2P
from pgp.projections.base import NoProjection, Projection
from pgp.projections.orthogonal import Orthogonal
from pgp.projections.released import ReleasedBasis
from pgp.readouts.head import MethodHead
from pgp.readouts.lda import LDA, NCM
from pgp.reports.comparison import paired
from pgp.runs.checkpoint import CheckpointName
from pgp.runs.environment import describe_environment
from pgp.runs.run import Run
from pgp.scenario import Task
from pgp.train import train
from pgp.training.session import Session

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
IMAGES = SHARED / "data" / "emoji_renditions_200.npz"
WEIGHTS = SHARED / "backbones" / "vit_small_patch14_imgfocus.safetensors"
RESULTS = ROOT / "docs" / "results" / "emoji.jsonl"
TUNING = ROOT / "docs" / "results" / "emoji_tuning.jsonl"
TEST = ("emojione", "emojione-v1")
VALIDATION = ("openmoji",)
RATES = (0.03, 0.1, 0.3, 1.0)
METHODS: dict[str, Method.Config] = {
    "head-only": HeadOnly.Config(),
    "l2p": L2P.Config(top_k=2, head_type="token"),
    "dualprompt": DualPrompt.Config(),
}
"""Seven pictures of a class are few: a smaller choice of prompts, and CLS as published for the smallest data set."""
BEST_RATE = {"l2p": 0.3, "head-only": 0.03, "dualprompt": 0.03}
"""Per 256 images; of what `tune` tried, the best average incremental accuracy (the mean over all stages)."""
TINY_ROWS = ("head only", "L2P", "L2P-PGP sum update 0.99", "DualPrompt at 0.3-PGP keys")
"""Rows that a rehearsal runs, where none are named."""


def folder(held_out: tuple[str, ...], left_out: tuple[str, ...] = ()) -> Path:
    """Return the pictures as an image folder, written once: `train/<class>/<vendor>.png`, and `test` likewise."""
    root = ROOT / "data" / ("emoji-" + "-".join(held_out))
    if root.is_dir():
        return root
    partial = Path(tempfile.mkdtemp(dir=_made(root.parent)))
    with np.load(IMAGES) as arrays:
        vendors = arrays["vendors"]
        for picture, vendor, name in zip(arrays["x"], arrays["vendor"], arrays["name"], strict=True):
            if vendors[vendor] in left_out:
                continue
            part = "test" if vendors[vendor] in held_out else "train"
            path = _made(partial / part / name) / f"{vendors[vendor]}.png"
            Image.fromarray(picture).save(path)
    try:
        partial.rename(root)
    except OSError:  # another process was faster
        if not root.is_dir():
            raise
        shutil.rmtree(partial)
    return root


def base(root: Path, seed: int, *, tiny: bool = False) -> Config:
    """Return the settings that all rows share."""
    config = Config(
        name="emoji",
        dataset=Folder(root),
        transforms=Transforms(
            size=56, resize=56, scale=(0.6, 1.0), flip=0.0, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)
        ),
        backbone=ViT.Config("vit_small_patch14_dinov2.lvd142m", weights=str(WEIGHTS)),
        method=METHODS["l2p"],
        projection=NoProjection.Config(),
        readouts=(MethodHead.Config(), LDA.Config()),
        optimizer=Optimizer(lr=BEST_RATE["l2p"]),
        tasks=10,
        epochs=3,
        batch_size=4,
        seed=seed,
        shuffle=True,
        log_every_steps=1000,
    )
    return rehearsal.tiny(config, root) if tiny else config


def rows() -> dict[str, dict[str, Any]]:
    """Return the configuration of each row of the table, by name."""
    table: dict[str, dict[str, Any]] = {
        "head only": {"method": METHODS["head-only"], "optimizer": Optimizer(lr=BEST_RATE["head-only"])},
        "nearest class mean": {"method": HeadOnly.Config(learns=False), "readouts": (NCM.Config(),)},
        "L2P, all tasks at once": {"joint": True},
        "L2P": {},
        "L2P-PGP released": {"projection": ReleasedBasis.Config()},
    }
    for energy in (0.99, 0.9, 0.999):
        for on in ("gradient", "update"):
            for space in ("sum", "union", "input"):
                projection: Projection.Config = Orthogonal.Config(space, energy, energy, on)
                table[f"L2P-PGP {space} {on} {energy:g}"] = {"projection": projection}
    for rate in (BEST_RATE["dualprompt"], 0.3):  # at the best rate its prompts hardly move: at one where they do, too
        base = {"method": METHODS["dualprompt"], "optimizer": Optimizer(lr=rate)}
        table[f"DualPrompt at {rate:g}"] = base
        for protect in ("keys", "keys+values"):
            table[f"DualPrompt at {rate:g}-PGP {protect}"] = {
                **base,
                "method": DualPrompt.Config(protect=protect),
                "projection": Orthogonal.Config(energy=0.99, key_energy=0.99, apply_to="update"),
            }
    return table


def measure(config: Config) -> dict[str, Any]:
    """Run once, in a temporary folder, and return the final metrics by readout, in [0, 1]."""
    scratch = Path(tempfile.mkdtemp())
    started = time.perf_counter()
    try:
        run = train(config, scratch / "run")
        figures = {
            column: {
                "average_accuracy": metrics.average_accuracy(matrix),
                "forgetting": metrics.forgetting(matrix),
                "average_incremental_accuracy": metrics.average_incremental_accuracy(matrix),
                "new_task_accuracy": float(matrix.diagonal().mean()),
            }
            for column, matrix in run.matrices().items()
        }
        *_, last = run.events("task")
        moved = drift(run)
    finally:
        shutil.rmtree(scratch)
    seconds = round(time.perf_counter() - started, 1)
    return {"seconds": seconds, "ranks": last["ranks"], "drift": moved, "figures": figures}


@torch.no_grad()
def drift(run: Run) -> float:
    """Return how far features of test images moved between the end of their task and the end of the run.

    The norm of the change by the norm of the features, the mean over all tasks but the last.
    """
    session = Session(Fabric(accelerator="cpu", devices=1), run.config, Progress(disable=True))
    state = session.new_state()
    split = session.evaluator.test_split()
    tasks = session.scenario.tasks[:-1]

    def features(task: Task, checkpoint: CheckpointName) -> torch.Tensor:
        state.load_state_dict(run.load(checkpoint))
        (batch,) = batches(split, sequential_batches(task.test, len(task.test)), LoaderOptions())
        return state.method.features(batch.images)

    if not tasks:
        return 0.0
    final = CheckpointName(len(tasks) + 1)
    pairs = [(features(task, CheckpointName(task.index + 1)), features(task, final)) for task in tasks]
    return statistics.mean(float((after - before).norm() / before.norm()) for before, after in pairs)


def tune(root: Path, results: Path, part: int, parts: int, *, tiny: bool = False) -> None:
    """Run each learning rate on the images of `root`, which contain no test vendor."""
    jobs = [(name, method, lr) for name, method in METHODS.items() for lr in RATES]
    for name, method, lr in jobs[part - 1 :: parts]:
        if (name, lr) not in {(line["method"], line["lr"]) for line in records.read(results)}:
            config = replace(
                base(root, seed=100, tiny=tiny),
                method=method,
                optimizer=Optimizer(lr=lr),
                readouts=(MethodHead.Config(),),
            )
            records.append(results, {"method": name, "lr": lr, "seed": 100, **measure(config)})


def run(
    root: Path, results: Path, part: int, parts: int, seeds: Sequence[int], wanted: Sequence[str], *, tiny: bool = False
) -> None:
    """Run every row and seed that is not in the results yet; if rows are `wanted`, only those."""
    jobs = [(name, changes, seed) for seed in seeds for name, changes in rows().items()]
    for name, changes, seed in jobs[part - 1 :: parts]:
        if wanted and name not in wanted:
            continue
        if (name, seed) not in {(line["row"], line["seed"]) for line in records.read(results)}:
            result = measure(replace(base(root, seed, tiny=tiny), **changes))
            about = describe_environment()
            kept = {key: about[key] for key in ("commit", "processor", "threads")}
            records.append(results, {"row": name, "seed": seed, **result, **kept})


def table(results: Path = RESULTS) -> str:
    """Return means ± standard deviations, and paired differences to no projection ± standard errors, in percent."""
    lines = list(records.read(results))
    by = {(line["row"], line["seed"]): line for line in lines}
    out = [
        "Means ± standard deviations over seeds, in %. Differences are paired by seed, ± standard error, in points.",
        "",
        "| row | rank prompts / keys | seeds | own head: accuracy | forgetting | LDA: accuracy | forgetting | drift |"
        " own head, less base: accuracy | forgetting |",
        "|" + "---|" * 10,
    ]
    for name in rows():
        seeds = sorted(seed for row, seed in by if row == name)
        if not seeds:
            continue

        def column(readout: str, figure: str, name: str = name, seeds: list[int] = seeds) -> str:
            found = [by[name, seed]["figures"] for seed in seeds]
            only = next(iter(found[0])) if len(found[0]) == 1 and readout == "head" else readout
            return spread([100 * figures[only][figure] for figures in found if only in figures])

        def less_base(figure: str, name: str = name) -> str:
            base = name.partition("-PGP")[0]
            if base == name:
                return ""
            own, other = (
                {seed: 100 * line["figures"]["head"][figure] for (row, seed), line in by.items() if row == wanted}
                for wanted in (name, base)
            )
            return difference(own, other)

        ranks = [by[name, seed]["ranks"] for seed in seeds]
        mean = {space: statistics.mean(r[space] for r in ranks) for space in ranks[0]}
        keys = [mean.pop("keys")] if mean else []
        drifts = [by[name, seed]["drift"] for seed in seeds if "drift" in by[name, seed]]
        cells = [
            name,
            " / ".join(f"{rank:.0f}" for rank in [statistics.mean(mean.values()), *keys]) if mean else "",
            str(len(seeds)),
            column("head", "average_accuracy"),
            column("head", "forgetting"),
            column("lda", "average_accuracy"),
            column("lda", "forgetting"),
            f"{statistics.mean(drifts):.2f}" if drifts else "",
            less_base("average_accuracy"),
            less_base("forgetting"),
        ]
        out.append("| " + " | ".join(cells) + " |")
    return "\n".join(out) + "\n"


def spread(values: list[float]) -> str:
    """Return `mean ± standard deviation`."""
    if not values:
        return ""
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{deviation}"


def difference(one: Mapping[int, float], other: Mapping[int, float]) -> str:
    """Return the mean of `one - other` over common seeds `± standard error`."""
    found = paired(one, other)
    if found is None:
        return ""
    return f"{found.mean:+.1f}" + ("" if found.error is None else f" ± {found.error:.1f}")


def _made(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    return path


def get_ready(*needed: Path) -> None:
    """Set one thread, and end the process if a file is missing that is not part of the project."""
    if missing := [str(path) for path in needed if not path.is_file()]:
        sys.exit(f"skipped: this benchmark needs {', '.join(missing)}, which are not part of the project")
    torch.set_num_threads(1)


def share(text: str) -> tuple[int, int]:
    """Return the two numbers of `PART/PARTS`."""
    part, parts = map(int, text.split("/"))
    if not 1 <= part <= parts:
        raise ValueError(f"expected PART/PARTS such as 1/2, got {text}")
    return part, parts


def main(argv: Sequence[str] | None = None) -> None:
    """Tune, run or draw the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("tune", "run", "table"))
    parser.add_argument("--part", type=share, default=(1, 1), help="which share of the runs, such as 1/2")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--rows",
        nargs="+",
        default=[],
        choices=list(rows()),
        metavar="ROW",
        help="names of rows; all, if none is given",
    )
    parser.add_argument("--tiny", action="store_true", help="rehearse on noise with a tiny encoder; nothing is kept")
    options = parser.parse_args(argv)
    part, parts = options.part
    if options.what == "table":
        records.write_page(RESULTS, table())
    elif options.tiny:
        with tempfile.TemporaryDirectory() as scratch:
            root, results = rehearsal.pictures(Path(scratch) / "pictures"), Path(scratch) / RESULTS.name
            if options.what == "tune":
                tune(root, results, part, parts, tiny=True)
            else:
                run(root, results, part, parts, options.seeds[:1], options.rows or TINY_ROWS, tiny=True)
                records.write_page(results, table(results))
    else:
        get_ready(IMAGES, WEIGHTS)
        if options.what == "tune":
            tune(folder(VALIDATION, left_out=TEST), TUNING, part, parts)
        else:
            run(folder(TEST), RESULTS, part, parts, options.seeds, options.rows)


if __name__ == "__main__":
    main()
