"""Train deep prompts with every projection and every control, and evaluate every readout, on two data sets.

    python benchmarks/protection.py tune --data emoji                # tune learning rates, on images for tuning only
    python benchmarks/protection.py run --data emoji --part 1/2 &    # run rows and seeds that are not in the results
    python benchmarks/protection.py run --data emoji --part 2/2
    python benchmarks/protection.py table                            # write docs/results/protection.md
    python benchmarks/protection.py run --tiny                       # test a few rows on noise

`--data emoji` are 200 emoji; it needs ../shared/data/emoji_renditions_200.npz. `--data kanji` are 200 characters, drawn
by benchmarks/kanji_data.py. Both need ../shared/backbones/vit_small_patch14_imgfocus.safetensors. The files in
../shared are not part of the project.

Each finished run is one line of docs/results/protection.jsonl (for tune, of protection_tuning.jsonl), and is not run
again.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.progress import Progress

import emoji
import kanji_data
import records
import rehearsal
from pgp.analysis.audit import oracle
from pgp.config import Config, Optimizer
from pgp.evaluation import metrics
from pgp.methods.dualprompt import DualPrompt
from pgp.methods.head_only import HeadOnly
from pgp.methods.vpt import VPT
from pgp.projections.base import NoProjection
from pgp.projections.orthogonal import Orthogonal
from pgp.projections.random import RandomBasis
from pgp.projections.released import ReleasedBasis
from pgp.readouts.base import Readout
from pgp.readouts.head import MethodHead
from pgp.readouts.lda import LDA
from pgp.readouts.logistic import Logistic
from pgp.reports.drift import STATISTICS, DriftHistory
from pgp.reports.tables import markdown_table
from pgp.runs.environment import describe_environment
from pgp.train import train

RESULTS = emoji.ROOT / "docs" / "results" / "protection.jsonl"
TUNING = emoji.ROOT / "docs" / "results" / "protection_tuning.jsonl"
RATES = {
    "emoji": (
        *((0.1, None), (0.3, None)),
        *((0.1, 0.1), (0.1, 0.03), (0.1, 0.01), (0.3, 0.03), (0.3, 0.01), (0.3, 0.1), (0.1, 0.3)),
        *((0.03, 1.0), (0.1, 1.0), (0.3, 1.0), (1.0, 1.0)),
    ),
    "kanji": ((0.3, None), (0.3, 0.1), (0.3, 0.03), (0.3, 0.01), (0.1, 0.03), (0.1, None)),
}
"""Of the head, per 256 images, and the share of it at which prompts learn; None: without prompts."""
RATE = {"emoji": (0.3, 0.1), "kanji": (0.3, 0.1)}
"""What `tune` chose: the highest oracle."""
TINY_ROWS = ("head only", "unprojected", "input .99", "random, ranks of input .99", "frozen")
"""Rows that a rehearsal runs, if none are named."""


def folder(data: str, *, tuning: bool) -> Path:
    """Return the image folder of a data set; the one for tuning contains no test image."""
    if data == "kanji":
        return kanji_data.folder("validation") if tuning else kanji_data.folder()
    return emoji.folder(emoji.VALIDATION, left_out=emoji.TEST) if tuning else emoji.folder(emoji.TEST)


def base(data: str, root: Path, seed: int, *, tiny: bool = False) -> Config:
    """Return the settings that all rows share: 10 tasks of 20 classes at 84 px, deep prompts."""
    config = emoji.base(root, seed)
    config = replace(
        config,
        name=data,
        transforms=replace(config.transforms, size=84, resize=84),
        method=VPT.Config(length=8, protect="affinity+aggregation"),
        optimizer=optimizer(data),
        precision="bf16-mixed",
        epochs=5 if data == "emoji" else 2,  # 6 or 7 pictures a class, or 14: about as many steps
    )
    return rehearsal.tiny(config, root) if tiny else config


def measure(config: Config) -> dict[str, Any]:
    """Run once, in a temporary folder, and return the final metrics by readout, in [0, 1]."""
    scratch = Path(tempfile.mkdtemp())
    started = time.perf_counter()
    try:
        run = train(config, scratch / "run")
        bound = oracle(run, Progress(disable=True))
        *_, last = run.events("task")
        figures = {
            column: {
                figure: getattr(metrics, figure)(matrix)
                for figure in ("average_accuracy", "forgetting", "average_incremental_accuracy")
            }
            for column, matrix in run.matrices().items()
        }
    finally:
        shutil.rmtree(scratch)
    about = describe_environment()
    kept = {key: about[key] for key in ("commit", "processor", "vectors", "threads")}
    kept |= {"ranks": {space: round(rank, 1) for space, rank in last["ranks"].items()}, "readouts": last["readouts"]}
    kept |= {"forgetting_within": last["forgetting_within"], "identified": last["identified"], "drift": last["drift"]}
    return {"seconds": round(time.perf_counter() - started, 1), "figures": figures, "oracle": bound, **kept}


def optimizer(data: str) -> Optimizer:
    """Return the optimizer of `base`."""
    lr, share = RATE[data]
    return Optimizer(lr=lr, prompt_lr_scale=share)


def later_prompt_lr_scale(data: str, scale: float) -> dict[str, Any]:
    """Return `base` with the prompts' learning rate multiplied by `scale` from the second task on."""
    slowed = replace(optimizer(data), later_prompt_lr_scale=scale)
    return {"projection": NoProjection.Config(), "optimizer": slowed}


def rows(data: str) -> dict[str, dict[str, Any]]:
    """Return the settings of each row that differ from `base`, by name."""
    table: dict[str, dict[str, Any]] = {
        "head only": {"method": HeadOnly.Config(), "projection": NoProjection.Config()},
        "unprojected": {"projection": NoProjection.Config()},
        **{f"slower {scale}": later_prompt_lr_scale(data, float(scale)) for scale in (".01", ".09", ".3", ".5")},
        "frozen": later_prompt_lr_scale(data, 0.0),
    }
    for name, protect, space, energy in (
        ("affinity+aggregation .99", "affinity+aggregation", "input", 0.99),
        ("affinity+aggregation .9", "affinity+aggregation", "input", 0.9),
        ("affinity .99", "affinity", "input", 0.99),
        ("input .99", "tokens", "input", 0.99),
        ("input .9", "tokens", "input", 0.9),
        ("sum .99", "tokens", "sum", 0.99),
        ("sum .9", "tokens", "sum", 0.9),
    ):
        method = VPT.Config(length=8, protect=protect)  # type: ignore[arg-type]
        projection = Orthogonal.Config(space, energy, apply_to="update")  # type: ignore[arg-type]
        table[name] = {"method": method, "projection": projection}
    tokens = VPT.Config(length=8, protect="tokens")
    for name in ("input .99", "sum .9", "affinity .99"):
        table[random_of(name)] = {**table[name], "projection": RandomBasis.Config(**asdict(table[name]["projection"]))}
    table["released"] = {"method": tokens, "projection": ReleasedBasis.Config(components=5, when="after")}
    exact = VPT.Config(length=8, protect="affinity+aggregation", prompts_after_norm=True)
    table["behind the norm, unprojected"] = {"method": exact, "projection": NoProjection.Config()}
    table["behind the norm, affinity+aggregation .99"] = {
        "method": exact,
        "projection": Orthogonal.Config("input", 0.99, apply_to="update"),
    }
    l2p = {"method": emoji.METHODS["l2p"], "optimizer": Optimizer(lr=emoji.BEST_RATE["l2p"])}
    table["L2P"] = {**l2p, "projection": NoProjection.Config()}
    table["L2P, sum .99"] = {**l2p, "projection": Orthogonal.Config("sum", 0.99, 0.99, "update")}
    dual = {"method": emoji.METHODS["dualprompt"], "optimizer": Optimizer(lr=0.3)}  # a rate at which prompts do move
    table["DualPrompt"] = {**dual, "projection": NoProjection.Config()}
    for protect in ("keys", "keys+values"):
        table[f"DualPrompt, {protect} .99"] = {
            **dual,
            "method": DualPrompt.Config(protect=protect),  # type: ignore[arg-type]
            "projection": Orthogonal.Config("input", 0.99, 0.99, "update"),
        }
    return table


def random_of(row: str) -> str:
    """Return the row with random directions, as many as the projection of this row protects."""
    return f"random, ranks of {row}"


READOUTS: tuple[Readout.Config, ...] = (
    MethodHead.Config(),
    *(LDA.Config(compensate=how) for how in ("none", "shift", "linear")),
    *(Logistic.Config(compensate=how, draws=16) for how in ("none", "linear")),
    *(LDA.Config(query=True, compensate=how, shrinkage=0.2) for how in ("none", "linear")),
)
"""Twice as wide features are pulled twice as far toward a round covariance."""


def run(
    data: str,
    root: Path,
    results: Path,
    part: int,
    parts: int,
    seeds: Sequence[int],
    wanted: Sequence[str],
    *,
    tiny: bool = False,
) -> None:
    """Run every row and seed that is not in the results yet; if rows are `wanted`, only those."""
    jobs = [
        (name, changes, seed) for seed in seeds for name, changes in rows(data).items() if not wanted or name in wanted
    ]
    for name, changes, seed in jobs[part - 1 :: parts]:
        if not any(is_of(line, data, name, seed) for line in records.read(results)):
            config = replace(base(data, root, seed, tiny=tiny), readouts=READOUTS, **changes)
            records.append(results, {"data": data, "row": name, "seed": seed, **measure(config)})


def is_of(line: dict[str, Any], data: str, row: str, seed: int) -> bool:
    """Return whether this line of the results is that of a run, with all readouts."""
    own = bool((line["data"], line["row"], line["seed"]) == (data, row, seed))
    return own and {readout.name for readout in READOUTS} <= line["figures"].keys()


def table(results: Path = RESULTS) -> str:
    """Return by data set the accuracy of every readout, the differences that the targets ask for, and the drift."""
    out = []
    for data in ("emoji", "kanji"):
        lines: Lines = {name: {} for name in rows(data)}
        for line in records.read(results):
            if line["data"] == data:
                lines[line["row"]][line["seed"]] = line
        known = {name: own for name, own in lines.items() if own}
        if known:
            out += [
                f"## {data}",
                "",
                "Average accuracy, %; the oracle is LDA on statistics that are not stale.",
                "",
                accuracies(known),
            ]
            out += ["", "The own head, less that of other rows, seed by seed, ± standard error, in points.", ""]
            out += [own_heads(known), "", "Compensated LDA, less LDA on features that do not move, likewise.", ""]
            out += [compensated(known)]
            out += ["", "The drift meter after the last task, %.", "", drifts(known)]
    return "\n".join(out)


Lines = dict[str, dict[int, dict[str, Any]]]
"""By row and seed, a line of the results."""


def accuracies(lines: Lines) -> str:
    """Return mean and deviation over seeds of every readout, of the bound, and of the own head's forgetting."""
    cells = []
    for name, own in lines.items():
        readouts = [emoji.spread(values(own, readout.name, "average_accuracy")) for readout in READOUTS]
        bound = emoji.spread([100 * line["oracle"]["lda"][0] for line in own.values()])
        stale = f"{statistics.mean(line['oracle']['lda'][1] for line in own.values()):.2f}"
        lost = [emoji.spread(values(own, column, "forgetting")) for column in ("head", "lda+linear")]
        cells.append([name, str(len(own)), *readouts, bound, stale, *lost])
    head = ["row", "seeds", *(readout.name for readout in READOUTS), "oracle", "staleness"]
    return markdown_table([*head, "head, forgetting", "lda+linear, forgetting"], cells)


def own_heads(lines: Lines) -> str:
    """Return forgetting and accuracy of the method's head, minus those of other rows (the first target)."""
    others = ("unprojected", "slower .5", "slower .3", "slower .09", "frozen")
    head = ["row", *(f"to {other}: {what}" for other in (*others, RANDOM) for what in ("accuracy", "forgetting"))]
    cells = [
        [
            name,
            *(
                less(own, lines.get(other, {}), "head", "head", figure)
                for other in (*others, random_of(name))
                for figure in ("average_accuracy", "forgetting")
            ),
        ]
        for name, own in lines.items()
    ]
    return markdown_table(head, cells)


def compensated(lines: Lines) -> str:
    """Return what the second target asks: accuracy by statistics that move, less that by statistics that need not.

    And how far that goes from the better of those toward the same row's oracle.
    """
    still = [(row, plain) for plain in ("lda", "lda+query") for row in STILL]
    moving = ("unprojected", "slower .3", "slower .09")
    head = ["row", "read by", "seeds", *(f"to {row}, {plain}" for row, plain in still)]
    head += [
        *(f"to {row}, same" for row in (*moving, RANDOM)),
        "left to the oracle",
        "of the way, %: from lda",
        "from lda+query",
    ]
    cells = []
    for name, own in lines.items():
        for plain in ("lda", "lda+query"):
            column = f"{plain}+linear"
            found = by_seed(own, column, "average_accuracy")
            if not found:
                continue
            bound = {seed: 100 * own[seed]["oracle"][plain][0] for seed in found}
            row = [name, column, str(len(found))]
            row += [less(own, lines.get(one, {}), column, other, "average_accuracy") for one, other in still]
            row += [
                less(own, lines.get(one, {}), column, column, "average_accuracy") for one in (*moving, random_of(name))
            ]
            row.append(emoji.difference(bound, found))
            for start in ("lda", "lda+query"):
                row.append(way(found, bound, [by_seed(lines.get(one, {}), start, "average_accuracy") for one in STILL]))
            cells.append(row)
    return markdown_table(head, cells)


RANDOM = "random directions of its ranks"
"""The heading of what a row is to its `random_of`."""
STILL = ("frozen", "head only")
"""Rows whose features do not move after the first task."""


def way(found: dict[int, float], bound: dict[int, float], floors: list[dict[int, float]]) -> str:
    """Return the share in percent of the way from the higher of the mean `floors` to the bound, over the seeds of all.

    Nothing if that is a way of a point or less.
    """
    seeds = [seed for seed in found if all(seed in floor for floor in floors)]
    if not seeds:
        return ""
    reached, most, *rest = (statistics.mean(one[seed] for seed in seeds) for one in (found, bound, *floors))
    return f"{100 * (reached - max(rest)) / (most - max(rest)):.0f}" if most > max(rest) + 1 else ""


def drifts(lines: Lines) -> str:
    """Return means over old tasks, spaces and seeds, and the forgetting if the task is given."""
    cells = []
    for name, own in lines.items():
        course = DriftHistory(name, [{0: line} for line in own.values()])
        told = [course.last(figure) for heading, figure in STATISTICS.items() if heading in DRIFT]
        within = statistics.mean(line["forgetting_within"]["head"] for line in own.values())
        cells.append([name, *("" if value is None else f"{100 * value:.1f}" for value in (*told, within))])
    return markdown_table(["row", *DRIFT, "own head, forgetting, task known"], cells)


DRIFT = ("features", "logits", "protected responses", "energy held", "removed", "leak", "task identified")
"""Of `pgp.reports.drift.STATISTICS`."""


def by_seed(lines: dict[int, dict[str, Any]], column: str, figure: str) -> dict[int, float]:
    """Return a figure in percent, of the runs that were read so."""
    figures = {seed: line["figures"].get(column) for seed, line in lines.items()}
    return {seed: 100 * found[figure] for seed, found in figures.items() if found}


def values(lines: dict[int, dict[str, Any]], column: str, figure: str) -> list[float]:
    """Return the same without seeds."""
    return list(by_seed(lines, column, figure).values())


def less(
    own: dict[int, dict[str, Any]], other: dict[int, dict[str, Any]], column: str, others: str, figure: str
) -> str:
    """Return the mean difference of a figure to that of another row over the seeds of both, with its standard error."""
    return emoji.difference(by_seed(own, column, figure), by_seed(other, others, figure))


def tune(data: str, root: Path, results: Path, part: int, parts: int, *, tiny: bool = False) -> None:
    """Run each learning rate without projection on the images of `root`, which contain no test image."""
    for lr, share in RATES[data][part - 1 :: parts]:
        if (data, lr, share) not in {
            (line["data"], line["lr"], line["prompt_share"]) for line in records.read(results)
        }:
            rates = Optimizer(lr=lr, prompt_lr_scale=share or 1.0)
            config = replace(base(data, root, 100, tiny=tiny), optimizer=rates)
            if share is None:
                config = replace(config, method=HeadOnly.Config())
            config = replace(config, readouts=(MethodHead.Config(), LDA.Config(), LDA.Config(compensate="linear")))
            records.append(results, {"data": data, "lr": lr, "prompt_share": share, "seed": 100, **measure(config)})


def main(argv: Sequence[str] | None = None) -> None:
    """Tune, run or draw the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("tune", "run", "table"))
    parser.add_argument("--data", choices=("emoji", "kanji"), default="emoji")
    parser.add_argument("--part", type=emoji.share, default=(1, 1), help="which share of the runs, such as 1/2")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(10)))
    parser.add_argument(
        "--rows",
        nargs="+",
        default=[],
        choices=list(rows("emoji")),
        metavar="ROW",
        help="names of rows; all, if none is given",
    )
    parser.add_argument("--tiny", action="store_true", help="rehearse on noise with a tiny encoder; nothing is kept")
    options = parser.parse_args(argv)
    data, tuning, (part, parts) = options.data, options.what == "tune", options.part
    if options.what == "table":
        records.write_page(RESULTS, table())
    elif options.tiny:
        with tempfile.TemporaryDirectory() as scratch:
            root, results = rehearsal.pictures(Path(scratch) / "pictures"), Path(scratch) / RESULTS.name
            if tuning:
                tune(data, root, results, part, parts, tiny=True)
            else:
                run(data, root, results, part, parts, options.seeds[:1], options.rows or TINY_ROWS, tiny=True)
                records.write_page(results, table(results))
    else:
        emoji.get_ready(emoji.WEIGHTS, *([emoji.IMAGES] if data == "emoji" else []))
        root = folder(data, tuning=tuning)
        if tuning:
            tune(data, root, TUNING, part, parts)
        else:
            run(data, root, RESULTS, part, parts, options.seeds, options.rows)


if __name__ == "__main__":
    main()
