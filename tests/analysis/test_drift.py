"""The drift meter: what it says is so, from whole runs and by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import tiny
from pgp import train
from pgp.analysis.drift import Drift, DriftMeter
from pgp.config import Optimizer
from pgp.datasets.folder import Folder
from pgp.datasets.synthetic import Synthetic
from pgp.evaluation.accuracy import FeatureBatch
from pgp.methods.adapter import Adapter
from pgp.methods.head_only import HeadOnly
from pgp.methods.l2p import L2P
from pgp.methods.lora import LoRA
from pgp.methods.vpt import VPT
from pgp.projections.base import NoProjection
from pgp.projections.orthogonal import Orthogonal
from pgp.projections.random import RandomBasis
from pgp.projections.released import ReleasedBasis
from pgp.readouts.base import Features
from pgp.readouts.head import MethodHead
from pgp.reports import drift
from pgp.subspace import ProtectedInputs, ProtectedParameter
from pgp.training.tasks import build_tasks
from test_train import opened

EVERYTHING = Orthogonal.Config("input", 1.0, 1.0, "update")


def drifts(folder, **changes):
    """What a small run logs of drift, task by task."""
    run = train.train(tiny.config(**changes), folder)
    return [event["drift"] for event in run.events("task")]


def test_sketches_have_the_energy_of_all_rows_on_average():
    draws = torch.Generator().manual_seed(0)
    rows = ProtectedInputs(torch.randn(3, 2, 5, 4, generator=draws, dtype=torch.float64))  # (B, H, N, d)
    step = torch.randn(4, 2, generator=draws, dtype=torch.float64)
    assert rows.sketch_shape(20000) == (20000, 5)
    mixed = rows.sketch(torch.randn(3, 20000, 5, generator=draws, dtype=torch.float64))
    assert mixed.shape == (2, 20000, 4)
    for head in range(2):
        true = (rows.inputs[:, head] @ step).square().sum()
        assert float((mixed[head] @ step).square().sum() / 20000 / true) == pytest.approx(1, abs=0.05)
    joined = rows.inputs.transpose(1, 2).flatten(-2) @ step.repeat(2, 1)  # heads side by side, as `released` joins them
    both = mixed.transpose(0, 1).flatten(-2) @ step.repeat(2, 1)
    assert float(both.square().sum() / 20000 / joined.square().sum()) == pytest.approx(1, abs=0.05)


def test_sketches_of_mapped_rows_are_those_of_the_rows_that_enter_the_parameter():
    inputs = torch.randn(3, 2, 5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    through = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    mapped = ProtectedInputs(inputs, head_maps=through)
    assert mapped.sketch_shape(7) == (2, 7, 5)
    weights = torch.randn(3, 2, 7, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    torch.testing.assert_close(mapped.sketch(weights), (weights @ (inputs @ through)).sum((0, 1)))
    assert mapped.expanded.shape == (3, 10, 6)


@pytest.mark.parametrize(
    "method", [L2P.Config(top_k=2), tiny.DUALPROMPT, VPT.Config(length=3, protect="affinity+aggregation")]
)
def test_figures_do_not_depend_on_how_many_images_are_seen_together(tmp_path, method):
    """Line 11: mixtures are drawn image by image, so that figures of a CPU and a GPU can be compared."""
    run = train.train(tiny.config(method=method), tmp_path / "run")
    figures = []
    for size in (1, 3, None):
        session, state = opened(run)
        state.meter.micro_batch_size = size or 32
        task = session.scenario.tasks[2]
        session.evaluator.evaluate(state.method, [], 2, session.progress, state.meter.watch)
        figures.append(state.meter.end_task(state.method, task, session.progress))
        sketch = state.meter.references[2]["sketch"]
        figures[-1]["sketch"] = {space: rows.flatten().tolist() for space, rows in sketch.items()}
    for other in figures[1:]:
        for what in ("held", "sketch"):
            for space, value in figures[0][what].items():
                assert other[what][space] == pytest.approx(value, rel=1e-4, abs=1e-4), (what, space)


def test_the_jump_at_the_begin_of_a_task_is_no_update(tmp_path):
    """Line 12: DualPrompt copies a prompt when a task begins: no step of the optimizer, whatever is projected."""
    updates = {}
    for on in ("gradient", "update"):
        projection = Orthogonal.Config("input", 0.5, 0.5, on)
        run = train.train(tiny.config(method=tiny.DUALPROMPT, projection=projection, drift_images=4), tmp_path / on)
        session, state = opened(run)
        state.meter.start_task()
        with state.projection.constrain():
            state.method.begin_task(session.scenario.tasks[1])
        updates[on] = state.meter.energies
    assert updates == {"gradient": {}, "update": {}}


def test_it_costs_one_pass_over_a_sample_of_the_new_task(tmp_path, monkeypatch):
    """Line 21: images of earlier tasks are seen by evaluation anyway, so the cost does not grow with the tasks."""
    session, state = opened(train.train(tiny.config(), tmp_path / "run"))
    passes = []
    monkeypatch.setattr(type(state.method), "features", lambda *_, **__: pytest.fail("a pass of its own"))
    activations = type(state.method).activations
    monkeypatch.setattr(
        type(state.method), "activations", lambda *args: passes.append(len(args[1])) or activations(*args)
    )
    watched = FeatureBatch(torch.arange(len(session.data.test)), Features(torch.randn(len(session.data.test), 48)))
    for task in session.scenario.tasks:
        state.meter.watch(task, watched)
    monkeypatch.setattr(type(state.method), "selected_prompts", lambda *_: None)
    state.meter.end_task(state.method, session.scenario.tasks[2], session.progress)
    assert sum(passes) == len(state.meter.sample(session.scenario.tasks[2]))


@pytest.mark.parametrize(
    "method",
    [
        VPT.Config(length=3, protect="affinity+aggregation", prompts_after_norm=True),
        replace(tiny.DUALPROMPT, protect="keys+values"),
    ],
)
def test_old_answers_stay_where_everything_is_protected_and_move_where_nothing_is(tmp_path, method):
    lively = {"method": method, "optimizer": Optimizer(lr=1.0)}
    _, _, free = drifts(tmp_path / "free", projection=NoProjection.Config(), **lively)
    _, _, held = drifts(tmp_path / "held", projection=EVERYTHING, **lively)
    assert free["tasks"] == held["tasks"] == [0, 1]
    assert min(free["features"]) > 10 * max(held["features"])
    for space, changes in held["responses"].items():
        assert max(changes) <= 0.03 * min(free["responses"][space]), space  # of test images, so not to rounding
    assert any(min(changes) > 0 for changes in free["responses"].values())
    assert free["held"] == free["removed"] == free["leak"] == {}
    assert all(share > 0.97 for share in held["held"].values())
    assert all(share is None or 0 <= share <= 1 for share in held["removed"].values())  # the first may leave nothing
    assert all(share is None or share < 1e-6 for share in held["leak"].values())


def test_leak_and_removed_tell_gradients_from_updates(tmp_path):
    settings = {"method": L2P.Config(top_k=2), "optimizer": Optimizer(lr=1.0)}
    leaks, removed = {}, {}
    for on in ("gradient", "update"):
        _, second, _ = drifts(tmp_path / on, projection=Orthogonal.Config("input", 0.9, 0.9, on), **settings)
        leaks[on] = second["leak"]["prompts"]
        assert 0 < second["gradients"]["prompts"] < 1
        assert second["removed"] == second[f"{on}s"]
        removed[on] = second["updates"]["prompts"]
    assert leaks["gradient"] > 1e-3
    assert leaks["update"] < 1e-9
    assert 0 < removed["gradient"] < removed["update"] < 1  # of projected gradients, Adam makes updates that go back in


@pytest.mark.parametrize("method", [LoRA.Config(rank=3), Adapter.Config(rank=3)])
def test_what_a_task_of_lora_leaks_is_measured_before_it_is_merged(tmp_path, method):
    leaks = {}
    for on in ("gradient", "update"):
        _, second, _ = drifts(tmp_path / on, projection=Orthogonal.Config("input", 0.9, 0.9, on), method=method)
        leaks[on] = second["leak"]
        assert len(leaks[on]) == len(second["removed"]) > 0
    assert min(leaks["gradient"].values()) > 1e-6
    assert max(leaks["update"].values()) < 1e-9


def test_leak_is_the_share_of_the_way_in_the_protected_subspace(tmp_path):
    run = train.train(tiny.config(), tmp_path / "run")
    _, state = opened(run)
    before, after = (run.load(f"task-0{n}") for n in (1, 2))
    way = after["method"]["pool.prompts"].double() - before["method"]["pool.prompts"].double()
    basis = before["projection"]["prompts"]
    _, event, _ = run.events("task")
    assert event["drift"]["leak"]["prompts"] == pytest.approx(float((way @ basis).norm() / way.norm()) ** 2, rel=1e-6)
    assert state.meter.params_at_task_start == {}


def test_features_and_logits_are_compared_with_those_of_then(tmp_path):
    run = train.train(tiny.config(drift_images=5), tmp_path / "run")
    session, state = opened(run)
    task = session.scenario.tasks[0]
    places = torch.linspace(0, len(task.test) - 1, 5).long()
    view = run.config.transforms.test()
    images = torch.stack([view(session.data.test.image(int(task.test[place]))) for place in places])
    answers = []
    for name in ("task-01", "task-03"):
        state.load_state_dict(run.load(name))
        with torch.no_grad():
            features = state.method.features(images)
            logits = state.method.head(features)[:, list(task.classes)]
            answers.append((features, logits - logits.mean(1, keepdim=True)))
    *_, event = run.events("task")
    for i, what in enumerate(("features", "logits")):
        then, now = answers[0][i], answers[1][i]
        assert event["drift"][what][0] == pytest.approx(float((now - then).norm() / then.norm()), rel=1e-4)


def test_held_is_about_the_energy_asked_for_and_less_in_random_directions(tmp_path):
    settings = {"method": VPT.Config(length=3, protect="tokens"), "drift_images": 1000}
    data = Synthetic(noise=0.3)
    true, random = (
        drifts(
            tmp_path / kind.__qualname__, dataset=data, projection=kind("input", 0.9, apply_to="update"), **settings
        )[-1]
        for kind in (Orthogonal.Config, RandomBasis.Config)
    )
    for space, share in true["held"].items():
        assert share == pytest.approx(0.9, abs=0.08)
        assert random["held"][space] < share - 0.2


def test_two_spaces_of_one_parameter_are_both_measured_before_either_is_taken_out():
    parameter = torch.nn.Parameter(torch.zeros(2, 2, dtype=torch.float64))
    protected = {"rows": ProtectedParameter(parameter, axis=-1), "columns": ProtectedParameter(parameter, axis=-2)}
    for on in ("gradient", "update"):
        projection = Orthogonal(protected, Orthogonal.Config(apply_to=on))
        projection.bases = {space: torch.eye(2, 1, dtype=torch.float64) for space in protected}
        optimizer = torch.optim.SGD([parameter], lr=1.0)
        meter = DriftMeter(SimpleNamespace(config=tiny.config()), projection, None)
        meter.attach(optimizer)
        projection.attach(optimizer)
        parameter.data.zero_()
        parameter.grad = torch.tensor([[5.0, 3.0], [2.0, 1.0]], dtype=torch.float64)
        optimizer.step()
        torch.testing.assert_close(parameter.data, torch.tensor([[0, 0], [0, -1.0]], dtype=torch.float64))
        for space, inside in {"rows": 29.0, "columns": 34.0}.items():
            gradients, updates = meter.energies[space]
            assert gradients.tolist() == pytest.approx([inside, 39.0]), (on, space)
            left = [0.0, 1.0] if on == "gradient" else [inside, 39.0]
            assert updates.tolist() == pytest.approx(left), (on, space)


def test_choices_that_change_and_prompts_that_are_used(tmp_path):
    run = train.train(tiny.config(method=L2P.Config(pool_size=4, top_k=1)), tmp_path / "run")
    session, state = opened(run)
    *_, event = run.events("task")
    assert len(event["drift"]["usage"]) == 4
    assert sum(event["drift"]["usage"]) == pytest.approx(1)
    key = state.method.pool.learned_key.detach()
    state.method.pool.learned_key.data = -key  # the last choice is now the first
    session.evaluator.evaluate(state.method, state.readouts, 2, session.progress, state.meter.watch)
    moved = state.meter.end_task(state.method, session.scenario.tasks[2], session.progress)
    assert moved["changed"] == [1.0, 1.0]
    assert event["drift"]["changed"] != moved["changed"]


@pytest.mark.parametrize("method", [L2P.Config(top_k=2), tiny.DUALPROMPT, VPT.Config(length=3, protect="tokens")])
def test_released_is_measured_too(tmp_path, method):
    _, _, last = drifts(
        tmp_path / "run", method=method, projection=ReleasedBasis.Config(components=3, key_components=3)
    )
    assert last["held"]
    assert all(0 <= share <= 1 + 1e-9 for share in last["held"].values())


def test_methods_without_choices_or_spaces_say_less(tmp_path):
    _, second, _ = drifts(tmp_path / "run", method=VPT.Config(length=2))
    assert "changed" not in second
    assert "usage" not in second


def test_off_costs_nothing(tmp_path):
    run = train.train(tiny.config(drift_images=0), tmp_path / "run")
    *_, event = run.events("task")
    assert "drift" not in event
    assert "drift" not in event["seconds"]
    assert "drift" not in run.load()


def test_forgetting_stands_beside_what_is_left_once_the_task_is_known(tmp_path):
    run = train.train(tiny.config(readouts=(MethodHead.Config(),)), tmp_path / "run")
    events = list(run.events("task"))
    within = torch.full((3, 3), torch.nan, dtype=torch.float64)
    for event in events:
        within[event["task"], : event["task"] + 1] = torch.tensor(event["within"]["head"], dtype=torch.float64)
    expected = (within[:, :2].nan_to_num(nan=-math.inf).amax(0) - within[2, :2]).mean()
    assert events[-1]["forgetting_within"]["head"] == pytest.approx(float(expected))
    assert events[-1]["forgetting"]["head"] >= 0


@pytest.mark.looks_at_figures
def test_the_report_tells_means_over_seeds_and_draws_them(tmp_path):
    runs = [train.train(tiny.config(seed=seed), tmp_path / str(seed)) for seed in (1, 2)]
    silent = train.train(tiny.config(drift_images=0, projection=NoProjection.Config()), tmp_path / "silent")
    (course,) = drift.drift_histories([*runs, silent])
    events = [list(run.events("task"))[-1] for run in runs]
    expected = sum(event["drift"]["features"][i] for event in events for i in (0, 1)) / 4
    assert course.last(drift.STATISTICS["features"]) == pytest.approx(expected)
    assert list(course.curve(drift.STATISTICS["features"])) == [2, 3]
    head, _, row = drift.markdown([course]).splitlines()
    assert "energy held" in head
    assert row.startswith("| projection orthogonal | 2 | ")
    assert f" {100 * expected:.2f} " in row
    drift.draw_drift([course], tmp_path / "drift.png")
    assert (tmp_path / "drift.png").stat().st_size > 10_000
    assert drift.drift_histories([silent]) == []
    unfinished = course._replace(runs=[course.runs[0], {0: course.runs[1][0]}])
    assert drift.markdown([unfinished]).splitlines()[-1].startswith("| projection orthogonal | 1 | ")
    alone = course._replace(runs=[course.runs[0]])
    assert drift.markdown([unfinished]) == drift.markdown([alone])
    drift.draw_drift([unfinished], tmp_path / "unfinished.png")


def test_the_report_draws_methods_that_protect_and_choose_nothing(tmp_path):
    run = train.train(tiny.config(method=HeadOnly.Config(), projection=NoProjection.Config()), tmp_path / "run")
    table = drift.drift_histories([run])
    drift.draw_drift(table, tmp_path / "drift.png")
    assert (tmp_path / "drift.png").is_file()
    assert table[0].last(drift.STATISTICS["features"]) == 0
    assert table[0].last(drift.STATISTICS["energy held"]) is None


def of_pictures(folder, **changes):
    """A configuration with two tasks of two classes, four pictures of each for training and for the test."""
    for name, red in (("ant", 0), ("bee", 60), ("cat", 120), ("dog", 180)):
        for part in ("train", "test"):
            (folder / part / name).mkdir(parents=True)
            for number in range(4):
                Image.new("RGB", (32, 32), (red + 5 * number, 9, 9)).save(folder / part / name / f"{number}.png")
    return tiny.config(dataset=Folder(folder), tasks=2, on_bad_image="skip", epochs=1, **changes)


def test_an_image_that_can_be_read_only_later_is_not_compared():
    then = Drift(torch.tensor([1, 2, 4]), torch.tensor([[1.0], [2.0], [4.0]]), torch.zeros(3, 2), None)
    now = Drift(torch.tensor([0, 1, 4]), torch.tensor([[0.5], [1.5], [4.5]]), torch.zeros(3, 2), None)
    new, old = now.at(then.indices), then.at(now.indices)
    assert new.indices.tolist() == old.indices.tolist() == [1, 4]
    assert (new.features[:, 0].tolist(), old.features[:, 0].tolist()) == ([1.5, 4.5], [1.0, 4.0])


@pytest.mark.filterwarnings("ignore:skipped")
def test_a_run_goes_on_after_an_unreadable_image_was_repaired(tmp_path, monkeypatch):
    """The last test image of the first task is unreadable until the second task has begun."""
    config = of_pictures(tmp_path / "data")
    bad = tmp_path / "data" / "test" / "bee" / "3.png"
    whole = bad.read_bytes()
    bad.write_bytes(whole[:40])
    original = train.fit_task

    def repair(session, state, task):
        if task.index:
            bad.write_bytes(whole)
        return original(session, state, task)

    monkeypatch.setattr(train, "fit_task", repair)
    run = train.train(config, tmp_path / "run")
    *_, last = run.events("task")
    assert last["drift"]["tasks"] == [0]
    assert 0 <= last["drift"]["features"][0] < 1


@pytest.mark.filterwarnings("ignore:skipped")
def test_drift_is_not_measured_if_no_image_of_the_sample_can_be_read(tmp_path):
    config = of_pictures(tmp_path / "data", drift_images=1)
    data, scenario = build_tasks(config)
    meter = DriftMeter(SimpleNamespace(config=config, scenario=scenario), SimpleNamespace(protected={}), 1)
    (bad,) = meter.sample(scenario.tasks[0]).tolist()
    Path(data.test.paths[bad]).write_bytes(b"no image")
    run = train.train(config, tmp_path / "run")
    first, last = run.events("task")
    assert (first["drift"]["tasks"], last["drift"]["tasks"]) == ([], [])
