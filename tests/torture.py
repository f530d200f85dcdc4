"""Folders as they are found: a small data set for each thing that can be wrong with one, and what is made of it.

    python tests/torture.py

builds them all in a temporary folder, from nothing but numpy and Pillow, lets `pgp data check`, `pgp train` and
`pgp predict` read each, and writes docs/results/torture.md. tests/test_torture.py holds what has to come out.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import socket
import struct
import sys
import tempfile
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

import tiny
from pgp import predict, train
from pgp.baselines import matching_baselines
from pgp.cli import main as cli
from pgp.config import Config
from pgp.datasets.folder import Folder
from pgp.predict import Predictor
from pgp.runs.run import Run
from pgp.system import escaping
from pgp.system.outputs import make_output

PAGE = Path(__file__).parent.parent / "docs" / "results" / "torture.md"
NFC, NFD = "caf\u00e9", "cafe\u0301"
LATIN = os.fsdecode(b"caf\xe9")
"""A file name in Latin-1, as Python spells it."""


class Place:
    """The folder of a case, and what to put into it."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def images(self, folder: str = "", count: int = 4, name: str = "{}.png", **options: object) -> None:
        """Sound images."""
        for number in range(count):
            self.image(f"{folder}/{name.format(number)}", picture(number, len(folder)), **options)

    def image(self, path: str, image: Image.Image, kind: str | None = None, **options: object) -> None:
        """One image."""
        file = io.BytesIO()
        image.save(file, kind or Image.registered_extensions().get(Path(path).suffix.lower(), "PNG"), **options)
        self.file(path, file.getvalue())

    def file(self, path: str, content: bytes | str = b"?") -> Path:
        """A file with this content."""
        place = self.root / path.lstrip("/")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(content.encode() if isinstance(content, str) else content)
        return place

    def folder(self, path: str) -> Path:
        """An empty folder."""
        (self.root / path).mkdir(parents=True, exist_ok=True)
        return self.root / path

    def link(self, path: str, target: str) -> None:
        """A link to a path that counts from where the link is."""
        self.folder(str(Path(path).parent))
        (self.root / path).symlink_to(target)

    def classes(self, part: str = "", names: tuple[str, ...] = ("cat", "dog"), count: int = 4) -> Place:
        """Sound images of some classes."""
        for name in names:
            self.images(f"{part}/{name}" if part else name, count)
        return self


def picture(number: int = 0, shade: int = 0) -> Image.Image:
    """A small image, another for each number."""
    return Image.new("RGB", (12, 8), ((40 * number) % 256, (30 * shade) % 256, 90))


def content_of(kind: str = "JPEG", image: Image.Image | None = None, **options: object) -> bytes:
    """The bytes of an image file."""
    file = io.BytesIO()
    (image or picture()).save(file, kind, **options)
    return file.getvalue()


def exif(*tags: tuple[int, int, int, bytes]) -> bytes:
    """Exif of tags: number, type, count and value."""
    values, rows, start = b"", b"", 8 + 2 + 12 * len(tags) + 4
    for tag, kind, count, value in tags:
        held = value.ljust(4, b"\0") if len(value) <= 4 else struct.pack("<I", start + len(values))
        values += value if len(value) > 4 else b""
        rows += struct.pack("<HHI", tag, kind, count) + held
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(tags)) + rows + bytes(4) + values


def png(width: int, height: int) -> bytes:
    """A PNG file that claims a size and holds next to nothing."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def pipe(place: Place, path: str) -> None:
    """A pipe, which nobody writes to."""
    place.folder(str(Path(path).parent))
    os.mkfifo(place.root / path)


def bound_socket(place: Place, path: str) -> None:
    """A socket; its address is short, so it is made from inside its folder."""
    before = Path.cwd()
    os.chdir(place.folder(str(Path(path).parent)))
    try:
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(Path(path).name)
    finally:
        os.chdir(before)


def sparse(place: Place, path: str, size: int) -> None:
    """A file of zeros that takes no room."""
    os.truncate(place.file(path, b"\x89PNG\r\n\x1a\n"), size)


class Outcome(NamedTuple):
    """What came out, in short."""

    check: str
    """`whole`, `N bad` or `refused`; and how many files and folders are ignored."""
    train: str
    """Images for training and the test, and classes; or `refused`. Images that cannot be read are skipped."""
    predict: str
    """Answers, and images that cannot be read."""


@dataclass(frozen=True)
class Case:
    """A folder, and what has to come out."""

    name: str
    build: Callable[[Place], object]
    check: str
    train: str
    predict: str
    says: str = ""
    """A pattern of what `data check` has to say, beside the plain counts."""
    settings: tuple[tuple[str, str], ...] = ()
    """Of the data set."""


ALL, NONE = "6 + 2 of 2", "refused"
"""What `train` makes of the usual eight images of two classes, and of what it refuses."""


def beside(*what: Callable[[Place], object]) -> Callable[[Place], object]:
    """The usual two classes, and something else."""

    def build(place: Place) -> None:
        place.classes()
        for one in what:
            one(place)

    return build


def file(path: str, content: bytes | str = b"?") -> Callable[[Place], object]:
    """A file more."""
    return lambda place: place.file(path, content)


def images(folder: str, count: int = 4, name: str = "{}.png") -> Callable[[Place], object]:
    """More images."""
    return lambda place: place.images(folder, count, name)


def image(
    path: str, made: Callable[[], Image.Image], kind: str | None = None, **options: object
) -> Callable[[Place], object]:
    """One more image."""
    return lambda place: place.image(path, made(), kind, **options)


def parts(*names: str) -> Callable[[Place], object]:
    """The usual two classes in each of several folders."""
    return lambda place: [place.classes(name) for name in names]


def all_of(*what: Callable[[Place], object]) -> Callable[[Place], object]:
    """One thing after the other."""
    return lambda place: [one(place) for one in what]


# fmt: off
LAYOUTS = [
    Case("two folders of classes", beside(), "whole", ALL, "8"),
    Case("train/ and test/", parts("train", "test"), "whole", "8 + 8 of 2", "16"),
    Case("train/ and valid/", parts("train", "valid"), "whole", "8 + 8 of 2", "16"),
    Case("Training/ and TESTING/", parts("Training", "TESTING"), "whole", "8 + 8 of 2", "16"),
    Case("train/ and eval/", parts("train", "eval"), "whole", "8 + 8 of 2", "16"),
    Case("train/ alone", parts("train"), "whole", ALL, "8"),
    Case("train/, val/ and test/", parts("train", "val", "test"), "whole, 8 ignored", "8 + 8 of 2", "24", "those of test/, not those of val/"),
    Case("the same, val/ named", parts("train", "val", "test"), "whole, 8 ignored", "8 + 8 of 2", "24", "not used", (("test_folder", "val"),)),
    Case("test/ without classes beside val/", all_of(parts("train", "val"), images("test")), "whole, 4 ignored", "8 + 8 of 2", "20", "not those of test/, which has no folders"),
    Case("test/ without classes", all_of(parts("train"), images("test")), NONE, NONE, "12", "not known what is on these images"),
    Case("an empty test/", all_of(parts("train"), lambda p: p.folder("test")), NONE, NONE, "8", "expected folders of classes"),
    Case("testing/ and test/", parts("train", "test", "testing"), NONE, NONE, "24", "expected one folder of test images"),
    Case("train/ and training/", parts("train", "training"), NONE, NONE, "16", "expected one folder of training images"),
    Case("a class called train", lambda p: p.classes(names=("car", "plane", "train")), NONE, NONE, "12", "--dataset.train-folder"),
    Case("the same, told that all are classes", lambda p: p.classes(names=("car", "plane", "train")), "whole", "9 + 3 of 3", "12", "", (("train_folder", "."),)),
    Case("a class called test", beside(images("test")), NONE, NONE, "12", "no data folder at .*train, beside"),
    Case("train/ beside folders of classes", all_of(parts("train"), lambda p: p.classes()), NONE, NONE, "16", "got images in cat/ beside it"),
    Case("train/ beside a folder of notes", all_of(parts("train", "test"), file("notes/a.txt")), "whole, 1 ignored", "8 + 8 of 2", "16", "folders beside those that are used: notes"),
    Case("train and test inside the classes", parts("cat/train", "cat/test"), NONE, NONE, "16", "train and test inside"),
    Case("a folder around train/ and test/", parts("photos/train", "photos/test"), NONE, NONE, "16", "train and test inside .*or name"),
    Case("folders of folders of classes", parts("indoor", "outdoor"), "whole", "12 + 4 of 2", "16", "16 images lie deeper"),
    Case("images without folders", images(""), NONE, NONE, "4", "4 images outside the class folders"),
    Case("images beside the folders", beside(images("", 2)), "whole, 2 ignored", ALL, "10", "2 images outside the class folders"),
    Case("nothing at all", lambda p: None, NONE, NONE, "none", "no images in"),
    Case("one class", images("cat"), "whole", "3 + 1 of 1", "4"),
    Case("a class of one image", beside(images("eel", 1)), "not whole", "7 + 2 of 3", "9", "no training or no test image of eel"),
    Case("a class in test/ only", all_of(parts("train", "test"), images("test/eel")), NONE, NONE, "20", "in test only"),
    Case("a class in train/ only", all_of(parts("train", "test"), images("train/eel")), "not whole", "12 + 8 of 3", "20", "no training or no test image of eel"),
    Case("an empty folder", beside(lambda p: p.folder("eel")), "whole, 1 ignored", ALL, "8", "1 folders without any file: eel"),
    Case("a folder of texts", beside(file("eel/a.txt")), NONE, NONE, "8", "none of .'eel'."),
    Case("a file in the place of a folder", beside(file("eel")), "whole, 1 ignored", ALL, "8", "1 files without a suffix: eel"),
]
LINKS = [
    Case("a link to a folder of a class", all_of(images("dog"), images("../away/cat"), lambda p: p.link("cat", "../away/cat")), "whole", ALL, "4"),
    Case("two names of one folder", beside(lambda p: p.link("kitten", "cat")), NONE, NONE, "8", "the same by a link"),
    Case("a link to the folder above", beside(lambda p: p.link("loop", ".")), "whole, 1 ignored", ALL, "8", "1 links to folders: loop"),
    Case("a link to a folder within a class", beside(lambda p: p.link("cat/dogs", "../dog")), "whole, 1 ignored", ALL, "8", "1 links to folders: cat/dogs"),
    Case("a link to itself", beside(lambda p: p.link("cat/x.png", "x.png")), "whole, 1 ignored", ALL, "8", "1 links that lead nowhere"),
    Case("a link to nothing", beside(lambda p: p.link("cat/x.png", "gone.png")), "whole, 1 ignored", ALL, "8", "1 links that lead nowhere"),
    Case("a link to an image", beside(lambda p: p.link("cat/x.png", "../dog/0.png")), "whole", "7 + 2 of 2", "9"),
    Case("a hard link to an image", beside(lambda p: os.link(p.root / "dog/0.png", p.root / "cat/x.png")), "whole", "7 + 2 of 2", "9"),
    Case("a pipe", beside(lambda p: pipe(p, "cat/x.png")), "whole, 1 ignored", ALL, "8", "1 pipes, sockets and devices"),
    Case("a socket", beside(lambda p: bound_socket(p, "cat/x.png")), "whole, 1 ignored", ALL, "8", "1 pipes, sockets and devices"),
    Case("a link to a device", beside(lambda p: p.link("cat/x.png", "/dev/zero")), "whole, 1 ignored", ALL, "8", "1 "),
]
FILES = [
    Case("suffixes .JPG, .JPeG, .jfif, .jpe", all_of(images("cat", 4, "{}.JPeG"), images("dog", 2, "{}.jfif"), images("dog", 2, "{}.jpe")), "whole", ALL, "8"),
    Case("files of an unknown suffix", beside(file("cat/a.heic"), file("cat/b.HEIC"), file("cat/c.txt")), "whole, 3 ignored", ALL, "8", r".heic 2, .txt 1"),
    Case("a table beside the images", beside(file("labels.csv")), "whole, 1 ignored", ALL, "8", ".csv 1"),
    Case("an image without a suffix", beside(lambda p: p.image("cat/photo", picture())), "whole, 1 ignored", ALL, "8", "images without a suffix.*cat/photo"),
    Case("a text without a suffix", beside(file("cat/README")), "whole, 1 ignored", ALL, "8", "1 files without a suffix"),
    Case("names with a dot or a space at the end", beside(file("cat/a.png.", content_of("PNG")), file("cat/b.png ", content_of("PNG"))), "whole, 2 ignored", ALL, "8", "1 images without a suffix"),
    Case("hidden files and folders", beside(file("cat/.x.png"), images(".cache")), "whole, 2 ignored", ALL, "8", "2 hidden"),
    Case("what macOS leaves", beside(file("cat/._0.png"), file(".DS_Store"), images("__MACOSX/cat")), "whole, 3 ignored", ALL, "8", "3 files and folders of operating systems"),
    Case("what Windows leaves", beside(file("cat/Thumbs.db"), file("cat/desktop.ini"), images("$RECYCLE.BIN"), images("System Volume Information")), "whole, 4 ignored", ALL, "8", "4 files and"),
    Case("what network storage leaves", beside(images("cat/@eaDir"), images("#recycle"), images("dog/@Recycle"), images(".Trash-1000")), "whole, 4 ignored", ALL, "8", "4 files and"),
    Case("lost+found", beside(lambda p: p.folder("lost+found")), "whole, 1 ignored", ALL, "8", "1 files and"),
    Case("runs/ of pgp", beside(lambda p: make_output(p.root / "runs"), images("runs/own-seed42", 2)), "whole, 1 ignored", ALL, "8", "1 folders that pgp wrote: runs"),
    Case("a run within a class", beside(lambda p: make_output(p.root / "cat/run"), images("cat/run", 2)), "whole, 1 ignored", ALL, "8", "1 folders that pgp wrote: cat/run"),
    Case("the same bytes twice in a class", beside(lambda p: shutil.copy(p.root / "cat/0.png", p.root / "cat/x.png")), "whole", "7 + 2 of 2", "9"),
    Case("the same bytes in two classes", beside(lambda p: shutil.copy(p.root / "cat/0.png", p.root / "dog/x.png")), "whole", "7 + 2 of 2", "9"),
    Case("a folder that is read-only", beside(lambda p: (p.root / "cat").chmod(0o555)), "whole", ALL, "8"),
]
IMAGES = [
    Case("an empty file", beside(file("cat/x.png", b"")), "1 bad", "7 + 2 of 2", "8, 1 bad", "the file is empty"),
    Case("a web page called .png", beside(file("cat/x.png", "<!DOCTYPE html>")), "1 bad", "7 + 2 of 2", "8, 1 bad", "it is a web page"),
    Case("HEIC called .jpg", beside(file("cat/x.jpg", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")), "1 bad", "7 + 2 of 2", "8, 1 bad", "it is HEIC"),
    Case("PostScript called .png", beside(file("cat/x.png", "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")), "1 bad", "7 + 2 of 2", "8, 1 bad", "it is PostScript"),
    Case("a pointer of Git LFS", beside(file("cat/x.png", "version https://git-lfs.github.com/spec/v1\n")), "1 bad", "7 + 2 of 2", "8, 1 bad", "git lfs pull"),
    Case("JPEG called .png", beside(file("cat/x.png", content_of("JPEG"))), "whole", "7 + 2 of 2", "9"),
    Case("a JPEG that is cut off", beside(file("cat/x.jpg", content_of("JPEG", Image.effect_noise((64, 64), 50))[:900])), "1 bad", "7 + 2 of 2", "8, 1 bad", "truncated"),
    Case("a PNG without its end", beside(file("cat/x.png", content_of("PNG", Image.effect_noise((64, 64), 50))[:900])), "1 bad", "7 + 2 of 2", "8, 1 bad", "cannot read the image"),
    Case("a sparse file of 100 GB", beside(lambda p: sparse(p, "cat/x.png", 100 << 30)), "1 bad", "7 + 2 of 2", "8, 1 bad", "damaged, or no image"),
    Case("a decompression bomb", beside(file("cat/x.png", png(60_000, 60_000))), "1 bad", "7 + 2 of 2", "8, 1 bad", "exceeds limit"),
    Case("1 x 1 pixels", beside(image("cat/x.png", lambda: Image.new("RGB", (1, 1)))), "whole", "7 + 2 of 2", "9"),
    Case("1 x 20,000 pixels", beside(image("cat/x.png", lambda: Image.new("RGB", (1, 20_000)))), "whole", "7 + 2 of 2", "9"),
    Case("20,000 x 1 pixels", beside(image("cat/x.png", lambda: Image.new("RGB", (20_000, 1)))), "whole", "7 + 2 of 2", "9"),
    Case("an animation", beside(image("cat/x.gif", picture, save_all=True, append_images=[picture(3)])), "whole", "7 + 2 of 2", "9"),
    Case("16 bits", beside(image("cat/x.png", lambda: Image.fromarray(np.full((8, 8), 30000, np.uint16)))), "whole", "7 + 2 of 2", "9"),
    Case("floats from 0 to 1", beside(image("cat/x.tif", lambda: Image.fromarray(np.full((8, 8), 0.5, np.float32)))), "whole", "7 + 2 of 2", "9"),
    Case("floats from 0 to 255", beside(image("cat/x.tif", lambda: Image.fromarray(np.full((8, 8), 90.0, np.float32)))), "1 bad", "7 + 2 of 2", "8, 1 bad", r"floats outside \[0, 1\]"),
    Case("integers of 32 bits", beside(image("cat/x.tif", lambda: Image.fromarray(np.full((8, 8), 90, np.int32)))), "1 bad", "7 + 2 of 2", "8, 1 bad", "signed integers of 32 bits"),
    *(Case(f"colours of kind {mode}", beside(image(f"cat/x{suffix}", lambda mode=mode: picture().convert(mode))), "whole", "7 + 2 of 2", "9") for mode, suffix in (("CMYK", ".jpg"), ("P", ".png"), ("LA", ".png"), ("1", ".png"), ("L", ".jpg"), ("RGBA", ".webp"), ("YCbCr", ".jpg"))),
    Case("a tag of a wrong type", beside(file("cat/x.jpg", content_of("JPEG", exif=exif((0x010F, 5, 1, b"abc"), (0x0112, 3, 1, b"\6\0"))))), "whole", "7 + 2 of 2", "9"),
    Case("a zero denominator", beside(file("cat/x.jpg", content_of("JPEG", exif=exif((0x011A, 5, 1, struct.pack("<II", 72, 0)))))), "whole", "7 + 2 of 2", "9"),
    Case("a description that is not UTF-8", beside(file("cat/x.png", content_of("PNG", exif=exif((0x010E, 2, 6, b"gr\xfcn\0\0"))))), "whole", "7 + 2 of 2", "9"),
    Case("a class without a sound image", lambda p: [p.images("cat"), [p.file(f"dog/{i}.png", b"") for i in range(4)]], "4 bad", NONE, "4, 4 bad", "no training image or no test image of dog can be read"),
    Case("a test without a sound image", all_of(parts("train"), file("test/cat/0.png"), file("test/dog/0.png")), "2 bad", NONE, "8, 2 bad", "no training image or no test image of cat can be read"),
]
NAMES = [
    Case("emoji and right-to-left names", lambda p: p.classes(names=("\U0001f408", "\u05d7\u05ea\u05d5\u05dc")), "whole", ALL, "8"),
    Case("a class with a line break", lambda p: p.classes(names=("a\nb", "dog")), "whole", ALL, "8"),
    Case("a class with escape sequences", lambda p: p.classes(names=("\x1b[31mred\x1b[0m", "dog")), "whole", ALL, "8"),
    Case("a class with markup and brackets", lambda p: p.classes(names=("[bold]cat[/bold]", "[/]")), "whole", ALL, "8"),
    Case("a class with a tab and spaces around", lambda p: p.classes(names=("a\tb", " dog ")), "whole", ALL, "8"),
    Case("classes called -x and con", lambda p: p.classes(names=("-x", "con")), "whole", ALL, "8"),
    Case("a class of 255 bytes", lambda p: p.classes(names=("x" * 255, "dog")), "whole", ALL, "8"),
    Case("cat and Cat", lambda p: p.classes(names=("cat", "Cat")), "whole", ALL, "8", "differ only in case"),
    Case("café in two forms, in two parts", lambda p: [p.classes("train", (NFC, "dog")), p.classes("test", (NFD, "dog"))], "whole", "8 + 8 of 2", "16"),
    Case("café in two forms, in one part", lambda p: p.classes(names=(NFC, NFD)), NONE, NONE, "8", "two folders"),
    Case("an image whose name is not UTF-8", beside(file(f"cat/{LATIN}.png", content_of("PNG"))), "whole", "7 + 2 of 2", "9"),
    Case("a bad image whose name is not UTF-8", beside(file(f"cat/{LATIN}.png", b"")), "1 bad", "7 + 2 of 2", "8, 1 bad", r"caf\\udce9.png"),
    Case("a class whose name is not UTF-8", lambda p: p.classes(names=(LATIN, "dog")), "whole", ALL, "8", "names that are not UTF-8"),
    Case("an image with a line break", beside(images("cat", 1, "a\n{}b.png")), "whole", "7 + 2 of 2", "9"),
]
TEXTS = [
    Case("names.txt with a byte order mark", beside(file("names.txt", "\ufeffcat Katze\r\ndog Hund\r\n")), "whole", ALL, "8"),
    Case("names.txt in Latin-1", beside(file("names.txt", "cat Größe\ndog b\n".encode("latin-1"))), NONE, NONE, "8", "another encoding at byte 6, in line 1"),
    Case("names.txt in UTF-16", beside(file("names.txt", "cat a\ndog b\n".encode("utf-16"))), NONE, NONE, "8", "got UTF-16"),
    Case("names.txt is a folder", beside(lambda p: p.folder("names.txt")), NONE, NONE, "8", "expected a file, got a folder"),
    Case("class_order.txt in the other form", lambda p: [p.classes(names=(NFC, "dog")), p.file("class_order.txt", f"dog\n{NFD}\n")], "whole", ALL, "8"),
    Case("class_order.txt is a pipe", beside(lambda p: pipe(p, "class_order.txt")), NONE, NONE, "8", "expected a file, got a pipe"),
    Case("tasks.json in the other form", lambda p: [p.classes(names=(NFC, "dog")), p.file("tasks.json", json.dumps({"all": [NFD, "dog"]}))], "whole", ALL, "8"),
    Case("tasks.json of a thousand brackets", beside(file("tasks.json", "[" * 100_000)), NONE, NONE, "8", "expected JSON in .*tasks.json"),
]
# fmt: on
CASES = {case.name: case for case in (*LAYOUTS, *LINKS, *FILES, *IMAGES, *NAMES, *TEXTS)}


class Reference(NamedTuple):
    """A run on a sound data set, which predicts what is on all others."""

    run: Run
    predictor: Predictor

    @classmethod
    def of(cls, folder: Path) -> Reference:
        """Train it in `folder`."""
        case = CASES["two folders of classes"]
        run = train.train(config_of(case, built(case, folder / "reference")), folder / "run")
        return cls(run, Predictor(run))


def config_of(case: Case, root: Path) -> Config:
    """The nearest class mean on a tiny encoder, which needs no training."""
    data = replace(Folder(root), **dict(case.settings))
    base = tiny.config(dataset=data, tasks=None, epochs=1, drift_images=0, on_bad_image="skip")
    return replace(matching_baselines(base)["ncm"], tasks=None, name="torture")


def shown(work: Callable[[], object]) -> tuple[str, bool]:
    """All that a piece of work prints, as a terminal shows it, and the error that ends it; and whether it ended well."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            work()
        except (ValueError, RuntimeError, OSError) as error:
            return out.getvalue() + escaping.printable(error), False
    return out.getvalue(), True


def built(case: Case, folder: Path) -> Path:
    """The data folder of a case, below `folder`."""
    root = folder / "data"
    root.mkdir(parents=True)
    case.build(Place(root))
    return root


def check(case: Case, root: Path) -> tuple[str, str]:
    """What `pgp data check` makes of it, in short and in full."""
    text, whole = shown(lambda: cli._check(config_of(case, root)))
    ignored = sum(int(found) for found in re.findall(r"^ignored: (\d+)", text, re.MULTILINE))
    bad = len(re.findall("^cannot read the image", text, re.MULTILINE))
    if not whole and not text.endswith("the data are not complete; see above"):
        return "refused", text
    short = f"{bad} bad" if bad else ("whole" if whole else "not whole")
    return short + (f", {ignored} ignored" if ignored else ""), text


def trained(case: Case, root: Path) -> tuple[str, str]:
    """What `pgp train` makes of it, in short and in full."""
    text, good = shown(lambda: train.train(config_of(case, root), root.parent / "run"))
    if not good:
        return "refused", text
    known = json.loads((root.parent / "run" / "classes.json").read_text(encoding="utf-8"))
    counts = (sum(known["images"][part]) for part in ("train", "test"))
    return f"{' + '.join(map(str, counts))} of {len(known['names'])}", text


def predicted(reference: Reference, root: Path) -> tuple[str, str]:
    """What `pgp predict` makes of it, in short and in full, with a run that knows other images."""
    was, predict.Predictor = predict.Predictor, lambda *_: reference.predictor
    try:
        text, _ = shown(lambda: cli.predict_command([str(reference.run.folder), str(root)]))
    finally:
        predict.Predictor = was
    lines = text.split("\n")
    answers = sum(line.count("\t") > 0 for line in lines)
    bad = sum(line.startswith("pgp: skipped") for line in lines)
    return (str(answers) if answers else "none") + (f", {bad} bad" if bad else ""), text


def outcome(case: Case, root: Path, reference: Reference) -> tuple[Outcome, str]:
    """What came out, in short, and what `data check` said, in full."""
    short, text = check(case, root)
    return Outcome(short, trained(case, root)[0], predicted(reference, root)[0]), text


def what_it_says(case: Case, text: str, root: Path) -> str:
    """The line of `data check` that tells of the case, without the place of its folder; "" if there is none."""
    found = next((line for line in text.split("\n") if case.says and re.search(case.says, line)), "")
    return found.replace(f"{root}/", "").replace(str(root), "the folder")


def main() -> None:
    """Build all, read all, and write the page."""
    rows, surprises = [], 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        reference = Reference.of(folder)
        for number, case in enumerate(CASES.values()):
            root = built(case, folder / str(number))
            found, text = outcome(case, root, reference)
            rows.append((case.name, *found, what_it_says(case, text, root)))
            expected = found == (case.check, case.train, case.predict) and re.search(case.says, text)
            surprises += not expected
            print("  ".join((f"{case.name:45}", f"{found.check:20}", f"{found.train:12}", f"{found.predict:10}")))
            if not expected:
                print(f"  expected {case.check}, {case.train}, {case.predict}, and {case.says!r} in:\n{text}")
    PAGE.write_text(page(rows), encoding="utf-8")
    sys.exit(f"{surprises} cases are not as expected" if surprises else 0)


def page(rows: list[tuple[str, ...]]) -> str:
    """The table of all cases in Markdown."""
    head = ("folder", "data check", "train", "predict", "what `data check` says")
    lines = [head, ("---",) * len(head), *(tuple(map(escaping.markdown_cell, row)) for row in rows)]
    return INTRODUCTION.format(count=len(rows)) + "".join(f"| {' | '.join(line)} |\n" for line in lines)


INTRODUCTION = """\
# What becomes of folders as they are found

`python tests/torture.py` builds {count} small data sets, each with one thing that may be wrong with a folder of images, and lets
three commands read them. It writes this page; `tests/test_torture.py` holds every line of it.

- **data check**: `whole` if all images that are used can be read, else how many cannot; or `refused`, if it is not clear which
  images are meant. Whatever is not used is counted as ignored, by its kind, and named.
- **train**: images for training and for the test, and classes. Images that cannot be read are skipped (`--on-bad-image skip`).
- **predict**: answers for the images in the folder, at any depth.

"""


if __name__ == "__main__":
    main()
