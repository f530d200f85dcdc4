"""Seconds and peak memory of L2P-PGP and DualPrompt-PGP on ViT-B/16, against a plain L2P measured in the same run.

    python benchmarks/cost.py                          # everything: lines of docs/results/cost.jsonl, and cost.md from them
    python benchmarks/cost.py --only "L2P evaluation"  # a part, anew
    python benchmarks/cost.py --memory train l2p       # one peak, of this process

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
from pgp.config import Hardware
from pgp.datasets import Batch, Loading, batches, in_order
from pgp.datasets.synthetic import Synthetic
from pgp.environment import environment
from pgp.methods import only
from pgp.projections.orthogonal import Orthogonal
from pgp.scenario import Task, generator
from pgp.subspace import Protected
from pgp.train import Learner, observe, train_step

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results" / "cost.jsonl"
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


def images(count: int = BATCH) -> Tensor:
    return torch.rand(count, 3, SIZE, SIZE, generator=generator(0, "images"))


def train(kind: str, precision: str) -> Callable[[], Any]:
    """One training step."""
    batch, labels = images(), torch.arange(BATCH) % 10
    if kind == "baseline":
        model = Baseline()
        learned = [model.prompts, model.key, *model.head.parameters()]
        optimizer = torch.optim.Adam(learned, lr=0.001875)

        def plain() -> None:
            with autocast(precision):
                loss = model.loss(batch, labels)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(learned, 1.0)
            optimizer.step()
            optimizer.zero_grad()

        return plain
    learner = new_learner(kind, precision)
    adam = learner.config.optimizer.build(learner.method, BATCH)
    protected = learner.method.protected()
    half_projection(protected).attach(adam, protected)
    ready = learner.fabric.setup_optimizers(adam)
    return lambda: train_step(learner, ready, Batch(batch, labels, labels), TASK, BATCH)


def new_learner(kind: str, precision: str) -> Learner:
    """The published recipe for CIFAR-100, on noise."""
    recipe = recipes.RECIPES[f"10cifar100_{kind}_pgp"]()
    data = Synthetic(classes=CLASSES, per_class=8)
    config = replace(recipe, dataset=data, backbone=ViT.Config(MODEL, "random"), batch_size=BATCH)
    config = replace(config, hardware=Hardware("cpu", precision=precision))
    return Learner(Fabric(accelerator="cpu", devices=1, precision=precision), config, Progress(disable=True))


def half_projection(protected: dict[str, Protected]) -> Orthogonal:
    """A projection of half rank in every space, as many directions as a run gathers over its tasks."""
    projection = Orthogonal()
    bases = {}
    for space, target in protected.items():
        width = target.parameter.shape[target.axis]
        draw = torch.randn(width, width // 2, generator=generator(0, "basis"), dtype=torch.float64)
        bases[space] = torch.linalg.qr(draw).Q
    projection.load_state_dict(bases)
    return projection


def evaluation(kind: str, precision: str) -> Callable[[], Any]:
    """One test batch of a task that was evaluated before: the query is known to ours, and recomputed by the baseline."""
    batch = images()
    if kind == "baseline":
        baseline = Baseline()

        def act() -> None:
            baseline.head(baseline.features(batch)[0])
    else:
        model = new_learner(kind, precision).method
        with torch.no_grad(), autocast(precision):
            query = model.query(batch)

        def act() -> None:
            model(batch, query)

    return torch.no_grad()(autocast(precision)(act))


def boundary(kind: str, precision: str, count: int = 192) -> Callable[[], Any]:
    """What follows a task of `count` images: observe them and grow the bases. The baseline is one query pass over them.

    A quarter of the 768 images whose memory is measured suffices for the time: the fewer, the more growing counts.
    """
    learner = new_learner("l2p" if kind == "query" else kind, precision)
    task = replace(TASK, train=torch.arange(count))

    def looking_back() -> None:
        projection = Orthogonal()
        observe(learner, task, projection, [])
        projection.end_task(learner.method.protected())

    @torch.no_grad()
    @autocast(precision)
    def query() -> None:
        for batch in batches(learner.viewed("test", "observed", task), in_order(task.train, BATCH), Loading()):
            learner.method.query(batch.images)

    return query if kind == "query" else looking_back


ACTS: dict[str, Callable[[str, str], Callable[[], Any]]] = {
    "train": train,
    "evaluation": evaluation,
    "boundary": boundary,
}
MEASURED = {
    "L2P train step": ("train", "l2p", "baseline"),
    "L2P evaluation": ("evaluation", "l2p", "baseline"),
    "L2P boundary": ("boundary", "l2p", "query"),
    "DualPrompt train step": ("train", "dualprompt", None),
    "DualPrompt boundary": ("boundary", "dualprompt", None),
}
"""By name: what is done, by which method, and against what; memory alone where against nothing."""
OTHERS = {"baseline": "plain L2P", "query": "a query pass over the same images", None: ""}


def autocast(precision: str) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed")


def seconds(acts: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each act in each round, the acts taking turns."""
    taken: dict[str, list[float]] = {name: [] for name in acts}
    for number in range(rounds + 1):
        for name, act in acts.items():
            started = time.perf_counter()
            act()
            if number:  # the first round warms up
                taken[name].append(time.perf_counter() - started)
    return taken


def peak(act: str, kind: str, precision: str, threads: int) -> float:
    """Peak resident memory in GB of a process that does one thing: twice, or the boundary of 768 images once."""
    command = [sys.executable, __file__, "--memory", act, kind, "--precision", precision, "--threads", str(threads)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def peak_of_this_process() -> float:
    """Peak resident memory in GB, by Linux. (`getrusage` would report the parent's peak where that was higher.)"""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 / 1e9


def compare(what: str, precision: str, threads: int, rounds: int) -> dict[str, Any]:
    """One line of figures."""
    act, kind, other = MEASURED[what]
    line: dict[str, Any] = {"what": what, "against": OTHERS[other], "precision": precision}
    if other:
        acts = {"ours": ACTS[act](kind, precision), "other": ACTS[act](other, precision)}
        if precision != "32-true":
            acts["float32"] = ACTS[act](other, "32-true")
        taken = seconds(acts, rounds)
        for name in list(acts)[1:]:
            ratios = [mine / its for mine, its in zip(taken["ours"], taken[name], strict=True)]
            rounded = [round(ratio, 3) for ratio in ratios]
            line |= {f"ratio_to_{name}": statistics.median(ratios), f"ratios_to_{name}": rounded}
        line |= {f"{name}_seconds": statistics.median(taken[name]) for name in acts}
    line["ours_peak_gb"] = peak(act, kind, precision, threads)
    if other:
        line["other_peak_gb"] = peak(act, other, precision, threads)
    if what == "L2P train step":
        line["projection_seconds"] = projection_seconds()
    return line


def projection_seconds() -> float:
    """Seconds that the projection adds to an optimizer step: the difference of two medians over 30 steps."""
    prompts = {"prompts": torch.nn.Parameter(torch.rand(10, 5, 768)), "keys": torch.nn.Parameter(torch.rand(10, 768))}
    protected = {space: Protected(parameter) for space, parameter in prompts.items()}
    medians = {}
    for on in (False, True):
        optimizer = torch.optim.Adam(prompts.values(), lr=0.001875)
        if on:
            half_projection(protected).attach(optimizer, protected)
        for parameter in prompts.values():
            parameter.grad = torch.rand_like(parameter)
        medians[on] = statistics.median(seconds({"step": optimizer.step}, 30)["step"])
    return medians[True] - medians[False]


def has_bf16() -> bool:
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    return "avx512_bf16" in flags or "amx_bf16" in flags


def table() -> str:
    """The latest line of each kind."""
    lines = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    latest = {(line["what"], line["precision"]): line for line in lines}
    out = [
        "| what | against | precision | ours, s | other, s | ratio (rounds) | to the other in float32 | ours, GB | other, GB |",
        "|---" * 9 + "|",
    ]

    def shown(line: dict[str, Any], name: str, digits: int) -> str:
        return f"{line[name]:.{digits}f}" if name in line else ""

    def rounds(line: dict[str, Any], name: str) -> str:
        return f" ({', '.join(f'{ratio:.2f}' for ratio in line[name])})" if name in line else ""

    for (what, precision), line in latest.items():
        cells = [
            what,
            line["against"],
            precision,
            shown(line, "ours_seconds", 2),
            shown(line, "other_seconds", 2),
            shown(line, "ratio_to_other", 3) + rounds(line, "ratios_to_other"),
            shown(line, "ratio_to_float32", 3) + rounds(line, "ratios_to_float32"),
            shown(line, "ours_peak_gb", 2),
            shown(line, "other_peak_gb", 2),
        ]
        out.append("| " + " | ".join(cells) + " |")
    out.append("")
    for line in latest.values():
        if "projection_seconds" in line:
            added, step = line["projection_seconds"], line["ours_seconds"]
            out.append(
                f"The projection adds {1000 * added:.1f} ms to a step of {step:.2f} s: {100 * added / step:.2f} %."
            )
    about = lines[-1]
    out.append(
        f"{about['processor']}, {about['threads']} threads, torch {about['torch']};"
        f" commits {', '.join(sorted({line['commit'] for line in latest.values()}))}."
    )
    if not has_bf16():
        out.append("This processor has no bf16 arithmetic, so bf16-mixed is not measured.")
    return "\n".join(out) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", nargs=2, metavar=("ACT", "KIND"))
    parser.add_argument("--only", nargs="+", choices=MEASURED, default=list(MEASURED))
    both = ("32-true", "bf16-mixed")
    parser.add_argument("--precision", nargs="+", choices=both, default=both if has_bf16() else both[:1])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    if options.memory:
        (act, kind), (precision, *_) = options.memory, options.precision
        if act == "boundary":
            seconds({kind: boundary(kind, precision, 768)}, 0)
        else:
            seconds({kind: ACTS[act](kind, precision)}, 1)
        print(peak_of_this_process())
        return
    about = environment()
    kept = {"commit": about["commit"], "processor": about["processor"], "torch": about["versions"]["torch"]}
    for precision in options.precision:
        for what in options.only:
            line = compare(what, precision, options.threads, options.rounds)
            with RESULTS.open("a") as raw:
                raw.write(json.dumps({**line, "threads": options.threads, **kept}) + "\n")
    RESULTS.with_suffix(".md").write_text(table())
    print(table())


if __name__ == "__main__":
    main()
