"""Seconds and peak memory of L2P-PGP on ViT-B/16, against a plain baseline measured in the same run.

    python benchmarks/cost.py                     # everything; docs/results/cost.md and cost.jsonl
    python benchmarks/cost.py --only train ours   # one measurement, in this process

The baseline is how this family of methods is usually written: two copies of the timm model (one for queries, one
prompted), every block computed for every token, the query computed anew whenever it is needed, the batch in one piece.
Same arithmetic, same prompts, same batch. Each line runs in a process of its own: random weights, 224 px, batch 16. Ours and the baseline take
turns, five rounds; times are medians and the ratio is the median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import json
import resource
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
from pgp.datasets import Batch
from pgp.datasets.synthetic import Synthetic
from pgp.methods import Method, only
from pgp.methods.l2p import L2P
from pgp.projections.orthogonal import Orthogonal
from pgp.run import environment
from pgp.scenario import Task, generator
from pgp.train import Learner, train_step

ROOT = Path(__file__).resolve().parent.parent
MODEL, SIZE, BATCH, CLASSES, BOUNDARY = "vit_base_patch16_224.orig_in21k", 224, 16, 100, 768
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
    """One training step. `unprojected` is ours without a projection."""
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
    recipe = replace(recipes.RECIPES["10cifar100_l2p_pgp"](), dataset=Synthetic(classes=CLASSES, per_class=3))
    config = replace(recipe, backbone=ViT.Config(MODEL, "random"), method=L2P.Config())
    learner = Learner(Fabric(accelerator="cpu", devices=1), config, Progress(disable=True))
    adam = config.optimizer.build([p for p in learner.method.parameters() if p.requires_grad], BATCH)
    if kind == "ours":
        half_projection(learner.method).attach(adam, learner.method.protected())
    ready = learner.fabric.setup_optimizers(adam)
    return lambda: train_step(learner, ready, Batch(batch, labels, labels), TASK, BATCH)


def half_projection(method: Method) -> Orthogonal:
    """A projection of rank D/2 in every space, as many directions as a run gathers over its tasks."""
    projection, width = Orthogonal(), method.backbone.width
    basis = torch.linalg.qr(torch.randn(width, width // 2, generator=generator(0, "basis"), dtype=torch.float64))[0]
    projection.load_state_dict({space: basis.clone() for space in method.protected()})
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


def boundary(kind: str) -> Callable[[], Any]:
    """What follows a task of 768 images: observe them all and grow the bases. The baseline is one query pass over them."""
    model, batch = ours(), images()

    @torch.no_grad()
    def observe() -> None:
        projection = Orthogonal()
        for _ in range(BOUNDARY // BATCH):
            for space, rows in model.activations(batch).items():
                projection.observe(space, rows)
        projection.end_task(model.protected())

    @torch.no_grad()
    def query() -> None:
        for _ in range(BOUNDARY // BATCH):
            model.query(batch)

    return observe if kind == "ours" else query


MEASURED: dict[str, tuple[Callable[[str], Callable[[], Any]], str, int]] = {
    "train": (train, "baseline", 3),
    "projection": (train, "unprojected", 3),
    "evaluation": (evaluation, "baseline", 3),
    "boundary": (boundary, "baseline", 1),
}
"""By name: what is measured, against what, and how often within a process."""


def measure(what: str, kind: str, precision: str, threads: int) -> dict[str, Any]:
    """Median seconds and peak resident memory of one kind, in this process."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    make, _, times = MEASURED[what]
    seconds = []
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
        act = make(kind)
        if times > 1:
            act()  # the first call allocates
        for _ in range(times):
            started = time.perf_counter()
            act()
            seconds.append(time.perf_counter() - started)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2
    return {"seconds": statistics.median(seconds), "peak_gib": peak}


def in_a_process(what: str, kind: str, precision: str, threads: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--only", what, kind, "--precision", precision, "--threads", str(threads)]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    result: dict[str, Any] = json.loads(out.splitlines()[-1])
    return result


def compare(what: str, precision: str, threads: int, rounds: int) -> dict[str, Any]:
    """Ours and the other in turn."""
    other = MEASURED[what][1]
    pairs = [[in_a_process(what, kind, precision, threads) for kind in ("ours", other)] for _ in range(rounds)]
    return {
        "what": what,
        "against": other if what != "boundary" else "one query pass",
        "precision": precision,
        "ours_seconds": statistics.median(mine["seconds"] for mine, _ in pairs),
        "other_seconds": statistics.median(its["seconds"] for _, its in pairs),
        "ratio": statistics.median(mine["seconds"] / its["seconds"] for mine, its in pairs),
        "ratios": [round(mine["seconds"] / its["seconds"], 3) for mine, its in pairs],
        "ours_peak_gib": max(mine["peak_gib"] for mine, _ in pairs),
        "other_peak_gib": max(its["peak_gib"] for _, its in pairs),
        "threads": threads,
        "rounds": rounds,
    }


def has_bf16() -> bool:
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    return "avx512_bf16" in flags or "amx_bf16" in flags


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs=2, metavar=("WHAT", "KIND"))
    parser.add_argument("--precision", default="32-true", choices=("32-true", "bf16-mixed"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if options.only:
        print(json.dumps(measure(*options.only, options.precision, options.threads)))
        return
    about = environment()
    lines = [f"{about['processor']}, {options.threads} threads, torch {about['versions']['torch']},"
             f" commit {about['commit']}, medians of {options.rounds} rounds"]  # fmt: skip
    if not has_bf16():
        lines[0] += "; this processor has no bf16 arithmetic, so bf16-mixed is not measured"
    lines += [
        "",
        "| what | against | precision | ours, s | other, s | ratio | ours, GiB | other, GiB |",
        "|---" * 8 + "|",
    ]
    raw = (ROOT / "docs" / "results" / "cost.jsonl").open("a")
    for precision in ("32-true", *(["bf16-mixed"] if has_bf16() else [])):
        for what in MEASURED:
            line = compare(what, precision, options.threads, options.rounds)
            raw.write(json.dumps({**line, "commit": about["commit"], "processor": about["processor"]}) + "\n")
            lines.append(f"| {what} | {line['against']} | {precision} | {line['ours_seconds']:.3f} |"
                         f" {line['other_seconds']:.3f} | {line['ratio']:.3f} | {line['ours_peak_gib']:.2f} |"
                         f" {line['other_peak_gib']:.2f} |")  # fmt: skip
            print(lines[-1], flush=True)
    (ROOT / "docs" / "results" / "cost.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
