"""Measure a training step on a GPU next to the plain forward and backward pass of the same encoder.

    python benchmarks/gpu.py                       # docs/results/gpu.jsonl, and gpu.md from it
    python benchmarks/gpu.py --precision tf32      # one precision
    python benchmarks/gpu.py --tiny                # a rehearsal, on a CPU if there is no GPU; nothing is kept

The plain pass is timm's ViT-B/16, frozen except for its linear head and its CLS token: one forward pass, and one
backward pass through all blocks, without prompts, queries, projection or optimizer. A step of L2P-PGP or DualPrompt-PGP
has a second forward pass, for the queries. Both are uncompiled unless `compiled` says that ours is. They take turns; a
speed is the median over rounds. Images are on the device already. Utilisation is the part of the time in which the GPU
computes, as its driver reports it while steps run; memory is the peak that torch allocates.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, get_args

import timm
import torch
import torch.nn.functional as F
from rich.progress import Progress

import records
import rehearsal
from pgp import recipes
from pgp.backbones.vit import ViT
from pgp.config import Config, Hardware
from pgp.datasets.loader import Batch
from pgp.datasets.synthetic import Synthetic
from pgp.datasets.transforms import Transforms
from pgp.precision import Precision
from pgp.rng import make_generator
from pgp.runs.environment import describe_environment
from pgp.scenario import Task
from pgp.train import train_step
from pgp.training.devices import build_fabric
from pgp.training.session import Session

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results" / "gpu.jsonl"
CLASSES = 100
TASK = Task(0, tuple(range(10)), torch.empty(0), torch.empty(0))


class Scale(NamedTuple):
    """How large everything is that is measured."""

    encoder: ViT.Config
    size: int
    """Pixels a side."""
    batch: int
    steps: int
    """Steps of a round."""


FULL = Scale(ViT.Config("vit_base_patch16_224.orig_in21k", "random"), 224, 128, 20)
TINY = Scale(rehearsal.ENCODER, rehearsal.SIZE, 4, 2)


def settings(kind: str, precision: Precision, scale: Scale, *, compiled: bool) -> Config:
    """Return the published recipe for CIFAR-100, on noise."""
    recipe = recipes.RECIPES[f"10cifar100_{kind}_pgp"]()
    hardware = Hardware(micro_batch_size=scale.batch, compile=compiled)
    return replace(
        recipe,
        dataset=Synthetic(classes=CLASSES, per_class=8),
        backbone=scale.encoder,
        batch_size=scale.batch,
        transforms=Transforms(size=scale.size, resize=scale.size * 256 // 224),
        hardware=hardware,
        precision=precision,
    )


def ours(config: Config, scale: Scale) -> Callable[[], Any]:
    """Return one training step, with its projection."""
    session = Session(build_fabric(config), config, Progress(disable=True))
    state = session.new_state()
    projection = state.projection
    for space, target in projection.protected.items():  # half of all directions are protected
        width = target.parameter.shape[target.axis]
        draw = torch.randn(width, width // 2, generator=make_generator(0, "basis"), dtype=torch.float64)
        projection.bases[space] = torch.linalg.qr(draw).Q
    plain = config.optimizer.build(state.method, scale.batch, fused=session.scaler is not None)
    projection.attach(plain)
    optimizer = session.fabric.setup_optimizers(plain)
    state.method.backbone.compiles_blocks = config.hardware.compile
    batch = batch_of(scale).to(session.fabric.device)
    return lambda: train_step(session, state, optimizer, batch, TASK, scale.batch)


def plain_pass(config: Config, scale: Scale) -> Callable[[], Any]:
    """Return one forward and backward pass of timm's model."""
    fabric = build_fabric(config)
    arguments = {"img_size": scale.size, "num_classes": CLASSES, **scale.encoder.arguments}
    model = timm.create_model(scale.encoder.model, **arguments).eval().requires_grad_(False)
    model.head.requires_grad_(True)
    model.cls_token.requires_grad_(True)  # the gradient passes all blocks, as that of a prompt does
    model.to(fabric.device)
    images, labels, *_ = batch_of(scale).to(fabric.device)

    def run() -> None:
        with fabric.autocast():
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        model.zero_grad()

    return run


def batch_of(scale: Scale) -> Batch:
    """Return a batch of noise."""
    images = torch.rand(scale.batch, 3, scale.size, scale.size, generator=make_generator(0, "images"))
    labels = torch.arange(scale.batch) % 10
    return Batch(images, labels, labels)


def measure(kind: str, precision: Precision, rounds: int, scale: Scale, *, compiled: bool) -> dict[str, Any]:
    """Return one line of results."""
    config = settings(kind, precision, scale, compiled=compiled)
    works = {"ours": ours(config, scale), "plain": plain_pass(config, scale)}
    speeds: dict[str, list[float]] = {name: [] for name in works}
    busy: list[int] = []
    peaks: dict[str, float] = {}
    gpu = torch.cuda.is_available()
    for number in range(rounds + 1):
        for name, work in works.items():
            if gpu:
                torch.cuda.reset_peak_memory_stats()
                torch.cuda.synchronize()
            started = time.perf_counter()
            for _ in range(scale.steps):
                work()
                if gpu and number and name == "ours":
                    busy += utilisation()
            if gpu:
                torch.cuda.synchronize()
                peaks[name] = torch.cuda.max_memory_allocated() / 1e9
            if number:  # the first round warms up
                speeds[name].append(scale.steps * scale.batch / (time.perf_counter() - started))
    ratios = [mine / its for mine, its in zip(speeds["ours"], speeds["plain"], strict=True)]
    return {
        "device": torch.cuda.get_device_name() if gpu else "CPU",
        "method": kind,
        "precision": precision,
        "compiled": compiled,
        "batch": scale.batch,
        "ours": statistics.median(speeds["ours"]),
        "plain": statistics.median(speeds["plain"]),
        "ratio": statistics.median(ratios),
        "utilisation": statistics.mean(busy) if busy else None,
        **{f"{name}_gb": peak for name, peak in peaks.items()},
    }


def utilisation() -> list[int]:
    """Return the percentage of recent time in which the GPU computed, if the library that asks its driver is there."""
    try:
        return [torch.cuda.utilization()]
    except (ModuleNotFoundError, RuntimeError):  # pynvml is optional
        return []


def table(results: Path = RESULTS) -> str:
    """Return the latest line of each device, method, precision and way to run."""
    keys = ("device", "method", "precision", "compiled")
    lines = {tuple(line[key] for key in keys): line for line in records.read(results)}
    head = [*keys, "ours, images/s", "plain pass, images/s", "ratio", "utilisation, %", "ours, GB", "plain, GB"]
    out = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for line in lines.values():
        numbers = [line["ours"], line["plain"], line["ratio"], line["utilisation"], line.get("ours_gb")]
        digits = (1, 1, 3, 0, 2, 2)
        cells = [
            "" if value is None else f"{value:.{places}f}"
            for value, places in zip([*numbers, line.get("plain_gb")], digits, strict=True)
        ]
        out.append("| " + " | ".join([*(str(line[key]) for key in keys), *cells]) + " |")
    if any(line["device"] == "CPU" for line in lines.values()):
        out += ["", "Measured on a CPU: these numbers say nothing about a GPU."]
    return "\n".join(out) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", nargs="+", choices=("l2p", "dualprompt"), default=["l2p", "dualprompt"])
    parser.add_argument("--precision", nargs="+", choices=get_args(Precision), default=get_args(Precision))
    parser.add_argument("--compile", nargs="+", choices=("no", "yes"), default=["no", "yes"])
    parser.add_argument("--batch", type=int, help="images of a batch")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help="rehearse on a tiny encoder; nothing is kept")
    options = parser.parse_args(argv)
    if not options.tiny and not torch.cuda.is_available():
        parser.error("expected a CUDA GPU, and torch sees none; --tiny rehearses on a CPU")
    scale = TINY if options.tiny else FULL
    scale = scale._replace(batch=options.batch or scale.batch)
    about = describe_environment()
    kept = {"commit": about["commit"], "torch": about["versions"]["torch"]}
    with tempfile.TemporaryDirectory() as scratch:
        results = Path(scratch) / RESULTS.name if options.tiny else RESULTS
        for precision in options.precision:
            for method in options.method:
                for compiled in options.compile:
                    line = measure(method, precision, options.rounds, scale, compiled=compiled == "yes")
                    records.append(results, {**line, **kept})
        records.write_page(results, table(results))


if __name__ == "__main__":
    main()
