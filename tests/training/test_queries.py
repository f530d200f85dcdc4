"""Which images pass through the encoder, and how often: queries in training, and frozen features around it."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch

import tiny
from pgp import progress, recipes, train
from pgp.analysis.drift import DriftMeter
from pgp.datasets.base import BadImageError
from pgp.datasets.loader import LoaderOptions, batches, sequential_batches
from pgp.evaluation import metrics
from pgp.evaluation.accuracy import Evaluator, extract_frozen
from pgp.evaluation.online import OnlineAccuracy
from pgp.methods.adapter import Adapter
from pgp.methods.base import Method
from pgp.methods.coda_prompt import CODAPrompt
from pgp.methods.head_only import HeadOnly
from pgp.methods.l2p import L2P
from pgp.methods.lora import LoRA
from pgp.methods.vpt import VPT
from pgp.projections.released import ReleasedBasis
from pgp.readouts.head import MethodHead
from pgp.readouts.lda import LDA
from pgp.runs.run import Run
from pgp.training import observe
from pgp.training.devices import build_fabric
from pgp.training.session import Session
from test_train import final, same

IMAGES, STEPS = 24, 6
"""Training images of a task of `tiny.config`, and its steps in two epochs."""
LINEAR = LDA.Config(query=True, compensate="linear")
CODA = CODAPrompt.Config(layers=(0,), pool_size=12, per_task=4)
WITH_QUERIES = {
    "l2p": {"method": L2P.Config(top_k=2)},
    "l2p by vote": {"method": L2P.Config(top_k=2, selection="batch")},
    "dualprompt": {"method": tiny.DUALPROMPT},
    "coda": {"method": CODA},
    "head-only": {"method": HeadOnly.Config()},
    "experts of l2p": {"method": L2P.Config(top_k=2), "experts": "2"},
}


def phases(monkeypatch) -> Counter[tuple[str, int]]:
    """Count the images that pass through the first block of the encoder, by the phase of the run and the task."""
    counts, where = Counter(), [("outside", 0)]

    def labelled(owner, name, phase, task_of):
        original = getattr(owner, name)

        def wrapped(*arguments, **named):
            where.append((phase, task_of(arguments)))
            try:
                return original(*arguments, **named)
            finally:
                where.pop()

        monkeypatch.setattr(owner, name, wrapped)

    labelled(train, "train_step", "training", lambda a: a[4].index)
    labelled(train, "compute_queries", "queries", lambda a: a[2].index)
    labelled(train, "observe_before_training", "before", lambda a: a[2].index)
    labelled(train, "observe_after_training", "after", lambda a: a[2].index)
    labelled(Evaluator, "evaluate", "evaluation", lambda a: a[3])
    labelled(DriftMeter, "end_task", "drift", lambda a: a[2].index)
    labelled(OnlineAccuracy, "predict", "online", lambda a: a[4].index)
    new_state = Session.new_state

    def watched(session):
        state = new_state(session)
        norm = state.method.backbone.vit.blocks[0].norm1

        def count(_, inputs, __):
            if inputs[0].dim() == 3:  # images, not prompts alone
                counts[where[-1]] += len(inputs[0])

        norm.register_forward_hook(count)
        return state

    monkeypatch.setattr(Session, "new_state", watched)
    return counts


def passes(counts, phase, images=IMAGES):
    """Passes of each task's images in a phase."""
    return [counts[phase, task] / images for task in range(3)]


PER_TASK = {
    # passes of a task's images through the encoder, by the query and the phase:
    # each epoch (the second pass is the query's), queries, before training and after it, for three tasks
    "l2p": {
        "augmented": {"training": [4, 4, 4], "queries": [0, 0, 0], "before": [0, 2, 2], "after": [2, 1, 1]},
        "clean": {"training": [2, 2, 2], "queries": [1, 0, 0], "before": [0, 2, 2], "after": [1, 1, 1]},
    },
    "dualprompt": {
        "augmented": {"training": [4, 4, 4], "queries": [0, 0, 0], "before": [0, 2, 2], "after": [2, 1, 1]},
        "clean": {"training": [2, 2, 2], "queries": [1, 0, 0], "before": [0, 2, 2], "after": [1, 1, 1]},
    },
}


@pytest.mark.parametrize("query", ["augmented", "clean"])
@pytest.mark.parametrize("name", PER_TASK)
def test_each_frozen_feature_of_a_task_is_computed_once(tmp_path, monkeypatch, name, query):
    counts = phases(monkeypatch)
    readouts = (LDA.Config(query=True, patches=True, compensate="linear"),)
    train.train(tiny.config(query=query, readouts=readouts, **WITH_QUERIES[name]), tmp_path / "run")
    assert {phase: passes(counts, phase) for phase in PER_TASK[name][query]} == PER_TASK[name][query]
    assert not any(phase == "outside" for phase, _ in counts)


@pytest.mark.parametrize("method", [VPT.Config(length=2), LoRA.Config(rank=2), Adapter.Config(rank=2)])
def test_projection_and_readouts_share_a_pass(tmp_path, monkeypatch, method):
    counts = phases(monkeypatch)
    train.train(tiny.config(method=method, drift_images=0), tmp_path / "run")
    assert passes(counts, "after") == [1, 1, 1]


@pytest.mark.parametrize("name", WITH_QUERIES)
def test_a_step_with_clean_queries_has_one_pass(tmp_path, monkeypatch, name):
    counts = phases(monkeypatch)
    train.train(tiny.config(query="clean", readouts=(MethodHead.Config(),), **WITH_QUERIES[name]), tmp_path / "run")
    features_are_queries = name == "head-only"
    more = 1 / 3 if name == "experts of l2p" else 0  # the first batch of three chooses the expert of the third task
    assert passes(counts, "training") == [0 if features_are_queries else 2 + extra for extra in (0, 0, more)]
    assert passes(counts, "queries") == [1, 1, 1]


def test_an_online_run_with_clean_queries_predicts_with_them(tmp_path, monkeypatch):
    runs = {}
    for query in ("augmented", "clean"):
        with monkeypatch.context() as patch:
            counts = phases(patch)
            config = tiny.config(setting="oil", query=query, readouts=(LDA.Config(query=True),))
            runs[query] = train.train(config, tmp_path / query)
            found = {phase: passes(counts, phase) for phase in ("queries", "online", "training", "after")}
        expected = {
            "augmented": {"queries": [0] * 3, "online": [2] * 3, "training": [2] * 3, "after": [2] * 3},
            "clean": {"queries": [1] * 3, "online": [1] * 3, "training": [1] * 3, "after": [1] * 3},
        }
        assert found == expected[query]


@pytest.mark.parametrize("query", ["augmented", "clean"])
@pytest.mark.parametrize("method", [VPT.Config(length=10), LoRA.Config(rank=10)], ids=lambda method: method.tag)
def test_no_query_is_computed_that_nothing_reads(tmp_path, monkeypatch, method, query):
    queried = []
    for name in ("query", "query_and_patches"):
        original = getattr(Method, name)
        monkeypatch.setattr(
            Method, name, lambda self, x, original=original: (queried.append(len(x)), original(self, x))[1]
        )
    plain = (MethodHead.Config(), LDA.Config(compensate="linear"))
    projection = ReleasedBasis.Config(energy=0.9, when="before")
    config = tiny.config(method=method, query=query, epochs=1, readouts=plain, projection=projection)
    train.train(config, tmp_path / "plain")
    assert queried == []
    train.train(replace(config, readouts=(replace(LINEAR, patches=True),)), tmp_path / "reads")
    data = config.dataset.build()
    assert sum(queried) == len(data.train) + len(data.test)  # once for each image, whatever the projection passes


def open_session(**changes):
    config = tiny.config(query="clean", **changes)
    session = Session(build_fabric(config), config, progress.no_progress())
    return session, session.new_state()


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("patches", [False, True])
def test_a_clean_query_is_that_of_the_test_view_bitwise(precision, patches):
    session, state = open_session(precision=precision, readouts=(LDA.Config(patches=patches),))
    task = session.scenario.tasks[1]
    observe.compute_queries(session, state, task)
    assert len(session.frozen) == len(task.train)
    split = session.transformed("test", "anything", None)
    for batch in batches(split, sequential_batches(task.train, session.micro_batch_size), LoaderOptions()):
        with torch.no_grad():
            frozen = extract_frozen(state.method, batch.images, session.fabric.autocast, patches=patches)
        known = session.with_queries(state, batch)
        assert known.query.dtype == torch.float32
        assert torch.equal(known.query, frozen.query)
        shuffled = batch.indices.flip(0)
        assert torch.equal(session.frozen.get(shuffled).query, frozen.query.flip(0))


def test_kept_features_hold_no_more_memory_than_their_own():
    session, state = open_session(readouts=(LDA.Config(patches=True),))
    observe.compute_queries(session, state, session.scenario.tasks[0])
    rows = [tensor for row in session.frozen._rows.values() for tensor in row]
    memory = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in rows}
    assert sum(memory.values()) == sum(tensor.numel() * tensor.element_size() for tensor in rows)


def test_training_reads_the_kept_queries(tmp_path, monkeypatch):
    given, prepare = [], L2P.prepare_batch

    def watched(self, images, task, query=None):
        given.append(query)
        return prepare(self, images, task, query)

    monkeypatch.setattr(L2P, "prepare_batch", watched)
    runs = {query: train.train(tiny.config(query=query), tmp_path / query) for query in ("augmented", "clean")}
    assert [query is None for query in given] == [True] * 3 * STEPS + [False] * 3 * STEPS
    keys = [final(run)["/method/pool.learned_key"] for run in runs.values()]
    assert not torch.equal(*keys)


def test_an_image_without_a_query_is_left_out_and_shifts_no_other(monkeypatch):
    session, state = open_session(on_bad_image="skip")
    task, split = session.scenario.tasks[1], session.data.train
    lost, read = int(task.train[5]), split.image

    def image(index):
        if index == lost:
            raise BadImageError(f"{index}")
        return read(index)

    with monkeypatch.context() as patch:
        patch.setattr(split, "image", image)
        with pytest.warns(UserWarning, match="skipped"):
            observe.compute_queries(session, state, task)
    plan = sequential_batches(task.train, 8)
    for batch in session.training_stream(task, plan):
        known = session.with_queries(state, batch)
        assert known.indices.tolist() == [index for index in batch.indices.tolist() if index != lost]
        assert len(known.images) == len(known.labels) == len(known.query) == len(known.indices)
        for index, label, query in zip(known.indices.tolist(), known.labels, known.query, strict=True):
            assert split.labels[index] == label
            image = session.transformed("test", "anything", None)[sequential_batches(torch.tensor([index]), 1)[0][0]][0]
            with torch.no_grad():
                torch.testing.assert_close(state.method.query(image[None])[0], query, rtol=0, atol=1e-5)
    (alone,) = session.training_stream(task, [[key for batch in plan for key in batch if key.image == lost]])
    assert len(session.with_queries(state, alone).indices) == 0


RESUMED = {
    **WITH_QUERIES,
    "with drift": {"readouts": (replace(LINEAR, patches=True),)},
    "online": {"setting": "oil", "readouts": (LDA.Config(query=True),), "batch_size": 4},
    "with views": {"views": 1},
    "bf16": {"precision": "bf16-mixed"},
}


@pytest.mark.parametrize("name", RESUMED)
def test_resumes_inside_a_task_bitwise(tmp_path, monkeypatch, name):
    config = tiny.config(query="clean", **RESUMED[name])
    whole = train.train(config, tmp_path / "whole")
    train_step, calls = train.train_step, []

    def crash(*arguments, **named):
        calls.append(None)
        if len(calls) == STEPS + 3:
            raise KeyboardInterrupt
        return train_step(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", crash)
        with pytest.raises(KeyboardInterrupt):
            train.train(replace(config, save_every_steps=1), tmp_path / "run")
    assert Run.open(tmp_path / "run").latest_checkpoint() == "task-02-step-000002"
    resumed = train.resume(tmp_path / "run")
    same(final(whole), final(resumed))


def test_the_demo_learns_with_clean_queries(tmp_path):
    demo = recipes.RECIPES["demo"]()
    config = replace(demo, query="clean", tasks=2, increment=None, first_task=None, epochs=1, drift_images=0)
    matrices = train.train(config, tmp_path / "run").matrices()
    assert metrics.average_accuracy(matrices["head"]) > 0.5  # chance is 0.1


def test_a_query_of_an_unknown_kind_is_refused():
    tree = tiny.config().to_json()
    assert tree["query"] == "augmented"
    with pytest.raises(ValueError, match="query"):
        type(tiny.config()).from_json({**tree, "query": "both"})
