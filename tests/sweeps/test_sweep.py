from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import filelock
import pytest
import torch

import tiny
from pgp import recipes, train
from pgp.cli import main, parse
from pgp.evaluation import metrics
from pgp.methods.head_only import HeadOnly
from pgp.projections.base import NoProjection
from pgp.projections.orthogonal import Orthogonal
from pgp.projections.released import ReleasedBasis
from pgp.reports import comparison
from pgp.runs.run import Run
from pgp.sweeps import pool, sweep
from pgp.system.storage import RunError
from photos import tree

ENERGIES = ["--over", "projection.energy=.5,0.90"]


@pytest.fixture(autouse=True)
def _tiny_demo(monkeypatch, tmp_path):
    def demo():
        """A tiny demo."""
        return replace(tiny.config(epochs=1, method=HeadOnly.Config(), tasks=2), name="demo")

    monkeypatch.setitem(recipes.RECIPES, "demo", demo)
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)


def swept(*words):
    """`pgp sweep demo` in this process, and its folder."""
    main.main(["sweep", "demo", "--workers", "1", *words])
    return Path("sweeps/demo")


def fails(capsys, *words):
    with pytest.raises(SystemExit) as stop:
        swept(*words)
    assert stop.value.code == 2
    return capsys.readouterr().err


def planned(tmp_path, choices, **settings):
    base = tiny.config()
    words = parse.parse_grid(choices)
    configs = []
    for choice in words:
        config = base
        for path, value in choice.items():
            part, name = path.split(".")
            config = replace(config, **{part: replace(getattr(config, part), **{name: type_of(value)})})
        configs.append(config)
    plan = sweep.Sweep(tmp_path / "out", base)
    return plan, plan.plan(parse.label_choices(words, configs, "tiny"), [0, 1], **settings)


def type_of(text):
    try:
        return float(text)
    except ValueError:
        return text


def test_a_grid_is_every_choice():
    assert len(parse.parse_grid(["a=1,2", "b.c=x,y,z"])) == 6
    assert parse.parse_grid(["a-b=1", "a_b=2"]) == [{"a_b": "1"}, {"a_b": "2"}]
    assert parse.parse_grid([]) == [{}]
    assert parse.to_flags({"projection.preserve_key_norms": "True", "b.c": "false", "readouts": "lda ncm"}) == [
        "--projection.preserve_key_norms", "--b.no_c", "--readouts", "lda", "ncm",
    ]  # fmt: skip
    assert parse.parse_seeds("3,7,3") == [3, 7]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seeds", "none"], "expected --seeds 10, for seeds 0 to 9"),
        (["--seeds", "0"], "got '0'"),
        (["--over", "projection.energy"], "expected --over PATH=VALUE,VALUE"),
        (["--over", "projection.energy=.5,"], "such as projection.energy=.9,.99, got"),
        (["--over", "seed=1,2"], "seeds are --seeds"),
        (["--seed", "3"], "seeds are --seeds"),
        (["--twin"], "expected pgp sweep without --twin"),
        (["--tracker", "tensorboard"], "expected pgp sweep without --tracker"),
        (["--devices", "2"], "expected --devices 1 in a sweep"),
        (["--workers", "0"], "expected --workers of at least 1, got 0"),
        (["--over", "projection.enregy=.5"], "--projection.energy"),
        (["--over", "projection.energy=high"], "high"),
    ],
)
def test_what_cannot_be_swept_is_said(capsys, words, message):
    assert message in " ".join(fails(capsys, *words).split())
    assert not Path("sweeps").exists()


def test_names_and_baselines(tmp_path):
    plan, jobs = planned(tmp_path, ["projection.energy=.9,0.5,0.90", "projection.basis=sum,union"])
    names = {job.name for job in jobs}
    points = {f"energy-{energy}_basis-{space}" for energy in (0.9, 0.5) for space in ("sum", "union")}
    shared = {"unprojected", "reduced-lr", "frozen", "linear-probe", "ncm", "joint"}  # one of each for all points
    assert names == points | shared | {f"random_{point}" for point in points}
    assert len(jobs) == 2 * len(names)
    assert {job.folder for job in jobs} == {tmp_path / "out" / name / f"seed-{k}" for name in names for k in (0, 1)}
    assert plan.entries["energy-0.5_basis-sum"].baselines["random"] == "random_energy-0.5_basis-sum"
    assert len({repr(job.config) for job in jobs}) == len(jobs)
    grown, more = planned(tmp_path, ["projection.energy=.7,.5,.9", "projection.basis=union,sum"])
    assert names < {job.name for job in more}
    assert {name: grown.entries[name] for name in names} == plan.entries
    _, alone = planned(tmp_path / "bare", ["projection.energy=.9"], baselines=False)
    assert {job.name for job in alone} == {"energy-0.9"}


def test_a_sweep_may_go_on_on_other_hardware(tmp_path):
    planned(tmp_path, ["projection.energy=.9"])
    plan = sweep.Sweep(tmp_path / "out", tiny.config())
    part = replace(tiny.config().hardware, micro_batch_size=2)
    point = tiny.config(projection=Orthogonal.Config(energy=0.9), hardware=part)
    jobs = plan.plan({"energy 0.9": point}, [2])
    assert {job.seed for job in jobs} == {2}
    assert {job.config.hardware for job in jobs} == {part}
    (again, *_) = sweep.Sweep(tmp_path / "out", tiny.config()).plan({"energy 0.9": point}, [2])
    assert again.folder == jobs[0].folder


def test_released_has_no_random_twin(tmp_path):
    point = tiny.config(projection=ReleasedBasis.Config())
    plan = sweep.Sweep(tmp_path / "out", tiny.config())
    plan.plan({"released": point}, [0])
    assert {"unprojected", "reduced-lr", "frozen"} <= plan.entries["released"].baselines.keys()
    assert "random" not in plan.entries["released"].baselines


def test_names_are_safe_and_unique(tmp_path):
    plan = sweep.Sweep(tmp_path / "out", tiny.config())
    labels = ["data a/b", "data a:b", "x" * 300]
    jobs = plan.plan({label: tiny.config(epochs=n) for n, label in enumerate(labels, 3)}, [0], baselines=False)
    assert [job.name for job in jobs][:2] == ["data-a-b", "data-a-b-2"]
    assert len(jobs[2].name) == sweep.LONGEST
    assert [job.name for job in plan.plan({"other": tiny.config(epochs=4)}, [0], baselines=False)] == ["data-a-b-2"]


@pytest.mark.slow
def test_parts_and_points_that_are_baselines(capsys):
    folder = swept("--over", "projection=orthogonal,none", "--seeds", "1")
    entries = json.loads((folder / "sweep.json").read_text())["entries"]
    assert entries["projection-orthogonal"]["baselines"]["unprojected"] == "projection-none"
    assert "random" not in entries["projection-none"]["baselines"]
    assert "unprojected" not in entries
    assert Run.open(folder / "projection-none" / "seed-0").config.projection == NoProjection.Config()
    out = capsys.readouterr().out
    assert "minus unprojected" in out
    assert "figure: sweeps/demo/sweep.png" in out
    assert (folder / "sweep.png").stat().st_size > 1_000


def modified(folder):
    return {path: path.stat().st_mtime_ns for path in folder.glob("*/seed-*/checkpoints/task-*/*")}


@pytest.mark.slow
def test_goes_on_after_a_kill_and_grows(monkeypatch, capsys):
    few = ["--no-baselines", "--seeds", "3"]
    whole = swept(*ENERGIES, *few, "--output", "whole") and Path("whole")
    shutil.copytree(whole, "sweeps/demo")
    _, half, none = (Path(f"sweeps/demo/energy-0.5/seed-{seed}") for seed in range(3))
    (half / "checkpoints" / "latest").write_text("task-01")
    shutil.rmtree(half / "checkpoints" / "task-02")
    for path in ("latest", "task-01", "task-02"):
        target = none / "checkpoints" / path
        shutil.rmtree(target) if target.is_dir() else target.unlink()
    shutil.rmtree("sweeps/demo/energy-0.9/seed-0")
    shutil.rmtree("sweeps/demo/energy-0.9/seed-1")
    (Path("sweeps/demo/energy-0.9/seed-1") / "checkpoints").mkdir(parents=True)
    before = modified(Path("sweeps/demo"))
    capsys.readouterr()
    swept(*ENERGIES, *few)
    told = capsys.readouterr().err
    assert "2 of 6 runs are finished already" in told
    assert told.count(": trained in") == 3
    assert told.count(": resumed in") == 1
    after = modified(Path("sweeps/demo"))
    assert {path: after[path] for path in before} == before
    for path in whole.glob("*/seed-*/accuracy.csv"):
        assert (Path("sweeps/demo") / path.relative_to(whole)).read_bytes() == path.read_bytes()
    assert (none.parent / "seed-2-abandoned" / "metrics.jsonl").is_file()
    assert (Path("sweeps/demo") / "sweep.md").read_bytes() == (whole / "sweep.md").read_bytes()
    swept("--over", "projection.energy=.5,.9,.99", "--no-baselines", "--seeds", "3,4")  # which 3 is new, too
    assert "6 of 6 runs" not in (told := capsys.readouterr().err)
    assert told.count(": trained in") == 6
    table = (Path("sweeps/demo") / "sweep.md").read_text()
    assert "| energy 0.5 | head | 5 |" in table
    assert "| energy 0.99 | head | 2 |" in table


def test_other_settings_are_refused(capsys):
    folder = swept(*ENERGIES, "--no-baselines", "--seeds", "1")
    before = modified(folder)
    told = fails(capsys, *ENERGIES, "--no-baselines", "--seeds", "1", "--epochs", "2")
    assert "other settings: expected epochs 1, as there, got 2 now" in told
    other = Run.open(folder / "energy-0.5" / "seed-0")
    tiny.reconfigure(other.folder, epochs=7)
    before = modified(folder)
    told = fails(capsys, *ENERGIES, "--no-baselines", "--seeds", "1")
    assert "seed-0 has other settings: expected epochs 7, as there, got 1 now. Nothing is overwritten" in told
    assert modified(folder) == before
    Path("photos").mkdir()
    Path("photos/cat.jpg").touch()
    told = fails(capsys, "--output", "photos")
    assert "expected a new or empty folder, or that of a sweep, got" in told
    tree_of = json.loads((folder / "sweep.json").read_text())
    tree_of["entries"]["../../escaped"] = next(iter(tree_of["entries"].values()))
    (folder / "sweep.json").write_text(json.dumps(tree_of))
    assert "the entry '../../escaped' is no name of a folder" in fails(capsys, *ENERGIES)
    (folder / "sweep.json").write_text('{"format": 99}')
    assert "does not describe a sweep of this pgp (format 99)" in fails(capsys, *ENERGIES)


def test_what_is_not_ours_is_not_moved(tmp_path):
    plan, (job, *_) = planned(tmp_path, ["projection.energy=.9"])
    job.folder.mkdir(parents=True)
    (job.folder / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match=r"expected a run of this sweep or nothing at .*: move it away"):
        sweep.run_job(job)
    assert (job.folder / "notes.txt").read_text() == "mine"
    assert not sweep.finished_result(job)
    assert plan.members() == []


def test_one_failing_run_stops_no_other(monkeypatch, capsys):
    learn = train.train

    def fail(config, folder):
        if config.seed == 1 and config.projection.energy == 0.5:
            raise RunError("the loss is nan at step 3")
        return learn(config, folder)

    monkeypatch.setattr(train, "train", fail)
    told = fails(capsys, *ENERGIES, "--no-baselines", "--seeds", "3")
    assert (
        "1 of 6 runs failed; repeat the same call to try them again:\npgp: energy-0.5, seed 1: the loss is nan at"
        " step 3" in told
    )
    table = Path("sweeps/demo/sweep.md").read_text()
    assert "| energy 0.5 | head | 2 |" in table
    assert "| energy 0.9 | head | 3 |" in table


@pytest.mark.filterwarnings("ignore:no test images of")
def test_runs_without_test_images_are_finished_and_in_the_table(capsys):
    tree(Path("photos"), "")
    words = ["--data", "photos", "--tasks", "1", "--dataset.test-share", "0", "--over", "optimizer.lr=.1,.2"]
    for told in ("average accuracy not measured", "2 of 2 runs are finished already"):
        folder = swept(*words, "--no-baselines", "--seeds", "1")
        said = capsys.readouterr()
        assert told in said.out + said.err
    assert (folder / "sweep.md").read_text().count("not measured") >= 2


def test_no_run_is_run_twice(tmp_path):
    _, (job, *_) = planned(tmp_path, ["projection.energy=.9"])
    job.folder.parent.mkdir(parents=True)
    with filelock.FileLock(job.folder.parent / ".seed-0.lock"):
        assert sweep.run_job(job).status == "busy"
        assert not job.folder.exists()
    done = [sweep.JobResult("busy", 0, 0), sweep.JobResult("kept", 0, 1)]
    asked = []

    def spread(work, jobs):
        asked.append(list(jobs))
        yield jobs[0], done.pop(0)

    assert list(sweep.run_all([job], spread)) == [(job, sweep.JobResult("kept", 0, 1))]
    assert asked == [[job], [job]]


def test_a_baseline_without_the_readout_is_read_by_its_best(tmp_path):
    (run,) = made(tmp_path, "baseline", {0: [[0.5]]}).values()
    run.save("task-02", {"matrices": {"head": torch.tensor([[0.5]]), "lda": torch.tensor([[0.7]])}})
    baseline = comparison.Entry("linear-probe", {0: run})
    assert comparison._comparable_column(baseline, "head") == "head"
    assert comparison._comparable_column(baseline, "lda+query+linear") == "lda"
    assert comparison._comparable_column(comparison.Entry("none", {}), "lda") is None
    matrices = {"head": 0.5, "lda": math.nan, "head/legacy": 0.9}
    (run,) = made(tmp_path, "legacy", {0: [[0.5]]}).values()
    baseline = comparison.Entry("linear-probe", {0: run})
    run.save("task-02", {"matrices": {name: torch.tensor([[value]]) for name, value in matrices.items()}})
    assert comparison._comparable_column(baseline, "lda+query") == "head"  # neither with the task, nor not measured
    assert comparison._comparable_column(baseline, "ncm/legacy") == "head/legacy"


def made(tmp_path, name, matrices):
    """A finished run for each seed, by its matrix of one column."""
    runs = {}
    for seed, matrix in matrices.items():
        classes = tiny.described(map(str, range(len(matrix))), [[t] for t in range(len(matrix))])
        run = Run.create(tmp_path / name / str(seed), tiny.config(seed=seed), classes)
        run.save(f"task-{len(matrix):02d}", {"matrices": {"head": torch.tensor(matrix, dtype=torch.float64)}})
        runs[seed] = run
    return runs


@pytest.mark.looks_at_figures
def test_the_table_is_paired_by_seed(tmp_path):
    nan = float("nan")
    own = {0: [[0.9, nan], [0.7, 0.8]], 1: [[0.8, nan], [0.6, 0.9]], 2: [[1.0, nan], [0.8, 0.6]]}
    twin = {0: [[0.9, nan], [0.5, 0.8]], 1: [[0.9, nan], [0.6, 0.8]], 3: [[0.9, nan], [0.1, 0.1]]}
    baselines = {
        "unprojected": comparison.Entry("unprojected", made(tmp_path, "twin", twin)),
        "joint": comparison.Entry("joint", made(tmp_path, "joint", {0: [[0.95]], 1: [[0.97]]})),
        "missing": comparison.Entry("missing", {}),
    }
    point = comparison.Entry("energy 0.9", made(tmp_path, "own", own), baselines)
    rows = comparison.table([point, *baselines.values()])
    accuracy = [0.75, 0.75, 0.7]
    mean, deviation = 100 * statistics.mean(accuracy), 100 * statistics.stdev(accuracy)
    assert rows[0] == ("energy 0.9", "head", "3", f"{mean:.2f} ± {deviation:.2f}", "20.00 ± 0.00")
    # accuracy: .75 - .65, .75 - .70; forgetting: .2 - .4, .2 - .3; the error of two is half of their difference
    assert rows[1] == ("minus unprojected", "head", "2", "+7.50 ± 2.50", "-15.00 ± 5.00")
    assert rows[2] == ("minus joint", "head", "2", "-21.00 ± 1.00", "")
    assert rows[3][:3] == ("unprojected", "head", "3")
    assert rows[4] == ("joint", "head", "2", "96.00 ± 1.41", "")
    assert len(rows) == 5
    assert "| minus unprojected | head | 2 | +7.50 ± 2.50 |" in comparison.markdown([point])
    comparison.draw_comparison([point, *baselines.values()], tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    assert metrics.average_accuracy(point.runs[0].matrices()["head"]) == pytest.approx(0.75)


def test_workers_in_this_process_report_errors():
    out = list(pool.run_local(int, ["1", "x"], 1))
    assert out[0] == ("1", 1)
    assert "invalid literal" in str(out[1][1])
    (only,) = pool.run_local({}.__getitem__, ["x"], 1)
    assert str(only[1]) == "KeyError: 'x'"


def test_gpus_are_shared(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert pool._visible_gpus(2) == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert pool._visible_gpus(2) == ["3", "5"]
    assert pool._visible_gpus(0) == []


def test_ray_is_an_extra(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    told = fails(capsys, *ENERGIES, "--ray", "auto")
    assert "expected Ray for --ray, which is not installed: pip install 'prompt-gradient-projection[ray]'" in told


DRIVER = """
import sys, torch
from dataclasses import replace
import tiny
from pgp import recipes
from pgp.cli.main import main
recipes.RECIPES["demo"] = lambda: replace(tiny.config(epochs=1), name="demo")
if __name__ == "__main__":
    main(sys.argv[1:])
"""


def as_a_process(folder, *words, **settings):
    script = folder / "driver.py"
    script.write_text(DRIVER)
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), "sweep", "demo", *words]
    return subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True, **settings)


@pytest.mark.slow
def test_two_processes_and_a_kill(tmp_path):
    words = [*ENERGIES, "--no-baselines", "--seeds", "3", "--workers", "2"]
    first = as_a_process(tmp_path, *words)
    while not list(tmp_path.glob("sweeps/demo/*/seed-*/checkpoints/task-01")):
        assert first.poll() is None
        time.sleep(0.02)
    first.kill()
    first.communicate(timeout=60)  # the stream ends when its workers have ended, too
    both = [as_a_process(tmp_path, *words) for _ in range(2)]  # at the same time
    told = [one.communicate(timeout=300)[1] for one in both]
    assert [one.returncode for one in both] == [0, 0], told
    for energy in (0.5, 0.9):
        for seed in range(3):
            run = Run.open(tmp_path / "sweeps" / "demo" / f"energy-{energy}" / f"seed-{seed}")
            assert len(list(run.events("task"))) == 3  # each task once
            alone = train.train(
                replace(run.config, hardware=replace(run.config.hardware)), tmp_path / f"{energy}{seed}"
            )
            assert (alone.folder / "accuracy.csv").read_bytes() == (run.folder / "accuracy.csv").read_bytes()


def kill_or_square(number):
    if number == 3:
        os._exit(9)
    return number * number


@pytest.mark.slow
def test_a_process_that_dies_takes_no_other_run_with_it():
    out = dict(pool.run_local(kill_or_square, range(6), 2))
    assert {number: out[number] for number in out if number != 3} == {n: n * n for n in (0, 1, 2, 4, 5)}
    assert isinstance(out[3], pool.DiedError)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs Ray: pip install ray")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("nodes", [0, 2])
def test_on_a_ray_cluster(tmp_path, nodes):
    """One that is started for the sweep, or one of two nodes that is there already."""
    with contextlib.ExitStack() as stack:
        address = "local"
        if nodes:
            cluster_utils = importlib.import_module("ray.cluster_utils")
            cluster = cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
            stack.callback(cluster.shutdown)
            cluster.add_node(num_cpus=1)
            address = cluster.address
        process = as_a_process(tmp_path, *ENERGIES, "--no-baselines", "--seeds", "2", "--ray", address)
        told = process.communicate(timeout=300)[1]
    assert process.returncode == 0, told
    assert told.count(": trained in") == 4
    kinds = {
        type(Run.open(path.parent).config.projection) for path in tmp_path.glob("sweeps/demo/*/seed-*/config.json")
    }
    assert kinds == {Orthogonal.Config}


@pytest.mark.filterwarnings("always:left out of the table")
def test_a_run_that_has_learned_more_leaves_the_table(capsys):
    swept("--over", "epochs=1", "--seeds", "2", "--no-baselines", "--output", "out")
    folder = Path("out")
    (entry,) = (path for path in folder.iterdir() if (path / "seed-1").is_dir())
    tiny.reconfigure(entry / "seed-1", epochs=3)
    swept("--over", "epochs=1", "--seeds", "1", "--no-baselines", "--output", "out")
    assert re.search("left out of the table: the run at .*seed-1 has other settings", capsys.readouterr().err)
    assert "| 1 |" in (folder / "sweep.md").read_text()
    assert "| 2 |" not in (folder / "sweep.md").read_text()


def test_which_checkpoints_are_kept_may_change():
    words = ("--over", "epochs=1", "--no-baselines", "--output", "out")
    swept(*words, "--seeds", "1")
    swept(*words, "--seeds", "2", "--keep-checkpoints", "last")
    (entry,) = (path for path in Path("out").iterdir() if (path / "seed-1").is_dir())
    kept = {seed: len(list((entry / f"seed-{seed}" / "checkpoints").glob("task-*"))) for seed in (0, 1)}
    assert kept == {0: 2, 1: 1}


def test_data_that_have_changed_are_refused(capsys):
    tree(Path("photos"), "", count=6)
    words = ["--data", "photos", "--tasks", "1", "--no-baselines", *ENERGIES]
    folder = swept(*words, "--seeds", "1")
    before = modified(folder)
    shutil.copy(next(Path("photos").glob("*/*.png")), next(Path("photos").glob("*/")) / "another.png")
    swept(*words, "--seeds", "1")  # nothing is left to train
    told = fails(capsys, *words, "--seeds", "2")
    assert "photos have changed since " in told
    assert "seed-0 was trained, and runs on other data cannot be compared: name another --output" in told
    assert before.items() <= modified(folder).items()


def test_versions_that_differ_are_named(tmp_path):
    runs = made(tmp_path, "own", {0: [[0.5]], 1: [[0.5]]})
    members = [comparison.Entry("own", runs)]
    assert "different versions" not in comparison.markdown(members)
    for seed, commit in enumerate(("abc", "def-dirty")):
        text = json.dumps({"commit": commit, "versions": {"torch": "2.14.1"}})
        (runs[seed].folder / "environment.json").write_text(text)
    note = "Trained with different versions, which can change results: commit abc, def-dirty."
    assert comparison.markdown(members).endswith(f"{note}\n")
    (runs[0].folder / "environment.json").write_text("[]")
    with pytest.warns(UserWarning, match=r"environment\.json .*\. Its versions are not compared with those of"):
        assert "different versions" not in comparison.markdown(members)


def test_a_baseline_has_the_marker_of_its_kind_and_the_colour_of_its_point(tmp_path):
    def entry(name, baselines):
        return comparison.Entry(name, made(tmp_path, name, {0: [[0.9, 0.0], [0.7, 0.8]]}), baselines)

    shared = entry("ncm", {})
    points = [entry(f"p{i}", {"random": entry(f"random{i}", {}), "ncm": shared}) for i in range(9)]
    looks = {point: comparison.style.look(number) for number, point in enumerate(points)}
    found = comparison._baseline_looks(points, looks)
    assert len(found) == 10
    assert {found[point.baselines["random"]].marker for point in points} == {"s"}
    assert found[shared].marker == "D"
    assert found[shared].colour == comparison.style.INK
    assert all(found[point.baselines["random"]].colour == looks[point].colour for point in points)
