"""Renamed flags and values: errors that name the new spelling."""

from __future__ import annotations

from collections.abc import Sequence

FLAGS = {
    "controls": "baselines",
    "part": "micro-batch-size",
    "hardware.part": "micro-batch-size",
    "arrival": "order",
    "method.reads": "method.head-type",
    "method.experts": "method.expert-type",
    "method.behind-norm": "method.prompts-after-norm",
    "projection.space": "projection.basis",
    "projection.on": "projection.apply-to",
    "projection.hold-norms": "projection.preserve-key-norms",
    "projection.aggregation-energy": "projection.value-energy",
    "optimizer.prompt-share": "optimizer.prompt-lr-scale",
    **{f"views.{name}": f"transforms.{name}" for name in ("size", "resize", "scale", "ratio", "flip", "mean", "std")},
}
VALUES = {
    "method": {"sequential": "unprojected", "slower": "reduced-lr", "linear": "linear-probe"},
    "readouts": {"sequential": "head"},
}


def refuse_old_spellings(words: Sequence[str]) -> None:
    """Raise if `words`, the flags of a command, have an old spelling among them.

    Raises:
        ValueError: Naming the new spelling.
    """
    current = ""
    for word in words:
        if word.startswith("--"):
            flag, _, value = word.removeprefix("--").partition("=")
            current = flag.replace("_", "-")
            if new := FLAGS.get(current.replace("no-", "")):
                raise ValueError(f"unknown flag --{flag}: it is called --{new} now")
        else:
            value = word
        if new := VALUES.get(current, {}).get(value):
            raise ValueError(f"unknown {current.removesuffix('s')} {value!r}: it is called {new!r} now")
