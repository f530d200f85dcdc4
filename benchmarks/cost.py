"""Seconds and peak memory of L2P-PGP on ViT-B/16, against a plain baseline measured in the same run.

    python benchmarks/cost.py                     # everything; docs/results/cost.md and cost.jsonl
    python benchmarks/cost.py --memory train ours # one peak, of this process

The baseline is how this family of methods is usually written: two copies of the timm model (one for queries, one
prompted), every block computed for every token, the query computed anew whenever it is needed, the batch in one piece.
Same arithmetic, same prompts, same batch: random weights, 224 px, batch 16. For times, ours and the other take turns in
one process, after a warm-up; a time is the median over rounds and the ratio the median of the rounds' ratios, since the
speed of shared machines drifts. Peak memory is the resident set of a process that does nothing else (Linux only).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from rich.progress import Progress
from torch import Tensor, nn

from pgp import recipes
from pgp.backbones.vit import ViT
from pgp.datasets import Batch, Loading, batches, in_order
from pgp.datasets.synthetic import Synthetic
from pgp.methods import only
from pgp.methods.l2p import L2P
from pgp.projections.orthogonal import Orthogonal
from pgp.run import environment
from pgp.scenario import Task, generator
from pgp.subspace import Protected
from pgp.train import Learner, observe, train_step

ROOT = Path(__file__).resolve().parent.parent
MODEL, SIZE, BATCH, CLASSES = "vit_base_patch16_224.orig_in21k", 224, 16, 100
TASK = Task(0, tuple(range(10)), torch.empty(0), torch.empty(0))


class Baseline(nn.Module):
    """L2P as it is usually written, on two timm models."""

    def __init__(self) -> None:
        super().__init__()
        self.original = timm.create_model(MODEL, num_classes=0).eval().requires_grad_(False)
        self.prompted = timm.create_model(MODEL, num_classes=0).eval().requires_grad_(False)
        width = self.prompted.embed_dim
        self.prompts = nn.Parameter(torch.rand(10, 5, width) * 2 - 1)
        self.key = nn.Parameter(torch.rand(10, width) * 2 - 1)
        self.head = nn.Linear(width, CLASSES)

    def features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            query = self.original.forward_features(images)[:, 0]
        similarity = F.normalize(query, dim=-1) @ F.normalize(self.key, dim=-1).T
        best = similarity.topk(5, dim=-1)
        prompts = self.prompts[best.indices].flatten(1, 2)
        model = self.prompted
        tokens = model._pos_embed(model.patch_embed(images))
        tokens = torch.cat([tokens[:, :1], prompts + model.pos_embed[:, :1], tokens[:, 1:]], dim=1)
        tokens = model.norm(model.blocks(tokens))
        return tokens[:, 1 : 1 + prompts.shape[1]].mean(1), best.values.sum(1).mean()

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        features, pull = self.features(images)
        return F.cross_entropy(only(self.head(features), TASK.classes), labels) - 0.1 * pull


def ours() -> L2P:
    return L2P(L2P.Config(), ViT.Config(MODEL, "random").build(SIZE), CLASSES, generator(0, "init"))


def images(count: int = BATCH) -> Tensor:
    return torch.rand(count, 3, SIZE, SIZE, generator=generator(0, "images"))


def train(kind: str) -> Callable[[], Any]:
    """One training step."""
    batch, labels = images(), torch.arange(BATCH) % 10
    if kind == "baseline":
        model = Baseline()
        learned = [model.prompts, model.key, *model.head.parameters()]
        optimizer = torch.optim.Adam(learned, lr=0.001875)

        def plain() -> None:
            model.loss(batch, labels).backward()
            torch.nn.utils.clip_grad_norm_(learned, 1.0)
            optimizer.step()
            optimizer.zero_grad()

        return plain
    learner = new_learner()
    adam = learner.config.optimizer.build([p for p in learner.method.parameters() if p.requires_grad], BATCH)
    protected = learner.method.protected()
    half_projection(protected, learner.method.backbone.width).attach(adam, protected)
    ready = learner.fabric.setup_optimizers(adam)
    return lambda: train_step(learner, ready, Batch(batch, labels, labels), TASK, BATCH)


def new_learner() -> Learner:
    """The published recipe for CIFAR-100, on noise."""
    recipe = replace(recipes.RECIPES["10cifar100_l2p_pgp"](), dataset=Synthetic(classes=CLASSES, per_class=8))
    config = replace(recipe, backbone=ViT.Config(MODEL, "random"), method=L2P.Config())
    return Learner(Fabric(accelerator="cpu", devices=1), config, Progress(disable=True))


def half_projection(protected: dict[str, Protected], width: int) -> Orthogonal:
    """A projection of rank D/2 in every space, as many directions as a run gathers over its tasks."""
    projection = Orthogonal()
    basis = torch.linalg.qr(torch.randn(width, width // 2, generator=generator(0, "basis"), dtype=torch.float64))[0]
    projection.load_state_dict({space: basis.clone() for space in protected})
    return projection


def evaluation(kind: str) -> Callable[[], Any]:
    """One test batch of a task that was evaluated before: the query is known to ours, and recomputed by the baseline."""
    batch = images()
    with torch.no_grad():
        if kind == "baseline":
            baseline = Baseline()
            return torch.no_grad()(lambda: baseline.head(baseline.features(batch)[0]))
        model = ours()
        query = model.query(batch)
    return torch.no_grad()(lambda: model(batch, query))


def boundary(kind: str, count: int = 192) -> Callable[[], Any]:
    """What follows a task of `count` images: observe them and grow the bases. The baseline is one query pass over them.

    A quarter of the 768 images whose memory is measured suffices for the time: the fewer, the more growing counts.
    """
    learner = new_learner()
    task = replace(TASK, train=torch.arange(count))

    def ours() -> None:
        projection = Orthogonal()
        observe(learner, task, projection, [])
        projection.end_task(learner.method.protected())

    @torch.no_grad()
    def query() -> None:
        for batch in batches(learner.viewed("test", "observed", task), in_order(task.train, BATCH), Loading()):
            learner.method.query(batch.images)

    return ours if kind == "ours" else query


MEASURED: dict[str, tuple[Callable[[str], Callable[[], Any]], str]] = {
    "train": (train, "baseline"),
    "evaluation": (evaluation, "baseline"),
    "boundary": (boundary, "one query pass"),
}
"""By name: what is measured, and against what."""


def autocast(precision: str) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed")


def seconds(acts: dict[str, Callable[[], Any]], rounds: int, precision: str) -> dict[str, list[float]]:
    """Seconds of each act in each round, the acts taking turns."""
    taken: dict[str, list[float]] = {name: [] for name in acts}
    with autocast(precision):
        for number in range(rounds + 1):
            for name, act in acts.items():
                started = time.perf_counter()
                act()
                if number:  # the first round warms up
                    taken[name].append(time.perf_counter() - started)
    return taken


def peak(what: str, kind: str, precision: str, threads: int) -> float:
    """Peak resident memory in GB of a process that does one thing: twice, or the boundary of 768 images once."""
    command = [sys.executable, __file__, "--memory", what, kind, "--precision", precision, "--threads", str(threads)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def peak_of_this_process() -> float:
    """Peak resident memory in GB, by Linux. (`getrusage` would report the parent's peak where that was higher.)"""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 / 1e9


def compare(what: str, precision: str, threads: int, rounds: int) -> dict[str, Any]:
    """Ours and the other."""
    make, other = MEASURED[what]
    taken = seconds({"ours": make("ours"), "other": make(other)}, rounds, precision)
    ratios = [mine / its for mine, its in zip(taken["ours"], taken["other"], strict=True)]
    return {
        "what": what,
        "against": other,
        "precision": precision,
        "ours_seconds": statistics.median(taken["ours"]),
        "other_seconds": statistics.median(taken["other"]),
        "ratio": statistics.median(ratios),
        "ratios": [round(ratio, 3) for ratio in ratios],
        "ours_peak_gb": peak(what, "ours", precision, threads),
        "other_peak_gb": peak(what, other, precision, threads),
    }


def projection_seconds() -> float:
    """Seconds that the projection adds to an optimizer step: the difference of two medians over 30 steps."""
    prompts = {"prompts": torch.nn.Parameter(torch.rand(10, 5, 768)), "keys": torch.nn.Parameter(torch.rand(10, 768))}
    protected = {space: Protected(parameter) for space, parameter in prompts.items()}
    medians = {}
    for on in (False, True):
        optimizer = torch.optim.Adam(prompts.values(), lr=0.001875)
        if on:
            half_projection(protected, 768).attach(optimizer, protected)
        for parameter in prompts.values():
            parameter.grad = torch.rand_like(parameter)
        medians[on] = statistics.median(seconds({"step": optimizer.step}, 30, "32-true")["step"])
    return medians[True] - medians[False]


def has_bf16() -> bool:
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    return "avx512_bf16" in flags or "amx_bf16" in flags


def measure(threads: int, rounds: int) -> str:
    """Everything, as a table; raw figures go to cost.jsonl."""
    about = environment()
    head = f"{about['processor']}, {threads} threads, torch {about['versions']['torch']}, commit {about['commit']}, {rounds} rounds"
    if not has_bf16():
        head += "; this processor has no bf16 arithmetic, so bf16-mixed is not measured"
    lines = [
        head,
        "",
        "| what | against | precision | ours, s | other, s | ratio | ours, GB | other, GB |",
        "|---" * 8 + "|",
    ]
    with (ROOT / "docs" / "results" / "cost.jsonl").open("a") as raw:
        for precision in ("32-true", *(["bf16-mixed"] if has_bf16() else [])):
            for what in MEASURED:
                line = compare(what, precision, threads, rounds)
                raw.write(json.dumps({**line, "commit": about["commit"], "threads": threads}) + "\n")
                lines.append(
                    f"| {what} | {line['against']} | {precision} | {line['ours_seconds']:.2f} | {line['other_seconds']:.2f} |"
                    f" {line['ratio']:.3f} | {line['ours_peak_gb']:.2f} | {line['other_peak_gb']:.2f} |"
                )
                print(lines[-1], flush=True)
                if what == "train":
                    added = projection_seconds()
                    share = 100 * added / line["ours_seconds"]
                    last = f"The projection adds {1000 * added:.1f} ms to a step of {line['ours_seconds']:.2f} s: {share:.2f} %."
    return "\n".join([*lines, "", last]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", nargs=2, metavar=("WHAT", "KIND"))
    parser.add_argument("--precision", default="32-true", choices=("32-true", "bf16-mixed"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    if options.memory:
        what, kind = options.memory
        if what == "boundary":
            seconds({kind: boundary(kind, 768)}, 0, options.precision)
        else:
            seconds({kind: MEASURED[what][0](kind)}, 1, options.precision)
        print(peak_of_this_process())
        return
    table = measure(options.threads, options.rounds)
    (ROOT / "docs" / "results" / "cost.md").write_text(table)
    print(table)


if __name__ == "__main__":
    main()
