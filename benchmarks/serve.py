"""Measure how fast `pgp serve` answers, and whether it loses requests while it is taught.

    python benchmarks/serve.py           # write docs/results/serve.md and serve.jsonl
    python benchmarks/serve.py --tiny    # test in seconds; the results mean nothing

Speed: 1, 8 and 32 clients each send one photo (JPEG, 500 x 375 px) after the other to a run of the recipe `quick` on
ViT-S/16 with random weights, at 224 px, with batches of up to 32 images and of one image. `Predictor` classifies the
same photos one after the other in this process. Clients and service share the cores of the machine.

Endurance: 8 clients send 10,000 requests to a run of `demo-quick`, a tenth of them with a broken image, while another
process adds a class to the run and undoes it, 20 changes together. Every good answer is compared with `Predictor`.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import io
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import loading
import records
import rehearsal
from pgp.backbones.vit import ViT
from pgp.datasets.folder import Folder
from pgp.datasets.transforms import Transforms
from pgp.predict import Predictor
from pgp.recipes import RECIPES
from pgp.reports.tables import markdown_table
from pgp.runs.environment import describe_environment
from pgp.runs.run import Run
from pgp.train import resume, train

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results" / "serve.jsonl"
CLIENTS = (1, 8, 32)
BOUNDARY = "pgp-benchmark"


def body_of(content: bytes) -> bytes:
    """Return the body of a request with one image."""
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="files"; filename="photo"\r\n\r\n'
    return head.encode() + content + f"\r\n--{BOUNDARY}--\r\n".encode()


@contextlib.contextmanager
def service(run: Path, *flags: str) -> Iterator[tuple[int, int]]:
    """Serve a run in another process. Yield its port and process id."""
    command = [sys.executable, "-m", "pgp", "serve", str(run), "--port", "0", *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, encoding="utf-8")
    assert process.stdout is not None
    try:
        address = process.stdout.readline()
        found = re.search(r":([0-9]+) ", address)
        if found is None:
            raise RuntimeError(f"expected the address of the service, got {address!r}")
        yield int(found[1]), process.pid
    finally:
        process.terminate()
        process.wait()
        process.stdout.close()


class Load(threading.Thread):
    """A client that sends one request after the other over one connection."""

    def __init__(
        self, port: int, take: Callable[[], bytes | None], keep: Callable[[bytes, int, Any, float], None]
    ) -> None:
        """Prepare a client.

        Args:
            port: Port of the service.
            take: Returns the next image, or None at the end.
            keep: Called with image, status, answer and seconds.
        """
        super().__init__()
        self.port, self.take, self.keep = port, take, keep

    def run(self) -> None:
        """Send until there is no image left."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        headers = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
        while (image := self.take()) is not None:
            started, status, answer = time.perf_counter(), 0, None  # a status of 0: there was no answer
            try:
                connection.request("POST", "/predict?top=1", body_of(image), headers)
                response = connection.getresponse()
                status, answer = response.status, json.loads(response.read())
            except (OSError, http.client.HTTPException, ValueError):
                connection.close()  # the next request opens another one
            self.keep(image, status, answer, time.perf_counter() - started)
        connection.close()


def send(port: int, images: Sequence[bytes], clients: int, keep: Callable[[bytes, int, Any, float], None]) -> float:
    """Send all images from so many clients, and return the seconds."""
    left, lock = iter(images), threading.Lock()

    def take() -> bytes | None:
        with lock:
            return next(left, None)

    def keep_one(*answer: Any) -> None:
        with lock:
            keep(*answer)

    threads = [Load(port, take, keep_one) for _ in range(clients)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - started


def measure_speed(*, tiny: bool) -> Iterator[dict[str, Any]]:
    """Yield images a second and latencies of the service, and of `Predictor` in a loop."""
    scale = loading.TINY._replace(images=3) if tiny else loading.FULL._replace(images=20)
    requests = 6 if tiny else 200
    with tempfile.TemporaryDirectory() as scratch:
        for label in ("first", "second"):
            folder = Path(scratch) / "photos" / label
            folder.mkdir(parents=True)
            loading.photos(folder, scale)
        config = replace(RECIPES["quick"](), dataset=Folder(Path(scratch) / "photos"), tasks=1, drift_images=0)
        encoder = rehearsal.ENCODER if tiny else ViT.Config("vit_small_patch16_224", "random")
        transforms = Transforms(size=rehearsal.SIZE, resize=rehearsal.SIZE) if tiny else config.transforms
        run = train(replace(config, backbone=encoder, transforms=transforms), Path(scratch) / "run").folder
        paths = sorted((Path(scratch) / "photos").rglob("*.*"))
        images = [path.read_bytes() for path, _ in zip(itertools.cycle(paths), range(requests), strict=False)]
        predictor = Predictor(run)
        predictor.predict(paths[:2], reject=0.05)  # warm up
        started = time.perf_counter()
        for path, _ in zip(itertools.cycle(paths), range(requests), strict=False):
            predictor.predict([path], reject=0.05)
        yield {"loop": requests / (time.perf_counter() - started)}
        del predictor
        for batch_size in (32, 1):
            with service(run, "--batch-size", str(batch_size)) as (port, _):
                send(port, images[:4], 2, lambda *answer: None)  # warm up
                for clients in CLIENTS[: 2 if tiny else None]:
                    seconds: list[float] = []

                    def keep(
                        image: bytes, status: int, answer: Any, took: float, seconds: list[float] = seconds
                    ) -> None:
                        if status == 200:
                            seconds.append(took)

                    total = send(port, images, clients, keep)
                    if len(seconds) < requests:
                        raise RuntimeError(f"expected {requests} answers, got {len(seconds)}")
                    yield {
                        "clients": clients,
                        "batch_size": batch_size,
                        "images_per_second": len(seconds) / total,
                        "median": statistics.median(seconds),
                        "p99": float(np.quantile(seconds, 0.99)),
                    }


def measure_endurance(*, tiny: bool) -> dict[str, Any]:
    """Return how many of many requests went wrong while the run changed, and how the memory of the service grew."""
    requests, swaps = (40, 2) if tiny else (10_000, 20)
    rng = np.random.default_rng(0)
    good = [_png(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)) for _ in range(18)]
    broken = [b"no image", good[0][:60]]
    images = [broken[n // 10 % 2] if n % 10 == 9 else good[n % len(good)] for n in range(requests)]
    with tempfile.TemporaryDirectory() as scratch:
        run = train(RECIPES["demo-quick"](), Path(scratch) / "run").folder
        taught = Path(scratch) / "new" / "taught"
        taught.mkdir(parents=True)
        files = []
        for number, content in enumerate(good):
            files.append(Path(scratch) / f"{number}.png")
            files[-1].write_bytes(content)
            (taught / f"{number}.png").write_bytes(content)
        expected = {"task-05": _expected(run, files)}

        def change(number: int) -> None:
            if number % 2:
                changed = Run.open(run)
                with changed.writing():
                    changed.undo_add()
            else:
                resume(run, add=taught.parent)

        change(0)
        expected["task-06"] = _expected(run, files)
        change(1)
        found: Counter[str] = Counter()
        done = threading.Event()

        def change_often() -> None:
            try:
                for number in range(swaps):
                    change(number)
                    found["changes"] += 1
                    time.sleep(1.5)  # the service looks once a second
            finally:
                done.set()

        with service(run) as (port, process):
            swapping = threading.Thread(target=change_often)

            def keep(image: bytes, status: int, answer: Any, seconds: float) -> None:
                if image in broken:
                    found["broken, refused" if status == 400 else "broken, wrong status"] += 1
                elif status != 200:
                    found["good, lost"] += 1
                else:
                    name = answer["predictions"][0]["classes"][0]["name"]
                    right = expected[answer["predictions"][0]["checkpoint"]][good.index(image)] == name
                    found["good, right" if right else "good, wrong"] += 1
                    found[answer["predictions"][0]["checkpoint"]] += 1

            swapping.start()
            seconds, sent, memory = 0.0, 0, []
            while sent < requests or not done.is_set():  # go on until the last change
                some = images[sent % requests : sent % requests + requests // 20]
                seconds += send(port, some, 8, keep)
                sent += len(some)
                memory.append(_resident(process))
            swapping.join()
            outcomes = sum(number for outcome, number in found.items() if ", " in outcome)
            if outcomes != sent or found["changes"] != swaps:
                raise RuntimeError(
                    f"expected {sent} outcomes and {swaps} changes, got {outcomes} and {found['changes']}"
                )
            loads = _metric(port, "pgp_checkpoint_loads_total")
    return {"requests": sent, "seconds": seconds, "swaps": swaps, "loads": loads, "found": found, "megabytes": memory}


def _png(pixels: np.ndarray[Any, Any]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def _expected(run: Path, files: Sequence[Path]) -> list[str]:
    return [prediction.names[0] for prediction in Predictor(run).predict(files)]


def _resident(process: int) -> float:
    """Return the resident memory of a process in megabytes; NaN if the system does not tell."""
    status = Path(f"/proc/{process}/statm")
    if not status.is_file():
        return float("nan")
    return int(status.read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def _metric(port: int, name: str) -> float:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    connection.close()
    found = re.search(rf"^{name} (\S+)$", text, re.M)
    return float(found[1]) if found else 0.0


def table(results: Path = RESULTS) -> str:
    """Return the tables of speed and endurance."""
    lines = list(records.read(results))
    loop = next(line["loop"] for line in lines if "loop" in line)
    cells = [
        [
            str(line["clients"]),
            str(line["batch_size"]),
            f"{line['images_per_second']:.1f}",
            f"{line['images_per_second'] / loop:.2f}",
            f"{1000 * line['median']:.0f}",
            f"{1000 * line['p99']:.0f}",
        ]
        for line in lines
        if "clients" in line
    ]
    head = ["clients", "batches up to", "images a second", "ratio to `Predictor` in a loop", "median, ms", "99 %, ms"]
    (lasting,) = [line for line in lines if "found" in line]
    found, megabytes = lasting["found"], lasting["megabytes"]
    sizes = [megabytes[int(part * (len(megabytes) - 1))] for part in (0, 0.25, 0.5, 1)]
    rows = [
        ["requests", f"{lasting['requests']:,}"],
        ["good, answered as `Predictor` does", f"{found.get('good, right', 0):,}"],
        ["good, lost or answered otherwise", f"{found.get('good, lost', 0) + found.get('good, wrong', 0):,}"],
        ["broken, refused", f"{found.get('broken, refused', 0):,}"],
        ["changes of the run", f"{lasting['swaps']}"],
        ["checkpoints that the service loaded", f"{lasting['loads']:.0f}"],
        ["requests a second", f"{lasting['requests'] / lasting['seconds']:.0f}"],
        ["memory in MB after 5, 25, 50 and 100 % of them", ", ".join(f"{size:.0f}" for size in sizes)],
    ]
    return "\n".join(
        [
            f"Speed. `Predictor` in a loop: {loop:.1f} images a second.",
            "",
            markdown_table(head, cells),
            "",
            "Endurance.",
            "",
            markdown_table(["measured", ""], rows),
            "",
        ]
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="test with tiny encoders; nothing is kept")
    tiny = parser.parse_args(argv).tiny
    with tempfile.TemporaryDirectory() as scratch:
        results = Path(scratch) / RESULTS.name if tiny else RESULTS
        results.unlink(missing_ok=True)
        about = {key: describe_environment()[key] for key in ("commit", "processor", "threads")}
        for line in measure_speed(tiny=tiny):
            records.append(results, {**line, **about})
        records.append(results, {**measure_endurance(tiny=tiny), **about})
        records.write_page(results, table(results))


if __name__ == "__main__":
    main()
