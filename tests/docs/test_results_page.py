"""Numbers of docs/results.md that are written by hand are those of the raw output."""

from __future__ import annotations

import re
import statistics
from pathlib import Path

import pytest

import emoji
import records

DOCS = Path(__file__).parents[2] / "docs"
DATA = ("emoji", "kanji", "mixed")
OWN, QUICK, EXPERTS = "lda+query+patches+normalize", "lda+patches+normalize", "experts+query+patches+normalize"
RANDOM = "LoRA, random, ranks of input .9"
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


def differences(*pair):
    own, other = ([values(data, *one) for data in DATA] for one in pair)
    return [emoji.difference(*both) for both in zip(own, other, strict=True)]


def cells(start, columns):
    """The cells of the line that begins so, by number after the first, without marks and numbers of seeds."""
    (line,) = [line for line in LINES if line.startswith(start)]
    own = [re.sub(r"\*|\(\d\)", "", cell).strip() for cell in line.strip("|").split("|")][1:]
    return [own[column] for column in columns]


@pytest.mark.parametrize(
    ("start", "columns", "row", "readout"),
    [
        ("| **`lda+patches+normalize`** (recipe `quick`", (1, 3, 5), "frozen features", QUICK),
        ("| **`lda+patches+normalize`** (recipe `quick`", (0, 2, 4), "frozen features, no views", QUICK),
        ("| `lda+patches+normalize+tuned` | 65", (1, 3, 5), "frozen features", f"{QUICK}+tuned"),
        ("| `lda+patches` |", (1, 3, 5), "frozen features", "lda+patches"),
        ("| `ranpac-2000` | 6", (1, 3, 5), "frozen features", "ranpac-2000"),
        ("| **`input` .97** (recipe `own`", (0, 2, 4), "LoRA, input .97", OWN),
        ("| **`input` .97** (recipe `own`", (1, 3, 5), "LoRA, input .97", f"{OWN}+linear"),
        ("| `input` .99 | 7", (0, 2, 4), "LoRA, input .99", OWN),
        ("| `input` .9, with `+nearby`", (0, 2, 4), "LoRA, input .9", f"{OWN}+nearby"),
        ("| random directions, as many as `input` .9 |", (0, 2, 4), RANDOM, OWN),
        ("| random directions, as many as `input` .9 |", (1, 3, 5), RANDOM, f"{OWN}+linear"),
        ("| the same, with `+nearby`", (0, 2, 4), RANDOM, f"{OWN}+nearby"),
    ],
)
def test_accuracies(start, columns, row, readout):
    assert cells(start, columns) == spreads(row, readout)


def test_accuracies_of_experts():
    """But for emoji, where the row is of another router."""
    assert cells("| accuracy, % | 7", (1, 2)) == spreads("LoRA, experts", EXPERTS)[1:]


@pytest.mark.parametrize(
    ("start", "columns", "readout", "figure"),
    [
        ("| `lda+patches+normalize` (recipe `quick`)", (0, 1, 2), QUICK, "calibration_error"),
        ("| `lda+patches+normalize` (recipe `quick`)", (3, 4, 5), QUICK, "auroc"),
        ("| the same by chance", (0, 1, 2), QUICK, "calibration_error_by_chance"),
        ("| `lda+patches+normalize+tuned` | 6.9", (0, 1, 2), f"{QUICK}+tuned", "calibration_error"),
        ("| `lda` | 6.8", (0, 1, 2), "lda", "calibration_error"),
        ("| `logistic` | 6.1", (0, 1, 2), "logistic", "calibration_error"),
        ("| `ranpac-2000` | 12", (0, 1, 2), "ranpac-2000", "calibration_error"),
    ],
)
def test_calibration_and_unknown_images(start, columns, readout, figure):
    assert cells(start, columns) == spreads("frozen features", readout, figure)


@pytest.mark.parametrize(
    ("start", "row", "readout"),
    [
        ("| `quick`: LDA", "frozen features", QUICK),
        ("| `own`: one LoRA", "LoRA, input .97", OWN),
    ],
)
def test_means_in_short(start, row, readout):
    assert cells(start, range(3)) == [spread.partition(" ")[0] for spread in spreads(row, readout)]


@pytest.mark.parametrize(
    ("start", "other", "readout"),
    [
        ("| no LoRA | +3", "frozen features", QUICK),
        ("| frozen after the first task | +1", "LoRA, frozen after task 1", OWN),
        ("| `input` .99 | -0", "LoRA, input .99", OWN),
    ],
)
def test_paired_differences_of_own(start, other, readout):
    assert cells(start, range(3)) == differences(("LoRA, input .97", OWN), (other, readout))


@pytest.mark.parametrize(
    ("start", "other", "readout"),
    [
        ("| LDA, without compensation", RANDOM, OWN),
        ("| LDA with `+linear`", RANDOM, f"{OWN}+linear"),
        ("| LDA with `+nearby`", RANDOM, f"{OWN}+nearby"),
        ("| as many random directions, with `+nearby`", RANDOM, f"{OWN}+nearby"),
    ],
)
def test_paired_differences_of_random_directions(start, other, readout):
    assert cells(start, range(3)) == differences(("LoRA, input .9", readout), (other, readout))


@pytest.mark.parametrize(
    ("start", "rows"),
    [
        ("| `input` .9; as many", ("LoRA, input .9", RANDOM)),
        ("| `input` .97 | 5.9", ("LoRA, input .97",)),
        ("| `input` .99; as many", ("LoRA, input .99", "LoRA, random, ranks of input .99")),
    ],
)
def test_drift(start, rows):
    """Means over the seeds that measured it, with one decimal below 10 %."""
    expected = []
    for data in DATA:
        lines = [[line for line in RESULTS if (line["data"], line["row"]) == (data, row)] for row in rows]
        means = [100 * statistics.mean(line["drift"] for line in own if line.get("drift")) for own in lines]
        expected.append("; ".join(f"{mean:.{int(mean < 10)}f}" for mean in means))
    assert cells(start, range(3)) == expected
