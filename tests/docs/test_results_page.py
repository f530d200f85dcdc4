"""Numbers of docs/results.md that are written by hand are those of the raw output."""

from __future__ import annotations

from pathlib import Path

import pytest

import emoji
import records

DOCS = Path(__file__).parents[2] / "docs"
DATA = ("emoji", "kanji", "mixed")
OWN, QUICK, EXPERTS = "lda+query+patches+normalize", "lda+patches+normalize", "experts+query+patches+normalize"
LINES = [line for line in (DOCS / "results.md").read_text(encoding="utf-8").splitlines() if line.startswith("|")]
RESULTS = list(records.read(DOCS / "results" / "readouts.jsonl"))


def values(data, row, readout, figure="average_accuracy"):
    found = {
        line["seed"]: 100 * line["figures"][readout][figure]
        for line in RESULTS
        if (line["data"], line["row"]) == (data, row) and figure in line["figures"].get(readout, {})
    }
    assert found, (data, row, readout)
    return found


def spreads(row, readout, figure="average_accuracy"):
    return [emoji.spread(list(values(data, row, readout, figure).values())) for data in DATA]


def line_of(start):
    (found,) = [line for line in LINES if line.startswith(start)]
    return found


@pytest.mark.parametrize(
    ("start", "row", "readout"),
    [
        ("| **`lda+patches+normalize`** (recipe `quick`", "frozen features", QUICK),
        ("| **`lda+patches+normalize`** (recipe `quick`", "frozen features, no views", QUICK),
        ("| `lda+patches+normalize+tuned` | 65", "frozen features", f"{QUICK}+tuned"),
        ("| `lda+patches` |", "frozen features", "lda+patches"),
        ("| `ranpac-2000` | 6", "frozen features", "ranpac-2000"),
        ("| **`input` .97** (recipe `own`", "LoRA, input .97", OWN),
        ("| **`input` .97** (recipe `own`", "LoRA, input .97", f"{OWN}+linear"),
        ("| `input` .99 | 7", "LoRA, input .99", OWN),
        ("| `input` .9, with `+nearby`", "LoRA, input .9", f"{OWN}+nearby"),
        ("| accuracy, % | 7", "LoRA, experts", EXPERTS),
    ],
)
def test_accuracies(start, row, readout):
    line = line_of(start)
    for spread in spreads(row, readout) if row != "LoRA, experts" else spreads(row, readout)[1:]:
        assert spread in line, (spread, line)


@pytest.mark.parametrize(
    ("start", "readout", "figure"),
    [
        ("| `lda+patches+normalize` (recipe `quick`)", QUICK, "calibration_error"),
        ("| `lda+patches+normalize` (recipe `quick`)", QUICK, "auroc"),
        ("| the same by chance", QUICK, "calibration_error_by_chance"),
        ("| `lda` | 6.8", "lda", "calibration_error"),
        ("| `logistic` | 6.1", "logistic", "calibration_error"),
        ("| `ranpac-2000` | 12", "ranpac-2000", "calibration_error"),
    ],
)
def test_calibration_and_unknown_images(start, readout, figure):
    for spread in spreads("frozen features", readout, figure):
        assert spread in line_of(start)


@pytest.mark.parametrize(
    ("start", "row", "readout"),
    [
        ("| `quick`: LDA", "frozen features", QUICK),
        ("| `own`: one LoRA", "LoRA, input .97", OWN),
    ],
)
def test_means_in_short(start, row, readout):
    cells = [cell.strip(" *") for cell in line_of(start).strip("|").split("|")]
    assert cells[1:] == [spread.partition(" ")[0] for spread in spreads(row, readout)]


@pytest.mark.parametrize(
    ("start", "readout", "other", "others"),
    [
        ("| no LoRA | +3", OWN, "frozen features", QUICK),
        ("| frozen after the first task | +1", OWN, "LoRA, frozen after task 1", OWN),
        ("| `input` .99 | -0", OWN, "LoRA, input .99", OWN),
    ],
)
def test_paired_differences_of_own(start, readout, other, others):
    line = line_of(start)
    for data in DATA:
        assert emoji.difference(values(data, "LoRA, input .97", readout), values(data, other, others)) in line
