"""Experts: kept bit by bit, found without labels, and combined as probabilities are."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import tiny
from conftest import golden_vit
from pgp import train
from pgp.analysis.checkpoints import evaluate_checkpoints
from pgp.baselines import BASELINES
from pgp.datasets.folder import Folder
from pgp.datasets.synthetic import Synthetic
from pgp.evaluation.accuracy import extract_features
from pgp.methods.adapter import Adapter
from pgp.methods.coda_prompt import CODAPrompt
from pgp.methods.dualprompt import DualPrompt
from pgp.methods.experts import Experts
from pgp.methods.l2p import L2P
from pgp.methods.lora import LoRA
from pgp.methods.vpt import VPT
from pgp.predict import Predictor
from pgp.readouts.base import Features
from pgp.readouts.experts import ExpertLDA
from pgp.readouts.head import MethodHead
from pgp.readouts.lda import LDA
from pgp.rng import make_generator
from pgp.runs.run import Run
from pgp.scenario import Task
from prompted import images
from test_train import final, same

METHODS = {
    "lora": LoRA.Config(rank=3),
    "adapter": Adapter.Config(rank=3),
    "vpt": VPT.Config(length=2),
    "dualprompt": DualPrompt.Config(general_layers=(0,), expert_layers=(1,)),
    "l2p": L2P.Config(top_k=2),
}
READOUTS = (ExpertLDA.Config(), ExpertLDA.Config(query=True, patches=True, normalize=True), LDA.Config())


def config(**changes):
    settings = {"method": METHODS["lora"], "experts": "task", "readouts": (*READOUTS, MethodHead.Config())}
    return tiny.config(**{**settings, **changes})


def photos(folder, *names):
    for name in names:
        (folder / name).mkdir(parents=True)
        for number in range(5):
            colour = (29 * "abcdefgh".index(name) + 5 * number, 120, 200 - 20 * "abcdefgh".index(name))
            Image.new("RGB", (40, 36), colour).save(folder / name / f"{number}.png")
    return folder


def test_earlier_checkpoints_know_no_classes_that_were_added_later(tmp_path):
    run = train.train(config(dataset=Folder(photos(tmp_path / "old", *"abcd")), tasks=2), tmp_path / "run")
    before = {column: matrix[1].clone() for column, matrix in run.matrices().items()}
    train.resume(run.folder, add=photos(tmp_path / "new", "e", "f"))
    again = Run.open(run.folder)
    for column, matrix in evaluate_checkpoints(again, again.config, every_task=True).items():
        torch.testing.assert_close(matrix[1, :2], before[column])


def test_frozen_experts_need_no_drift_compensation(tmp_path):
    """A readout with compensation is what it is without, and shared parameters are an error that says so."""
    readouts = (LDA.Config(), LDA.Config(compensate="linear"), LDA.Config(compensate="shift"))
    run = train.train(config(readouts=readouts), tmp_path / "run")
    plain, *compensated = run.matrices().values()
    for matrix in compensated:
        torch.testing.assert_close(matrix, plain, rtol=0, atol=0, equal_nan=True)
    with pytest.raises(ValueError, match=r"expected readouts without \+shift, \+linear and \+nearby for experts that"):
        train.train(config(method=METHODS["dualprompt"], readouts=readouts), tmp_path / "shared")


def task(number):
    return Task(number, (2 * number, 2 * number + 1), torch.arange(4), torch.arange(4))


def batch(number):
    """Images of one of two classes of a task, which differ in brightness."""
    labels = torch.tensor(task(number).classes).repeat(4)
    return images(8, seed=number) * 0.3 + labels.view(-1, 1, 1, 1) / 8, labels


def learn(experts, number, steps=3):
    """Train on one task, and fit the router as a run does."""
    experts.begin_task(task(number))
    optimizer = torch.optim.Adam([p for p in experts.parameters() if p.requires_grad], lr=0.01)
    x, labels = batch(number)
    for _ in range(steps):
        experts.loss(x, labels, task(number)).backward()
        optimizer.step()
        optimizer.zero_grad()
    experts.end_task(task(number))
    with torch.no_grad():
        features = extract_features(experts, x, experts.query_and_patches(x), torch.inference_mode, task=task(number))
        experts.router.observe(experts.router.select_features(features), labels)
    experts.router.end_task()


def build(name, **settings):
    method = METHODS[name].as_expert().build(golden_vit(), "abcdef", make_generator(0, "init"))
    return Experts(method, 6, **settings).double()


@pytest.mark.parametrize("name", METHODS)
@torch.no_grad()
def test_an_expert_is_what_its_task_has_trained_and_later_tasks_change_no_bit_of_it(name):
    experts, found = build(name), []
    for number in range(3):
        with torch.enable_grad():
            learn(experts, number)
        x = batch(number)[0]
        found.append(experts.method.features(x, experts.query(x)))  # what was just trained
        assert torch.equal(experts.features_by_expert(x, task=task(number)).features[:, 0], found[number])
    shared = bool(experts.method.shared_parameters())
    for number in range(2):
        again = experts.features_by_expert(batch(number)[0], task=task(number)).features[:, 0]
        assert torch.equal(again, found[number]) != shared  # DualPrompt's general prefixes go on learning
    assert not torch.equal(found[0], experts.query(batch(0)[0]))


@pytest.mark.parametrize("name", METHODS)
@torch.no_grad()
def test_each_image_of_a_batch_gets_its_own_experts(name):
    experts = build(name, candidates=2)
    for number in range(3):
        with torch.enable_grad():
            learn(experts, number)
    x = torch.cat([batch(number)[0][:2] for number in range(3)])
    together = experts.features_by_expert(x)
    assert together.experts.shape == (6, 2)
    assert len(together.experts[:, 0].unique()) > 1
    for image in range(6):
        alone = experts.features_by_expert(x[image : image + 1])
        assert torch.equal(alone.experts[0], together.experts[image])
        torch.testing.assert_close(alone.features[0], together.features[image], rtol=0, atol=1e-10)
    assert torch.equal(experts.features(x), together.features[:, 0])


@torch.no_grad()
def test_the_router_adds_up_class_probabilities():
    experts = build("lora", candidates=3)
    for number in range(3):
        with torch.enable_grad():
            learn(experts, number)
    x = torch.cat([batch(number)[0][:2] for number in range(3)])
    query, patches = experts.query_and_patches(x)
    router = experts.router
    frozen = torch.cat([F.normalize(query.float()), F.normalize(patches.float())], 1)
    logits = router.logits(frozen).double().numpy() / router.temperature
    by_class = np.exp(logits - logits.max(1, keepdims=True))
    by_class /= by_class.sum(1, keepdims=True)
    by_task = by_class.reshape(6, 3, 2).sum(2)
    found, log_probabilities = experts.route(query, patches)
    expected = np.take_along_axis(by_task, found.numpy(), 1)
    np.testing.assert_allclose(log_probabilities.exp().numpy(), expected, rtol=1e-4, atol=1e-9)
    np.testing.assert_allclose(expected, -np.sort(-by_task, axis=1), rtol=0, atol=1e-30)  # what is less is 0 in float32
    assert experts.expert_of_class.tolist() == [0, 0, 1, 1, 2, 2]


def packed(number, log_probability, features):
    head = torch.tensor([float(number), log_probability]).expand(len(features), 2)
    return torch.cat([head, features], dim=1)


def test_probabilities_are_those_of_tasks_times_those_of_their_classes():
    generator = torch.Generator().manual_seed(0)
    readout = ExpertLDA.Config().build(torch.nn.Linear(3, 4), 4, 0)
    plain = LDA.Config().build(torch.nn.Linear(3, 4), 4, 0)
    for number in range(2):
        labels = torch.arange(20) % 2 + 2 * number
        x = torch.randn(20, 3, generator=generator) + labels[:, None]
        readout.observe(packed(number, 0.0, x), labels)
        plain.observe(x, labels)
        readout.end_task()
        plain.end_task()
    assert readout.expert_of_class.tolist() == [0, 0, 1, 1]
    rows = [torch.randn(5, 3, generator=generator) for _ in range(2)]
    logs = np.log([0.7, 0.2])
    image = torch.cat([packed(1, logs[0], rows[0]), packed(0, logs[1], rows[1])], dim=1)
    expected = np.zeros((5, 4))
    for own, log, x in (((2, 3), logs[0], rows[0]), ((0, 1), logs[1], rows[1])):
        logits = plain.logits(x).double().numpy()[:, own]
        weights = np.exp(logits - logits.max(1, keepdims=True))
        expected[:, own] = np.exp(log) * weights / weights.sum(1, keepdims=True)
    np.testing.assert_allclose(readout.logits(image).exp().numpy(), expected, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(readout.probabilities(readout.logits(image)).sum(1).numpy(), 1, rtol=1e-5)
    only_one = readout.logits(packed(1, 0.0, rows[0]))
    assert torch.isneginf(only_one[:, :2]).all()


def test_unknown_images_are_far_from_all_classes_by_features_without_experts():
    generator = torch.Generator().manual_seed(0)
    config = ExpertLDA.Config(query=True, patches=True, normalize=True)
    readout, frozen = config.build(torch.nn.Identity(), 4, 0), LDA(4)
    assert not ExpertLDA.Config(normalize=True).build(torch.nn.Identity(), 4, 0).detects_unknown

    def draw(labels, experts):
        query, patches = (torch.randn(len(labels), 3, generator=generator) + labels[:, None] for _ in range(2))
        features = torch.randn(len(labels), len(experts), 3, generator=generator)  # whatever the experts say
        numbers = torch.tensor(experts).expand(len(labels), -1)
        selected = readout.select_features(
            Features(features[:, 0], query, patches, numbers, torch.zeros(numbers.shape), features)
        )
        return selected, torch.cat([F.normalize(query), F.normalize(patches)], dim=1)

    for number in range(2):
        labels = torch.arange(40) % 2 + 2 * number
        selected, without = draw(labels, [number])
        for one, rows in ((readout, selected), (frozen, without)):
            one.observe(rows, labels)
            one.hold_out(rows[::5], labels[::5], augmented=False)
            one.end_task()
    selected, without = draw(torch.tensor([0, 3, 9]), [1, 0])
    torch.testing.assert_close(readout.unknown_scores(selected), frozen.unknown_scores(without), rtol=1e-4, atol=1e-3)
    assert readout.unknown_threshold(0.95) == pytest.approx(frozen.unknown_threshold(0.95), rel=1e-4)


@pytest.mark.parametrize("name", METHODS)
def test_a_run_predicts_as_it_was_evaluated_and_resumes_bit_by_bit(name, tmp_path):
    settings = config(method=METHODS[name], expert_candidates=2)
    run = train.train(settings, tmp_path / "whole")
    data = settings.dataset.build()
    predictor = Predictor(run)
    truth = [data.class_names[label] for label in data.test.labels.tolist()]
    predicted = predictor.predict([data.test.image(index) for index in range(len(data.test))])
    hits = np.mean([one.names[0] == name for one, name in zip(predicted, truth, strict=True)])
    last = run.matrices()["experts"][-1]
    counts = torch.bincount(data.test.labels).view(3, 2).sum(1)
    assert hits == pytest.approx(float((last * counts).sum() / counts.sum()))
    stopped = tmp_path / "stopped"
    with pytest.MonkeyPatch.context() as patch:
        save = train.Session.save

        def stop(session, state):
            save(session, state)
            if state.task == 2:
                raise KeyboardInterrupt

        patch.setattr(train.Session, "save", stop)
        with pytest.raises(KeyboardInterrupt):
            train.train(settings, stopped)
    same(final(train.resume(stopped)), final(run))


def test_tasks_without_an_expert_of_their_own_use_the_nearest(tmp_path):
    run = train.train(config(experts="2"), tmp_path / "run")
    state = Run.open(tmp_path / "run").load(run.latest_checkpoint())["method"]
    assert len({name.split(".")[1] for name in state if name.startswith("stored.")}) == 2
    numbers = state["expert_of_class"].tolist()
    assert numbers[:4] == [0, 0, 1, 1]
    assert numbers[4] == numbers[5] in (0, 1)
    assert float(run.matrices()["experts"][-1, -1]) > 0.5  # its classes are learned all the same


def test_a_class_is_added_to_a_finished_run(tmp_path):
    run = train.train(config(dataset=Folder(photos(tmp_path / "old", *"abcdef"))), tmp_path / "run")
    before = Run.open(tmp_path / "run").load(run.latest_checkpoint())["method"]
    more = train.resume(tmp_path / "run", add=Folder(photos(tmp_path / "new", "g", "h")))
    after = Run.open(tmp_path / "run").load(more.latest_checkpoint())["method"]
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items() if name.startswith("stored."))
    assert sum(name.startswith("stored.3.") for name in after) > 0
    assert after["expert_of_class"].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert len(Predictor(more).classes) == 8
    predictor = Predictor(more, "experts+query+patches+normalize")
    known, unlike = predictor.unknown_scores([tmp_path / "new" / "g" / "0.png", torch.zeros(3, 40, 36).byte()])
    assert known < unlike
    assert not Predictor(more, "experts").detects_unknown


def test_a_class_that_was_learned_under_another_name_is_named(tmp_path):
    train.train(config(dataset=Folder(photos(tmp_path / "old", *"abcdef"))), tmp_path / "run")
    shutil.copytree(tmp_path / "old" / "b", tmp_path / "new" / "z")
    run = train.resume(tmp_path / "run", add=Folder(tmp_path / "new"))
    warnings = [event["warning"] for event in run.events("data")]
    assert any("images of z look like those of b, which was learned before" in warning for warning in warnings)


@pytest.mark.parametrize("candidates", [1, 3])
def test_a_given_task_decides_the_expert(candidates, tmp_path):
    """With all experts as candidates, the own expert is always among them; with one, it must not be missing."""
    settings = config(expert_candidates=candidates, readouts=(ExpertLDA.Config(),))
    til = train.train(replace(settings, setting="til"), tmp_path / "til").matrices()["experts"]
    run = train.train(settings, tmp_path / "cil")
    within = torch.tensor([event["within"]["experts"] for event in run.events("task")][-1])
    torch.testing.assert_close(within, til[-1].to(within), rtol=0, atol=1e-6)
    every = train.train(replace(settings, setting="til", expert_candidates=3), tmp_path / "every")
    torch.testing.assert_close(til, every.matrices()["experts"], rtol=0, atol=0, equal_nan=True)
    (calibration,) = list(Run.open(tmp_path / "til").events("task"))[-1]["calibration"].values()
    assert np.isfinite(calibration["error"])


def test_tasks_in_which_only_the_head_learns_use_the_first_expert(tmp_path):
    run = train.train(config(adapt="first-task"), tmp_path / "run")
    state = Run.open(tmp_path / "run").load(run.latest_checkpoint())["method"]
    assert {name.split(".")[1] for name in state if name.startswith("stored.")} == {"0"}
    assert state["expert_of_class"].tolist() == [0] * 6
    few = train.train(config(adapt="first-task", experts="1", readouts=(ExpertLDA.Config(),)), tmp_path / "few")
    assert few.matrices()["experts"].shape == (3, 3)


def test_a_last_task_of_one_class_gets_an_expert_beyond_the_limit(tmp_path):
    dataset = Synthetic(classes=5, noise=0.05)
    settings = config(experts="1", epochs=1, dataset=dataset, readouts=(ExpertLDA.Config(), LDA.Config()))
    run = train.train(settings, tmp_path / "run")
    assert len(run.data.tasks[-1]) == 1
    assert run.load(run.latest_finished())["method"]["expert_of_class"].tolist() == [0] * 5


def test_the_size_of_an_expert_is_that_of_the_trained_part(tmp_path):
    run = train.train(config(), tmp_path / "run")
    state = Run.open(tmp_path / "run").load(run.latest_checkpoint())["method"]
    sizes = [sum(t.numel() for name, t in state.items() if name.startswith(f"stored.{n}.")) for n in range(3)]
    assert sizes == [2 * 2 * 3 * (48 + 48)] * 3  # layers, places, rank, input and output


def test_what_cannot_have_experts_says_so(tmp_path):
    with pytest.raises(ValueError, match=r"method that can have experts .* got coda"):
        config(method=CODAPrompt.Config())
    with pytest.raises(ValueError, match="cil or til with experts, got oil"):
        config(setting="oil")
    with pytest.raises(ValueError, match="experts none, task or a number, got 0"):
        config(experts="0")
    with pytest.raises(ValueError, match="--experts task for the readout experts, got none"):
        train.train(config(experts="none"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="expected legacy_eval=False with experts"):
        config(legacy_eval=True)
    with pytest.raises(ValueError, match="compensate='none' for experts"):
        ExpertLDA.Config(compensate="linear")


def test_a_checkpoint_without_experts_is_refused():
    experts = build("lora")
    with pytest.raises(ValueError, match="expected a checkpoint with experts"):
        experts.load_trainable_state_dict(experts.method.trainable_state_dict())


@pytest.mark.parametrize("name", BASELINES)
def test_a_recipe_with_experts_has_all_baselines(name):
    changed = BASELINES[name](config())
    assert changed.experts == ("none" if name in ("linear-probe", "ncm") else "task")
