"""Measure how many images per second are loaded (decoded, cropped, resized to 224 px), and how many are trained on.

    python benchmarks/loading.py           # write docs/results/loading.md and loading.jsonl
    python benchmarks/loading.py --tiny    # test in seconds; the results mean nothing

CIFAR-100's images are noise of their size (32 x 32, in memory, as torchvision reads them): cropping and resizing them
is the same work. Such small images are transformed in batches on the device. Three rows compare this, taking turns:
with torchvision, image by image, as large images are; in batches on this processor; and what is left to this processor
if the device is a GPU: drawing crops, stacking bytes, weights (on torch's meta device, no pixel is computed). Photos
are JPEG files of 500 x 375 px, about as large as those of ImageNet-R and CUB-200. The training step is the one of
10cifar100_l2p_pgp on ViT-B/16 with random weights, batch 16, on this processor. A rate is the median over rounds.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torchvision.transforms import v2

import cost
import records
from pgp.datasets.base import ArraySplit, Split
from pgp.datasets.files import FileSplit
from pgp.datasets.loader import LoaderOptions, TransformedSplit, batches, sequential_batches
from pgp.datasets.transforms import Transforms
from pgp.rng import make_generator
from pgp.runs.environment import describe_environment

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results" / "loading.jsonl"


class Scale(NamedTuple):
    """Number of images and rounds of a measurement."""

    step: cost.Scale
    images: int
    rounds: int
    workers: tuple[int, ...]


FULL = Scale(cost.FULL, 512, 5, (0, 1, 2))
TINY = Scale(cost.TINY, 8, 2, (0,))


def cifar(scale: Scale) -> Split:
    """Return images of noise with the size of CIFAR-100's images."""
    pixels = torch.randint(256, (scale.images, 3, 32, 32), generator=make_generator(0, "pixels"), dtype=torch.uint8)
    return ArraySplit(pixels, torch.zeros(scale.images, dtype=torch.int64))


def photos(folder: Path, scale: Scale) -> FileSplit:
    """Write JPEG files of smooth noise, and return them as a split."""
    paths = [folder / f"{number}.jpg" for number in range(scale.images)]
    for number, path in enumerate(paths):
        coarse = torch.randint(256, (47, 63, 3), generator=make_generator(number, "photo"), dtype=torch.uint8)
        Image.fromarray(coarse.numpy()).resize((500, 375), Image.Resampling.BICUBIC).save(path, quality=90)
    return FileSplit(paths, [0] * scale.images)


def rate(
    split: Split, workers: int, number: int, scale: Scale, device: str = "cpu", *, image_by_image: bool = False
) -> float:
    """Return the images per second of one pass."""
    transforms = Transforms(size=scale.step.size)
    transform = one_by_one(transforms) if image_by_image else transforms.train()
    viewed = TransformedSplit(split, transform, 0, ("view", 0), skip_bad=False)
    plan = sequential_batches(torch.arange(scale.images), scale.step.batch, number)
    started = time.perf_counter()
    for _ in batches(viewed, plan, LoaderOptions(workers, device=torch.device(device))):
        pass
    return scale.images / (time.perf_counter() - started)


def one_by_one(transforms: Transforms) -> v2.Transform:
    """Return the training transform of torchvision alone."""
    crop = v2.RandomResizedCrop(transforms.size, transforms.scale, transforms.ratio, antialias=True)
    to_float = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(transforms.mean, transforms.std)]
    return v2.Compose([crop, v2.RandomHorizontalFlip(transforms.flip), *to_float])


def cifar_rates(workers: int, scale: Scale) -> dict[str, list[float]]:
    """Return the images per second of each round, by how small images are transformed."""
    split, rates = cifar(scale), dict[str, list[float]]()
    for number in range(scale.rounds):
        for how, image_by_image, device in (
            ("image by image", True, "cpu"),
            ("on this processor", False, "cpu"),
            ("without the GPU's part", False, "meta"),
        ):
            found = rate(split, workers, number, scale, device, image_by_image=image_by_image)
            rates.setdefault(f"CIFAR-100 {how}, {workers} workers", []).append(found)
    return rates


def measured(scale: Scale) -> Iterator[tuple[str, list[float]]]:
    """Yield the name of each measurement, and its images per second in each round."""
    for workers in scale.workers:
        yield from cifar_rates(workers, scale).items()
    with tempfile.TemporaryDirectory() as folder:
        for workers in dict.fromkeys([scale.workers[0], scale.workers[-1]]):
            files = photos(Path(folder), scale)  # whose memory is empty again
            first = [rate(files, workers, 0, scale)]
            yield f"photos, first pass, {workers} workers", first
            later = [rate(files, workers, number, scale) for number in range(1, scale.rounds)]
            yield f"photos, later passes, {workers} workers", later
    step = cost.train("l2p", "32-true", scale.step)
    taken = cost.seconds({"step": step}, scale.rounds)["step"]
    yield "training step", [scale.step.batch / one for one in taken]


def table(results: Path = RESULTS) -> str:
    """Return the medians, and their ratios to the rate of the training step."""
    lines = list(records.read(results))
    medians = {str(line["what"]): statistics.median(line["images_per_second"]) for line in lines}
    step, about = medians["training step"], lines[0]
    rows = [f"| {what} | {median:.1f} | {median / step:.0f} |" for what, median in medians.items()]
    head = ["| what | images per second | times the training step |", "|---|---|---|"]
    stale = [] if all(line.get("version") == VERSION for line in lines) else ["", STALE]
    note = f"\n{about['processor']}, {about['cores']} cores, {about['threads']} threads, commit {about['commit']}."
    return "\n".join([*head, *rows, *stale, note]) + "\n"


VERSION = 3
"""Of this script, in every line of the results."""
STALE = "Measured by an older version of this script. To be measured anew."


def main(argv: Sequence[str] | None = None) -> None:
    """Measure everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="rehearse on few images; nothing is kept")
    options = parser.parse_args(argv)
    about = describe_environment()
    kept = {key: about[key] for key in ("commit", "processor", "threads", "cores")}
    lines = [
        {"what": what, "images_per_second": rates, "version": VERSION, **kept}
        for what, rates in measured(TINY if options.tiny else FULL)
    ]
    with tempfile.TemporaryDirectory() as scratch:
        results = Path(scratch) / RESULTS.name if options.tiny else RESULTS
        results.unlink(missing_ok=True)  # all of it is from one run
        for line in lines:
            records.append(results, line)
        records.write_page(results, table(results))


if __name__ == "__main__":
    main()
