"""Images per second of loading (decode, crop, resize to 224 px) against those that a training step takes.

    python benchmarks/loading.py        # docs/results/loading.md and loading.jsonl

CIFAR-100's images are noise of their size (32 x 32, in memory, as torchvision reads them): cropping and resizing them is the
same work. Photos are JPEG files of 500 x 375 px, about as large as those of ImageNet-R and CUB-200. The training step is the one
of 10cifar100_l2p_pgp on ViT-B/16 with random weights, batch 16, on this processor. A rate is the median over rounds.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from cost import BATCH, train
from PIL import Image

from pgp.datasets import ArraySplit, Loading, Split, Viewed, Views, batches, in_order
from pgp.datasets.files import FileSplit
from pgp.environment import environment
from pgp.scenario import generator

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results"
IMAGES, ROUNDS = 512, 5


def cifar() -> Split:
    pixels = torch.randint(256, (IMAGES, 3, 32, 32), generator=generator(0, "pixels"), dtype=torch.uint8)
    return ArraySplit(pixels, torch.zeros(IMAGES, dtype=torch.int64))


def photos(folder: Path) -> FileSplit:
    paths = [folder / f"{number}.jpg" for number in range(IMAGES)]
    for number, path in enumerate(paths):
        coarse = torch.randint(256, (47, 63, 3), generator=generator(number, "photo"), dtype=torch.uint8)
        Image.fromarray(coarse.numpy()).resize((500, 375), Image.Resampling.BICUBIC).save(path, quality=90)
    return FileSplit(paths, [0] * IMAGES)


def rate(split: Split, workers: int, number: int) -> float:
    """Images per second of one pass."""
    viewed = Viewed(split, Views().train(), 0, ("view", 0), skip_bad=False)
    plan = in_order(torch.arange(IMAGES), BATCH, number)
    started = time.perf_counter()
    for _ in batches(viewed, plan, Loading(workers)):
        pass
    return IMAGES / (time.perf_counter() - started)


def measured() -> Iterator[tuple[str, list[float]]]:
    """What is measured, and images per second in each round."""
    split = cifar()
    for workers in (0, 1, 2):
        yield f"CIFAR-100, {workers} workers", [rate(split, workers, number) for number in range(ROUNDS)]
    with tempfile.TemporaryDirectory() as folder:
        for workers in (0, 2):
            files = photos(Path(folder))  # whose memory is empty again
            first = [rate(files, workers, 0)]
            yield f"photos, first pass, {workers} workers", first
            later = [rate(files, workers, number) for number in range(1, ROUNDS)]
            yield f"photos, later passes, {workers} workers", later
    step = train("l2p", "32-true")
    step()
    seconds = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - started)
    yield "training step", [BATCH / one for one in seconds]


def main() -> None:
    about = environment()
    kept = {key: about[key] for key in ("commit", "processor", "threads", "cores")}
    lines = [{"what": what, "images_per_second": rates, **kept} for what, rates in measured()]
    (RESULTS / "loading.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    medians = {str(line["what"]): statistics.median(line["images_per_second"]) for line in lines}
    step = medians["training step"]
    rows = [f"| {what} | {median:.1f} | {median / step:.0f} |" for what, median in medians.items()]
    head = ["| what | images per second | times the training step |", "|---|---|---|"]
    note = (
        f"\n{about['processor']}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, commit {about['commit']}."
    )
    (RESULTS / "loading.md").write_text("\n".join([*head, *rows, note]) + "\n")
    print((RESULTS / "loading.md").read_text())


if __name__ == "__main__":
    main()
