"""Help texts: every flag has its docstring as one paragraph, and nothing is wider than the terminal."""

from __future__ import annotations

import dataclasses

import pytest

from pgp import recipes
from pgp.cli import main
from pgp.cli.commands import PredictCommand, TrainCommand
from pgp.cli.help_texts import field_texts
from pgp.config import Config


def help_of(words, capsys):
    with pytest.raises(SystemExit) as ended:
        main.main([*words, "--help"])
    assert not ended.value.code
    return capsys.readouterr().out


@pytest.mark.parametrize("words", [["train", "demo"], ["predict"], ["sweep", "demo"], ["report"], ["audit"]])
def test_help_fits_the_terminal(words, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    _, _, flags = help_of(words, capsys).partition("show this help message")  # tyro does not wrap what is above
    assert max(map(len, flags.splitlines())) <= 80


def test_docstrings_are_one_paragraph(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "300")
    assert "gpu: CUDA. mps: Apple's GPU," in help_of(["train", "demo"], capsys)  # in the source, a line ends at "gpu:"


@pytest.mark.parametrize("kind", [Config, TrainCommand, PredictCommand])
def test_every_setting_has_a_docstring(kind):
    without = {field.name for field in dataclasses.fields(kind)} - field_texts(kind).keys()
    assert without <= {"config", "dataset", "backbone", "method", "projection", "transforms", "optimizer", "hardware"}


def test_fields_of_base_classes_keep_their_docstrings():
    readout = recipes.READOUTS["lda+query+linear"]
    texts = field_texts(type(readout))
    assert texts.keys() == {field.name for field in dataclasses.fields(readout)}
    assert texts["bandwidth"].startswith("Width of the Gaussian weights")
