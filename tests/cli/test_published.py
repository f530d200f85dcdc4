"""The published command line, in words of ours."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace

import pytest
import torch

import tiny
from pgp import recipes, train
from pgp.baselines import matching_baselines
from pgp.cli import main, published
from pgp.projections.base import NoProjection
from pgp.runs.run import Run


@pytest.fixture(autouse=True)
def _tiny_recipe(monkeypatch, tmp_path):
    for name in ("10cifar100_l2p_pgp", "20cifar100_l2p_pgp"):
        monkeypatch.setitem(recipes.RECIPES, name, lambda name=name: replace(tiny.config(epochs=1), name=name))
    monkeypatch.chdir(tmp_path)


def fails(capsys, *words):
    with pytest.raises(SystemExit) as stop:
        main.published_main(list(words))
    assert stop.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "ours"),
    [
        ("--model vit_base_patch16_224", "--backbone.model vit_base_patch16_224.orig_in21k"),
        ("--model=vit_base_patch16_224", "--backbone.model vit_base_patch16_224.orig_in21k"),
        ("--model vit_tiny_patch16_224.augreg_in21k", "--backbone.model vit_tiny_patch16_224.augreg_in21k"),
        ("--output_dir ./output --output-dir=x", "--output ./output --output x"),
        ("--data-path /data --data_path=/d", "--dataset.root /data --dataset.root /d"),
        ("--epochs 1 --seed 50 --batch-size 8", "--epochs 1 --seed 50 --batch-size 8"),
        ("--num_tasks 20 --task_inc True --task_inc False", "--tasks 20 --setting til --setting cil"),
        ("--task_inc --shuffle false --shuffle", "--setting til --no-shuffle --shuffle"),
        ("--pgp False --no_pgp", "--no-pgp --no-pgp"),
        ("--pgp True --no-pgp False", "--pgp --pgp"),
        ("--size 20 --length=3 --top_k 2", "--method.pool-size 20 --method.length 3 --method.top-k 2"),
        ("--pull_constraint_coeff 0.5 --lr 0.01", "--method.pull 0.5 --optimizer.lr 0.01"),
        ("--opt sgd --clip-grad 0", "--optimizer.name sgd --optimizer.clip 0"),
        ("--device cuda --device cpu", "--accelerator gpu --accelerator cpu"),
        ("--num_workers 4 --no-pin-mem --pin-mem", "--workers 4 --no-pin-memory --pin-memory"),
        ("--imagenet-r-split random:3", "--dataset.split random:3"),
        ("--readouts lda head --method.top-k=3", "--readouts lda head --method.top-k=3"),
    ],
)
def test_flags_in_words_of_ours(words, ours):
    assert published.translate_flags(words.split(), recipes.cifar100_10_l2p_pgp()) == ours.split()


def test_what_a_flag_means_depends_on_the_method_and_the_encoder():
    prompts, clip = recipes.cifar100_10_dualprompt_pgp(), recipes.cifar100_10_clip_pgp()
    assert published.translate_flags(["--length", "20"], prompts) == ["--method.expert-length", "20"]
    assert published.translate_flags(["--length", "4"], clip) == ["--method.image-prompt", "4"]
    words = ["--model", "vit_base_patch16_224"]
    assert published.translate_flags(words, clip)[1::2] == ["ViT-B-16-quickgelu", "openai"]
    assert published.explain_model_flag(words, prompts) == (
        "--model vit_base_patch16_224 is vit_base_patch16_224.orig_in21k, the published weights"
    )
    assert published.explain_model_flag(words, clip).startswith(
        "--model vit_base_patch16_224 is ViT-B-16-quickgelu openai"
    )
    assert published.explain_model_flag(["--model", "vit_small_patch16_224.augreg_in21k"], prompts) is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--task_inc", "yes"], "expected --task-inc True or --task-inc False, got 'yes'"),
        (["--pgp", "0"], "expected --pgp True or --pgp False, got '0'"),
        (["--model", "--eval_batch_size"], "expected a value after --model, got none"),
        (["--lr", "0.1", "--method", "clip", "--backbone", "demo-clip"], "--optimizer.first-lr for CLIP"),
        (["--device", "cuda:1"], "expected --device cuda or cpu, got 'cuda:1'; set CUDA_VISIBLE_DEVICES"),
        (["--top_k", "1", "--method", "head-only"], "--top-k means nothing to HeadOnly, which has no such flags"),
    ],
)
def test_flags_that_do_not_fit(capsys, words, message):
    assert message in fails(capsys, "10cifar100_l2p_pgp", *words)


def test_unknown_recipes_and_flags_name_the_nearest(capsys):
    assert "perhaps you meant '10cifar100_l2p_pgp'" in fails(capsys, "10cifar_l2p_pgp")
    assert "--data" in fails(capsys, "10cifar100_l2p_pgp", "--data-pat", "x")
    main.published_main([])
    assert "usage: python main.py RECIPE" in capsys.readouterr().out


@pytest.mark.parametrize("folder", ["nowhere", "no/where"])
def test_an_evaluation_says_that_there_is_no_run(folder, tmp_path, capsys):
    error = fails(capsys, "10cifar100_l2p_pgp", "--eval", "--output_dir", folder)
    assert f"no finished task of 10cifar100_l2p_pgp in {tmp_path / folder}, which does not exist: name another" in error


@pytest.mark.slow
def test_runs_lie_in_the_output_folder_under_both_names(tmp_path, capsys):
    main.published_main(["10cifar100_l2p_pgp", "--output_dir", "./output", "--no_pgp", "--lr", "0.2"])
    run = Run.open(tmp_path / "output")
    assert run.config.optimizer.lr == 0.2
    assert run.config.projection == NoProjection.Config()
    names = [f"task{n}_checkpoint.pth" for n in (1, 2, 3)]
    assert sorted(path.name for path in (tmp_path / "output" / "checkpoint").iterdir()) == names
    left = torch.load(tmp_path / "output" / "checkpoint" / names[1], weights_only=True)
    ours = run.load("task-02")["method"]
    assert left["task"] == 2
    assert all(torch.equal(left["model"][name], tensor) for name, tensor in ours.items())

    before = (tmp_path / "output" / "accuracy.csv").read_bytes()
    main.published_main(["20cifar100_l2p_pgp", "--output_dir", "./output", "--seed", "7"])
    assert "the output folder is not empty: this run goes to output-2" in capsys.readouterr().err
    assert (tmp_path / "output" / "accuracy.csv").read_bytes() == before
    assert Run.open(tmp_path / "output-2").config.seed == 7

    for words in (["--eval"], ["--output_dir", "./output", "--lr", "0.2", "--eval"]):
        main.published_main(["10cifar100_l2p_pgp", *words])
        out = capsys.readouterr().out
        assert "output: accuracy" in "".join(out.split("\n"))
        assert out.count("yes") == 2 * 3  # readouts and tasks
    main.published_main(["20cifar100_l2p_pgp", "--eval"])
    assert "output-2: accuracy" in "".join(capsys.readouterr().out.split("\n"))
    for words, name in (
        (["--top_k", "1"], "method.top-k"),
        (["--pgp", "True"], "projection"),
        (["--seed", "1"], "seed"),
    ):
        error = fails(capsys, "10cifar100_l2p_pgp", "--eval", *words)
        assert f"were trained with other settings of {name}, which --eval cannot change" in error
    assert "no finished task of demo in" in fails(capsys, "demo", "--eval")


@pytest.mark.slow
def test_an_evaluation_finds_the_run_that_its_words_mean(tmp_path, capsys, monkeypatch):
    (tmp_path / "output-bert").mkdir()
    (tmp_path / "output-bert" / "config.json").write_text('{"model_type": "bert"}')  # another program's
    recipe = "10cifar100_l2p_pgp"
    main.published_main([recipe, "--seed", "3"])
    main.published_main([recipe, "--twin", "--seed", "4"])
    capsys.readouterr()
    found = {
        ("--seed", "3"): "output:",
        ("--no_pgp",): "output-2/none:",
        ("--seed", "4", "--pgp", "True"): "output-2/orthogonal:",
        ("--eval-batch-size", "5", "--no_pgp"): "output-2/none:",
    }
    for words, name in found.items():
        main.published_main([recipe, "--eval", *words])
        out = capsys.readouterr().out
        assert f"{name} accuracy" in "".join(out.split("\n")).replace(str(tmp_path) + "/", "")
        assert out.count("yes") == 6
    main.published_main(["--resume", "output"])
    assert "run:    output" in capsys.readouterr().out
    monkeypatch.chdir(tmp_path / "output-bert")
    (tmp_path / "output-bert" / "config.json").unlink()
    main.published_main([recipe, "--output_dir", "."])
    assert Run.open(tmp_path / "output-bert").latest_checkpoint() == "task-03"


def test_an_evaluation_tells_a_recipe_from_its_baselines(tmp_path, capsys):
    recipe = "10cifar100_l2p_pgp"
    settings = replace(recipes.RECIPES[recipe](), tasks=1, shuffle=True)
    for number, (name, config) in enumerate([("orthogonal", settings), *matching_baselines(settings).items()]):
        run = train.train(config, tmp_path / "output" / name)
        os.utime(run.folder / "checkpoints" / "latest", (number, number))

    def evaluated(*words):
        main.published_main([recipe, "--eval", "--tasks", "1", *words])
        return capsys.readouterr().out.replace("\n", "")

    assert "output/orthogonal: accuracy" in evaluated()
    for name in ("joint", "unprojected", "random"):
        assert f"output/{name}: accuracy" in evaluated("--method", name)
    shutil.rmtree(tmp_path / "output" / "joint")
    assert "other settings of joint" in fails(capsys, recipe, "--eval", "--tasks", "1", "--method", "joint")
    assert "other settings of shuffle" in fails(capsys, recipe, "--eval", "--tasks", "1", "--shuffle", "False")


def test_an_evaluation_finds_a_later_run_whose_folder_has_a_safe_name(tmp_path):
    recipe = "10cifar100_l2p_pgp"
    settings = replace(recipes.RECIPES[recipe](), tasks=1)
    for number, folder in enumerate(("my output", "my-output", "my-output-2")):
        run = train.train(settings, tmp_path / folder)
        os.utime(run.folder / "checkpoints" / "latest", (number, number))
        found, _ = published.find_latest_run(settings, [], tmp_path / "my output")
        assert found.folder == run.folder


def test_the_files_of_finished_tasks_are_there_after_an_error_too(tmp_path, capsys, monkeypatch):
    train_step, calls = main.train.train_step, []

    def breaks(*arguments, **named):
        calls.append(None)
        if len(calls) > 5:
            raise OSError("the cable was pulled")
        return train_step(*arguments, **named)

    monkeypatch.setattr(main.train, "train_step", breaks)
    assert "the cable was pulled" in fails(capsys, "10cifar100_l2p_pgp")
    assert [path.name for path in (tmp_path / "output" / "checkpoint").iterdir()] == ["task1_checkpoint.pth"]
    shutil.rmtree("output")


def test_data_can_have_moved_for_an_evaluation(tmp_path, capsys, monkeypatch):
    def photos():
        return replace(tiny.config(epochs=1, tasks=2), name="photos", dataset=recipes.DATASETS["folder"])

    monkeypatch.setitem(recipes.RECIPES, "photos", photos)
    monkeypatch.setattr(
        "pgp.datasets.files.read_image",
        lambda path: torch.full((3, 32, 32), len(path.name) * 9 % 255, dtype=torch.uint8),
    )
    for label in "abcd":
        for number in range(4):
            path = tmp_path / "here" / label / f"{'i' * (1 + number)}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    words = ["photos", "--readouts", "head"]
    main.published_main([*words, "--data_path", "here"])
    (tmp_path / "here").rename(tmp_path / "there")
    assert "no data folder" in fails(capsys, *words, "--eval")
    assert "no data folder" in fails(capsys, *words, "--eval", "--data_path", "nowhere")
    for place in (["--data_path=there"], ["--data", "there"]):
        main.published_main([*words, "--eval", *place])
        assert capsys.readouterr().out.count("yes") == 2
    assert "no data folder" in fails(capsys, *words, "--eval", "--data", "nowhere")
