"""Small data sets in the true layout and format of the published ones, and a server that gives them away badly."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import http.server
import pickle
import tarfile
import threading
import time
import zipfile
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision import datasets as torchvision_sets

from pgp.datasets.archives import Archive
from pgp.datasets.imagenet_r import LISTS

BIRDS = ("Black_footed_Albatross", "Laysan_Albatross", "Sooty_Albatross", "Groove_billed_Ani", "Crested_Auklet")


def paint(path: Path, label: int, part: str, index: int, side: int = 24) -> Path:
    """A photograph of one colour, which tells label, part and index; see `told`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (side, side), (20 + 8 * label, 200 if part == "test" else 60, 20 + 8 * index)).save(
        path, "JPEG", quality=95
    )
    return path


def told(pixels) -> tuple[int, str, int]:
    """Label, part and index of an image that `paint` made."""
    red, green, blue = (round(float(channel)) for channel in pixels.float().mean((1, 2)))
    return round((red - 20) / 8), "test" if green > 130 else "train", round((blue - 20) / 8)


@cache
def imagenet_r_lists() -> tuple[list[str], list[str]]:
    """The WordNet ids, and the shared test files."""
    lines = (LISTS / "imagenet_r_classnames.txt").read_text().splitlines()
    return [line.split()[0] for line in lines], gzip.decompress(
        (LISTS / "imagenet_r_test.txt.gz").read_bytes()
    ).decode().split()


def make_imagenet_r(root: Path, classes: int = 4, per_class: int = 6, parts: bool = False) -> Path:
    """`root/imagenet-r`: a third of each class is on the shared list; `parts` as other tools leave it."""
    wnids, listed = imagenet_r_lists()
    for label, wnid in enumerate(sorted(wnids)[:classes]):
        tests = [name.split("/")[1] for name in listed if name.startswith(wnid)][: max(1, per_class // 3)]
        trains = [f"toy_{900 + i}.jpg" for i in range(per_class - len(tests))]
        assert not {f"{wnid}/{name}" for name in trains} & set(listed)
        for part, names in (("train", trains), ("test", tests)):
            for index, name in enumerate(names):
                paint(root / "imagenet-r" / (part if parts else "") / wnid / name, label, part, index)
    return root / "imagenet-r"


def make_tiny_imagenet(root: Path, classes: int = 4, per_class: int = 6, layout: str = "published") -> Path:
    """`root/tiny-imagenet-200`, a third as many test images; layouts `published`, `val` and `test` of other tools."""
    folder = root / "tiny-imagenet-200"
    wnids = [f"n0{1443537 + 37 * label}" for label in range(classes)]
    lines, number = [], 0
    for index in range(max(1, per_class // 3)):
        for label, wnid in reversed(list(enumerate(wnids))):
            inside = {"published": "val/images", "val": f"val/{wnid}", "test": f"test/{wnid}/images"}[layout]
            paint(folder / inside / f"val_{number}.JPEG", label, "test", index, 64)
            lines.append(f"val_{number}.JPEG\t{wnid}\t0\t32\t44\t62\n")
            number += 1
    for label, wnid in enumerate(wnids):
        for index in range(per_class):
            paint(folder / "train" / wnid / "images" / f"{wnid}_{index}.JPEG", label, "train", index, 64)
        (folder / "train" / wnid / f"{wnid}_boxes.txt").write_text(f"{wnid}_0.JPEG\t0\t10\t63\t58\n")
    (folder / "val").mkdir(exist_ok=True)
    (folder / "val" / "val_annotations.txt").write_text("".join(lines))
    (folder / "wnids.txt").write_text("".join(f"{wnid}\n" for wnid in reversed(wnids)))
    (folder / "words.txt").write_text("".join(f"{wnid}\tthing {i}, other word\n" for i, wnid in enumerate(wnids)))
    paint(folder / "test" / "images" / "test_0.JPEG", 0, "test", 9, 64)  # published without its label
    return folder


def make_cub200(root: Path, classes: int = 4, per_class: int = 6, parts: bool = False) -> Path:
    """`root/CUB_200_2011`, every third image of a class for the test; `parts` as other tools leave it."""
    folder = root / "CUB_200_2011"
    index: dict[str, list[str]] = {name: [] for name in ("images", "image_class_labels", "train_test_split", "classes")}
    number = 0
    for label in range(classes):
        bird = BIRDS[label % len(BIRDS)]
        species = f"{label + 1:03d}.{bird}"
        index["classes"].append(f"{label + 1} {species}\n")
        for i in range(per_class):
            number += 1
            part, file = "test" if i % 3 == 2 else "train", f"{species}/{bird}_{i:04d}_{900 - number}.jpg"
            paint(folder / (part if parts else "images") / file, label, part, i)
            index["images"].append(f"{number} {file}\n")
            index["image_class_labels"].append(f"{number} {label + 1}\n")
            index["train_test_split"].append(f"{number} {int(part == 'train')}\n")
    if not parts:
        for name, lines in index.items():
            (folder / f"{name}.txt").write_text("".join(lines))
    return folder


def make_cifar100(root: Path, classes: int = 100, per_class: int = 1) -> Path:
    """`root/cifar-100-python`: three pickles; one test image per class. See `proved`."""
    folder = root / "cifar-100-python"
    folder.mkdir(parents=True, exist_ok=True)
    for name, count in (("train", per_class), ("test", 1)):
        labels = [label for label in range(classes) for _ in range(count)]
        pixels = np.repeat(np.array(labels, dtype=np.uint8)[:, None], 3072, axis=1)
        entry = {"data": pixels, "fine_labels": labels, "coarse_labels": [0] * len(labels)}
        (folder / name).write_bytes(pickle.dumps(entry))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": [f"c{i:02d}" for i in range(classes)]}))
    return folder


def proved(monkeypatch, folder: Path) -> None:
    """Tells torchvision that the pickles of `make_cifar100` are the published ones."""
    sums = {name: hashlib.md5((folder / name).read_bytes()).hexdigest() for name in ("train", "test", "meta")}
    cifar = torchvision_sets.CIFAR100
    monkeypatch.setattr(cifar, "train_list", [["train", sums["train"]]])
    monkeypatch.setattr(cifar, "test_list", [["test", sums["test"]]])
    monkeypatch.setattr(cifar, "meta", {"filename": "meta", "key": "fine_label_names", "md5": sums["meta"]})


def pack(folder: Path, archive: Archive, place: Path) -> Archive:
    """Writes `place/<archive.name>` of `folder`, in the format that the name says; the archive as it now is."""
    place.mkdir(parents=True, exist_ok=True)
    path = place / archive.name
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as zipped:
            for file in [folder, *sorted(folder.rglob("*"))]:
                zipped.write(file, file.relative_to(folder.parent))
    else:
        with tarfile.open(path, "w" if path.suffix == ".tar" else "w:gz") as tape:
            tape.add(folder, folder.name)
    return signed(archive, path)


def signed(archive: Archive, path: Path) -> Archive:
    """`archive` with the digest and the size of the file at `path`."""
    return archive._replace(digest=f"md5:{hashlib.md5(path.read_bytes()).hexdigest()}", size=path.stat().st_size)


def tree(folder: Path) -> dict[str, bytes | None]:
    """Every file below `folder` with what is in it, and every folder; but not what pgp has not finished."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
        if ".pgp" not in path.parts
    }


class Server:
    """Gives files of a folder away on 127.0.0.1, as badly as a test asks."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.requests: list[tuple[str, str | None, str | None]] = []
        """Path, Range and If-Range of each."""
        self.breaks: list[int] = []
        """Bytes after which the connection of each coming answer closes; then all is well."""
        self.statuses: list[int] = []
        """Statuses of coming answers, instead of the file."""
        self.version: str | None = '"one"'
        """ETag."""
        self.ranges = True
        self.length = True
        self.seconds = 0.0
        """Before each answer."""
        self.headers: dict[str, str] = {}
        self.span: str | None = None
        """Content-Range of a partial answer, instead of a true one."""
        self.pause = 0.0
        """Seconds between pieces of `piece` bytes."""
        self.piece = 1 << 30
        self.more = 0
        """Bytes that come behind the file."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_port}"

    def answer(self, handler: http.server.BaseHTTPRequestHandler) -> None:
        wanted, condition = handler.headers.get("Range"), handler.headers.get("If-Range")
        self.requests.append((handler.path, wanted, condition))
        time.sleep(self.seconds)
        path = self.folder / handler.path.lstrip("/")
        if self.statuses or not path.is_file():
            handler.send_response(self.statuses.pop(0) if self.statuses else 404)
            for name, value in {**self.headers, "Content-Length": "0"}.items():
                handler.send_header(name, value)
            handler.end_headers()
            return
        body, start = path.read_bytes(), 0
        if wanted and self.ranges and condition in (None, self.version):
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            if start >= len(body):
                handler.send_error(416)
                return
        handler.send_response(206 if start else 200)
        if start:
            handler.send_header("Content-Range", self.span or f"bytes {start}-{len(body) - 1}/{len(body)}")
        if self.length:
            handler.send_header("Content-Length", str(len(body) - start))
        for name, value in {**({"ETag": self.version} if self.version else {}), **self.headers}.items():
            handler.send_header(name, value)
        handler.end_headers()
        stop = start + self.breaks.pop(0) if self.breaks else len(body)
        sent = body[start:stop] + bytes(self.more)
        with contextlib.suppress(ConnectionError):
            for place in range(0, len(sent), self.piece):
                handler.wfile.write(sent[place : place + self.piece])
                time.sleep(self.pause)

    def __enter__(self) -> Server:
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.answer(self)

            def log_message(self, *_) -> None:
                pass

        self._http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = False
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,))
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()
