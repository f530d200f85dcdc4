"""Compare readouts of frozen features with readouts of prompts that learn, on three data sets.

    python benchmarks/readouts.py tune --data mixed               # tune learning rates, on images for tuning only
    python benchmarks/readouts.py run --data emoji --part 1/2 &   # run rows and seeds that are not in the results
    python benchmarks/readouts.py run --data emoji --part 2/2
    python benchmarks/readouts.py table                           # write docs/results/readouts.md
    python benchmarks/readouts.py run --tiny                      # test a few rows on noise

`--data emoji` are 200 emoji, `kanji` 200 characters (benchmarks/kanji_data.py), and `mixed` digits, clothing, emoji and
characters in turn (benchmarks/mixed_data.py). All need ../shared/backbones/vit_small_patch14_imgfocus.safetensors, and
emoji and mixed ../shared/data/emoji_renditions_200.npz. The files in ../shared are not part of the project.

Each finished run is one line of docs/results/readouts.jsonl (for tune, of readouts_tuning.jsonl), and is not run again.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

import emoji
import mixed_data
import protection
import records
import rehearsal
from pgp.config import Config, Optimizer
from pgp.evaluation import metrics
from pgp.evaluation.calibration import calibration_error_by_chance, logged_bins
from pgp.evaluation.unknown import auroc, false_positive_rate
from pgp.methods.base import Method
from pgp.methods.coda_prompt import CODAPrompt
from pgp.methods.head_only import HeadOnly
from pgp.methods.lora import LoRA
from pgp.methods.vpt import VPT
from pgp.predict import Predictor
from pgp.projections.base import NoProjection, Projection
from pgp.projections.orthogonal import Orthogonal
from pgp.projections.random import RandomBasis
from pgp.projections.soft import Soft
from pgp.readouts.base import Readout
from pgp.readouts.experts import ExpertLDA
from pgp.readouts.head import MethodHead
from pgp.readouts.lda import LDA, NCM
from pgp.readouts.logistic import Logistic
from pgp.readouts.ranpac import RanPAC
from pgp.reports.drift import mean_of
from pgp.reports.tables import markdown_table
from pgp.runs.checkpoint import CheckpointName
from pgp.runs.environment import describe_environment
from pgp.runs.run import Run
from pgp.train import train
from pgp.training.tasks import build_tasks

RESULTS = emoji.ROOT / "docs" / "results" / "readouts.jsonl"
TUNING = emoji.ROOT / "docs" / "results" / "readouts_tuning.jsonl"
DATA = ("emoji", "kanji", "mixed")
RATES = (0.01, 0.03, 0.1, 0.3)
"""Learning rates that `tune` tries if none are named; prompts learn at a tenth of them."""
TUNED = (
    "VPT, unprojected",
    "VPT, frozen after task 1",
    "VPT, input .99",
    "VPT, affinity+aggregation .9",
    "LoRA, unprojected",
    "LoRA, frozen after task 1",
    "LoRA, input .99",
    "LoRA, experts",
    "CODA, unprojected",
    "CODA, frozen after task 1",
    "CODA, keys+values .99",
)
"""Rows that `tune` runs. Slowed prompts take the rate of unprojected ones, random directions that of the true ones."""
ENERGIES = (0.9, 0.97, 0.99, 0.999)
"""Energies that projections of LoRA hold; they all take the rate that is best at .99."""
RIDGES = (0.1, 0.01, 0.001)
"""lambda of the soft rule for LoRA, at the same rate."""
TINY_ROWS = ("frozen features", "VPT, input .99", "VPT, random, ranks of input .99")
"""Rows that a rehearsal runs, if none are named."""
FROZEN: tuple[Readout.Config, ...] = (
    NCM.Config(),
    LDA.Config(),
    LDA.Config(shrinkage=None),
    LDA.Config(normalize=True),
    LDA.Config(patches=True),
    LDA.Config(patches=True, normalize=True),
    LDA.Config(patches=True, normalize=True, shrinkage=None),
    Logistic.Config(draws=16),
    RanPAC.Config(dimensions=2000),
    RanPAC.Config(dimensions=2000, patches=True, normalize=True),
)
"""Readouts of frozen features."""
PROMPTED: tuple[Readout.Config, ...] = (
    MethodHead.Config(),
    *(
        LDA.Config(query=wide, patches=wide, normalize=True, compensate=how)
        for wide in (False, True)
        for how in ("none", "linear")
    ),
    LDA.Config(query=True, patches=True, normalize=True, compensate="nearby"),
)
"""Readouts of features with prompts; the wide ones also use the frozen features."""
EXPERTS: tuple[Readout.Config, ...] = (
    ExpertLDA.Config(normalize=True),
    ExpertLDA.Config(query=True, normalize=True),
    ExpertLDA.Config(query=True, patches=True, normalize=True),
)
"""Readouts of experts."""


def folder(data: str, *, tuning: bool) -> Path:
    """Return the image folder of a data set; the one for tuning contains no test image."""
    if data == "mixed":
        return mixed_data.folder("validation") if tuning else mixed_data.folder()
    return protection.folder(data, tuning=tuning)


def base(data: str, root: Path, seed: int, *, tiny: bool = False) -> Config:
    """Return the settings that all rows share: 84 px, float32, two augmented views for the readouts."""
    config = protection.base("kanji" if data == "kanji" else "emoji", root, seed)
    config = replace(config, name=data, views=2, precision="32-true")
    if data == "mixed":
        config = replace(config, tasks=None, shuffle=False)  # tasks.json has the tasks
    return rehearsal.tiny(config, root) if tiny else config


def optimizer(data: str, row: str, scale: float = 1.0) -> Optimizer:
    """Return the optimizer of a row; from the second task on, it multiplies the prompts' learning rate by `scale`."""
    return Optimizer(lr=best_rate(data, row), prompt_lr_scale=0.1, later_prompt_lr_scale=scale)


def best_rate(data: str, row: str) -> float:
    """Return the rate with the highest accuracy of a tuned row, by its best readout, on images for tuning only.

    A row of which not more than one rate was tried on a data set takes the rate of the mixed one, which has classes of
    all others.
    """
    row = "LoRA, input .99" if row.startswith(("LoRA, input", "LoRA, soft")) else row
    for tuned_on in (data, "mixed"):
        found = {
            max(one["average_accuracy"] for one in line["figures"].values()): line["lr"]
            for line in records.read(TUNING)
            if (line["data"], line["row"]) == (tuned_on, row)
        }
        if len(found) > 1:
            return float(found[max(found)])
    return RATES[0]


def rows(data: str) -> dict[str, dict[str, Any]]:
    """Return the settings of each row that differ from `base`, by name."""
    frozen = {"method": HeadOnly.Config(learns=False), "projection": NoProjection.Config(), "readouts": FROZEN,
              "drift_images": 0}  # fmt: skip
    ranpac = RanPAC.Config(patches=True, normalize=True)
    lora = LoRA.Config()
    protected: dict[str, tuple[Method.Config, Projection.Config]] = {}
    protected |= {"input " + str(energy)[1:]: (lora, orthogonal(energy)) for energy in ENERGIES}
    protected |= {"soft " + str(ridge)[1:]: (lora, Soft.Config(ridge)) for ridge in RIDGES}
    return {
        "frozen features": frozen,
        "frozen features, no views": {**frozen, "views": 0},
        "frozen features, RanPAC as published": {**frozen, "readouts": (ranpac,)},
        **family("VPT", data, VPT.Config(length=8), {
            "input .99": (VPT.Config(length=8), orthogonal(0.99)),
            "affinity+aggregation .9": (VPT.Config(length=8, protect="affinity+aggregation"), orthogonal(0.9)),
        }),
        **family("LoRA", data, lora, protected),
        "LoRA, experts": experts(data, "LoRA, experts", lora),
        **family("CODA", data, CODAPrompt.Config(), {
            "keys+values .99": (CODAPrompt.Config(protect="keys+values"), orthogonal(0.99)),
        }),
    }  # fmt: skip


def experts(data: str, row: str, method: Method.Config) -> dict[str, Any]:
    """Return the settings of a row with an expert for each task, of which an image passes through two."""
    changes = {"method": method, "experts": "task", "expert_candidates": 2, "projection": NoProjection.Config()}
    return {**changes, "readouts": EXPERTS, "optimizer": optimizer(data, row), "drift_images": 0}


def orthogonal(energy: float) -> Orthogonal.Config:
    """Return the projection of updates that holds this share of the energy of old inputs."""
    return Orthogonal.Config("input", energy, apply_to="update")


def family(
    name: str, data: str, method: Method.Config, protected: Mapping[str, tuple[Method.Config, Projection.Config]]
) -> dict[str, dict[str, Any]]:
    """Return the rows of one kind of method: unprojected, slowed, frozen, and projected with their random twins.

    Args:
        name: Name of the method in the rows.
        data: Name of the data set.
        method: The method without projection.
        protected: By name of a row, the method and its projection.
    """
    plain = {"method": method, "projection": NoProjection.Config(), "readouts": PROMPTED}
    unprojected, frozen = f"{name}, unprojected", f"{name}, frozen after task 1"
    found = {
        unprojected: {**plain, "optimizer": optimizer(data, unprojected)},
        f"{name}, slower .09": {**plain, "optimizer": optimizer(data, unprojected, 0.09)},
        frozen: {**plain, "optimizer": optimizer(data, frozen, 0.0)},
    }
    for label, (own, projection) in protected.items():
        changes = {**plain, "method": own, "optimizer": optimizer(data, f"{name}, {label}")}
        found[f"{name}, {label}"] = {**changes, "projection": projection}
        if isinstance(projection, Orthogonal.Config):
            twin = RandomBasis.Config(**asdict(projection))
            found[f"{name}, random, ranks of {label}"] = {**changes, "projection": twin}
    return found


def measure(config: Config) -> dict[str, Any]:
    """Run once, in a temporary folder, and return the final figures by readout, in [0, 1].

    Unknown images are looked for by every readout of frozen features, and by the widest ones of features that learn,
    without compensation and with that of classes nearby.
    """
    scratch = Path(tempfile.mkdtemp())
    started = time.perf_counter()
    try:
        run = train(config, scratch / "run")
        seconds = time.perf_counter() - started
        *_, last = run.events("task")
        figures = {
            column: {
                "average_accuracy": metrics.average_accuracy(matrix),
                "forgetting": metrics.forgetting(matrix),
                "calibration_error": last["calibration"][column]["error"],
                "calibration_error_by_chance": calibration_error_by_chance(logged_bins(last["calibration"][column])),
                "accuracy_within_task": sum(last["within"][column]) / len(last["within"][column]),
                "task_found": sum(last["identified"][column]) / len(last["identified"][column]),
            }
            for column, matrix in run.matrices().items()
        }
        for column, found in unknown(run).items():
            figures[column] |= found
    finally:
        shutil.rmtree(scratch)
    about = describe_environment()
    kept = {key: about[key] for key in ("commit", "processor", "vectors", "threads")}
    kept["precision"] = config.precision
    if "drift" in last:
        kept["drift"] = mean_of(last["drift"]["features"])
    return {"seconds": round(seconds, 1), "figures": figures, "readouts": last["readouts"], **kept}


def unknown(run: Run) -> dict[str, dict[str, float]]:
    """Return, by readout, how well images of the last task are told apart before it is learned."""
    data, scenario = build_tasks(run.config)
    tasks = scenario.tasks
    (run.checkpoints.folder / "latest").write_text(str(CheckpointName(len(tasks) - 1)), encoding="utf-8", newline="\n")
    found = {}
    learns = not isinstance(run.config.method, HeadOnly.Config)
    for readout in run.config.readouts:
        if learns and not readout.name.removesuffix("+nearby").endswith("+query+patches+normalize"):
            continue
        predictor = Predictor(run, readout.name)
        if not predictor.detects_unknown:
            continue
        known, others = (
            torch.cat(
                [predictor.unknown_scores(list(map(data.test.image, some.tolist()))) for some in images.split(64)]
            )
            for images in (torch.cat([task.test for task in tasks[:-1]]), tasks[-1].test)
        )
        threshold = predictor.unknown_threshold(0.05)
        found[readout.name] = {
            "auroc": auroc(known, others),
            "fpr95": false_positive_rate(known, others),
            "known_kept": float((known <= threshold).float().mean()),
            "unknown_rejected": float((others > threshold).float().mean()),
        }
    return found


def run(
    data: str, root: Path, results: Path, part: int, parts: int, seeds: Sequence[int], wanted: Sequence[str], tiny: bool
) -> None:
    """Run every row and seed that is not in the results yet; if rows are `wanted`, only those."""
    jobs = [(name, seed) for seed in seeds for name in rows(data) if not wanted or name in wanted]
    for name, seed in jobs[part - 1 :: parts]:
        if (data, name, seed) not in {(line["data"], line["row"], line["seed"]) for line in records.read(results)}:
            config = replace(base(data, root, seed, tiny=tiny), **rows(data)[name])
            records.append(results, {"data": data, "row": name, "seed": seed, **measure(config)})


def tune(
    data: str, root: Path, results: Path, part: int, parts: int, rates: Sequence[float], wanted: Sequence[str],
    tiny: bool,
) -> None:  # fmt: skip
    """Run tuned rows with each learning rate on the images of `root`, which contain no test image."""
    jobs = [(row, lr) for row in TUNED for lr in rates if not wanted or row in wanted]
    for row, lr in jobs[part - 1 :: parts]:
        if (data, row, lr) not in {(line["data"], line["row"], line["lr"]) for line in records.read(results)}:
            config = replace(base(data, root, 100, tiny=tiny), **rows(data)[row])
            config = replace(config, optimizer=replace(config.optimizer, lr=lr))
            records.append(results, {"data": data, "row": row, "lr": lr, "seed": 100, **measure(config)})


def is_trained(row: str) -> bool:
    """Return whether a row trains something."""
    return not row.startswith("frozen features")


Lines = dict[int, dict[str, Any]]
"""By seed, a line of the results."""


def table(results: Path = RESULTS) -> str:
    """Return the tables of each data set."""
    out = []
    for data in DATA:
        lines: dict[str, Lines] = {name: {} for name in rows(data)}
        for line in records.read(results):
            if line["data"] == data:
                lines.setdefault(line["row"], {})[line["seed"]] = line  # rows of older settings come last
        lines = {name: own for name, own in lines.items() if own}
        if lines:
            out += [f"## {data}", "", EXPLANATION, "", figures(lines), ""]
            if any(is_trained(name) for name in lines):
                row, readout = FROZEN_BASELINE
                out += [DIFFERENCES.format(row=row, readout=readout), "", differences(lines), ""]
    return "\n".join(out)


EXPLANATION = (
    "Means ± standard deviations over seeds, in %. Drift is the relative change of old features since their task, the"
    " mean over old tasks; older lines do not have it. AUROC and false positives are of test images of the last task,"
    " before it is learned, against those of all others; 5 % of held-out training images are above the threshold."
)
DIFFERENCES = (
    "Average accuracy, less that of `{readout}` on {row}, and less that of the same readout in other rows: seed by"
    " seed, ± standard error, in points."
)


def figures(lines: dict[str, Lines]) -> str:
    """Return accuracy, forgetting, calibration and unknown images of every row and readout."""
    cells = []
    for name, own in lines.items():
        for column in next(iter(own.values()))["figures"]:
            names = ("average_accuracy", "forgetting", "calibration_error", "calibration_error_by_chance", "auroc",
                     "fpr95", "known_kept")  # fmt: skip
            found = [
                [100 * line["figures"][column][one] for line in own.values() if one in line["figures"][column]]
                for one in names
            ]
            fits = [line["readouts"][column] for line in own.values() if column in line["readouts"]]
            cost = ["", ""]
            if fits:
                cost = [f"{max(fit['bytes'] for fit in fits) / 1e6:.1f}", f"{max(fit['seconds'] for fit in fits):.1f}"]
            drift = [100 * line["drift"] for line in own.values() if line.get("drift") is not None]
            spreads = (emoji.spread(values) if values else "" for values in (drift, *found))
            cells.append([name, column, str(len(own)), *spreads, *cost])
    head = ["row", "readout", "seeds", "drift", "accuracy", "forgetting", "calibration error", "by chance", "AUROC",
            "false positives", "kept by the threshold", "MB", "seconds of the last fit"]  # fmt: skip
    return markdown_table(head, cells)


FROZEN_BASELINE = ("frozen features", "lda+patches+normalize")
"""Row and readout of frozen features that trained rows are compared with.

It is the default of the recipe `quick`; no test image chose it.
"""


def differences(lines: dict[str, Lines]) -> str:
    """Return paired differences of each trained row, by readout: to frozen features, and to baselines of its method."""
    frozen, readout = FROZEN_BASELINE
    cells = []
    for name, own in lines.items():
        method, _, label = name.partition(", ")
        for column in next(iter(own.values()))["figures"] if is_trained(name) else ():
            if column == "head":
                continue
            compared = [protection.less(own, lines[frozen], column, readout, "average_accuracy")]
            for other in (*BASELINES, f"random, ranks of {label}"):
                found = lines.get(f"{method}, {other}", {})
                if found is own or label.startswith("experts"):
                    found = {}
                compared.append(protection.less(own, found, column, column, "average_accuracy") if found else "")
            cells.append([name, column, *compared])
    return markdown_table(
        ["row", "readout", f"to {frozen}, {readout}", *(f"to {other}" for other in BASELINES), "to random"], cells
    )


BASELINES = ("unprojected", "slower .09", "frozen after task 1")
"""Rows of a method that its other rows are compared with."""


def main(argv: Sequence[str] | None = None) -> None:
    """Tune, run or draw the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("tune", "run", "table"))
    parser.add_argument("--data", choices=DATA, default="emoji")
    parser.add_argument("--part", type=emoji.share, default=(1, 1), help="which share of the runs, such as 1/2")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(5)))
    parser.add_argument("--rows", nargs="+", default=[], choices=list(rows("emoji")), metavar="ROW",
                        help="names of rows; all, if none is given")  # fmt: skip
    parser.add_argument("--rates", type=float, nargs="+", default=list(RATES), help="learning rates that tune tries")
    parser.add_argument("--tiny", action="store_true", help="rehearse on noise with a tiny encoder; nothing is kept")
    options = parser.parse_args(argv)
    data, tuning, (part, parts) = options.data, options.what == "tune", options.part
    if options.what == "table":
        records.write_page(RESULTS, table())
    elif options.tiny:
        with tempfile.TemporaryDirectory() as scratch:
            root, results = rehearsal.pictures(Path(scratch) / "pictures"), Path(scratch) / RESULTS.name
            if tuning:
                tune(data, root, results, part, parts, options.rates, options.rows, True)
            else:
                run(data, root, results, part, parts, options.seeds[:1], options.rows or TINY_ROWS, True)
                records.write_page(results, table(results))
    else:
        emoji.get_ready(emoji.WEIGHTS, *([] if data == "kanji" else [emoji.IMAGES]))
        root = folder(data, tuning=tuning)
        if tuning:
            tune(data, root, TUNING, part, parts, options.rates, options.rows, False)
        else:
            run(data, root, RESULTS, part, parts, options.seeds, options.rows, False)


if __name__ == "__main__":
    main()
