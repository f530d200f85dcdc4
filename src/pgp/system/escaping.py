"""Escaping of text from data, files and the command line, with one function for each kind of output."""

from __future__ import annotations

import json
import re
import unicodedata
from typing import Any

UNSAFE = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
"""Unicode categories that can move a cursor, hide text, reverse it or break a line; surrogates cannot be encoded."""
JOINERS = frozenset("\u200c\u200d")
"""Characters of these categories that are allowed, because they occur in words of many scripts and in emoji."""


MARKUP = re.compile(r"[\\`*_\[\]#!|<>~$@&]|:(?=//)|(?<=www)\.", re.IGNORECASE)
"""What is markup inside a sentence of Markdown, with the addresses that GitHub and the Hugging Face hub link."""


def printable(text: object) -> str:
    r"""Return `text` as one line for a terminal, its control and formatting characters as escapes.

    >>> print(printable("cat\x1b[2J\ndog"))
    cat\x1b[2J\ndog
    >>> print(printable("Größe 日本"))
    Größe 日本
    """
    text = str(text)
    if text.isprintable():
        return text
    return "".join(char.encode("unicode_escape").decode() if _unsafe(char) else char for char in text)


def tsv_field(text: object) -> str:
    r"""Return `text` as one field of tab-separated values; a backslash is doubled, so that nothing is ambiguous.

    >>> print(tsv_field("a\tb\\c"))
    a\tb\\c
    """
    return printable(str(text).replace("\\", "\\\\"))


def markdown_cell(text: object) -> str:
    r"""Return `text` as one cell of a table in Markdown.

    >>> print(markdown_cell("a|b\n<i>"))
    a\|b\n&lt;i>
    """
    return printable(text).replace("|", r"\|").replace("<", "&lt;")


def markdown_text(text: object) -> str:
    r"""Return `text` for Markdown, in a sentence or a cell, where none of it is markup, a link or a mention.

    >>> print(markdown_text("[a](http://b) *c*|d"))
    \[a\](http\://b) \*c\*\|d
    """
    return MARKUP.sub(r"\\\g<0>", printable(text))


def json_line(value: Any, *, ascii_only: bool = False) -> str:
    r"""Return `value` as one line of JSON that is safe for a terminal.

    >>> print(json_line({"name": "Größe\x9b"}))
    {"name": "Größe\u009b"}
    """
    text = json.dumps(value, ensure_ascii=ascii_only)
    return text if text.isprintable() else "".join(json.dumps(c)[1:-1] if _unsafe(c) else c for c in text)


def _unsafe(char: str) -> bool:
    return unicodedata.category(char) in UNSAFE and char not in JOINERS


def encode_error(error: UnicodeError) -> tuple[str, int]:
    """Replace a character that a stream cannot encode; an error handler for `codecs.register_error`."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    char = error.object[error.start]
    return ASCII.get(char) or char.encode("unicode_escape").decode(), error.start + 1


ASCII = {"±": "+-", "–": "-", "…": "...", "│": "|", "─": "-", **dict.fromkeys("╭╮╰╯├┤", "+")}
"""Replacements for characters of our own output on a terminal that has only ASCII."""
