"""Measure how long `pgp add` takes to learn a class on a `quick` run, and how many bytes readouts keep.

    python benchmarks/adding.py           # write docs/results/adding.md and adding.jsonl
    python benchmarks/adding.py --tiny    # test in seconds; the results mean nothing

A run of the recipe `quick` has learned two classes of 20 photos, whose images are then deleted. Then classes of 20 and
of 1 photo are added, on ViT-S/16 and ViT-B/16 with random weights, at 224 px. Photos are JPEG files of 500 x 375 px.
For comparison, it also measures a forward pass over 20 photos that are already decoded.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import loading
import records
import rehearsal
from pgp.backbones.vit import ViT
from pgp.datasets.folder import Folder
from pgp.datasets.transforms import Transforms
from pgp.readouts.base import Features, Readout
from pgp.readouts.lda import LDA, NCM
from pgp.readouts.ranpac import RanPAC
from pgp.recipes import RECIPES
from pgp.reports.tables import markdown_table
from pgp.rng import make_generator
from pgp.runs.environment import describe_environment
from pgp.train import resume, train

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results" / "adding.jsonl"
ENCODERS = {"ViT-S/16": ("vit_small_patch16_224", 384), "ViT-B/16": ("vit_base_patch16_224", 768)}
"""Name of timm's model, and width of its tokens."""
CLASSES = (10, 100, 1000)
KEPT: tuple[Readout.Config, ...] = (
    NCM.Config(),
    LDA.Config(),
    LDA.Config(patches=True, normalize=True),
    RanPAC.Config(dimensions=2000),
    RanPAC.Config(),
)
"""Readouts whose bytes are counted."""


def measure_adding(name: str, *, tiny: bool) -> dict[str, Any]:
    """Return the seconds to add classes of 20 photos and of one, and of a forward pass over 20 photos."""
    scale = loading.TINY._replace(images=3) if tiny else loading.FULL._replace(images=20)
    scratch = Path(tempfile.mkdtemp())
    try:
        for label in ("first", "second"):
            for part in ("train", "test"):
                write(scratch / "old" / part / label, scale)
        config = replace(RECIPES["quick"](), dataset=Folder(scratch / "old"), tasks=1, drift_images=0)
        encoder = rehearsal.ENCODER if tiny else ViT.Config(ENCODERS[name][0], "random")
        transforms = Transforms(size=rehearsal.SIZE, resize=rehearsal.SIZE) if tiny else config.transforms
        run = train(replace(config, backbone=encoder, transforms=transforms), scratch / "run")
        shutil.rmtree(scratch / "old")
        found: dict[str, Any] = {"encoder": name}
        for photos in (20, 1):
            tested = photos // 4  # a fifth of the photos is held out for testing
            new = write(scratch / f"{photos}" / f"class of {photos}", scale._replace(images=photos + tested)).parent
            started = time.perf_counter()
            run = resume(run.folder, add=Folder(new))
            *_, last = run.events("task")
            found[f"add {photos}"] = {"command": time.perf_counter() - started, **last["seconds"]}
        found["forward 20"] = forward(encoder, transforms.size, 3 if tiny else 20)
    finally:
        shutil.rmtree(scratch)
    return found


def write(folder: Path, scale: loading.Scale) -> Path:
    """Write photos of noise into a new folder, and return it."""
    folder.mkdir(parents=True)
    loading.photos(folder, scale)
    return folder


@torch.no_grad()
def forward(encoder: ViT.Config, size: int, images: int) -> float:
    """Return the median seconds of a forward pass over a batch."""
    backbone = encoder.build(size)
    batch = torch.randn(images, 3, size, size, generator=make_generator(0, "batch"))
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        backbone(batch)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def count_bytes(config: Readout.Config, width: int, classes: int) -> int:
    """Return the bytes that a readout of `width` features keeps after two images of each class."""
    readout = config.build(torch.nn.Identity(), classes, 0)
    generator = make_generator(0, "features")
    features, query, patches = (torch.randn(2 * classes, width, generator=generator) for _ in range(3))
    labels = torch.arange(classes).repeat(2)
    readout.observe(readout.select_features(Features(features, query, patches)), labels)
    readout.end_task()
    return sum(tensor.numel() * tensor.element_size() for tensor in readout.state_dict().values())


def table(results: Path = RESULTS) -> str:
    """Return the tables of seconds and of bytes."""
    lines = list(records.read(results))
    seconds = [
        [
            line["encoder"],
            *(f"{line[f'add {n}'][part]:.2f}" for n in (20, 1) for part in ("command", "boundary", "evaluation")),
            f"{line['forward 20']:.2f}",
        ]
        for line in lines
        if "encoder" in line
    ]
    parts = ("all", "readouts", "evaluation")
    head = ["encoder", *(f"{n} photo{'s' * (n > 1)}: {part}" for n in (20, 1) for part in parts), "forward pass of 20"]
    out = ["Seconds to add a class.", "", markdown_table(head, seconds), "", "Megabytes that a readout keeps.", ""]
    kept: dict[tuple[str, int], dict[int, int]] = {}
    for line in lines:
        if "readout" in line:
            kept.setdefault((line["readout"], line["width"]), {})[line["classes"]] = line["bytes"]
    cells = [[*map(str, key), *(f"{size / 1e6:.2f}" for size in sizes.values())] for key, sizes in kept.items()]
    classes = next(iter(kept.values()))
    return "\n".join([*out, markdown_table(["readout", "width", *(f"{n} classes" for n in classes)], cells)]) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="test with a tiny encoder; nothing is kept")
    tiny = parser.parse_args(argv).tiny
    with tempfile.TemporaryDirectory() as scratch:
        results = Path(scratch) / RESULTS.name if tiny else RESULTS
        results.unlink(missing_ok=True)
        about = {key: describe_environment()[key] for key in ("commit", "processor", "threads")}
        for name in list(ENCODERS)[: 1 if tiny else None]:
            records.append(results, {**measure_adding(name, tiny=tiny), **about})
        for config in KEPT[:2] if tiny else KEPT:
            for width in (8,) if tiny else (384, 768):
                for classes in CLASSES[:2] if tiny else CLASSES:
                    size = count_bytes(config, width, classes)
                    line = {"readout": config.name, "width": width, "classes": classes, "bytes": size}
                    records.append(results, {**line, **about})
        records.write_page(results, table(results))


if __name__ == "__main__":
    main()
