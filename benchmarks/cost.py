"""Measure time and peak memory of L2P-PGP and DualPrompt-PGP on ViT-B/16, next to a plain L2P in the same run.

    python benchmarks/cost.py                          # everything: docs/results/cost.jsonl, and cost.md from it
    python benchmarks/cost.py --only "L2P evaluation"  # a part, anew
    python benchmarks/cost.py --memory train l2p       # one peak, of this process
    python benchmarks/cost.py --tiny                   # a rehearsal in seconds, whose figures mean nothing

The baseline is how this family of methods is usually written: two copies of the timm model (one for queries, one
prompted), every block computed for every token, the query computed anew whenever it is needed, the batch in one piece.
Same arithmetic, same prompts, same batch: random weights, 224 px, batch 16. For times, ours and the other take turns in
one process, after a warm-up; a time is the median over rounds and the ratio the median of the rounds' ratios, since the
speed of shared machines drifts. Peak memory is the resident set of a process that does nothing else (Linux only).
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import timm
import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from rich.progress import Progress
from torch import Tensor, nn

import records
import rehearsal
from pgp import recipes
from pgp.backbones.vit import ViT
from pgp.config import Hardware
from pgp.datasets.loader import Batch, LoaderOptions, batches, sequential_batches
from pgp.datasets.synthetic import Synthetic
from pgp.datasets.transforms import Transforms
from pgp.methods.base import mask_logits
from pgp.projections.orthogonal import Orthogonal
from pgp.rng import make_generator
from pgp.runs.environment import describe_environment
from pgp.scenario import Task
from pgp.subspace import ProtectedParameter
from pgp.system import platforms
from pgp.train import train_step
from pgp.training.observe import observe
from pgp.training.session import Session
from pgp.training.state import TrainState

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results" / "cost.jsonl"
Precision = Literal["32-true", "bf16-mixed"]
VERSION = 2
"""Of this script, in every line of the results; older lines are marked on the page."""
CLASSES = 100
CLEAN = ", clean"
"""Ending of a method's name that trains with `--query clean`: the queries of a batch are known."""
TASK = Task(0, tuple(range(10)), torch.empty(0), torch.empty(0))


class Scale(NamedTuple):
    """How large everything is that is measured."""

    encoder: ViT.Config
    size: int
    """Pixels a side."""
    batch: int
    observed: int
    """Images of a task at whose boundary time is measured. The fewer, the more the growing of bases counts."""
    remembered: int
    """Images of a task at whose boundary memory is measured."""


FULL = Scale(ViT.Config("vit_base_patch16_224.orig_in21k", "random"), 224, 16, 192, 768)
TINY = Scale(rehearsal.ENCODER, rehearsal.SIZE, 4, 8, 8)


class Baseline(nn.Module):
    """L2P as it is usually written, on two timm models."""

    def __init__(self, scale: Scale) -> None:
        """Make both models, with random weights."""
        super().__init__()
        name, arguments = scale.encoder.model, {"img_size": scale.size, "num_classes": 0, **scale.encoder.arguments}
        self.original = timm.create_model(name, **arguments).eval().requires_grad_(False)
        self.prompted = timm.create_model(name, **arguments).eval().requires_grad_(False)
        width = self.prompted.embed_dim
        self.prompts = nn.Parameter(torch.rand(10, 5, width) * 2 - 1)
        self.key = nn.Parameter(torch.rand(10, width) * 2 - 1)
        self.head = nn.Linear(width, CLASSES)

    def features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean output of the prompts `(B, D)`, and how well their keys match."""
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
        """Return the loss over the classes of the task."""
        features, pull = self.features(images)
        return F.cross_entropy(mask_logits(self.head(features), TASK.classes), labels) - 0.1 * pull


def images(scale: Scale) -> Tensor:
    """Return a batch of noise."""
    return torch.rand(scale.batch, 3, scale.size, scale.size, generator=make_generator(0, "images"))


def train(kind: str, precision: Precision, scale: Scale = FULL) -> Callable[[], Any]:
    """Return one training step."""
    batch, labels = images(scale), torch.arange(scale.batch) % 10
    if kind == "baseline":
        model = Baseline(scale)
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
    kind, clean, _ = kind.partition(CLEAN)
    session, state = untrained(kind, precision, scale)
    adam = session.config.optimizer.build(state.method, scale.batch)
    half_projection(state.method.protected()).attach(adam)
    ready = session.fabric.setup_optimizers(adam)
    query = torch.rand(scale.batch, state.method.backbone.width, generator=make_generator(0, "query"))
    whole = Batch(batch, labels, labels, query if clean else None)
    return lambda: train_step(session, state, ready, whole, TASK, scale.batch)


def untrained(kind: str, precision: Precision, scale: Scale) -> tuple[Session, TrainState]:
    """Return the published recipe for CIFAR-100, on noise."""
    recipe = recipes.RECIPES[f"10cifar100_{kind}_pgp"]()
    data = Synthetic(classes=CLASSES, per_class=8)
    config = replace(recipe, dataset=data, backbone=scale.encoder, batch_size=scale.batch)
    config = replace(config, transforms=Transforms(size=scale.size, resize=scale.size * 256 // 224))
    config = replace(config, hardware=Hardware("cpu"), precision=precision)
    session = Session(Fabric(accelerator="cpu", devices=1, precision=precision), config, Progress(disable=True))
    return session, session.new_state()


def half_projection(protected: dict[str, ProtectedParameter]) -> Orthogonal:
    """Return a projection of half rank in every space, as many directions as a run gathers over its tasks."""
    projection = Orthogonal(protected)
    bases = {}
    for space, target in protected.items():
        width = target.parameter.shape[target.axis]
        draw = torch.randn(width, width // 2, generator=make_generator(0, "basis"), dtype=torch.float64)
        bases[space] = torch.linalg.qr(draw).Q
    projection.load_state_dict(bases)
    return projection


def evaluation(kind: str, precision: Precision, scale: Scale = FULL) -> Callable[[], Any]:
    """Return one test batch of a task that was evaluated before: ours knows the query, the baseline recomputes it."""
    batch = images(scale)
    if kind == "baseline":
        baseline = Baseline(scale)

        def act() -> None:
            baseline.head(baseline.features(batch)[0])
    else:
        model = untrained(kind, precision, scale)[1].method
        with torch.no_grad(), autocast(precision):
            query = model.query(batch)

        def act() -> None:
            model(batch, query)

    def without_gradient() -> None:
        with torch.no_grad(), autocast(precision):
            act()

    return without_gradient


def boundary(kind: str, precision: Precision, scale: Scale = FULL) -> Callable[[], Any]:
    """Return what follows a task: observe its images and grow the bases. The baseline is one query pass over them."""
    session, state = untrained("l2p" if kind == "query" else kind, precision, scale)
    task = replace(TASK, train=torch.arange(scale.observed))

    def looking_back() -> None:
        projection = Orthogonal(state.method.protected())
        observe(session, state, task, projection, [])
        projection.end_task()

    def query() -> None:
        with torch.no_grad(), autocast(precision):
            viewed, plan = session.transformed("test", "observed", task), sequential_batches(task.train, scale.batch)
            for batch in batches(viewed, plan, LoaderOptions()):
                state.method.query(batch.images)

    return query if kind == "query" else looking_back


ACTS: dict[str, Callable[[str, Precision, Scale], Callable[[], Any]]] = {
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
    "LoRA train step": ("train", "lora", "vpt"),
    "L2P train step, clean queries": ("train", "l2p, clean", "baseline"),
    "DualPrompt train step, clean queries": ("train", "dualprompt, clean", "dualprompt"),
}
"""By name: what is done, by which method, and against what; memory alone where against nothing."""
OTHERS = {
    "baseline": "plain L2P",
    "query": "a query pass over the same images",
    "vpt": "a step of VPT",
    "dualprompt": "the step with queries of the augmented views",
    None: "",
}


def autocast(precision: Precision) -> torch.autocast:
    """Return the context in which a precision computes."""
    return torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed")


def seconds(acts: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each act in each round, the acts taking turns."""
    taken: dict[str, list[float]] = {name: [] for name in acts}
    for number in range(rounds + 1):
        for name, act in acts.items():
            started = time.perf_counter()
            act()
            if number:  # the first round warms up
                taken[name].append(time.perf_counter() - started)
    return taken


def peak(act: str, kind: str, precision: Precision, threads: int) -> float:
    """Return the peak resident memory in GB of a process that does one thing, see `remember`."""
    command = [sys.executable, __file__, "--memory", act, kind, "--precision", precision, "--threads", str(threads)]
    return float(subprocess.run(command, check=True, capture_output=True, encoding="utf-8").stdout.splitlines()[-1])


def remember(act: str, kind: str, precision: Precision, scale: Scale) -> float:
    """Do one thing twice, or a boundary once, and return the peak resident memory of this process in GB."""
    if act == "boundary":
        seconds({kind: boundary(kind, precision, scale._replace(observed=scale.remembered))}, 0)
    else:
        seconds({kind: ACTS[act](kind, precision, scale)}, 1)
    return peak_of_this_process()


def peak_of_this_process() -> float:
    """Return the peak resident memory in GB.

    It is not read from `getrusage`, which reports the peak of the parent process if that was higher.
    """
    status = Path("/proc/self/status")
    if not status.is_file():
        sys.exit("expected Linux, which reports the peak memory of a process in /proc/self/status; leave --memory out")
    (line,) = (line for line in status.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 / 1e9


def compare(what: str, precision: Precision, threads: int, rounds: int, scale: Scale = FULL) -> dict[str, Any]:
    """Return one line of figures; of a rehearsal, without peaks of memory."""
    act, kind, other = MEASURED[what]
    line: dict[str, Any] = {"what": what, "against": OTHERS[other], "precision": precision, "version": VERSION}
    if other:
        acts = {"ours": ACTS[act](kind, precision, scale), "other": ACTS[act](other, precision, scale)}
        if precision != "32-true":
            acts["float32"] = ACTS[act](other, "32-true", scale)
        taken = seconds(acts, rounds)
        for name in list(acts)[1:]:
            ratios = [mine / its for mine, its in zip(taken["ours"], taken[name], strict=True)]
            rounded = [round(ratio, 3) for ratio in ratios]
            line |= {f"ratio_to_{name}": statistics.median(ratios), f"ratios_to_{name}": rounded}
        line |= {f"{name}_seconds": statistics.median(taken[name]) for name in acts}
    if scale is FULL:
        line |= {"ours_peak_gb": peak(act, kind, precision, threads)}
        line |= {"other_peak_gb": peak(act, other, precision, threads)} if other else {}
    elif not other:
        seconds({"ours": ACTS[act](kind, precision, scale)}, rounds)
    if what == "L2P train step":
        line["projection_seconds"] = projection_seconds()
    return line


def projection_seconds() -> float:
    """Return the seconds that the projection adds to an optimizer step: the difference of two medians over 30 steps."""
    prompts = {"prompts": torch.nn.Parameter(torch.rand(10, 5, 768)), "keys": torch.nn.Parameter(torch.rand(10, 768))}
    protected = {space: ProtectedParameter(parameter) for space, parameter in prompts.items()}
    medians = {}
    for on in (False, True):
        optimizer = torch.optim.Adam(prompts.values(), lr=0.001875)
        if on:
            half_projection(protected).attach(optimizer)
        for parameter in prompts.values():
            parameter.grad = torch.rand_like(parameter)
        medians[on] = statistics.median(seconds({"step": optimizer.step}, 30)["step"])
    return medians[True] - medians[False]


def has_bf16() -> bool:
    """Return whether the processor multiplies in bfloat16."""
    flags = platforms.cpu_facts().get("flags", "").split()
    return "avx512_bf16" in flags or "amx_bf16" in flags


def table(results: Path = RESULTS) -> str:
    """Return the latest line of each kind."""
    lines = list(records.read(results))
    latest = {(line["what"], line["precision"]): line for line in lines}
    head = ["what", "against", "precision", "ours, s", "other, s", "ratio (rounds)", "to the other in float32"]
    out = [f"| {' | '.join([*head, 'ours, GB', 'other, GB'])} |", "|---" * 9 + "|"]

    def shown(line: dict[str, Any], name: str, digits: int) -> str:
        return f"{line[name]:.{digits}f}" if name in line else ""

    def rounds(line: dict[str, Any], name: str) -> str:
        return f" ({', '.join(f'{ratio:.2f}' for ratio in line[name])})" if name in line else ""

    for (what, precision), line in latest.items():
        cells = [
            what if current(line) else f"{what} *",
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
    if not all(map(current, latest.values())):
        out.append(STALE)
    about = lines[-1]
    out.append(
        f"{about['processor']}, {about['threads']} threads, torch {about['torch']};"
        f" commits {', '.join(sorted({line['commit'] for line in latest.values()}))}."
    )
    if not any(precision == "bf16-mixed" for _, precision in latest):
        out.append("bf16-mixed was not measured: it needs a processor with bf16 arithmetic.")
    return "\n".join(out) + "\n"


def current(line: dict[str, Any]) -> bool:
    """Return whether a line was measured by the script as it is."""
    return bool(line.get("version") == VERSION)


STALE = (
    "*: measured before the script broke (it imported a name that had moved, and did not start); what it measures has"
    " changed since, the projection's hooks among it. To be measured anew."
)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", nargs=2, metavar=("ACT", "KIND"))
    parser.add_argument("--only", nargs="+", choices=MEASURED, default=list(MEASURED))
    both = ("32-true", "bf16-mixed")
    parser.add_argument("--precision", nargs="+", choices=both, default=both if has_bf16() else both[:1])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help="rehearse on a tiny encoder; nothing is kept")
    options = parser.parse_args(argv)
    scale = TINY if options.tiny else FULL
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    if options.memory:
        (act, kind), (precision, *_) = options.memory, options.precision
        print(remember(act, kind, precision, scale))
        return
    about = describe_environment()
    kept = {"commit": about["commit"], "processor": about["processor"], "torch": about["versions"]["torch"]}
    with tempfile.TemporaryDirectory() as scratch:
        results = Path(scratch) / RESULTS.name if options.tiny else RESULTS
        for precision in options.precision:
            for what in options.only:
                line = compare(what, precision, options.threads, options.rounds, scale)
                records.append(results, {**line, "threads": options.threads, **kept})
        records.write_page(results, table(results))


if __name__ == "__main__":
    main()
