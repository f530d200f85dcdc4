"""The files of docs/extending.md do all that their base classes ask for, and learn; so does the code of own-data.md."""

from __future__ import annotations

import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pages import check, parts, python_blocks

import test_conformance as conformance
import tiny
from conftest import golden_vit
from pgp import recipes, train
from pgp.cli import main
from pgp.datasets.synthetic import Synthetic
from pgp.evaluation import metrics
from pgp.methods.head_only import HeadOnly
from pgp.predict import Predictor
from pgp.rng import make_generator
from pgp.runs.run import Run

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
PAGE = EXAMPLES.parent / "extending.md"


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))


@pytest.fixture
def method():
    from shared_prompts import SharedPrompts

    built = SharedPrompts.Config().build(golden_vit(), list("abcdef"), make_generator(0, "init")).double()
    built.begin_task(conformance.TASK)
    return built


def test_a_page_shows_each_example():
    pages = "".join(page.read_text(encoding="utf-8") for page in EXAMPLES.parent.glob("*.md"))
    for path in EXAMPLES.iterdir():
        assert path.suffix not in (".py", ".sh") or f"examples/{path.name}" in pages


@pytest.mark.parametrize(
    "promise",
    [
        conformance.test_what_is_protected_meets_what_is_observed,
        conformance.test_loss_falls_and_only_the_method_learns,
        conformance.test_state_goes_round_without_the_encoder,
        conformance.test_prompts_are_all_that_learns_but_the_head,
    ],
)
def test_the_method_keeps_the_promises_of_every_method(method, promise):
    promise(method)


@pytest.mark.slow
def test_the_method_learns_and_a_run_finds_it_again(tmp_path):
    from shared_prompts import SharedPrompts

    run = train.train(tiny.config(method=SharedPrompts.Config(length=3)), tmp_path / "run")
    last = list(run.events("task"))[-1]
    assert last["ranks"]["prompts"] > 0
    assert Run.open(run.folder).config.method == SharedPrompts.Config(length=3)
    code = f"from pgp.runs.run import Run; print(Run({str(run.folder)!r}).config.method.tag)"
    for first, status in (("", 1), ("import shared_prompts; ", 0)):
        done = subprocess.run([sys.executable, "-c", first + code], cwd=EXAMPLES, capture_output=True, text=True)
        assert done.returncode == status, done.stderr
    assert done.stdout == "shared-prompts\n"


@pytest.fixture
def named_in_environment(monkeypatch):
    """`PGP_IMPORT=my_recipes` in the folder of the examples; afterwards the recipe is unknown again."""
    monkeypatch.setenv("PGP_IMPORT", "my_recipes")
    monkeypatch.chdir(EXAMPLES)
    monkeypatch.setitem(recipes.RECIPES, "demo-shared", recipes.RECIPES["demo"])  # so that it is removed at the end
    monkeypatch.delitem(sys.modules, "my_recipes", raising=False)


def test_the_commands_of_the_page_know_the_recipe(named_in_environment, capsys):
    main.main(["list"])
    assert "Train prompts that all images share, on digits." in capsys.readouterr().out
    commands = [line for language, block in parts(PAGE) if language == "bash" for line in block.splitlines()]
    assert len(commands) == 3
    for line in commands[1:]:
        check(shlex.split(line))
    with pytest.raises(SystemExit) as ended:
        main.main(["train", "demo-shared", "--method.width", "4"])
    assert ended.value.code == 2
    assert "--method.width" in capsys.readouterr().err


@pytest.mark.parametrize("entry", [main.main, main.published_main])
@pytest.mark.parametrize(
    ("source", "reason"),
    [(None, "No module named 'broken_recipes'"), ("1 +", "SyntaxError: "), ("raise KeyError('x')", "KeyError: 'x'")],
)
def test_a_module_that_cannot_be_imported_is_named(entry, source, reason, tmp_path, monkeypatch, capsys):
    if source is not None:
        (tmp_path / "broken_recipes.py").write_text(source, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.setenv("PGP_IMPORT", "broken_recipes")
    with pytest.raises(SystemExit) as ended:
        entry(["list"])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("pgp: expected in PGP_IMPORT the names of modules")
    assert reason in error


def test_the_readout_is_fitted_task_by_task_and_restored(tmp_path):
    from cosine_means import CosineMeans

    config = tiny.config(readouts=(CosineMeans.Config(),), dataset=Synthetic(noise=0.02), method=HeadOnly.Config())
    run = train.train(config, tmp_path / "run")
    assert metrics.average_accuracy(run.matrices()["cosine"]) > 0.5  # chance is 1 in 6
    readout = CosineMeans.Config().build(torch.nn.Identity(), 3, 0)
    readout.observe(torch.tensor([[2.0, 0.1], [0.0, 1.0]]), torch.tensor([0, 1]))
    readout.end_task()
    logits = readout.logits(torch.tensor([[1.0, 0.0], [0.0, 3.0]]))
    assert logits.argmax(1).tolist() == [0, 1]
    assert logits[:, 2].isneginf().all()
    more = CosineMeans.Config().build(torch.nn.Identity(), 5, 0)
    more.load_state_dict(readout.state_dict())
    assert torch.equal(more.logits(torch.tensor([[1.0, 0.0]]))[:, :3], logits[:1])


def test_the_classifier_of_the_page_learns_digits(capsys):
    (code,) = python_blocks(EXAMPLES.parent / "own-data.md")
    exec(code, {})
    classes, _, score = capsys.readouterr().out.rpartition(" ")
    assert classes == "[0 1 2 3 4 5 6 7 8 9]"
    assert float(score) > 0.85


def test_the_data_set_is_learned_and_known_again(tmp_path):
    from npz_images import NpzImages

    generator = np.random.default_rng(0)
    labels = np.arange(24) % 4
    pictures = (labels[:, None, None, None] * 60 + generator.integers(0, 40, (24, 3, 16, 16))).astype("uint8")
    arrays = {
        f"{part}_{what}": value
        for part in ("train", "test")
        for what, value in (("images", pictures), ("labels", labels))
    }
    np.savez(tmp_path / "images.npz", names=np.array(list("abcd")), **arrays)
    config = tiny.config(dataset=NpzImages(file=tmp_path / "images.npz"), tasks=2)
    run = train.train(config, tmp_path / "run")
    assert Predictor(run, "lda").classes == ("a", "b", "c", "d")
    assert metrics.average_accuracy(run.matrices()["lda"]) > 0.5
    with pytest.raises(ValueError, match=r"expected an \.npz file"):
        train.train(replace(config, dataset=NpzImages(file=tmp_path / "none.npz")), tmp_path / "other")
