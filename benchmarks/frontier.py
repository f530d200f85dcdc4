"""Draw accuracy and drift of LoRA under each projection and each baseline, from docs/results/readouts.jsonl.

    python benchmarks/frontier.py    # write docs/pictures/frontier.png

Each point is a row of benchmarks/readouts.py, the mean over its seeds. A line joins the rows of one rule, from strong
to weak protection.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import emoji
import readouts
import records
from pgp.reports import style

PICTURE = emoji.ROOT / "docs" / "pictures" / "frontier.png"
READOUTS = {
    "lda+query+patches+normalize": "LDA",
    "lda+query+patches+normalize+linear": "LDA with +linear",
    "lda+query+patches+normalize+nearby": "LDA with +nearby",
}
TITLES = {"emoji": "emoji", "kanji": "characters", "mixed": "mixed"}
RULES = {
    "projected": ("LoRA, input .999", "LoRA, input .99", "LoRA, input .97", "LoRA, input .9"),
    "random directions, as many": tuple(
        f"LoRA, random, ranks of input {energy}" for energy in (".999", ".99", ".97", ".9")
    ),
    "scaled (soft)": ("LoRA, soft .001", "LoRA, soft .01", "LoRA, soft .1"),
    "not projected": ("LoRA, frozen after task 1", "LoRA, slower .09", "LoRA, unprojected"),
}
"""Rows of each rule, from strong to weak protection."""


class Point(NamedTuple):
    """Means over the seeds of a row, in %."""

    drift: float
    accuracy: float


def points(lines: Sequence[dict[str, Any]], data: str, readout: str) -> dict[str, Point]:
    """Return the point of each row of a data set; the drift is the mean over the lines that have it."""
    drifts: dict[str, list[float]] = {}
    accuracies: dict[str, list[float]] = {}
    for line in lines:
        if line["data"] == data and readout in line["figures"]:
            accuracies.setdefault(line["row"], []).append(100 * line["figures"][readout]["average_accuracy"])
            if line.get("drift") is not None:
                drifts.setdefault(line["row"], []).append(100 * line["drift"])
    return {row: Point(statistics.mean(own), statistics.mean(accuracies[row])) for row, own in drifts.items()}


def without_learning(lines: Sequence[dict[str, Any]], data: str) -> float:
    """Return the accuracy of frozen features in %, by the readout of the recipe `quick`."""
    row, readout = readouts.FROZEN_BASELINE
    accuracies: list[float] = [
        100 * line["figures"][readout]["average_accuracy"]
        for line in lines
        if (line["data"], line["row"]) == (data, row)
    ]
    return statistics.mean(accuracies)


@style.styled()
def draw(lines: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw a panel for each readout (row) and data set (column)."""
    width = 3.4 * len(TITLES)
    figure = style.new_figure(width, 3 * len(READOUTS) + 0.4)
    measured = {line["row"] for line in lines if line.get("drift") is not None}
    looks = {
        name: style.look(number) for number, (name, rows) in enumerate(RULES.items()) if not measured.isdisjoint(rows)
    }
    grid = figure.subplots(len(READOUTS), len(TITLES), sharex="col", squeeze=False)
    for panels, (readout, short) in zip(grid, READOUTS.items(), strict=True):
        for axes, (data, title) in zip(panels, TITLES.items(), strict=True):
            draw_panel(axes, points(lines, data, readout), looks)
            frozen = without_learning(lines, data)
            axes.axhline(frozen, color=style.INK, linewidth=0.6, linestyle="--")
            axes.annotate("no LoRA", (1, frozen), (0, 2), xycoords=("axes fraction", "data"),
                          textcoords="offset points", ha="right", fontsize=style.SMALL)  # fmt: skip
            axes.set(title=f"{title}, {short}")
    for axes in grid[-1]:
        axes.set_xlabel("drift of old features, %")
    for axes in grid[:, 0]:
        axes.set_ylabel("average accuracy, %")
    style.legend(figure, looks, width)
    style.save_figure(figure, path)


def draw_panel(axes: Any, found: dict[str, Point], looks: dict[str, style.Look]) -> None:
    """Draw the rows of each rule that were found."""
    for name, own in looks.items():
        known = [(row, found[row]) for row in RULES[name] if row in found]
        axes.plot([at.drift for _, at in known], [at.accuracy for _, at in known], color=own.colour, marker=own.marker,
                  linewidth=0.8)  # fmt: skip
        for row, at in known:
            style.name_point(axes, at.drift, at.accuracy, label(row), own)


def label(row: str) -> str:
    """Return what tells a row from others of its rule, such as its energy.

    >>> label("LoRA, random, ranks of input .99"), label("LoRA, slower .09"), label("LoRA, frozen after task 1")
    ('.99', 'slower', 'frozen')
    """
    *_, last = row.split(", ")
    words = last.split()
    return words[-1] if words[0] in ("input", "ranks", "soft") else words[0]


def main(argv: Sequence[str] | None = None) -> None:
    """Draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args(argv)
    draw(list(records.read(readouts.RESULTS)), PICTURE)


if __name__ == "__main__":
    main()
