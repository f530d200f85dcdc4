from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import tiny
from pgp import train
from pgp.datasets.synthetic import Synthetic
from pgp.evaluation import metrics
from pgp.methods.head_only import HeadOnly
from pgp.projections.base import NoProjection
from pgp.readouts.lda import LDA, NCM
from pgp.reports import drift, html, tables
from pgp.runs.run import Run
from test_train import opened


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Run]:
    """Two runs that learn the same and are asked differently."""
    folder = tmp_path_factory.mktemp("evaluate")
    return {setting: train.train(tiny.config(setting=setting), folder / setting) for setting in ("cil", "til")}


@pytest.mark.parametrize("column", ["head", "lda"])
def test_what_is_left_once_the_task_is_known_is_what_a_run_that_knows_it_reads(runs, column):
    known = runs["til"].matrices()[column]
    for t, event in enumerate(runs["cil"].events("task")):
        assert event["within"][column] == pytest.approx(known[t, : t + 1].tolist(), abs=1e-12)


@pytest.mark.parametrize("column", ["head", "lda"])
def test_who_is_right_has_found_the_task(runs, column):
    own = runs["cil"].matrices()[column]
    for t, event in enumerate(runs["cil"].events("task")):
        identified, within = (torch.tensor(event[key][column]).double() for key in ("identified", "within"))
        assert bool((own[t, : t + 1] <= identified + 1e-9).all())
        assert bool((own[t, : t + 1] <= within + 1e-9).all())
    assert float(identified.min()) < 1  # tasks do compete here
    for event in runs["til"].events("task"):  # nothing competes where the task is given
        assert event.keys().isdisjoint(("identified", "within", "forgetting_within"))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_counts_only_its_own_images_if_their_features_are_cached(rank, tmp_path):
    run = train.train(tiny.config(method=HeadOnly.Config(learns=False), readouts=(LDA.Config(),)), tmp_path / "run")
    session, state = opened(run)
    evaluator, task = session.evaluator, session.scenario.tasks[0]
    evaluator.evaluate(state.method, state.readouts, 0, session.progress)  # all are cached
    evaluator.fabric = SimpleNamespace(global_rank=rank, world_size=2, device=torch.device("cpu"))
    found = [batch.indices for _, batch in evaluator._test_batches(state.method, [task], session.progress)]
    keys = task.test.split(evaluator.config.eval_batch_size)
    assert torch.equal(torch.cat(found), torch.cat([own[rank::2] for own in keys]))


@pytest.mark.parametrize("test_images", [None, 3])
def test_a_joint_run_has_the_average_accuracy_of_its_tasks(tmp_path, test_images):
    """A nearest mean of frozen features predicts the same for any tasks, so both runs must have the same accuracy."""
    settings = {
        "method": HeadOnly.Config(learns=False),
        "projection": NoProjection.Config(),
        "readouts": (NCM.Config(),),
        "dataset": Synthetic(noise=0.6),
        "tasks": None,
        "first_task": 5,
        "increment": 1,
        "test_images": test_images,
    }
    plain = train.train(tiny.config(**settings), tmp_path / "plain")
    joint = train.train(tiny.config(**settings, joint=True), tmp_path / "joint")
    if test_images is None:
        assert plain.data.test_images == (20, 4)
    assert sum(plain.data.test_images) == sum(joint.data.test_images)
    accuracies = plain.matrices()["ncm"][-1].tolist()
    assert accuracies[0] != accuracies[1]
    assert metrics.average_accuracy(joint.matrices()["ncm"]) == pytest.approx(sum(accuracies) / 2)
    assert drift.drift_histories([joint]) == []  # nothing is old after a single task
    rows = tables.result_rows([plain, joint])
    assert [row.label for row in rows] == ["tiny", "joint"]
    assert tables.format_row(rows[1])[1:3] == ["", ""]


def test_domains_do_not_compete(tmp_path):
    run = train.train(tiny.config(setting="dil", dataset=Synthetic(domains=2), tasks=None), tmp_path / "run")
    last = list(run.events("task"))[-1]
    assert last.keys().isdisjoint(("identified", "within", "forgetting_within"))
    page = html.render([run])
    assert "of images, the task is identified" not in page
    assert "because features" not in page
