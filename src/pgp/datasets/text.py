"""Names and text files of users. Names are compared in Unicode NFC, files are read as UTF-8."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from pgp.datasets.decode import require_file

_ILL_FORMED = re.compile("[\ud800-\udfff]")
_OTHER_ENCODINGS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16", b"\0\0\xfe\xff": "UTF-32"}


def normalized(name: str) -> str:
    """Return a name in Unicode NFC, in which names are compared and stored.

    Bytes that are not valid UTF-8, such as in a file name, become U+FFFD.

    >>> normalized("cafe\u0301") == normalized("caf\u00e9")
    True
    """
    if name.isascii():
        return name
    return unicodedata.normalize("NFC", _ILL_FORMED.sub("\ufffd", name))


def repeated(names: Iterable[str]) -> list[str]:
    """Return the names that occur more than once, in alphabetical order."""
    return sorted(name for name, count in Counter(names).items() if count > 1)


def read_text(path: Path, what: str = "") -> str:
    """Return the text of a file in UTF-8, with or without a byte order mark.

    Args:
        path: The file.
        what: What it is, for errors, such as "the table of images".

    Raises:
        ValueError: Naming the file, if it cannot be read or is in another encoding.
    """
    called = f"{what} {path}".strip()
    try:
        require_file(path)
        content = path.read_bytes()
    except (OSError, ValueError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or error
        raise ValueError(f"cannot read {called} as a text in UTF-8: {reason}") from error
    for mark, encoding in _OTHER_ENCODINGS.items():
        if content.startswith(mark):
            raise ValueError(f"cannot read {called} as a text in UTF-8, got {encoding}: save it as UTF-8")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"cannot read {called} as a text in UTF-8, got another encoding at byte {error.start}, in line"
                         f" {line}: save it as UTF-8") from error  # fmt: skip
    if "\0" in text:
        raise ValueError(f"cannot read {called} as a text in UTF-8: it holds a zero byte, in line"
                         f" {text.count(chr(10), 0, text.index(chr(0))) + 1}")  # fmt: skip
    return text


def lines_of(text: str) -> list[str]:
    """Return the lines of a text. Unlike `str.splitlines`, it breaks at line ends only, not at rarer separators."""
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
