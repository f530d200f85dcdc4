"""Decode image files to RGB: only formats of photographs and drawings, and only their first frame.

Metadata are needed for the orientation only. Damaged metadata are ignored; damaged pixels are an error.
"""

from __future__ import annotations

import contextlib
import io
import re
import stat
import struct
import sys
from pathlib import Path

import numpy as np
from PIL import Image, TiffImagePlugin, UnidentifiedImageError

Image.init()
_CANDIDATES = ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "DIB", "PPM", "JPEG2000", "AVIF")
FORMATS = tuple(name for name in _CANDIDATES if name in Image.OPEN)
"""Formats that are decoded. Pillow knows more, but some of them start other programs or accept any bytes."""
SUFFIXES = frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in (*FORMATS, "MPO"))
"""Suffixes of image files that this installation of Pillow can read."""
_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""Operation that turns an image upright, by the value of its orientation tag."""
_WHOLE_NUMBERS = {1: "B", 3: "H", 4: "I"}
"""Integer types of a tag, with their codes for `struct`."""
_LARGEST_RETRY = 1 << 28
"""Maximum size in bytes of a file that is read again without its metadata."""
_MOST_PARTS = 100_000
"""Maximum number of segments or chunks of such a file, each of which takes memory."""


def decode(source: Path | bytes) -> Image.Image:
    """Decode an image to upright RGB, with transparency on white.

    Raises:
        Exception: If the image cannot be decoded; its type depends on the decoder.
    """
    if isinstance(source, Path):
        require_file(source)
    try:
        return _decode(source if isinstance(source, Path) else io.BytesIO(source))
    except Exception as error:
        with contextlib.suppress(Exception):  # the first error is more precise
            if bare := without_metadata(source):
                return _decode(io.BytesIO(bare))
        if isinstance(error, UnidentifiedImageError):
            raise ValueError(_kind_of(source)) from error
        raise


def num_pixels(content: bytes) -> int | None:
    """Return the number of pixels that an image takes in memory, as its header states it; None if it cannot be read.

    The tiles of a TIFF may be larger than the image.
    """
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            tile = 1
            if isinstance(image, TiffImagePlugin.TiffImageFile):
                tile = int(image.tag_v2.get(322, 1)) * int(image.tag_v2.get(323, 1))  # width and height of a tile
            return max(image.width * image.height, tile)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        return sys.maxsize
    except Exception:  # whatever a decoder raises
        return None


def require_file(path: Path) -> None:
    """Raise unless `path` is a regular file: opening a pipe or a device may never return."""
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFDIR: "folder", stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket"}
        raise ValueError(f"expected a file, got a {kinds.get(stat.S_IFMT(mode), 'device')}")


def starts_like_image(path: Path) -> bool:
    """Return whether the first bytes of a file are those of an image."""
    start = _start_of(path)
    for name in FORMATS:
        accepts = Image.OPEN[name][1]
        with contextlib.suppress(Exception):  # too few bytes
            if accepts and accepts(start):
                return True
    return False


def _decode(file: Path | io.BytesIO) -> Image.Image:
    with Image.open(file, formats=FORMATS) as image:
        return upright_rgb(image)


def upright_rgb(image: Image.Image) -> Image.Image:
    """Return an image of Pillow as RGB, upright as its metadata say, with transparency on white."""
    image.load()
    turn = _UPRIGHT.get(_orientation(image))
    upright = _to_rgb(image)
    return upright if turn is None else upright.transpose(turn)


def _orientation(image: Image.Image) -> int:
    """Return the orientation that the metadata state; 1, upright, if it cannot be read."""
    if image.format == "TIFF":  # Pillow turns TIFF images itself
        return 1
    exif, xmp = image.info.get("exif", b""), image.info.get("xmp", b"")
    if not exif and "Raw profile type exif" in image.info:  # of older PNG files: hexadecimal, below three lines
        with contextlib.suppress(ValueError):
            exif = bytes.fromhex("".join(image.info["Raw profile type exif"].split("\n")[3:]))
    stated = _orientation_of_exif(exif)
    if stated is None and (found := re.search(rb'tiff:Orientation(?:="|>)([0-9])', xmp)):
        stated = int(found[1])
    return stated or 1


def _orientation_of_exif(exif: bytes) -> int | None:
    """Return the orientation in the first directory of Exif, or None if there is none."""
    body = exif.removeprefix(b"Exif\0\0")
    order = "<" if body[:2] == b"II" else ">"
    with contextlib.suppress(struct.error):
        (start,) = struct.unpack_from(f"{order}I", body, 4)
        (count,) = struct.unpack_from(f"{order}H", body, start)
        for offset in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind, number = struct.unpack_from(f"{order}HHI", body, offset)
            if tag == _ORIENTATION and kind in _WHOLE_NUMBERS and number == 1:
                (value,) = struct.unpack_from(f"{order}{_WHOLE_NUMBERS[kind]}", body, offset + 8)
                return int(value)
    return None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        return _from_deep(image).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _from_deep(image: Image.Image) -> Image.Image:
    """Return a gray image of more than 8 bits with 8 bits, scaled by its kind.

    Raises:
        ValueError: If its kind does not say which values are black and white.
    """
    values, highest = np.asarray(image), 65535.0
    unknown = "so that black and white are unknown: save it with 8 or 16 bits"
    if image.mode == "F":
        highest = 1.0
        if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
            raise ValueError(f"its pixels are floats outside [0, 1], {unknown}")
    elif image.format == "TIFF":
        bits, signed = image.tag_v2.get(258, (1,))[0], image.tag_v2.get(339, (1,))[0] == 2  # type: ignore[attr-defined]
        if bits > 16 or signed:
            raise ValueError(f"its pixels are {'signed ' * signed}integers of {bits} bits, {unknown}, unsigned")
        highest = 2.0**bits - 1
        if image.tag_v2.get(262) == 0:  # type: ignore[attr-defined]  # as its tag says, 0 is white
            values = 2**bits - 1 - values
    elif image.mode == "I" and image.format not in ("PNG", "PPM"):  # which Pillow gives for their 16 bits
        raise ValueError(f"its pixels are signed integers of 32 bits, {unknown}, unsigned")
    gray = (values.astype(np.float64) * (255 / highest)).round().clip(0, 255).astype(np.uint8)
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        gray[values == clear] = 255
    return Image.fromarray(gray)


def without_metadata(source: Path | bytes) -> bytes | None:
    """Return the bytes of an image file without metadata that its pixels and orientation do not need.

    None if the file has another format than JPEG, PNG or TIFF, or is not sound enough to be taken apart.
    """
    takers = {b"\xff\xd8": _bare_jpeg, b"\x89P": _bare_png, b"II": _bare_tiff, b"MM": _bare_tiff}
    try:
        if isinstance(source, Path) and source.stat().st_size > _LARGEST_RETRY:
            return None
        data = source.read_bytes() if isinstance(source, Path) else source
        take = takers.get(data[:2])
        return take(data) if take else None
    except (OSError, ValueError, IndexError, struct.error):
        return None


def _bare_jpeg(data: bytes) -> bytes:
    """Drop comments and application segments, except Exif with the orientation and Adobe's colour transform."""
    kept, offset = [data[:2]], 2
    for _ in range(_MOST_PARTS):
        if data[offset] != 0xFF or data[offset + 1] == 0xDA:  # the start of the scan
            return b"".join((*kept, data[offset:]))
        marker, length = data[offset + 1], int.from_bytes(data[offset + 2 : offset + 4], "big")
        segment = data[offset : offset + 2 + length]
        needed = segment[4:8] == b"Exif" if marker == 0xE1 else segment[4:9] == b"Adobe" and len(segment) >= 16
        if marker != 0xFE and (needed or not 0xE0 <= marker <= 0xEF):
            kept.append(segment)
        offset += 2 + length
    raise ValueError(f"expected at most {_MOST_PARTS} segments")


def _bare_png(data: bytes) -> bytes:
    """Drop all chunks that are not critical, except transparency and Exif."""
    kept, offset = [data[:8]], 8
    for _ in range(_MOST_PARTS):
        if offset >= len(data):
            return b"".join(kept)
        length = int.from_bytes(data[offset : offset + 4], "big")
        chunk = data[offset : offset + 12 + length]
        if chunk[4:5].isupper() or chunk[4:8] in (b"tRNS", b"eXIf"):
            kept.append(chunk)
        offset += 12 + length
    raise ValueError(f"expected at most {_MOST_PARTS} chunks")


_TIFF_NEEDED = {
    *range(254, 267),
    273,
    274,
    277,
    278,
    279,
    284,
    317,
    320,
    322,
    323,
    324,
    325,
    338,
    339,
    347,
    529,
    530,
    532,
}
"""Tags of the TIFF 6.0 specification that say how the pixels are stored, and the orientation."""


def _bare_tiff(data: bytes) -> bytes:
    """Drop all tags of the first image that its pixels do not need."""
    order = "<" if data[:2] == b"II" else ">"
    version, start = struct.unpack_from(f"{order}HI", data, 2)
    if version != 42:
        raise ValueError(f"expected TIFF, got version {version}")
    (count,) = struct.unpack_from(f"{order}H", data, start)
    entries = [data[start + 2 + 12 * i : start + 14 + 12 * i] for i in range(count)]
    kept = [entry for entry in entries if struct.unpack_from(f"{order}H", entry)[0] in _TIFF_NEEDED]
    kept = [one for one in kept if struct.unpack_from(f"{order}H", one)[0] != _ORIENTATION or _is_short(one, order)]
    listed = struct.pack(f"{order}H", len(kept)) + b"".join(kept) + bytes(4)  # there is no next image
    return data[:start] + listed + data[start + len(listed) :]


def _is_short(entry: bytes, order: str) -> bool:
    return struct.unpack_from(f"{order}HI", entry, 2) == (3, 1)


_KINDS = {
    b"": "the file is empty",
    b"<!doctype": "it is a web page",
    b"<html": "it is a web page",
    b"<?xml": "it is XML or SVG",
    b"<svg": "it is SVG",
    b"%pdf": "it is a PDF document",
    b"%!ps": "it is PostScript",
    b"version https://git-lfs": "it is a pointer of Git LFS: fetch the file itself, by git lfs pull",
}
_BOXES = {b"heic": "HEIC", b"heix": "HEIC", b"mif1": "HEIF", b"msf1": "HEIF", b"avif": "AVIF"}


def _kind_of(source: Path | bytes) -> str:
    """Return a description of a file that cannot be read as an image."""
    start = _start_of(source).lower()
    if start[4:8] == b"ftyp" and start[8:12] in _BOXES:
        return f"it is {_BOXES[start[8:12]]}, which the installed Pillow cannot read: convert it to JPEG or PNG"
    for kind, name in _KINDS.items():
        if start == kind or (kind and start.lstrip().startswith(kind)):
            return name
    return f"it is damaged, or no image in one of the formats {', '.join(FORMATS)}"


def _start_of(source: Path | bytes) -> bytes:
    if isinstance(source, bytes):
        return source[:64]
    with source.open("rb") as file:
        return file.read(64)
