"""Draw a second data set: 200 Chinese characters in 23 typefaces, with random size, position and rotation.

14 typefaces are for training, 4 for tuning and 5 for testing.

    python benchmarks/kanji_data.py            # download about 190 MB with npm, draw data/kanji, print a summary
    python benchmarks/kanji_data.py --probe    # also print the accuracy of closed-form readouts of frozen features
    python benchmarks/kanji_data.py --tiny --probe    # test with letters of installed fonts, without npm

It needs npm (which comes with Node.js), and uses only `npm pack` with npm's configured registry. The probe takes 80 s
and needs ../shared/backbones/vit_small_patch14_imgfocus.safetensors, which is not part of the project.

The typefaces are under the SIL Open Font License 1.1 or the Apache License 2.0; data/kanji/SOURCES.txt names their
authors. They are downloaded and drawn, and not redistributed.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import random
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, NamedTuple

import matplotlib
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps, features

import rehearsal
from pgp.backbones.base import Backbone
from pgp.backbones.vit import ViT
from pgp.datasets.base import Split
from pgp.datasets.files import FileSplit
from pgp.datasets.folder import Folder
from pgp.datasets.loader import LoaderOptions, TransformedSplit, batches, sequential_batches
from pgp.datasets.transforms import Transforms
from pgp.readouts.base import Readout
from pgp.readouts.lda import LDA, NCM

ROOT = Path(__file__).resolve().parent.parent
WEIGHTS = ROOT.parent / "shared" / "backbones" / "vit_small_patch14_imgfocus.safetensors"
SIDE = 96
"""Pixels of a picture, each way."""
EM = (58.0, 80.0)
"""Pixels of the typeface's square, drawn for each picture. Not scaled to the ink: who draws small stays small."""
TILT = 10.0
"""Degrees either way."""
SHIFT = 8.0
"""Pixels off the centre, either way. With all characters upright, alike in size and in the centre, a classifier of mere
pixels beats frozen features; with these three it does not, by far."""
FINE = 256
"""Pixels of the typeface's square before it is made small."""
LARGEST = 16 << 20
"""Bytes of the largest file that is read out of a package; what claims more is none of these typefaces."""
Part = Literal["train", "validation", "test"]
PARTS: tuple[Part, ...] = ("train", "validation", "test")
CHARACTERS = (
    "一右雨王音下火花学九休玉金空月犬五口校左三山子四糸字耳七手十出女小上森人水正生青夕石赤千川先早草足村大男竹中虫町天田"
    "土二日入年白八百文木本名目立力林六引羽何科夏家歌画回会海外角活丸岩汽弓牛京教近兄形元言原古午後工公交光考行高黄合谷国"
    "今才作算止市矢思寺自室社弱首秋春少色食心新数西声星晴切雪船前走多太体台地池知茶昼朝直通弟店点刀冬当答同道内南肉麦半番父"
    "分米方母北妹万明毛夜野友用曜来里理安暗委意育院泳央"
)
"""What Japanese children learn first, in the order of the school lists, less what one of the typefaces lacks."""


class Font(NamedTuple):
    """A typeface in an npm package."""

    part: Part
    name: str
    version: str
    subset: str
    """File of the package that contains the characters."""
    sha256: str
    """Digest of the package, which npm does not change after its publication."""

    @property
    def package(self) -> str:
        """Name and version of the package for npm."""
        return f"@fontsource/{self.name}@{self.version}"

    @property
    def archive(self) -> str:
        """File name that npm gives to the package."""
        return f"fontsource-{self.name}-{self.version}.tgz"

    @property
    def file(self) -> str:
        """Path of the typeface in the package."""
        return f"package/files/{self.name}-{self.subset}-400-normal.woff"


# fmt: off
FONTS = (
    Font("train", "hina-mincho", "5.2.8", "japanese",  # Mincho, thin
         "38466d5704bf9f66f02abb5c6c80aa606b562bdba356b90b77681a37710c7bf9"),
    Font("train", "zen-antique", "5.3.0", "japanese",  # Mincho, heavy
         "26f28d7bd1b4aaca6dded4d6e7e56e5fd2f5b5635e670a7d56e319da6bfd98ca"),
    Font("train", "sawarabi-gothic", "5.3.1", "japanese",  # Gothic
         "29bf44a5846453419e066fb8e09cd30919643fa04a3210af3397fc11e65f78ae"),
    Font("train", "shippori-antique", "5.3.0", "japanese",  # Gothic, heavy
         "6251b13b55fe2a61d8230173b2dbcb9370633af6a73c19ec5aeb9fc2c2fc0c5d"),
    Font("train", "rocknroll-one", "5.3.0", "japanese",  # Gothic, lively
         "aa274450543b7e1bfc0965cda9100a3a6bef26271d5b4c9ad1dc7f05118aea51"),
    Font("train", "reggae-one", "5.3.0", "japanese",  # brushed headline
         "88f67b908e40afc364045c8e18f69cf99727f358408fab86dc447b445caa6d4e"),
    Font("train", "stick", "5.3.0", "japanese",  # sticks
         "ef2d959b5b974e8b8334f6faa4b380c6c90b91aae9b509c01733a7ce4616a7c7"),
    Font("train", "potta-one", "5.3.0", "japanese",  # fat brush
         "ba4b54bac2024f7534d62759974dcb3e1b2e40585cb03cea06817699d35c10e9"),
    Font("train", "yomogi", "5.3.0", "japanese",  # fine pen
         "db1cc83484c6552df59b9c22f2f4725ceaad79875d90f42dcc9268a5c35d5080"),
    Font("train", "hachi-maru-pop", "5.3.0", "japanese",  # rounded handwriting
         "10f8789329e00597f5f4ae91f8fc1408c22b3b132a6de54b4b08c2f8d3e2b9c3"),
    Font("train", "ma-shan-zheng", "5.3.1", "chinese-simplified",  # brush
         "f441a8e137c210da78e8a287616227b11771ff8bbc4a6e506a0f5f84790ca272"),
    Font("train", "zcool-xiaowei", "5.3.0", "chinese-simplified",  # Song
         "da63bdd0b1fe09ca18433ced3033c0ecbcffcfdca09c021206e8076822d28720"),
    Font("train", "kosugi-maru", "5.3.0", "japanese",  # Gothic, round
         "ce8295c0e9c13b50b25867e47f3a78cdb4464a27a82eb5a6f89b7eff484a15ab"),
    Font("train", "dela-gothic-one", "5.3.0", "japanese",  # wide and black
         "2344fa5f9b2bb0b152013d98073a01006cffc4eac2d638586df6b0805e4d9474"),
    Font("validation", "mochiy-pop-one", "5.3.0", "japanese",  # fat and round
         "e51bf9bf1885021eadc9ad3178f1dd7a0fa98e88b69be71ca8f13dc177ca976e"),
    Font("validation", "zcool-kuaile", "5.3.0", "chinese-simplified",  # playful
         "1e708b9f87a9e933e11c9137b4aa891c3e3105beee047ddfe75d23466c887dc1"),
    Font("validation", "zcool-qingke-huangyou", "5.3.0", "chinese-simplified",  # condensed
         "fde964d5d311f415ff8ea42bb583b4a68ca4193202b900d7e5314c941f5d95b8"),
    Font("validation", "long-cang", "5.3.0", "chinese-simplified",  # running hand
         "f37d7fc6e0ed15718e03fe9edd5f8b0117d6d011d23c15bf2d35b7b00f9c4e26"),
    Font("test", "zen-kurenaido", "5.3.0", "japanese",  # pen
         "f8a7fb316996b6d8a7daa9faf3a5f8baab1622cdca9e2aec4af807036ddb2fa4"),
    Font("test", "yuji-mai", "5.3.0", "japanese",  # brush
         "c12fbb2a58b2b51d9b5674ff8e14c4d6d2e5525b57f573598a6d11067e132849"),
    Font("test", "dotgothic16", "5.3.0", "japanese",  # pixels
         "5977ee64b27320f4cc22017b956c5271f2152d307e294771970d6b19cdf6b3dd"),
    Font("test", "rampart-one", "5.3.0", "japanese",  # outline with a shadow
         "f686a1ca09a507666f8ffa9743b000614e9fdec605136d6278aa6f2b040d53ac"),
    Font("test", "yusei-magic", "5.3.0", "japanese",  # marker
         "f752e070375427a719f719629f7af78b64d24a6fd7bea7041d8b6b72e2bcc6a0"),
)
# fmt: on
"""Pens, brushes and headlines are in each part; the pixels and the outline are far from all that is trained on. Cursive
hands such as zhi-mang-xing are left out: frozen features read 5 to 9 % of them, which only thins all figures."""


class DataError(Exception):
    """Something cannot be downloaded or drawn. The message says what to do."""


class Collection(NamedTuple):
    """Characters and typefaces to draw, and their folders."""

    fonts: tuple[Font, ...]
    characters: str
    data: Path
    """Folder of the image folders."""

    @property
    def packages(self) -> Path:
        """Folder of downloaded packages, which may be deleted after drawing."""
        return self.data / "kanji-packages"


KANJI = Collection(FONTS, CHARACTERS, ROOT / "data")


def folder(held_out: Literal["validation", "test"] = "test", of: Collection = KANJI) -> Path:
    """Return an image folder, which is written once: data/kanji, or data/kanji-validation for tuning.

    The first has the test images in its folder `test`. The second has no test image; its folder `validation` takes
    their place.

    Pictures are `<part>/<class>/<typeface>.png`; a class is called by its code point, as in `u6728`, and `names.txt`
    has the character.
    """
    root = of.data / "kanji"
    if not root.is_dir():
        archives = {font: fetch(font, of.packages) for font in of.fonts}
        with write_once(root) as partial:
            for font, archive in archives.items():
                draw(font, _member(archive, font.file), partial, of.characters)
            names = "".join(f"{_class(character)} {character}\n" for character in of.characters)
            (partial / "names.txt").write_text(names, encoding="utf-8", newline="\n")
            sources = "".join(f"{font.part}\t{font.package}\t{_licence(path)}\n" for font, path in archives.items())
            (partial / "SOURCES.txt").write_text(sources, encoding="utf-8", newline="\n")
    if held_out == "test":
        return root
    tuning = of.data / "kanji-validation"
    if not tuning.is_dir():
        with write_once(tuning) as partial:
            shutil.copytree(root, partial, ignore=shutil.ignore_patterns("test"), dirs_exist_ok=True)
    return tuning


def draw(font: Font, content: bytes, root: Path, characters: str) -> None:
    """Write `root/<part>/<class>/<typeface>.png` for every character.

    Black on white, and as large, as tilted and as far off the centre as its own random numbers say, which are the same
    every time.

    Raises:
        DataError: If the typeface cannot be read or lacks characters.
    """
    try:
        # the basic layout, because the other depends on what else is installed
        face = ImageFont.truetype(io.BytesIO(content), FINE, layout_engine=ImageFont.Layout.BASIC)
    except OSError as error:
        raise DataError(f"expected a typeface in {font.package}, got {error}: Pillow needs a FreeType with zlib, such"
                        " as the one in the wheels that pip installs") from error  # fmt: skip
    box_for_none = bytes(face.getmask("\U0010fffd"))  # a code point that no typeface has
    lacking = [character for character in characters if bytes(face.getmask(character)) in (b"", box_for_none)]
    if lacking:
        raise DataError(f"expected all of CHARACTERS in {font.package}, got none for {''.join(lacking)}: take these"
                        " out of CHARACTERS, or another typeface")  # fmt: skip
    for character in characters:
        path = root / font.part / _class(character) / f"{font.name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(face, character, random.Random(f"{font.name} {character}")).save(path)


def picture(face: ImageFont.FreeTypeFont, character: str, numbers: random.Random) -> Image.Image:
    """Return a gray image of `SIDE` x `SIDE` pixels that contains the whole character."""
    left, top, right, bottom = face.getbbox(character)
    sheet = Image.new("L", (2 * FINE, 2 * FINE), 0)  # white on black: that is what turning and cropping fill in
    corner = (FINE - (left + right) // 2, FINE - (top + bottom) // 2)
    ImageDraw.Draw(sheet).text(corner, character, fill=255, font=face)
    sheet = sheet.rotate(numbers.uniform(-TILT, TILT), Image.Resampling.BICUBIC)
    ink = sheet.crop(sheet.getbbox())
    factor = min(numbers.uniform(*EM) / FINE, SIDE / max(ink.size))
    ink = ink.resize([max(1, round(factor * length)) for length in ink.size], Image.Resampling.LANCZOS)
    room = [SIDE - length for length in ink.size]
    place = [min(max(round(free / 2 + numbers.uniform(-SHIFT, SHIFT)), 0), free) for free in room]
    whole = Image.new("L", (SIDE, SIDE), 0)
    whole.paste(ink, (place[0], place[1]))
    return ImageOps.invert(whole)


def fetch(font: Font, packages: Path) -> Path:
    """Return where the package of a typeface lies below `packages`, fetched if it is missing or another.

    Raises:
        DataError: If npm is missing, or gives nothing or something else.
    """
    archive = packages / font.archive
    if archive.is_file() and _digest(archive) == font.sha256:
        return archive
    npm = shutil.which("npm")
    if npm is None:
        raise DataError("expected the program npm, got none: install Node.js, which brings it")
    print(f"fetching {font.package}", flush=True)
    packages.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=packages) as place:
        command = [npm, "pack", "--ignore-scripts", "--pack-destination", place, font.package]
        done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=False)
        came = Path(place) / font.archive
        if done.returncode or not came.is_file():
            raise DataError(f"expected {font.package} from npm, got exit code {done.returncode}: look at what it says"
                            f" and start again, what has come stays\n{done.stderr.strip()}")  # fmt: skip
        if (got := _digest(came)) != font.sha256:
            raise DataError(f"expected {font.package} with sha256 {font.sha256}, got {got}: its registry holds another"
                            " file than the public one; set npm to the public registry")  # fmt: skip
        came.replace(archive)
    return archive


def probe(of: Collection, encoder: ViT.Config, size: int) -> None:
    """Print the accuracy of closed-form readouts of all classes at once, on frozen CLS features and on pixels."""
    data = Folder(folder(of=of)).build()
    assert isinstance(data.train, FileSplit)
    assert isinstance(data.test, FileSplit)
    folders = {character: _class(character) for character in of.characters}
    validation = FileSplit.of(folder(of=of) / "validation", [folders[name] for name in data.class_names])
    parts = {"train": data.train, "validation": validation, "test": data.test}  # `Folder` reads no third part
    views = Transforms(size=size, resize=size, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    backbone = encoder.build(views.size)
    started = time.perf_counter()
    inputs = {"CLS": {part: _features(split, views, backbone) for part, split in parts.items()}}
    print(f"features of {sum(map(len, parts.values()))} pictures: {time.perf_counter() - started:.0f} s")
    inputs["pixels"] = {part: _features(split, Transforms(size=24, resize=24), None) for part, split in parts.items()}
    for kind, read in inputs.items():
        readouts: dict[str, Readout] = {"LDA": LDA(data.classes), "nearest class mean": NCM(data.classes)}
        for name, readout in readouts.items():
            started = time.perf_counter()
            readout.observe(read["train"], data.train.labels)
            readout.end_task()
            right = {
                part: readout.logits(read[part]).argmax(1) == parts[part].labels for part in ("validation", "test")
            }
            figures = ", ".join(f"{part} {100 * hits.float().mean():.1f} %" for part, hits in right.items())
            print(f"{name} of {kind}: {figures}; {time.perf_counter() - started:.1f} s")
            if name == "LDA" and kind == "CLS":
                for part, hits in right.items():
                    print("   ", _by_font(parts[part], hits))


def summary(of: Collection) -> str:
    """Return the classes, the images by split, and their authors."""
    root = folder(of=of)
    counts = {part: len(list((root / part).glob("*/*.png"))) for part in PARTS}
    each = {part: sum(font.part == part for font in of.fonts) for part in PARTS}
    images = ", ".join(f"{part} {counts[part]} ({each[part]} a class)" for part in PARTS)
    sources = (root / "SOURCES.txt").read_text(encoding="utf-8")
    return f"{root}: {len(of.characters)} classes; images: {images}\n{sources.strip()}"


def _features(split: Split, views: Transforms, backbone: Backbone | None) -> torch.Tensor:
    """Return `(N, D)`: what the frozen encoder makes of the test view, or the view itself without one."""
    viewed = TransformedSplit(split, views.test(), 0, ("probe",), skip_bad=False)
    plan = sequential_batches(torch.arange(len(split)), 64)
    seen = (batch.images for batch in batches(viewed, plan, LoaderOptions()))
    return torch.cat([images.flatten(1) if backbone is None else backbone.encode(images) for images in seen])


def _by_font(split: FileSplit, hits: torch.Tensor) -> str:
    fonts = [path.stem for path in split.paths]
    share = {
        name: hits[[i for i, font in enumerate(fonts) if font == name]].float().mean() for name in sorted(set(fonts))
    }
    return ", ".join(f"{name} {100 * value:.1f} %" for name, value in share.items())


def _class(character: str) -> str:
    """Return plain letters, because some file systems and programs know no others."""
    return f"u{ord(character):04x}"


def _licence(archive: Path) -> str:
    """Return the description of a typeface in its package."""
    licence = json.loads(_member(archive, "package/metadata.json"))["license"]
    return f"{licence['type']}\t{licence['attribution']}"


def _member(archive: Path, name: str) -> bytes:
    """Return the content of one regular file of the package, without unpacking it to the disk."""
    try:
        with tarfile.open(archive) as package:
            info = package.getmember(name)
            if not info.isfile() or info.size > LARGEST:
                raise DataError(f"expected a plain file {name} of at most {LARGEST} bytes in {archive}, got"
                                f" {'one' if info.isfile() else 'no plain file'} of {info.size}")  # fmt: skip
            file = package.extractfile(info)
            assert file is not None  # it is a plain file
            return file.read()
    except (KeyError, tarfile.TarError, EOFError) as error:
        raise DataError(f"expected {name} in {archive}, got {error}: delete the archive and start again") from error


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def write_once(root: Path) -> Iterator[Path]:
    """Yield a temporary folder, which is renamed to `root` at the end, or deleted after an error."""
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root.parent, prefix=".partial-") as place:
        partial = Path(place) / root.name  # the one around it can be read by its owner only
        partial.mkdir()
        yield partial
        try:
            partial.rename(root)
        except OSError:  # another process was faster
            if not root.is_dir():
                raise


def letters(data: Path) -> Collection:
    """Return a few letters of matplotlib's typefaces, packed as npm does, for `--tiny`."""
    fonts = []
    faces = ("DejaVuSans", "DejaVuSansMono", "DejaVuSerif", "STIXGeneral")
    parts: tuple[Part, ...] = ("train", *PARTS)
    for part, name in zip(parts, faces, strict=True):
        font = Font(part, name.lower(), "0", "latin", "")
        content = (Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf").read_bytes()
        about = json.dumps({"license": {"type": "Bitstream Vera", "attribution": "DejaVu"}}).encode()
        archive = Collection((), "", data).packages / font.archive
        archive.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(archive, "w:gz") as package:
            for member, text in ((font.file, content), ("package/metadata.json", about)):
                info = tarfile.TarInfo(member)
                info.size = len(text)
                package.addfile(info, io.BytesIO(text))
        fonts.append(font._replace(sha256=_digest(archive)))
    return Collection(tuple(fonts), "abcd", data)


def main(argv: Sequence[str] | None = None) -> None:
    """Download the typefaces, draw the images, and print a summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--probe", action="store_true", help="also measure frozen features")
    parser.add_argument("--tiny", action="store_true", help="rehearse with a few letters; nothing is kept")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        of = letters(Path(scratch)) if options.tiny else KANJI
        started = time.perf_counter()
        try:
            print(summary(of))
        except DataError as error:
            sys.exit(str(error))
        print(f"{time.perf_counter() - started:.0f} s; drawn by FreeType {features.version('freetype2')}")
        if options.probe and not options.tiny and not WEIGHTS.is_file():
            print(f"skipped the probe: it needs {WEIGHTS}, which is not part of the project")
        elif options.probe:
            torch.set_num_threads(1)
            encoder = ViT.Config("vit_small_patch14_dinov2.lvd142m", weights=str(WEIGHTS))
            probe(of, rehearsal.ENCODER if options.tiny else encoder, rehearsal.SIZE if options.tiny else 84)


if __name__ == "__main__":
    main()
