"""Measure time and peak memory of training, evaluation and the pass after a task, on ViT-B/16 with random weights.

    python benchmarks/cost.py                          # everything: docs/results/cost.jsonl and cost.md
    python benchmarks/cost.py --only "L2P evaluation"  # one part again
    python benchmarks/cost.py --memory train l2p       # the peak of one operation, of this process
    python benchmarks/cost.py --tiny                   # test in seconds; the results mean nothing

Images are noise of 224 px, batches have 16, and a task has 300 images, as one of twenty of CUB-200. "Plain" L2P and
DualPrompt are how such methods are usually written: two copies of the timm model (one for queries, one with prompts),
every block computed for every token, the query computed whenever it is needed, and the batch in one piece. Prompts,
batch and arithmetic are the same.

The compared operations take turns in one process, short ones after a warm-up. A time is the median over rounds, and a
ratio the median of the rounds' ratios, since the speed of shared machines drifts. Peak memory is the resident set of a
process that does nothing else (Linux only).
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
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
from pgp.readouts.lda import LDA
from pgp.reports.tables import markdown_table
from pgp.rng import make_generator
from pgp.runs.environment import describe_environment
from pgp.scenario import Task
from pgp.system import platforms
from pgp.train import train_step
from pgp.training.observe import observe
from pgp.training.session import Session
from pgp.training.state import TrainState

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results" / "cost.jsonl"
Precision = Literal["32-true", "bf16-mixed"]
VERSION = 4
"""Of this script, in every line of the results; older lines are marked on the page."""
CLASSES = 100
CLEAN = ", clean"
"""Ending of a method's name that trains with `--query clean`: the queries of a batch are known."""
READ = ", lda"
"""Ending of a method's name whose features LDA reads after the task."""
PLAIN = ", one pass"
"""Ending of a method's name of which only one pass over the images of a task is measured."""
TASK = Task(0, tuple(range(10)), torch.empty(0), torch.empty(0))


class Scale(NamedTuple):
    """Sizes of what is measured."""

    encoder: ViT.Config
    size: int
    """Pixels a side."""
    batch: int
    observed: int
    """Images of a task, for what follows it. The fewer they are, the more the fits count, which do not grow."""


FULL = Scale(ViT.Config("vit_base_patch16_224.orig_in21k", "random"), 224, 16, 300)
TINY = Scale(rehearsal.ENCODER, rehearsal.SIZE, 4, 8)
ENCODERS = {name: f"vit_{name}_patch16_224" for name in ("small", "base", "large")}
"""Encoders whose peaks of memory are measured."""


class Plain(nn.Module):
    """A method as it is usually written, on two timm models: 10 prompts with keys, and a head."""

    prompts: nn.Parameter
    selected: int
    """Number of prompts that an image selects."""
    pull: float
    """Weight of the similarity of queries and keys in the loss."""

    def __init__(self, scale: Scale) -> None:
        """Make both models, with random weights."""
        super().__init__()
        name, arguments = scale.encoder.model, {"img_size": scale.size, "num_classes": 0, **scale.encoder.arguments}
        self.original = timm.create_model(name, **arguments).eval().requires_grad_(False)
        self.prompted = timm.create_model(name, **arguments).eval().requires_grad_(False)
        self.width = self.prompted.embed_dim
        self.key = nn.Parameter(torch.rand(10, self.width) * 2 - 1)
        self.head = nn.Linear(self.width, CLASSES)

    def selection(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the prompts that each image selects `(B, k)`, and how well their keys match."""
        with torch.no_grad():
            query = self.original.forward_features(images)[:, 0]
        similarity = F.normalize(query, dim=-1) @ F.normalize(self.key, dim=-1).T
        best = similarity.topk(self.selected, dim=-1)
        return best.indices, best.values.sum(1).mean()

    def features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the head reads `(B, D)`, and how well the keys of the selected prompts match."""
        raise NotImplementedError

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return the loss over the classes of the task."""
        features, match = self.features(images)
        return F.cross_entropy(mask_logits(self.head(features), TASK.classes), labels) - self.pull * match


class PlainL2P(Plain):
    """L2P: five prompts of an image are tokens of all blocks, and the head reads their mean."""

    selected = 5
    pull = 0.1

    def __init__(self, scale: Scale) -> None:
        """Make the prompts, too."""
        super().__init__(scale)
        self.prompts = nn.Parameter(torch.rand(10, 5, self.width) * 2 - 1)

    def features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """See `Plain.features`."""
        indices, match = self.selection(images)
        prompts = self.prompts[indices].flatten(1, 2)
        model = self.prompted
        tokens = model._pos_embed(model.patch_embed(images))
        tokens = torch.cat([tokens[:, :1], prompts + model.pos_embed[:, :1], tokens[:, 1:]], dim=1)
        tokens = model.norm(model.blocks(tokens))
        return tokens[:, 1 : 1 + prompts.shape[1]].mean(1), match


class PlainDualPrompt(Plain):
    """DualPrompt: attention prefixes in blocks 0 to 4, in the last three those of an expert; the head reads CLS."""

    selected = 1
    pull = 1.0

    def __init__(self, scale: Scale) -> None:
        """Make the prefixes, too."""
        super().__init__(scale)
        self.general = nn.Parameter(torch.rand(2, 2, 5, self.width) * 2 - 1)  # by block: keys and values of 5 tokens
        self.prompts = nn.Parameter(torch.rand(3, 10, 2, 5, self.width) * 2 - 1)  # by block and expert

    def features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """See `Plain.features`."""
        indices, match = self.selection(images)
        prefixes = [general.expand(len(images), -1, -1, -1) for general in self.general]
        prefixes += [experts[indices[:, 0]] for experts in self.prompts]
        model = self.prompted
        tokens = model._pos_embed(model.patch_embed(images))
        for block, prefix in zip(model.blocks, prefixes, strict=False):
            tokens = prefixed(block, tokens, prefix)
        tokens = model.blocks[len(prefixes) :](tokens)
        return model.norm(tokens)[:, 0], match


def prefixed(block: Any, tokens: Tensor, prefix: Tensor) -> Tensor:
    """Return the output of a block of timm whose attention also has the keys and values of a prefix `(B, 2, L, D)`."""
    attention = block.attn
    heads = attention.num_heads
    query, key, value = attention.qkv(block.norm1(tokens)).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    more_keys, more_values = prefix.unflatten(-1, (heads, -1)).permute(1, 0, 3, 2, 4)  # each (B, H, L, d)
    key, value = torch.cat([more_keys, key], dim=2), torch.cat([more_values, value], dim=2)
    attended = F.scaled_dot_product_attention(query, key, value)
    tokens = tokens + attention.proj(attended.transpose(1, 2).flatten(2))
    output: Tensor = tokens + block.mlp(block.norm2(tokens))
    return output


PLAINS: dict[str, type[Plain]] = {"plain l2p": PlainL2P, "plain dualprompt": PlainDualPrompt}


def images(scale: Scale) -> Tensor:
    """Return a batch of noise."""
    return torch.rand(scale.batch, 3, scale.size, scale.size, generator=make_generator(0, "images"))


def train(kind: str, precision: Precision, scale: Scale = FULL) -> Callable[[], Any]:
    """Return one training step."""
    batch, labels = images(scale), torch.arange(scale.batch) % 10
    if kind in PLAINS:
        model = PLAINS[kind](scale)
        learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
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
    attach(state, adam)
    ready = session.fabric.setup_optimizers(adam)
    query = torch.rand(scale.batch, state.method.backbone.width, generator=make_generator(0, "query"))
    whole = Batch(batch, labels, labels, query if clean else None)
    return lambda: train_step(session, state, ready, whole, TASK, scale.batch)


def untrained(kind: str, precision: Precision, scale: Scale) -> tuple[Session, TrainState]:
    """Return the recipe of a method for CIFAR-100, or the recipe `quick`, on noise; with `READ`, LDA is its readout."""
    kind, read, _ = kind.partition(READ)
    recipe = recipes.RECIPES[kind if kind == "quick" else f"10cifar100_{kind}_pgp"]()
    data = Synthetic(classes=CLASSES, per_class=8)
    config = replace(recipe, dataset=data, backbone=scale.encoder, batch_size=scale.batch)
    config = replace(config, transforms=Transforms(size=scale.size, resize=scale.size * 256 // 224))
    config = replace(config, hardware=Hardware("cpu"), precision=precision)
    config = replace(config, readouts=(LDA.Config(),)) if read else config
    session = Session(Fabric(accelerator="cpu", devices=1, precision=precision), config, Progress(disable=True))
    return session, session.new_state()


def attach(state: TrainState, optimizer: torch.optim.Optimizer) -> None:
    """Attach drift meter and projection, which protects half of each space: as much as that of a run over its tasks."""
    bases = {}
    for space, target in state.projection.protected.items():
        width = target.parameter.shape[target.axis]
        draw = torch.randn(width, width // 2, generator=make_generator(0, "basis"), dtype=torch.float64)
        bases[space] = torch.linalg.qr(draw).Q
    state.projection.load_state_dict(bases)
    assert state.meter is not None, "recipes measure drift"
    state.meter.attach(optimizer)
    state.projection.attach(optimizer)


def evaluation(kind: str, precision: Precision, scale: Scale = FULL) -> Callable[[], Any]:
    """Return one test batch of a task that was evaluated before: ours knows the query, a plain method recomputes it."""
    batch = images(scale)
    if kind in PLAINS:
        plain = PLAINS[kind](scale)

        def run() -> None:
            plain.head(plain.features(batch)[0])
    else:
        model = untrained(kind, precision, scale)[1].method
        with torch.no_grad(), autocast(precision):
            query = model.query(batch)

        def run() -> None:
            model(batch, query)

    def without_gradient() -> None:
        with torch.no_grad(), autocast(precision):
            run()

    return without_gradient


def boundary(kind: str, precision: Precision, scale: Scale = FULL) -> Callable[[], Any]:
    """Return what follows the training of a task: the pass for the projection and, with `READ`, for LDA, and their fit.

    With `PLAIN`, the same images only pass through the encoder once, which computes queries if the method reads them,
    else features.
    """
    kind, plain, _ = kind.partition(PLAIN)
    session, state = untrained(kind, precision, scale)
    task = replace(TASK, train=torch.arange(scale.observed))

    def all_of_it() -> None:
        projection = Orthogonal(state.method.protected(), session.config.projection)  # type: ignore[arg-type]
        readouts = [LDA(CLASSES)] if READ in kind else []
        observe(session, state, task, projection, readouts)
        projection.end_task()
        for readout in readouts:
            readout.end_task()

    def forward() -> None:
        run = state.method.query if state.method.uses_query else state.method.features
        with torch.no_grad(), autocast(precision):
            split, plan = session.transformed("test", "observed", task), sequential_batches(task.train, scale.batch)
            for batch in batches(split, plan, LoaderOptions()):
                run(batch.images)

    return forward if plain else all_of_it


def quick(kind: str, precision: Precision, scale: Scale = FULL) -> Callable[[], Any]:
    """Return one pass of the recipe `quick` over the images of a task, and the fit of its readout."""
    session, state = untrained(kind, precision, scale)
    task = replace(TASK, train=torch.arange(scale.observed))

    def all_of_it() -> None:
        (readout,) = (config.build(state.method.head, CLASSES, 0) for config in session.config.readouts)
        observe(session, state, task, None, [readout])
        readout.end_task()

    return all_of_it


OPERATIONS: dict[str, Callable[[str, Precision, Scale], Callable[[], Any]]] = {
    "train": train,
    "evaluation": evaluation,
    "boundary": boundary,
    "quick": quick,
}
AFTER_TASK = ("boundary", "quick")
"""Operations on all images of a task, which take so long that they need no warm-up."""
MEASURED = {
    "L2P train step": ("train", "l2p", "plain l2p"),
    "L2P train step, clean queries": ("train", "l2p, clean", "plain l2p"),
    "DualPrompt train step": ("train", "dualprompt", "plain dualprompt"),
    "DualPrompt train step, clean queries": ("train", "dualprompt, clean", "plain dualprompt"),
    "LoRA train step": ("train", "lora", "vpt"),
    "L2P evaluation": ("evaluation", "l2p", "plain l2p"),
    "DualPrompt evaluation": ("evaluation", "dualprompt", "plain dualprompt"),
    "L2P boundary": ("boundary", "l2p", "l2p, one pass"),
    "DualPrompt boundary": ("boundary", "dualprompt", "dualprompt, one pass"),
    "VPT boundary, with LDA": ("boundary", "vpt, lda", "vpt, one pass"),
    "LoRA boundary, with LDA": ("boundary", "lora, lda", "lora, one pass"),
}
"""By name: operation, method, and what it is compared with."""
PEAKS = {"train": "l2p", "evaluation": "l2p", "boundary": "l2p", "quick": "quick"}
"""Operations and methods whose peaks of memory are measured for all `ENCODERS`."""
OTHERS = {
    "plain l2p": "plain L2P",
    "plain dualprompt": "plain DualPrompt",
    "l2p, one pass": "a query pass over the same images",
    "dualprompt, one pass": "a query pass over the same images",
    "vpt, one pass": "a forward pass over the same images",
    "lora, one pass": "a forward pass over the same images",
    "vpt": "a step of VPT",
}


def autocast(precision: Precision) -> torch.autocast:
    """Return the context in which a precision computes."""
    return torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed")


def seconds(operations: dict[str, Callable[[], Any]], rounds: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Return the seconds of each operation in each round, in which they take turns, after rounds that do not count."""
    taken: dict[str, list[float]] = {name: [] for name in operations}
    for _ in range(warm_up + rounds):
        for name, run in operations.items():
            started = time.perf_counter()
            run()
            taken[name].append(time.perf_counter() - started)
    return {name: of_rounds[warm_up:] for name, of_rounds in taken.items()}


def peak(operation: str, kind: str, precision: Precision, threads: int, encoder: str = "base") -> float:
    """Return the peak resident memory in GB of a new process that calls `peak_of`."""
    command = [sys.executable, __file__, "--memory", operation, kind, "--encoder", encoder]
    command += ["--precision", precision, "--threads", str(threads)]
    return float(subprocess.run(command, check=True, capture_output=True, encoding="utf-8").stdout.splitlines()[-1])


def peak_of(operation: str, kind: str, precision: Precision, scale: Scale) -> float:
    """Run an operation twice, or once after a task of 12 batches, and return the peak memory of this process in GB."""
    scale = scale._replace(observed=12 * scale.batch)
    seconds({kind: OPERATIONS[operation](kind, precision, scale)}, 1 if operation in AFTER_TASK else 2, warm_up=0)
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
    """Return one line of the results; with a tiny encoder, without peaks of memory."""
    operation, kind, other = MEASURED[what]
    build = OPERATIONS[operation]
    line: dict[str, Any] = {"what": what, "against": OTHERS[other], "precision": precision, "version": VERSION}
    operations = {"ours": build(kind, precision, scale), "other": build(other, precision, scale)}
    if precision != "32-true":
        operations["float32"] = build(other, "32-true", scale)
    taken = seconds(operations, rounds, warm_up=0 if operation in AFTER_TASK else 1)
    for name in list(operations)[1:]:
        ratios = [mine / its for mine, its in zip(taken["ours"], taken[name], strict=True)]
        rounded = [round(ratio, 3) for ratio in ratios]
        line |= {f"ratio_to_{name}": statistics.median(ratios), f"ratios_to_{name}": rounded}
    line |= {f"{name}_seconds": statistics.median(taken[name]) for name in operations}
    if scale is FULL:
        line["ours_peak_gb"] = peak(operation, kind, precision, threads)
        line["other_peak_gb"] = peak(operation, other, precision, threads)
    if what == "L2P train step":
        line["hook_seconds"] = hook_seconds(kind, scale)
        line["drift_seconds"] = drift_seconds(kind, precision, scale)
    return line


def hook_seconds(kind: str, scale: Scale) -> float:
    """Return the seconds that projection and drift meter add to an optimizer step: a difference of medians."""
    _, state = untrained(kind, "32-true", scale)
    learned = [parameter for parameter in state.method.parameters() if parameter.requires_grad]
    for parameter in learned:
        parameter.grad = torch.rand_like(parameter)
    plain, hooked = (torch.optim.Adam(learned, lr=1e-6) for _ in range(2))
    attach(state, hooked)
    taken = seconds({"plain": plain.step, "hooked": hooked.step}, 30)
    return statistics.median(taken["hooked"]) - statistics.median(taken["plain"])


def drift_seconds(kind: str, precision: Precision, scale: Scale) -> float:
    """Return the seconds of the drift meter after a task, without the evaluation that it watches."""
    session, state = untrained(kind, precision, scale)
    meter, task = state.meter, session.scenario.tasks[0]
    assert meter is not None, "recipes measure drift"
    session.evaluator.evaluate(state.method, [], 0, session.progress, meter.watch, None)
    started = time.perf_counter()
    meter.end_task(state.method, task, session.progress)
    return time.perf_counter() - started


def measure_peaks(threads: int) -> Iterator[dict[str, Any]]:
    """Yield a line for each encoder: the peaks of `PEAKS` in float32, in GB."""
    for name in ENCODERS:
        peaks = {operation: peak(operation, kind, "32-true", threads, name) for operation, kind in PEAKS.items()}
        yield {"encoder": name, "peaks": peaks, "version": VERSION}


def has_bf16() -> bool:
    """Return whether the processor multiplies in bfloat16."""
    flags = platforms.cpu_facts().get("flags", "").split()
    return "avx512_bf16" in flags or "amx_bf16" in flags


def table(results: Path = RESULTS) -> str:
    """Return the latest line of each kind, by processor; those of this version of the script come first."""
    lines = list(records.read(results))
    latest = {(line["processor"], line["precision"], line["what"]): line for line in lines if "what" in line}
    latest = dict(sorted(latest.items(), key=lambda item: item[1]["version"] != VERSION))
    head = ["processor", "what", "against", "precision", "ours, s", "other, s", "ratio (rounds)",
            "to the other in float32", "ours, GB", "other, GB"]  # fmt: skip

    def shown(line: dict[str, Any], name: str, digits: int) -> str:
        return f"{line[name]:.{digits}f}" if name in line else ""

    def rounds(line: dict[str, Any], name: str) -> str:
        return f" ({', '.join(f'{ratio:.2f}' for ratio in line[name])})" if name in line else ""

    cells = [
        [
            processor,
            what if line.get("version") == VERSION else f"{what} *",
            line["against"],
            precision,
            shown(line, "ours_seconds", 2),
            shown(line, "other_seconds", 2),
            shown(line, "ratio_to_other", 3) + rounds(line, "ratios_to_other"),
            shown(line, "ratio_to_float32", 3) + rounds(line, "ratios_to_float32"),
            shown(line, "ours_peak_gb", 2),
            shown(line, "other_peak_gb", 2),
        ]
        for (processor, precision, what), line in latest.items()
    ]
    out = [markdown_table(head, cells), ""]
    for line in latest.values():
        if "hook_seconds" in line:
            added, step = line["hook_seconds"], line["ours_seconds"]
            out.append(f"Projection and drift meter add {1000 * added:.1f} ms to a step of {step:.2f} s,"
                       f" {100 * added / step:.2f} %; after a task, the drift meter takes {line['drift_seconds']:.1f} s"
                       f" ({line['precision']}, {line['processor']}).")  # fmt: skip
    peaks = {line["encoder"]: line["peaks"] for line in lines if "encoder" in line}
    if peaks:
        rows = [[name, *(f"{peak:.2f}" for peak in own.values())] for name, own in peaks.items()]
        out += ["", "Peak memory in GB, float32:", "", markdown_table(["ViT", *PEAKS], rows), ""]
    if any(line.get("version") != VERSION for line in latest.values()):
        out += ["*: measured by an earlier version of this script, with a task of 192 images.", ""]
    out += sorted({f"{processor}, {precision}: {line['threads']} threads, torch {line['torch']}; commit"
                   f" {line['commit']}." for (processor, precision, _), line in latest.items()})  # fmt: skip
    if not any(precision == "bf16-mixed" for _, precision, _ in latest):
        out.append("bf16-mixed was not measured: it needs a processor with bf16 arithmetic.")
    return "\n".join(out) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what the command line asks for, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", nargs=2, metavar=("OPERATION", "METHOD"))
    parser.add_argument("--encoder", choices=ENCODERS, default="base", help="for --memory")
    parser.add_argument("--only", nargs="+", choices=MEASURED, default=list(MEASURED))
    both = ("32-true", "bf16-mixed")
    parser.add_argument("--precision", nargs="+", choices=both, default=both if has_bf16() else both[:1])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="test with a tiny encoder; nothing is kept")
    options = parser.parse_args(argv)
    scale = TINY if options.tiny else FULL
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    if options.memory:
        (operation, kind), (precision, *_) = options.memory, options.precision
        encoder = scale.encoder if options.tiny else ViT.Config(ENCODERS[options.encoder], "random")
        print(peak_of(operation, kind, precision, scale._replace(encoder=encoder)))
        return
    about = describe_environment()
    kept = {"commit": about["commit"], "processor": about["processor"], "torch": about["versions"]["torch"]}
    with tempfile.TemporaryDirectory() as scratch:
        results = Path(scratch) / RESULTS.name if options.tiny else RESULTS
        for precision in options.precision:
            for what in options.only:
                line = compare(what, precision, options.threads, options.rounds, scale)
                records.append(results, {**line, "threads": options.threads, **kept})
        if scale is FULL and options.only == list(MEASURED):
            for line in measure_peaks(options.threads):
                records.append(results, {**line, "threads": options.threads, **kept})
        records.write_page(results, table(results))


if __name__ == "__main__":
    main()
