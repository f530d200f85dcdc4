"""Every benchmark and script starts, runs in a tiny case, and its page is what its raw output says."""

from __future__ import annotations

import importlib
import itertools
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

import adding
import cost
import emoji
import evaluation
import frontier
import gpu
import kanji_data
import loading
import mixed_data
import pretrain_demo_clip
import pretrain_demo_vit
import protection
import queries
import readouts
import records
import serve
from pgp.methods.prompts import cosine_similarity, select_prompts

ROOT = Path(__file__).parent.parent
PROGRAMS = {path.stem: path for folder in ("benchmarks", "scripts") for path in (ROOT / folder).glob("*.py")}
PARTS = {"records", "rehearsal"}
"""Modules in these folders that are no programs."""


@pytest.mark.parametrize("name", sorted(PROGRAMS.keys() - PARTS))
def test_every_program_says_what_it_does(name, capsys):
    module = importlib.import_module(name)
    with pytest.raises(SystemExit) as ended:
        module.main(["--help"])
    assert ended.value.code == 0
    assert f"python {PROGRAMS[name].relative_to(ROOT).as_posix()}" in capsys.readouterr().out


@pytest.mark.parametrize("page", [cost, loading, emoji, protection, adding, readouts, serve, evaluation, queries])
def test_pages_say_what_the_raw_output_says(page):
    assert page.RESULTS.with_suffix(".md").read_text(encoding="utf-8") == page.table()


def test_cost(capsys):
    cost.main(["--tiny", "--rounds", "1", "--precision", "32-true"])
    out = capsys.readouterr().out
    assert out.count("| 32-true |") == len(cost.MEASURED)
    assert "Projection and drift meter add" in out


@pytest.mark.parametrize("kind", ["l2p", "dualprompt"])
def test_a_step_with_clean_queries_is_measured_with_one_pass(monkeypatch, kind):
    passes, forward = [], cost.ViT.forward

    def counted(self, *arguments, **named):
        passes.append(None)
        return forward(self, *arguments, **named)

    monkeypatch.setattr(cost.ViT, "forward", counted)
    cost.train(kind, "32-true", cost.TINY)()
    assert len(passes) == 2
    cost.train(kind + cost.CLEAN, "32-true", cost.TINY)()
    assert len(passes) == 3


@pytest.mark.parametrize("kind", ["l2p", "dualprompt"])
def test_plain_methods_have_the_loss_and_gradients_of_ours(kind):
    """Their time is a yardstick only if they do the same work; keys and prompts are those of the images' queries."""
    method = cost.untrained(kind, "32-true", cost.TINY)[1].method
    plain = cost.PLAINS[f"plain {kind}"](cost.TINY)
    key = method.pool.key if kind == "l2p" else method.key
    encoder = method.backbone.vit.state_dict()
    for model in (plain.original, plain.prompted):
        model.load_state_dict(encoder)
    with torch.no_grad():
        plain.key.copy_(key)
        plain.head.load_state_dict(method.head.state_dict())
        if kind == "l2p":
            plain.prompts.copy_(method.pool.prompts)
        else:
            for mine, pools in ((plain.general.unsqueeze(1), method.general), (plain.prompts, method.experts)):
                for own, pool in zip(mine, pools.values(), strict=True):
                    own[:, 0].copy_(pool.keys.transpose(1, 2).flatten(2))  # (M, H, L, d) -> (M, L, D)
                    own[:, 1].copy_(pool.values.transpose(1, 2).flatten(2))
    images, labels = cost.images(cost.TINY), torch.arange(cost.TINY.batch) % 10
    batch = method.prepare_batch(images, cost.TASK)
    batch["indices"] = select_prompts(cosine_similarity(batch["query"], key), plain.selected)
    ours, theirs = method.loss(images, labels, cost.TASK, batch), plain.loss(images, labels)
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-6)
    for loss in (ours, theirs):
        loss.backward()
    torch.testing.assert_close(plain.key.grad, key.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(plain.head.weight.grad, method.head.weight.grad, rtol=1e-4, atol=1e-6)
    if kind == "l2p":
        torch.testing.assert_close(plain.prompts.grad, method.pool.prompts.grad, rtol=1e-4, atol=1e-6)
    else:
        first = next(iter(method.experts.values())).keys.grad.transpose(1, 2).flatten(2)
        torch.testing.assert_close(plain.prompts.grad[0, :, 0], first, rtol=1e-4, atol=1e-6)


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="only Linux tells a process its peak of memory")
def test_memory(capsys):
    cost.main(["--tiny", "--memory", "boundary", "l2p"])
    assert float(capsys.readouterr().out) > 0


@pytest.mark.slow
def test_serve(capsys):
    serve.main(["--tiny"])
    out = capsys.readouterr().out
    assert "| good, lost or answered otherwise | 0 |" in out
    assert "| changes of the run | 2 |" in out


def test_old_figures_are_marked(tmp_path):
    for line in records.read(cost.RESULTS):
        if line.get("what") == "L2P train step":
            records.append(tmp_path / "cost.jsonl", {**line, "version": 2})
    assert "L2P train step *" in cost.table(tmp_path / "cost.jsonl")
    current = {row.split(" | ")[1] for row in cost.table().splitlines() if "| 32-true |" in row and " * |" not in row}
    assert current == cost.MEASURED.keys()
    for line in records.read(loading.RESULTS):
        records.append(tmp_path / "loading.jsonl", {**line, "version": 2})
    assert loading.STALE in loading.table(tmp_path / "loading.jsonl")
    assert loading.STALE not in loading.table()


def test_loading(capsys):
    loading.main(["--tiny"])
    out = capsys.readouterr().out
    assert "| photos, later passes, 0 workers |" in out
    assert loading.STALE not in out


def test_gpu(capsys, monkeypatch):
    words = ["--rounds", "1", "--compile", "no", "--precision", "32-true", "16-mixed"]
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    gpu.main(["--tiny", *words])
    out = capsys.readouterr().out
    assert out.count("| CPU | l2p | ") == out.count("| CPU | dualprompt | ") == 2
    assert "Measured on a CPU: these numbers say nothing about a GPU." in out
    with pytest.raises(SystemExit):
        gpu.main(words)
    assert "expected a CUDA GPU, and torch sees none" in capsys.readouterr().err
    assert not gpu.RESULTS.exists() or "| CPU |" not in gpu.table()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_adding(capsys):
    adding.main(["--tiny"])
    out = capsys.readouterr().out
    assert "| ViT-S/16 | " in out
    assert "| lda | 8 | " in out


def test_evaluation(capsys):
    evaluation.main(["--tiny"])
    out = capsys.readouterr().out
    rows = [line.split(" | ")[1] for line in out.splitlines() if line.startswith("| `--evaluate")]
    assert rows == ["12", "12", "10", "6"]


def test_mixed_data(capsys):
    mixed_data.main(["--tiny"])
    out = capsys.readouterr().out.splitlines()
    assert out[1:5] == [
        "digits 1: 2 classes, 40 training and 40 test images",
        "letters 1: 2 classes, 4 training and 2 test images",
        "digits 2: 2 classes, 40 training and 40 test images",
        "letters 2: 2 classes, 4 training and 2 test images",
    ]


def test_images_for_tuning_are_neither_trained_nor_tested_on(tmp_path):
    test, tuning = (mixed_data.folder(part, tmp_path, lambda: mixed_data.tiny_worlds(tmp_path))
                    for part in ("test", "validation"))  # fmt: skip
    pictures = [{path.read_bytes() for path in (root / part).rglob("*.png")}
                for root, part in ((test, "train"), (test, "test"), (tuning, "test"))]  # fmt: skip
    assert [len(part) for part in pictures] == [88, 84, 84]
    assert not any(one & other for one, other in itertools.combinations(pictures, 2))
    assert {path.read_bytes() for path in (tuning / "train").rglob("*.png")} == pictures[0]


def test_mixed_data_of_other_settings_is_not_used(monkeypatch, tmp_path):
    def drawn():
        return mixed_data.folder("test", tmp_path, lambda: mixed_data.tiny_worlds(tmp_path))

    times = {path: path.stat().st_mtime_ns for path in drawn().rglob("*")}
    assert {path: path.stat().st_mtime_ns for path in drawn().rglob("*")} == times
    monkeypatch.setattr(mixed_data, "IMAGES", 19)
    with pytest.raises(kanji_data.DataError, match="delete it"):
        drawn()


def test_mixed_data_names_the_package_it_lacks(monkeypatch, tmp_path):
    monkeypatch.setattr(mixed_data.FashionMNIST, "search_paths", (tmp_path,))
    with pytest.raises(kanji_data.DataError, match="apt-get install dataset-fashion-mnist"):
        mixed_data.folder("test", tmp_path)
    assert not (tmp_path / "mixed").exists()


def test_readouts(capsys):
    readouts.main(["run", "--tiny", "--rows", "frozen features", "VPT, input .99"])
    out = capsys.readouterr().out
    assert "## emoji" in out
    assert out.count("| frozen features | ") == len(readouts.FROZEN)
    assert out.count("| VPT, input .99 | ") == 2 * len(readouts.PROMPTED) - 1  # in differences, too, without the head
    jobs = len(readouts.TUNED) * len(readouts.RATES)
    readouts.main(["tune", "--tiny", "--data", "mixed", "--part", f"{jobs}/{jobs}"])
    assert json.loads(capsys.readouterr().out)["data"] == "mixed"


def test_frontier_draws_every_row_with_drift(tmp_path):
    lines = list(records.read(readouts.RESULTS))
    drawn = {row for rows in frontier.RULES.values() for row in rows}
    for data in frontier.TITLES:
        for readout in frontier.READOUTS:
            found = frontier.points(lines, data, readout)
            assert found.keys() <= drawn
            assert all(0 <= at.drift <= 100 and 0 <= at.accuracy <= 100 for at in found.values())
    assert frontier.points(lines, "mixed", "lda+query+patches+normalize")["LoRA, input .99"] == pytest.approx(
        (3.2, 82.4), abs=0.1
    )
    frontier.draw(lines, tmp_path / "frontier.png")
    with Image.open(tmp_path / "frontier.png") as picture:
        assert picture.width > picture.height
    rows = [frontier.label(row) for row in ("LoRA, random, ranks of input .99", "LoRA, unprojected", "LoRA, soft .1")]
    assert rows == [".99", "unprojected", ".1"]


def test_queries(capsys):
    queries.main(["run", "--tiny"])
    out = capsys.readouterr().out
    lines = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    assert [(line["row"], line["query"]) for line in lines] == list(itertools.product(queries.ROWS, queries.QUERIES))
    rows = [row.split(" | ") for row in out.splitlines() if row.startswith("| emoji | ")]
    assert [row[1:4] for row in rows] == [[row, readout, "1"] for row in queries.ROWS for readout in ("head", "lda")]
    assert all(row[6].startswith(("+", "-")) for row in rows)  # a paired difference


def test_emoji(capsys):
    emoji.main(["run", "--tiny", "--rows", "L2P", "L2P-PGP sum update 0.99"])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| L2P")]
    assert [row.split(" | ")[0] for row in rows] == ["| L2P", "| L2P-PGP sum update 0.99"]
    assert rows[1].rstrip(" |").split(" | ")[-2:] != ["", ""]  # paired with the first
    emoji.main(["tune", "--tiny", "--part", "1/12"])
    assert json.loads(capsys.readouterr().out)["method"] == "head-only"


def test_protection(capsys):
    protection.main(["run", "--tiny", "--rows", "input .99"])
    out = capsys.readouterr().out
    assert "## emoji" in out
    assert out.count("| input .99 | ") == 5  # a row in three tables, two in that of compensated readouts
    protection.main(["tune", "--tiny", "--data", "kanji", "--part", "6/6"])
    assert json.loads(capsys.readouterr().out)["data"] == "kanji"


@pytest.mark.parametrize("benchmark", [emoji, protection, queries])
def test_what_a_benchmark_lacks_is_named(benchmark, monkeypatch, tmp_path):
    monkeypatch.setattr(emoji, "WEIGHTS", tmp_path / "weights")
    with pytest.raises(SystemExit, match=r"skipped: this benchmark needs .*weights.* not part of the project"):
        benchmark.main(["run"])
    with pytest.raises(SystemExit):
        benchmark.main(["run", "--rows", "nonsense"])
    with pytest.raises(SystemExit):
        benchmark.main(["run", "--part", "3/2"])


def test_drawn_characters(capsys):
    kanji_data.main(["--tiny", "--probe"])
    out = capsys.readouterr().out
    assert "4 classes; images: train 8 (2 a class), validation 4 (1 a class), test 4 (1 a class)" in out
    assert "LDA of CLS: validation" in out


def test_drawn_characters_need_their_tools(monkeypatch, tmp_path):
    monkeypatch.setattr(kanji_data, "KANJI", kanji_data.KANJI._replace(data=tmp_path))
    monkeypatch.setattr(kanji_data.shutil, "which", lambda name: None)
    with pytest.raises(SystemExit, match="expected the program npm, got none"):
        kanji_data.main([])


@pytest.mark.parametrize("script", [pretrain_demo_vit, pretrain_demo_clip])
def test_pretraining(script, tmp_path, capsys):
    script.main(["--tiny", "--output", str(tmp_path)])
    name = script.__name__.removeprefix("pretrain_")
    record = json.loads((tmp_path / f"{name}.json").read_text())
    assert record.keys() == json.loads((script.OUTPUT / f"{name}.json").read_text()).keys()
    assert (tmp_path / f"{name}.safetensors").is_file()
    with pytest.raises(SystemExit):
        script.main(["--tiny"])  # which would replace what is shipped


def test_the_wheel_check(capsys, tmp_path):
    check_wheel = importlib.import_module("check_wheel")
    check_wheel.main(["--tiny"])
    assert "1 modules import" in capsys.readouterr().out


@pytest.mark.slow
def test_the_wheel(capsys):
    importlib.import_module("check_wheel").main([])
    assert "modules import" in capsys.readouterr().out
