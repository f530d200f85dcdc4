"""Errors of tyro, which come in a box of many lines, as one line: what was expected, what came, and what to do."""

from __future__ import annotations

import difflib
import re

RULE = re.compile(r"[─-]{3,}")
"""A line between two sections of the box."""
MOST = 15
"""Maximum number of choices that an error lists; of more, it names those nearest to what was given."""


def shorten(text: str) -> str:
    r"""Return an error of tyro as one line.

    >>> shorten("│ Unrecognized options: --epohs, 3 │\n│ ─── │\n│ Perhaps you meant: │\n│   --epochs INT │")
    'unknown flag --epohs; perhaps you meant --epochs'
    >>> shorten("│ Error parsing --epochs: invalid literal for int() with base 10: 'x' │\n│ ─── │\n│ --epochs INT │")
    "expected --epochs INT, got 'x'"
    """
    lines = [line.strip(" │") for line in text.strip().splitlines() if line[:1] not in ("╭", "╰")]
    if not text.lstrip().startswith(("╭", "│")):  # without UTF-8 there is no box: the title is above a rule
        lines = lines[2:] or lines
    sections: list[list[str]] = [[]]
    for line in lines:
        if RULE.fullmatch(line):
            sections.append([])
        else:
            sections[-1].append(line)
    message = " ".join(" ".join(sections[0]).split())
    flags = [line for section in sections for line in section if line.startswith("--")]
    parts = [_reworded(message, flags[0] if flags else "")]
    if any(section and section[0].startswith("Perhaps you meant") for section in sections):
        parts.append(f"perhaps you meant {', '.join(flag.split()[0].rstrip(',') for flag in flags[:3])}")
    if program := re.search(r"For full helptext, (?:run|see):? (.*--help)", " ".join(" ".join(lines).split())):
        parts.append(f"see {program[1]}")
    return "; ".join(part for part in parts if part)


def _reworded(message: str, usage: str) -> str:
    """Return the first sentence of an error, reworded if it is a known one.

    Args:
        message: The sentence of tyro.
        usage: The flag that it concerns with the form of its values, such as `--epochs INT`; may be empty.
    """
    if found := re.match(r"Unrecognized options: (.*)", message):
        words = found[1].split(", ")
        flags = [word.partition("=")[0] for word in words if word.startswith("-")]
        return f"unknown flag {flags[0]}" if flags else f"unexpected argument {words[0]}"
    if found := re.match(r"invalid choice '(.*)' for argument '(.*)'\. Expected one of \((.*)\)", message):
        choices = sorted({choice for choice in re.findall(r"'([^']*)'", found[3]) if choice != "None"})
        if len(choices) > MOST:
            near = difflib.get_close_matches(found[1], choices, cutoff=0.4)
            hint = f": perhaps you meant {' or '.join(near)}" if near else ""
            return f"unknown value {found[1]!r} of {found[2]}{hint}"
        return f"expected {found[2]} with one of {', '.join(choices)}, got {found[1]!r}"
    if found := re.match(r"Missing value for argument '(.*)'\. Expected (\d+)", message):
        if not found[1].startswith("-"):
            return f"expected {found[1].upper()}, got none"
        if found[2] == "1":
            return f"expected a value after {found[1]}, got none"
        return f"expected {found[2]} values after {found[1]}, got fewer"
    if found := re.match(r"Missing from .*?: (\S+) (.*?)\.? \(required\)", message):
        return f"expected {found[1]} ({found[2]}), got none"
    if found := re.match(r"Error parsing (\S+): (.*)", message):
        reason = found[2]
        value = re.search(r"(?:from|arguments:?) \[(.*?)\]", reason) or re.search(r"('[^']*')$", reason)
        if found[1].startswith("-") and usage and value and not reason.startswith("expected"):
            return f"expected {usage.replace('{None}|', '')}, got {value[1]}"
        return reason
    return message
