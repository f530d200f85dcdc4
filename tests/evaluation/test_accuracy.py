from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import tiny
from pgp import train
from pgp.methods.head_only import HeadOnly
from pgp.readouts.lda import LDA
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
    for event in runs["til"].events("task"):
        assert set(event["identified"][column]) == {1.0}


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
