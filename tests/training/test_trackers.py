"""A run is reported to trackers while it trains. The real libraries are used, without a network."""

from __future__ import annotations

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import tiny
from pgp import train
from pgp.readouts.lda import LDA
from pgp.runs.run import Run
from pgp.system.signals import Interrupted
from pgp.training import trackers


def expected(folder):
    """By name, steps and values of what the log says."""
    found, steps = {}, {}
    for event in Run.open(folder).log_file.events():
        if event["event"] == "train":
            steps[event["task"]] = event["step"]
        for name, value in trackers.scalars(event).items():
            found.setdefault(name, []).append((sum(steps.values()), value))
    return found


def drawn(folder):
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {name: [(each.step, each.value) for each in events.Scalars(name)] for name in events.Tags()["scalars"]}


def same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, points in wanted.items():
        assert [step for step, _ in found[name]] == [step for step, _ in points]
        assert [value for _, value in found[name]] == pytest.approx([value for _, value in points])


def test_tensorboard_shows_the_log(tmp_path):
    train.train(tiny.config(), tmp_path / "run", trackers=["tensorboard"])
    wanted = expected(tmp_path / "run")
    assert {"train/loss", "accuracy/head", "forgetting/lda", "rank/prompts", "drift/features"} <= wanted.keys()
    assert wanted["task/finished"] == [(6, 1), (12, 2), (18, 3)]
    same(drawn(tmp_path / "run"), wanted)


def test_drift_that_was_not_measured_is_left_out():
    task = {"event": "task", "task": 2, "ranks": {}, "seconds": {}, "calibration": {}}
    task |= {"average_accuracy": {}, "forgetting": {}}
    assert trackers.scalars({**task, "drift": {"features": [None, 0.25]}})["drift/features"] == 0.25
    assert "drift/features" not in trackers.scalars({**task, "drift": {"features": [None, None]}})


def test_a_resumed_run_continues_where_it_was(tmp_path, monkeypatch):
    """Steps that are trained again are drawn once."""
    folder, steps = tmp_path / "run", []
    step = train.train_step

    def interrupted(*args, **kwargs):
        steps.append(1)
        if len(steps) == 11:
            raise KeyboardInterrupt
        return step(*args, **kwargs)

    monkeypatch.setattr(train, "train_step", interrupted)
    with pytest.raises((KeyboardInterrupt, Interrupted)):
        train.train(tiny.config(log_every_steps=1), folder, trackers=["tensorboard"])
    train.resume(folder, trackers=["tensorboard"])
    found, wanted = drawn(folder), expected(folder)
    same(found, wanted)
    assert [number for number, _ in wanted["train/loss"]] == list(range(1, 19))


def watched(monkeypatch, library):
    """A list that gets the step and the values of each call of `log`, of runs that `library` starts from here on."""
    logged, init = [], library.init

    def start(**settings):
        run = init(**settings)
        log = run.log
        monkeypatch.setattr(run, "log", lambda values, step: (logged.append((step, values)), log(values, step=step)))
        return run

    monkeypatch.setattr(library, "init", start)
    return logged


def test_wandb_offline(tmp_path, monkeypatch):
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logged = watched(monkeypatch, wandb)
    train.train(tiny.config(), tmp_path / "run", trackers=["wandb"])
    wanted = expected(tmp_path / "run")
    found = {}
    for step, values in logged:
        for name, value in values.items():
            found.setdefault(name, []).append((step, value))
    same(found, wanted)
    (file,) = (tmp_path / "run").glob("wandb/offline-run-*/*.wandb")
    assert Run.open(tmp_path / "run").id in file.name


def test_mlflow_in_a_folder(tmp_path, monkeypatch):
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    folder = tmp_path / "run"
    readouts = (LDA.Config(query=True), *tiny.config().readouts)  # "+" is not allowed in MLflow's names
    train.train(tiny.config(tasks=2, readouts=readouts), folder, trackers=["mlflow"])
    client = MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("pgp").experiment_id])
    assert (run.info.status, run.info.run_name) == ("FINISHED", "run")
    assert run.data.params["method.top_k"] == "2"
    wanted = {name.replace("+", "-"): points for name, points in expected(folder).items()}
    assert "accuracy/lda-query" in wanted
    same({name: [(each.step, each.value) for each in client.get_metric_history(run.info.run_id, name)]
          for name in wanted}, wanted)  # fmt: skip
    tracked = trackers.TrackedRun(Run.open(folder).id, "run", folder, {}, 0)
    assert trackers.MLflow(tracked)._id == run.info.run_id  # a resumed run is the same one


def test_trackio_in_a_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # which is read at import
    import trackio

    logged = watched(monkeypatch, trackio)
    train.train(tiny.config(tasks=2), tmp_path / "run", trackers=["trackio"])
    wanted = expected(tmp_path / "run")
    assert [(step, values["train/loss"]) for step, values in logged if "train/loss" in values] == wanted["train/loss"]
    assert capsys.readouterr().out == ""
    assert (tmp_path / "trackio" / "pgp.db").exists()


class Broken:
    """A tracker whose server goes away."""

    calls = 0

    def __init__(self, run):
        pass

    def log(self, values, step):
        Broken.calls += 1
        raise ConnectionError("the server went away")

    def finish(self, *, failed):
        raise AssertionError("it is not used any more")


def test_a_tracker_that_fails_never_stops_a_run(tmp_path, monkeypatch):
    monkeypatch.setitem(trackers.TRACKERS, "wandb", Broken)
    lines = []
    monkeypatch.setattr(trackers, "print_line", lambda progress, text: lines.append(text))
    run = train.train(tiny.config(tasks=2), tmp_path / "run", trackers=["wandb", "tensorboard"])
    assert run.progress() == (2, 2)
    assert Broken.calls == 1
    assert lines == ["pgp: warning: wandb failed, and gets no more values of this run: ConnectionError: the server went"
                     " away"]  # fmt: skip
    same(drawn(run.folder), expected(run.folder))


def test_a_tracker_changes_no_result(tmp_path):
    plain, tracked = (
        train.train(tiny.config(tasks=2), tmp_path / name, trackers=names)
        for name, names in (("plain", []), ("tracked", ["tensorboard"]))
    )
    assert (plain.folder / "accuracy.csv").read_bytes() == (tracked.folder / "accuracy.csv").read_bytes()
    assert not (plain.folder / "tensorboard").exists()


def test_a_tracker_that_is_missing_is_an_error_before_the_run(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="expected trackers among tensorboard, wandb, mlflow, trackio, got 'comet'"):
        train.train(tiny.config(), tmp_path / "run", trackers=["comet"])
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'prompt-gradient-projection\[wandb\]'"):
        train.train(tiny.config(), tmp_path / "run", trackers=["wandb"])
    assert not (tmp_path / "run").exists()
