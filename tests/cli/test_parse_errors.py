"""Each wrong argument ends in one short line that says what was expected, what came, and what to do."""

from __future__ import annotations

import pytest

from pgp.cli import main

EVERY = [
    (["train", "demo", "--epohs", "3"], "unknown flag --epohs; perhaps you meant --epochs; see pgp train demo --help"),
    (["train", "demo", "--epochs", "x"], "expected --epochs INT, got 'x'; see pgp train demo --help"),
    (["train", "demo", "--epochs"], "expected a value after --epochs, got none; see pgp train demo --help"),
    (["train", "demo", "--transforms.scale", "1"], "expected 2 values after --transforms.scale, got fewer; see pgp"),
    (
        ["train", "demo", "--transforms.scale", "1", "x"],
        "expected --transforms.scale FLOAT FLOAT, got '1', 'x'; see pgp train demo --help",
    ),
    (["train", "demo", "--tracker"], "expected a value after --tracker, got none"),
    (["train", "demo", "--readouts", "--epochs", "1"], "expected a value after --readouts, got none"),
    (["train", "--resume", "nowhere", "--tracker"], "expected a value after --tracker, got none"),
    (["train", "demo", "--data", "a", "--dataset.root", "b"], "expected --data or --dataset.root, got both: --data a"),
    (["train", "demo", "--data", "a.csv", "--dataset.file=b"], "expected --data or --dataset.file, got both"),
    (["train", "demo", "--data", "a", "--data_path", "b"], "expected --data or --data-path, got both: --data a and"),
    (["train", "demo", "--optimizer.name", "foo"], "expected --optimizer.name with one of adam, adamw, sgd, got 'foo'"),
    (
        ["train", "demo", "--readouts", "lda+quer"],
        "unknown value 'lda+quer' of --readouts: perhaps you meant lda+",
    ),
    (
        ["train", "demo", "--projection.energy", "3"],
        "expected projection.energy in [0, 1], got 3.0; see pgp train demo",
    ),
    (["sweep"], "expected a recipe, as in pgp sweep demo, got none: pgp list names all recipes"),
    (["sweep", "--seeds", "3", "demo"], "expected a recipe, as in pgp sweep demo, got --seeds: pgp list names all"),
    (["add", "run", ""], "expected a value after run, got an empty text: was a variable of the shell empty?"),
    (["predict", "run", ""], "expected a value after run, got an empty text"),
    (["train", "demo", "--output="], "expected a value in --output=, got an empty text"),
    (["train", "demo", "--dataset", "hugging-face"], "expected the name of a Hugging Face data set, got none"),
    (["sweep", "demo", "--workers", "many"], "expected --workers INT, got 'many'; see pgp sweep demo --help"),
    (["sweep", "demo", "--over"], "expected a value after --over, got none; see pgp sweep demo --help"),
    (["sweep", "demo", "--over", "a=1,2"], "unknown flag --a"),
    (["sweep", "demo", "--over=a="], "expected --over PATH=VALUE,VALUE, such as projection.energy=.9,.99, got 'a='"),
    (["sweep", "demo", "--over", "tasks=1,", "2"], "expected --over PATH=VALUE,VALUE without blanks, got '2'"),
    (["sweep", "demo", "--over", "tasks=1", "epochs=2"], "expected --over PATH=VALUE,VALUE without blanks, got 'epoc"),
    (["sweep", "demo", "--over", "output_dir=a,b"], "expected a setting of the runs in --over, got output_dir"),
    (["sweep", "demo", "--output_dir", "x"], "expected --output for the folder of a sweep, got --output-dir x"),
    (["data", "get"], "expected a recipe, as in pgp data get demo, got none"),
    (["eval", "--foo"], "expected RUN, got none; see pgp eval --help"),
    (["audit"], "expected RUN (Run folder), got none; see pgp audit --help"),
    (["audit", "run", "--batch-sizes", "x"], "expected --batch-sizes [INT [INT ...]], got 'x'; see pgp audit --help"),
    (["predict", "a", "b", "--top", "x"], "expected --top INT, got 'x'; see pgp predict --help"),
]


@pytest.mark.parametrize("columns", ["80", "300"])
@pytest.mark.parametrize(("words", "told"), EVERY, ids=[" ".join(words) for words, _ in EVERY])
def test_a_wrong_argument_is_told_in_one_line(words, told, columns, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", columns)
    with pytest.raises(SystemExit) as stop:
        main.main(words)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"pgp: {told}")
    assert len(line) <= 3 * 80


def test_the_help_of_add_is_about_add(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stop:
        main.main(["add", "--help"])
    assert not stop.value.code
    said = capsys.readouterr().out
    assert said.startswith("usage: pgp add RUN DATA")
    assert "without the old images" in said
