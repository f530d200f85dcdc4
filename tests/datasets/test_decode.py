"""Image files as people have them: sound pixels are used, whatever else is broken; what cannot be read is named."""

from __future__ import annotations

import io
import os
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from pgp.datasets.base import BadImageError
from pgp.datasets.decode import FORMATS, SUFFIXES, decode, upright_rgb, without_metadata
from pgp.datasets.files import read_image
from pgp.datasets.in_memory import InMemory, as_image, check_images
from pgp.datasets.transforms import Transforms

RED, BLUE = (200, 30, 20), (20, 30, 200)
WIDE = Image.new("RGB", (8, 4), RED)
WIDE.paste(BLUE, (4, 0, 8, 4))  # red is left, and above where the camera was turned to the right


def tags(*entries):
    """Exif of entries: tag, type, count and value."""
    values, rows, start = b"", b"", 8 + 2 + 12 * len(entries) + 4
    for tag, kind, count, value in entries:
        held = value.ljust(4, b"\0") if len(value) <= 4 else struct.pack("<I", start + len(values))
        values += value if len(value) > 4 else b""
        rows += struct.pack("<HHI", tag, kind, count) + held
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries)) + rows + bytes(4) + values


TURNED = (0x0112, 3, 1, struct.pack("<H", 6))
BROKEN = {
    "a wrong type": (0x010F, 5, 1, b"abc\0"),
    "a zero denominator": (0x011A, 5, 1, struct.pack("<II", 72, 0)),
    "no number": (0x011A, 12, 1, struct.pack("<d", float("nan"))),
    "no UTF-8": (0x010E, 2, 8, b"gr\xfcn\xff\xfe\0\0"),
    "a text as offset": (0x8769, 2, 4, b"abc\0"),
    "an offset too far": (0x8825, 4, 1, struct.pack("<I", 9_999_999)),
    "a text as resolution": (0x0128, 2, 4, b"abc\0"),
    "interoperability": (0xA005, 2, 4, b"abc\0"),
}
QUIET = pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's own, of what it met


def as_bytes(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def written(tmp_path, content, name):
    path = tmp_path / name
    path.write_bytes(content)
    return path


@QUIET
@pytest.mark.parametrize("broken", BROKEN)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_broken_tags_cost_neither_pixels_nor_orientation(tmp_path, broken, kind):
    entries = sorted([TURNED, BROKEN[broken]])
    pixels = read_image(written(tmp_path, as_bytes(WIDE, kind, exif=tags(*entries)), "x"))
    assert pixels.shape == (3, 8, 4)
    assert pixels[0, 1].float().mean() > 150 > pixels[0, 6].float().mean()  # red is above


@QUIET
def test_an_orientation_that_is_none(tmp_path):
    for value in ((0x0112, 2, 2, b"6\0"), (0x0112, 3, 1, struct.pack("<H", 99)), (0x0112, 5, 1, bytes(8))):
        assert read_image(written(tmp_path, as_bytes(WIDE, "JPEG", exif=tags(value)), "x.jpg")).shape == (3, 4, 8)
    bad = b"Exif\0\0XX*\0\x08\0\0\0\0\0"
    assert read_image(written(tmp_path, as_bytes(WIDE, "PNG", exif=bad), "x.png")).shape == (3, 4, 8)


def test_xmp_states_the_orientation_where_exif_does_not(tmp_path):
    xmp = b'<x:xmpmeta><d tiff:Orientation="6" n="gr\xfcn"/></x:xmpmeta>'
    upright = tags((0x0112, 3, 1, struct.pack("<H", 1)))
    for exif, shape in ((b"", (3, 8, 4)), (upright, (3, 4, 8))):
        plain, content = as_bytes(WIDE, "JPEG", exif=exif), b"http://ns.adobe.com/xap/1.0/\0" + xmp
        segment = b"\xff\xe1" + struct.pack(">H", len(content) + 2) + content
        assert read_image(written(tmp_path, plain[:2] + segment + plain[2:], "x.jpg")).shape == shape
        assert read_image(written(tmp_path, as_bytes(WIDE, "WEBP", xmp=xmp, exif=exif), "x.webp")).shape == shape


@pytest.mark.parametrize("value", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
def test_every_orientation_is_that_of_pillow(tmp_path, kind, value):
    from PIL import ImageOps

    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 24, 3), dtype=np.uint8))
    exif = image.getexif()
    exif[0x0112] = value
    path = written(tmp_path, as_bytes(image, kind, exif=exif), "x")
    with Image.open(path) as file:
        expected = np.asarray(ImageOps.exif_transpose(file))
    assert np.array_equal(read_image(path).permute(1, 2, 0).numpy(), expected)


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


@QUIET
@pytest.mark.parametrize("kind", [b"gAMA", b"cHRM", b"pHYs", b"acTL", b"fcTL", b"iCCP", b"zTXt", b"tEXt"])
@pytest.mark.parametrize("content", [b"", b"\0", b"k\0\0" + zlib.compress(bytes(2_000_000)), b"\xff" * 40])
def test_broken_chunks_of_a_png_cost_no_pixels(tmp_path, kind, content):
    sound = as_bytes(WIDE, "PNG")
    path = written(tmp_path, sound[:33] + chunk(kind, content) + sound[33:], "x.png")
    assert torch.equal(read_image(path), read_image(written(tmp_path, sound, "y.png")))


@QUIET
def test_broken_segments_of_a_jpeg_and_tags_of_a_tiff_cost_no_pixels(tmp_path):
    sound = as_bytes(WIDE, "JPEG")
    expected = read_image(written(tmp_path, sound, "y.jpg"))
    for marker, content in (
        (0xE0, b"JFIF\0"),
        (0xEE, b"Adobe\0"),
        (0xE2, b"MPF\0MM\0*\0\0\0\x08\0\1"),
        (0xFE, b"\xff"),
    ):
        segment = bytes((0xFF, marker)) + struct.pack(">H", len(content) + 2) + content
        assert torch.equal(read_image(written(tmp_path, sound[:2] + segment + sound[2:], "x.jpg")), expected)
    sound = as_bytes(WIDE, "TIFF", description="a long description")
    (start,) = struct.unpack("<I", sound[4:8])
    (count,) = struct.unpack("<H", sound[start : start + 2])
    rows = [start + 2 + 12 * row for row in range(count)]
    (place,) = (row for row in rows if sound[row : row + 2] == struct.pack("<H", 270))
    broken = sound[: place + 4] + b"\xff" * 8 + sound[place + 12 :]
    assert torch.equal(read_image(written(tmp_path, broken, "x.tif")), read_image(written(tmp_path, sound, "y.tif")))


def deep(values, **options):
    return as_bytes(Image.fromarray(values), "TIFF", **options)


def test_pictures_of_many_bits_are_scaled_by_their_kind(tmp_path):
    ramp = np.linspace(0, 1, 16, dtype=np.float32).reshape(4, 4)
    expected = torch.from_numpy((255 * ramp).round().astype(np.uint8)).expand(3, 4, 4)
    sixteen = (65535 * ramp).round().astype(np.uint16)
    for name, content in (
        ("float.tif", deep(ramp)),
        ("16.tif", deep(sixteen)),
        ("16.png", as_bytes(Image.fromarray(sixteen), "PNG")),
        ("16.pgm", b"P5 4 4 65535\n" + sixteen.astype(">u2").tobytes()),
    ):
        assert torch.equal(read_image(written(tmp_path, content, name)), expected), name
    black_is_zero, white_is_zero = (struct.pack("<HHIHH", 262, 3, 1, value, 0) for value in (1, 0))
    inverted = deep(65535 - sixteen).replace(black_is_zero, white_is_zero)
    assert torch.equal(read_image(written(tmp_path, inverted, "white is zero.tif")), expected)
    values = (4095 * ramp).round().astype(np.uint16).ravel()
    packed = b"".join(int(a << 12 | b).to_bytes(3, "big") for a, b in values.reshape(-1, 2).tolist())
    twelve = bytearray(deep(np.zeros((4, 4), np.uint16)))
    twelve = twelve.replace(struct.pack("<HHII", 258, 3, 1, 16), struct.pack("<HHII", 258, 3, 1, 12))
    (at,) = struct.unpack("<I", twelve[twelve.index(struct.pack("<HHI", 273, 4, 1)) + 8 :][:4])
    twelve[at : at + 24] = packed
    assert torch.equal(read_image(written(tmp_path, bytes(twelve), "12.tif")), expected)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.full((4, 4), 255.0, np.float32), r"its pixels are floats outside \[0, 1\]"),
        (np.full((4, 4), np.nan, np.float32), r"its pixels are floats outside \[0, 1\]"),
        (np.full((4, 4), -1.0, np.float32), r"its pixels are floats outside \[0, 1\]"),
        (np.full((4, 4), 3000, np.int32), "its pixels are signed integers of 32 bits"),
    ],
)
def test_pictures_without_a_known_white_are_refused(tmp_path, values, message):
    with pytest.raises(BadImageError, match=rf"cannot read the image .*x\.tif: {message}.*: save it with 8 or 16"):
        read_image(written(tmp_path, deep(values), "x.tif"))


@pytest.mark.parametrize("values", [[0, 255], [0, 65535], [-1, 9], [0, 70000]])
def test_integers_of_32_bits_in_memory_are_refused(values):
    with pytest.raises(ValueError, match="its pixels are signed integers of 32 bits, so that black and white are unk"):
        upright_rgb(Image.fromarray(np.array([values], np.int32)))


def test_bad_images_in_memory_are_numbered():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    cut = Image.open(io.BytesIO(as_bytes(noise, "PNG")[:3000]))
    images = check_images([WIDE, cut, Image.fromarray(np.full((4, 4), 9.0, np.float32))])
    split = InMemory.of(images, torch.tensor([0, 0, 0]), ["a"]).build().train
    assert split.image(0).shape == (3, 4, 8)
    for index, message in ((1, "image file is truncated"), (2, r"its pixels are floats outside \[0, 1\]")):
        with pytest.raises(BadImageError, match=f"cannot read the image at index {index}: {message}"):
            split.image(index)
    with pytest.raises(BadImageError, match="cannot read the image in memory: image file is truncated"):
        as_image(cut)


def test_transparency_of_16_bits_is_white(tmp_path):
    image = Image.fromarray(np.array([[0, 30000]], np.uint16))
    path = written(tmp_path, as_bytes(image, "PNG", transparency=0), "x.png")
    assert read_image(path)[0].tolist() == [[255, 117]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"<!DOCTYPE html><html></html>", "it is a web page"),
        (b"\n <HTML>", "it is a web page"),
        (b"<svg xmlns=''/>", "it is SVG"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "it is HEIC, which the installed Pillow cannot read: convert it"),
        (b"%PDF-1.7", "it is a PDF document"),
        (b"version https://git-lfs.github.com/spec/v1\n", "it is a pointer of Git LFS: fetch the file itself"),
        (b"Dear Sir,", "it is damaged, or no image in one of the formats JPEG, PNG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "it is PostScript"),  # Pillow would start Ghostscript
    ],
)
def test_what_is_no_image_is_called_by_its_name(tmp_path, content, message):
    with pytest.raises(BadImageError, match=rf"^cannot read the image {tmp_path}/x\.png: {message}"):
        read_image(written(tmp_path, content, "x.png"))
    with pytest.raises(BadImageError, match=rf"^cannot read the image {tmp_path}/x\.png: {message}"):
        read_image(tmp_path / "x.png", content)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_every_truncation_is_bad_or_whole(tmp_path, kind):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8))
    sound = as_bytes(image, kind)
    expected = read_image(written(tmp_path, sound, "sound"))
    bad = 0
    for size in range(0, len(sound), max(1, len(sound) // 60)):
        path = written(tmp_path, sound[:size], "cut")
        try:
            assert torch.equal(read_image(path), expected)
        except BadImageError:
            bad += 1
    assert bad > 50


def test_decompression_bombs_are_bad(tmp_path):
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 1, 0, 0, 0, 0)
    bomb = (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )
    with pytest.raises(BadImageError, match=r"x\.png: Image size \(3600000000 pixels\) exceeds limit"):
        read_image(written(tmp_path, bomb, "x.png"))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes with names")
def test_pipes_devices_and_folders_are_no_images(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    for place, what in ((tmp_path / "pipe.png", "pipe"), (tmp_path, "folder"), ("/dev/zero", "device")):
        with pytest.raises(BadImageError, match=f"expected a file, got a {what}"):
            read_image(tmp_path / place)
    with pytest.raises(BadImageError, match=r"cannot read the image .*nowhere.png: No such file or directory"):
        read_image(tmp_path / "nowhere.png")


def test_whatever_a_decoder_raises_names_the_file(tmp_path, monkeypatch):
    path = written(tmp_path, as_bytes(WIDE, "GIF"), "x.gif")
    for error in (struct.error("unpack"), ZeroDivisionError("division"), RecursionError(), MemoryError(), KeyError(3)):
        monkeypatch.setattr(Image, "open", lambda *_, _error=error, **__: (_ for _ in ()).throw(_error))
        with pytest.raises(BadImageError, match=r"cannot read the image .*x\.gif: \S"):
            read_image(path)


def test_animations_show_their_first_frame(tmp_path):
    frames = [Image.new("RGB", (6, 6), color) for color in (RED, BLUE)]
    for kind in ("GIF", "PNG", "WEBP", "TIFF"):
        path = written(tmp_path, as_bytes(frames[0], kind, save_all=True, append_images=frames[1:]), "x")
        red, _, blue = read_image(path)[:, 3, 3].tolist()
        assert (red > 180, blue < 60) == (True, True), kind


def test_formats_and_suffixes():
    assert {".jpg", ".jpe", ".jfif", ".jpeg", ".png", ".webp", ".tif", ".gif", ".bmp", ".ppm", ".pgm"} <= SUFFIXES
    assert (".avif" in SUFFIXES) == ("AVIF" in FORMATS)
    assert not SUFFIXES & {".eps", ".pdf", ".tga", ".ico", ".psd"}
    assert decode(as_bytes(WIDE, "JPEG")).mode == "RGB"


@pytest.mark.parametrize("shape", [(3, 1, 20_000), (3, 20_000, 1), (3, 2, 500)])
def test_very_long_images_are_seen_without_their_ends(shape):
    image = torch.zeros(shape, dtype=torch.uint8)
    image[:, (shape[1] - 1) // 2 : shape[1] // 2 + 1, (shape[2] - 1) // 2 : shape[2] // 2 + 1] = 255
    seen = Transforms(size=32, resize=36).test()(image)
    assert seen.shape == (3, 32, 32)
    assert seen[0, 15:17, 15:17].mean() > 0.5


def test_files_of_very_many_parts_are_not_taken_apart():
    """Each part would take memory of its own."""
    comments, chunks = b"\xff\xfe\0\2", b"\0\0\0\0tEXt\0\0\0\0"
    for few, head in ((comments, b"\xff\xd8"), (chunks, b"\x89PNG\r\n\x1a\n")):
        assert without_metadata(head + 10 * few + b"\xff\xda") is not None
        assert without_metadata(head + 200_000 * few + b"\xff\xda") is None
