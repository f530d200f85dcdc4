from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import tiny
from pgp import baselines, progress, train
from pgp.analysis.checkpoints import evaluate_checkpoints
from pgp.cli import main
from pgp.config import Hardware, Optimizer
from pgp.datasets.base import BadImageError
from pgp.datasets.loader import batches, sequential_batches
from pgp.datasets.synthetic import Synthetic
from pgp.datasets.transforms import Transforms
from pgp.evaluation import metrics
from pgp.evaluation.accuracy import Evaluator, FeatureBatch
from pgp.methods.adapted import AdaptedEncoder
from pgp.methods.adapter import Adapter
from pgp.methods.coda_prompt import CODAPrompt
from pgp.methods.dualprompt import DualPrompt
from pgp.methods.head_only import HeadOnly
from pgp.methods.l2p import L2P
from pgp.methods.lora import LoRA
from pgp.methods.vpt import VPT
from pgp.projections.base import NoProjection
from pgp.projections.orthogonal import Orthogonal
from pgp.projections.released import ReleasedBasis
from pgp.readouts.head import MethodHead
from pgp.readouts.lda import LDA
from pgp.readouts.logistic import Logistic
from pgp.readouts.ranpac import RanPAC
from pgp.readouts.statistics import StatisticsReadout
from pgp.runs.checkpoint import CheckpointName
from pgp.runs.run import Run
from pgp.runs.statetree import pieces_in
from pgp.system.storage import RunError
from pgp.training import observe
from pgp.training.devices import accelerator_name, build_fabric
from pgp.training.session import Session
from pgp.training.tasks import build_scenario, training_batches


def final(run, name="task-03"):
    """All tensors of a checkpoint as they were written, pieces among them."""
    record = json.loads((run.folder / "checkpoints" / name / "state.json").read_text())
    pieces = {
        piece: load_file(run.folder / "checkpoints" / "pieces" / f"{piece}.safetensors")
        for piece in pieces_in(record["state"])
    }
    own = load_file(run.folder / "checkpoints" / name / "state.safetensors")
    return own | {f"{piece}{path}": tensor for piece, tensors in pieces.items() for path, tensor in tensors.items()}


def same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=0, equal_nan=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    torch.set_num_threads(1)
    return train.train(tiny.config(), tmp_path_factory.mktemp("whole") / "run")


def opened(run, config=None):
    session = Session(build_fabric(config or run.config), config or run.config, progress.no_progress())
    state = session.new_state()
    state.load_state_dict(run.load())
    return session, state


def test_leaves_a_whole_run_folder(whole):
    names = {path.name for path in whole.folder.iterdir() if not path.name.startswith(".pgp-")}
    assert names == {"config.json", "classes.json", "environment.json", "metrics.jsonl", "accuracy.csv", "checkpoints"}
    assert whole.latest_checkpoint() == "task-03"
    assert whole.config == tiny.config()
    environment = json.loads((whole.folder / "environment.json").read_text())
    assert environment["versions"]["torch"]
    assert environment["vectors"].split()[0] == torch.backends.cpu.get_cpu_capability()
    for matrix in whole.matrices().values():
        assert matrix.isfinite().tolist() == [[True, False, False], [True, True, False], [True, True, True]]
    assert [event["task"] for event in whole.events("task")] == [0, 1, 2]
    *_, last = whole.events("task")
    assert last["ranks"]["prompts"] > 0
    assert last["ranks"]["keys"] > 0
    assert all(0 < event["loss"] < 5 for event in whole.events("train"))


@pytest.mark.parametrize("command", [["eval"], ["predict", "--json"], ["audit"], ["train", "--resume"], ["report"]])
def test_a_changed_byte_stops_every_command_in_one_line(whole, tmp_path, capsys, command):
    copy = Path(shutil.copytree(whole.folder, tmp_path / "copy"))
    (tmp_path / "photo.jpg").touch()
    name = "state.json" if command == ["report"] else "state.safetensors"
    path = copy / "checkpoints" / "task-03" / name
    data = path.read_bytes()
    path.write_bytes(data[:-30] + bytes([data[-30] ^ 1]) + data[-29:])
    before = {file: file.read_bytes() for file in copy.rglob("*") if file.is_file()}
    words = [*command, str(copy), *([str(tmp_path / "photo.jpg")] if "predict" in command else [])]
    with pytest.raises(SystemExit) as stop:
        main.main(words)
    assert stop.value.code == 2
    out, told = capsys.readouterr()
    assert f"{path} was changed or damaged after pgp wrote it" in told
    assert (out, told.strip().count("\n")) == ("", 0)
    assert {file: data for file, data in before.items() if file.read_bytes() != data} == {}


def test_evaluates_what_checkpoints_remain(tmp_path):
    run = train.train(tiny.config(epochs=1, keep_checkpoints="2"), tmp_path / "run")
    assert train.resume(run.folder).latest_checkpoint() == "task-03"
    with pytest.warns(UserWarning, match="has checkpoints of 2 of 3 finished tasks, and is evaluated after tasks 2, 3"):
        matrices = evaluate_checkpoints(run, run.config, every_task=True)
    known = run.matrices()["lda"]
    assert matrices["lda"][0].isnan().all()
    torch.testing.assert_close(matrices["lda"][1:], known[1:], rtol=0, atol=0, equal_nan=True)


def test_learns(tmp_path):
    easy = tiny.config(epochs=8, dataset=Synthetic(noise=0.02), method=HeadOnly.Config())
    matrices = train.train(easy, tmp_path / "run").matrices()
    assert float(matrices["head"].diagonal()[0]) > 0.8
    assert 0.8 < metrics.average_accuracy(matrices["lda"]) <= 1  # chance is 1 in 6


def test_resumes_after_a_task_bitwise(whole, tmp_path, monkeypatch):
    end_task = train.end_task

    def crash(session, state, task):
        if task.index == 2:
            raise KeyboardInterrupt
        end_task(session, state, task)

    monkeypatch.setattr(train, "end_task", crash)
    with pytest.raises(KeyboardInterrupt):
        train.train(tiny.config(), tmp_path / "run")
    monkeypatch.setattr(train, "end_task", end_task)
    assert Run.open(tmp_path / "run").latest_checkpoint() == "task-02"
    resumed = train.resume(tmp_path / "run")
    same(final(whole), final(resumed))
    assert (resumed.folder / "accuracy.csv").read_bytes() == (whole.folder / "accuracy.csv").read_bytes()


METHODS = [
    tiny.config().method,
    replace(tiny.DUALPROMPT, protect="keys+values"),
    HeadOnly.Config(),
    LoRA.Config(rank=3),
    Adapter.Config(rank=3),
    CODAPrompt.Config(layers=(0,), pool_size=12, per_task=4),
]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.tag)
def test_resumes_inside_a_task_bitwise(tmp_path, monkeypatch, method):
    whole = train.train(tiny.config(method=method), tmp_path / "whole")
    train_step, calls = train.train_step, []

    def crash(*arguments, **named):
        calls.append(None)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return train_step(*arguments, **named)

    monkeypatch.setattr(train, "train_step", crash)
    with pytest.raises(KeyboardInterrupt):
        train.train(tiny.config(method=method, save_every_steps=1), tmp_path / "run")
    monkeypatch.setattr(train, "train_step", train_step)
    assert Run.open(tmp_path / "run").latest_checkpoint() == "task-02-step-000002"
    resumed = train.resume(tmp_path / "run")
    same(final(whole), final(resumed))
    assert resumed.matrices().keys() == whole.matrices().keys()
    kept = {path.name for path in (resumed.folder / "checkpoints").iterdir()}
    assert kept == {"task-01", "task-02", "task-03", "latest", "pieces"}


def test_a_run_on_small_images_resumes_bitwise(tmp_path, monkeypatch):
    transforms = Transforms(size=32, resize=36, scale=(0.3, 1.0))
    config = tiny.config(dataset=Synthetic(noise=0.05, size=16), transforms=transforms, views=1, save_every_steps=1)
    whole = train.train(config, tmp_path / "whole")
    train_step, calls = train.train_step, []

    def crash(*arguments, **named):
        calls.append(None)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return train_step(*arguments, **named)

    monkeypatch.setattr(train, "train_step", crash)
    with pytest.raises(KeyboardInterrupt):
        train.train(config, tmp_path / "run")
    monkeypatch.setattr(train, "train_step", train_step)
    same(final(whole), final(train.resume(tmp_path / "run", Hardware(workers=2))))


def test_a_rewound_run_keeps_what_it_replaces(whole, tmp_path):
    run = train.train(tiny.config(), tmp_path / "run")
    (run.folder / "checkpoints" / "latest").write_text("task-01")
    same(final(whole), final(train.resume(run.folder)))
    same(final(whole), final(run, "task-03-replaced"))


@pytest.mark.parametrize("change", [{"hardware": Hardware(workers=2)}, {"eval_batch_size": 1}])
def test_how_images_are_loaded_changes_nothing(whole, tmp_path, change):
    other = train.train(tiny.config(**change), tmp_path / "run")
    assert other.matrices().keys() == whole.matrices().keys()
    for column, matrix in other.matrices().items():
        torch.testing.assert_close(matrix, whole.matrices()[column], rtol=0, atol=0, equal_nan=True)
    if "hardware" in change:
        same(final(whole), final(other))


@pytest.mark.parametrize("selection", ["image", "batch"])
def test_the_parts_of_a_batch_add_up(tmp_path, selection):
    ends = []
    for part in (3, 8):
        config = tiny.config(
            hardware=Hardware(micro_batch_size=part), method=L2P.Config(top_k=2, selection=selection), epochs=1
        )
        ends.append(final(train.train(config, tmp_path / str(part))))
    for name in ends[0]:
        if name.startswith("/method"):
            torch.testing.assert_close(ends[0][name], ends[1][name], rtol=1e-3, atol=1e-3)


def test_no_energy_is_the_unprojected_twin_bitwise(tmp_path):
    none = train.train(tiny.config(projection=NoProjection.Config()), tmp_path / "none")
    zero = train.train(tiny.config(projection=Orthogonal.Config(energy=0, key_energy=0)), tmp_path / "zero")
    projected = {name for name in final(zero) if "projection" in name}
    assert projected
    same(final(none), {name: tensor for name, tensor in final(zero).items() if name not in projected})


def test_predictions_at_batch_1_equal_those_at_batch_64_image_by_image(whole):
    predicted = {}
    for size in (1, 64):
        session, state = opened(whole, replace(whole.config, eval_batch_size=size))
        task, rows = session.scenario.tasks[1], []
        split, order = session.evaluator.test_split(), torch.arange(len(session.data.test))
        with torch.no_grad():
            for batch in batches(split, sequential_batches(order, size), session.evaluator.loader_options):
                evaluation, method = session.evaluator, state.method
                frozen = evaluation.frozen(method, batch.images, batch.indices)
                seen = FeatureBatch(batch.indices, evaluation.features(method, batch.images, frozen))
                logits = dict(evaluation.logits(method, state.readouts, batch.images, seen, task, 2))
                rows.append(torch.stack([value.argmax(1) for value in logits.values()], dim=1))
        predicted[size] = torch.cat(rows)
    assert len(predicted[1].unique()) > 1
    assert torch.equal(predicted[1], predicted[64])


def last_rows(matrices):
    return {column: matrix[2] for column, matrix in matrices.items()}


def test_task_incremental_masks_to_the_task(whole, tmp_path):
    til = last_rows(evaluate_checkpoints(whole, replace(whole.config, setting="til")))
    cil = last_rows(evaluate_checkpoints(whole, whole.config))
    assert all((til[column] >= cil[column]).all() for column in cil)
    assert (til["lda"] > cil["lda"]).any()
    for column, row in cil.items():
        assert torch.equal(row, whole.matrices()[column][2])


def test_online_makes_one_pass(tmp_path):
    run = train.train(tiny.config(setting="oil", epochs=7, log_every_steps=1), tmp_path / "run")
    assert len(list(run.events("train"))) == 3 * 3  # 24 images a task, 8 a step


def test_the_published_protocol_is_a_column_of_its_own(whole):
    row = last_rows(evaluate_checkpoints(whole, replace(whole.config, legacy_eval=True)))
    plain = last_rows(evaluate_checkpoints(whole, whole.config))
    assert set(row) == {*plain, "head/legacy", "lda/legacy"}
    for column, values in plain.items():
        assert torch.equal(row[column], values)


def test_a_test_image_is_queried_once_and_the_boundary_runs_no_prompted_transformer(tmp_path, monkeypatch):
    inside, queried, prompted = [], [], []
    row, observed, query = Evaluator.evaluate, observe.observe, L2P.query

    def spied_row(*arguments):
        inside.append("evaluation")
        out = row(*arguments)
        inside.pop()
        return out

    def spied_observe(session, state, *arguments):
        inside.append("boundary")
        forward = state.method.backbone.forward

        def spied(images, prompts=None, *rest, **named):
            prompted.append(prompts is not None)
            return forward(images, prompts, *rest, **named)

        monkeypatch.setattr(state.method.backbone, "forward", spied)
        out = observed(session, state, *arguments)
        monkeypatch.setattr(state.method.backbone, "forward", forward)
        inside.pop()
        return out

    def spied_query(self, images):
        queried.extend([inside[-1] if inside else "training"] * len(images))
        return query(self, images)

    monkeypatch.setattr(Evaluator, "evaluate", spied_row)
    monkeypatch.setattr(observe, "observe", spied_observe)
    monkeypatch.setattr(L2P, "query", spied_query)
    config = tiny.config(readouts=(MethodHead.Config(),))
    train.train(config, tmp_path / "run")
    data = config.dataset.build()
    assert queried.count("evaluation") == len(data.test)
    assert queried.count("boundary") == len(data.train)
    assert prompted
    assert not any(prompted)


def test_uneven_tasks(tmp_path):
    run = train.train(tiny.config(tasks=4, epochs=1), tmp_path / "run")
    assert len(run.matrices()["head"]) == 4


def test_a_loss_that_is_no_number_stops_the_run(tmp_path, monkeypatch):
    loss = L2P.loss

    def poisoned(self, images, labels, task, prepared):
        return loss(self, images, labels, task, prepared) * (torch.nan if task.index == 1 else 1)

    monkeypatch.setattr(L2P, "loss", poisoned)
    with pytest.raises(RunError, match=r"the loss is nan at step 0 of task 2.*last good state is .*task-01$"):
        train.train(tiny.config(save_every_steps=1), tmp_path / "run")  # no broken state is saved meanwhile
    assert Run.open(tmp_path / "run").load()["task"] == 1


class Exploding(torch.autograd.Function):
    """The identity, with an infinite gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * torch.inf


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_an_infinite_gradient_of_the_last_step_stops_the_run_before_it_is_made(tmp_path, monkeypatch, clip):
    loss, steps = L2P.loss, itertools.count()

    def poisoned(self, images, labels, task, prepared):
        value = loss(self, images, labels, task, prepared)
        return Exploding.apply(value) if next(steps) == 5 else value  # the last of the first task's six

    monkeypatch.setattr(L2P, "loss", poisoned)
    config = tiny.config(hardware=Hardware("cpu", micro_batch_size=8), optimizer=Optimizer(lr=0.1, clip=clip))
    with pytest.raises(RunError, match=r"the norm of the gradients is (inf|nan) at step 5 of task 1.*No state was"):
        train.train(config, tmp_path / "run")
    assert Run.open(tmp_path / "run").latest_checkpoint() is None


def test_weights_that_are_not_finite_are_never_saved(whole):
    session, state = opened(whole)
    session.saved = whole.folder / "checkpoints" / "task-03"
    state.method.head.weight.data[0, 0] = torch.nan
    with pytest.raises(RunError, match=r"head\.weight are not finite any more.*last good state is .*task-03$"):
        session.save(state)
    assert opened(whole)[1].method.head.weight.isfinite().all()


@pytest.mark.parametrize("on_gpu", [False, True])
def test_skipped_images_neither_shift_steps_nor_shrink_gradients(tmp_path, monkeypatch, on_gpu):
    """A batch of bad images is no step; the images that are left of another make a mean over those."""
    hardware = Hardware("cpu", micro_batch_size=8)
    config = tiny.config(hardware=hardware, on_bad_image="skip", epochs=1, tasks=2, log_every_steps=100)
    order = [[address.image for address in batch] for batch in training_batches(config, first_task(config), 1)]
    bad = {*order[1], *order[2][:6]}
    split = type(config.dataset.build().train)
    image = split.image

    def broken(self, index):
        if len(self) > 50 and index in bad:  # the training images
            raise BadImageError(f"cannot read image {index}")
        return image(self, index)

    losses, loss, weights = [], L2P.loss, []

    def watched(self, images, labels, task, prepared):
        value = loss(self, images, labels, task, prepared)
        losses.append(len(images))
        value.register_hook(weights.append)
        return value * torch.nan if len(losses) == 3 else value

    monkeypatch.setattr(split, "image", broken)
    monkeypatch.setattr(L2P, "loss", watched)
    if on_gpu:  # where finiteness is only looked at when losses are logged
        check = train.check_finite
        monkeypatch.setattr(train, "check_finite", lambda *a: None if sys._getframe(1).f_code.co_name == "train_step"
                            else check(*a))  # fmt: skip
    with pytest.warns(UserWarning, match="skipped"), pytest.raises(RunError, match="at step 3 of task 1"):
        train.train(config, tmp_path / "run")
    assert losses[:3] == [8, 2, 8]
    assert [float(weight) for weight in weights[:2]] == [1, 1]


def first_task(config):
    return build_scenario(config, config.dataset.build()).tasks[0]


def test_precision_is_fixed_when_a_run_begins(whole, capsys):
    assert "precision" not in {field.name for field in fields(Hardware)}
    with pytest.raises(SystemExit):
        main.main(["train", "--resume", str(whole.folder), "--precision", "bf16-mixed"])
    assert "got --precision: settings that decide results are fixed when a run begins" in capsys.readouterr().err


@pytest.mark.parametrize(("cuda", "expected"), [(True, "cuda"), (False, "cpu")])
def test_auto_never_takes_an_accelerator_without_float64(monkeypatch, cuda, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert accelerator_name(Hardware("auto")) == expected
    assert accelerator_name(Hardware("gpu")) == "cuda"  # Fabric's own gpu would take MPS on a Mac
    assert accelerator_name(Hardware("mps")) == "mps"


def test_loaded_tensors_are_aligned_as_torch_aligns_its_own(whole):
    """Products of tensors that are aligned otherwise are rounded otherwise: a resumed run's log would differ."""
    state = whole.load()
    tensors = [*state["method"].values(), *state["projection"].values(), *state["readouts"]["lda"].values()]
    assert len(tensors) > 5
    assert all(tensor.data_ptr() % 64 == 0 for tensor in tensors if tensor.numel())


def test_the_log_is_the_same_after_a_resume(tmp_path, whole):
    half = Path(shutil.copytree(whole.folder, tmp_path / "half"))
    (half / "checkpoints" / "latest").write_text("task-01")
    resumed = train.resume(half)
    events = [list(run.events("task")) for run in (whole, resumed)]
    for event in itertools.chain(*events):
        del event["seconds"], event["memory"], event["readouts"]
    assert events[0] == events[1][:1] + events[1][-2:]


def test_released_runs_on_fewer_images_than_it_wants(tmp_path):
    run = train.train(
        tiny.config(projection=ReleasedBasis.Config(energy=0.97)), tmp_path / "run"
    )  # 24 images, width 48
    *_, last = run.events("task")
    assert 0 < last["ranks"]["prompts"] < 20
    with pytest.raises(ValueError, match=r"expected --projection\.when after with --save-every-steps 2, got before"):
        train.train(tiny.config(projection=ReleasedBasis.Config(), save_every_steps=2), tmp_path / "other")


def test_a_kill_after_the_checkpoint_of_a_task_loses_nothing_of_its_log(tmp_path, monkeypatch):
    write = Run.write_matrices

    def stop(run, matrices):
        write(run, matrices)
        if len(list(run.events("task"))) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Run, "write_matrices", stop)
        with pytest.raises(KeyboardInterrupt):
            train.train(tiny.config(epochs=1), tmp_path / "run")
    assert Run.open(tmp_path / "run").latest_checkpoint() == "task-02"
    run = train.resume(tmp_path / "run")
    assert [event["task"] for event in run.events("task")] == [0, 1, 2]


def test_frozen_freezes_all_prompts_of_every_method(tmp_path):
    config = baselines.frozen(tiny.config(method=tiny.DUALPROMPT, epochs=1))
    run = train.train(config, tmp_path / "run")
    first, last = final(run, "task-01"), final(run)
    prompts = [name for name in last if name.startswith("/method/") and "head" not in name]
    assert {"keys", "separate_values"} <= {name.rpartition(".")[2] for name in prompts}
    for name in prompts:
        assert torch.equal(first[name], last[name]), name


def test_mixed_precision_runs(tmp_path):
    run = train.train(tiny.config(precision="bf16-mixed", epochs=1, tasks=2), tmp_path / "run")
    assert all(tensor.isfinite().all() for name, tensor in final(run, "task-02").items()
               if "matrices" not in name and "within" not in name)  # fmt: skip


def test_bf16_runs_are_evaluated_as_they_were(tmp_path):
    run = train.train(tiny.config(precision="bf16-mixed", epochs=1), tmp_path / "run")
    for column, row in last_rows(evaluate_checkpoints(run, run.config)).items():
        torch.testing.assert_close(row, run.matrices()[column][2], rtol=0, atol=0)


@pytest.mark.parametrize(
    "projection", [ReleasedBasis.Config(), ReleasedBasis.Config(when="after"), Orthogonal.Config()]
)
def test_nothing_to_protect_is_no_endless_search(tmp_path, projection):
    config = tiny.config(method=HeadOnly.Config(), projection=projection, epochs=1)
    *_, last = train.train(config, tmp_path / "run").events("task")
    assert last["ranks"] == {}


def test_a_run_inside_a_task_is_evaluated_at_the_last_whole_task(whole, tmp_path, monkeypatch):
    run = train.train(tiny.config(), tmp_path / "run")
    run.save("task-03-step-000002", {**run.load("task-02"), "step": 2, "optimizer": None})
    assert run.progress() == (2, 3)
    again = evaluate_checkpoints(run, run.config)["lda"]
    torch.testing.assert_close(again[1, :2], whole.matrices()["lda"][1, :2], rtol=0, atol=0)
    assert again[[0, 2]].isnan().all()
    every = evaluate_checkpoints(run, run.config, every_task=True)["lda"]
    torch.testing.assert_close(every[:2], whole.matrices()["lda"][:2], rtol=0, atol=0, equal_nan=True)


def test_resuming_says_where(tmp_path):
    run = train.train(tiny.config(epochs=1), tmp_path / "run")
    (run.folder / "checkpoints" / "latest").write_text("task-02")
    (run.folder / "accuracy.csv").unlink()  # a crash came before the table
    train.resume(run.folder, Hardware("cpu", workers=1))
    (event,) = run.events("resumed")
    assert event["hardware"]["workers"] == 1
    assert event["environment"]["versions"]["torch"]
    assert len(run.matrices()) == 2


def test_another_encoder_is_refused(whole, tmp_path):
    other = replace(tiny.BACKBONE, arguments={**tiny.BACKBONE.arguments, "mlp_ratio": 2})
    with pytest.raises(RunError, match="expected the encoder of this run"):
        opened(whole, replace(whole.config, backbone=other))


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("selection", ["image", "batch"])
def test_two_processes_learn_the_same(tmp_path, precision, selection):
    script = tmp_path / "two.py"
    script.write_text(
        "import sys, tiny, torch\n"
        "from dataclasses import replace\n"
        "from pathlib import Path\n"
        "from pgp import train\n"
        "from pgp.config import Hardware\n"
        "torch.set_num_threads(1)\n"
        "if __name__ == '__main__':\n"
        "    hardware = Hardware('cpu', devices=int(sys.argv[1]), micro_batch_size=1)\n"
        "    config = tiny.config(hardware=hardware, precision=sys.argv[3])\n"
        "    config = replace(config, method=replace(config.method, selection=sys.argv[4]))\n"
        "    train.train(config, Path(sys.argv[2]))\n"
    )
    runs = {}
    for devices in (1, 2):
        folder = tmp_path / f"run{devices}"
        command = [sys.executable, str(script), str(devices), str(folder), precision, selection]
        path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
        subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": path}, timeout=300)
        runs[devices] = Run.open(folder)
    one, two = final(runs[1]), final(runs[2])
    for name in one:
        if name.startswith("/method"):
            near = 1e-3 if precision == "32-true" else 0.05  # Adam divides what bf16 rounds
            torch.testing.assert_close(one[name], two[name], rtol=near, atol=near)
    for column, matrix in runs[1].matrices().items():
        assert (matrix - runs[2].matrices()[column]).nan_to_num().abs().max() <= 1 / 8 + 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("learns", [True, False])
def test_readouts_of_two_processes_are_those_of_one(learns, tmp_path):
    """Statistics, views, results on held-out images and what they choose; of 5 images a class, one is held out."""
    script = tmp_path / "two.py"
    script.write_text(
        "import sys, tiny, torch\n"
        "from pathlib import Path\n"
        "from pgp import train\n"
        "from pgp.config import Hardware\n"
        "from pgp.datasets.synthetic import Synthetic\n"
        "from pgp.methods.head_only import HeadOnly\n"
        "from pgp.readouts.lda import LDA\n"
        "from pgp.readouts.ranpac import RanPAC\n"
        "torch.set_num_threads(1)\n"
        "if __name__ == '__main__':\n"
        "    readouts = (LDA.Config(patches=True, shrinkage=None), RanPAC.Config(dimensions=32))\n"
        "    config = tiny.config(hardware=Hardware('cpu', devices=int(sys.argv[1])), readouts=readouts, views=1,\n"
        "                         dataset=Synthetic(noise=0.3, per_class=7),\n"
        "                         method=HeadOnly.Config(learns=bool(int(sys.argv[3]))))\n"
        "    train.train(config, Path(sys.argv[2]))\n"
    )
    states = []
    for devices in (1, 2):
        folder = tmp_path / f"run{devices}"
        command = [sys.executable, str(script), str(devices), str(folder), str(int(learns))]
        path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
        subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": path}, timeout=300)
        states.append(Run.open(folder).load()["readouts"])
    one, two = states
    assert one.keys() == two.keys() == {"lda+patches+tuned", "ranpac-32"}
    assert one["lda+patches+tuned"]["test_sizes"][:, 0].sum() > 0
    for name, state in one.items():
        for key, tensor in state.items():
            torch.testing.assert_close(two[name][key], tensor, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({"readouts": (LDA.Config(),)}, False),
        ({"readouts": (LDA.Config(), MethodHead.Config())}, True),
        ({"readouts": (Logistic.Config(),)}, True),
        ({"readouts": (LDA.Config(),), "setting": "oil"}, True),
        ({"readouts": (LDA.Config(),), "method": L2P.Config(pool_size=4, length=1, top_k=1)}, True),
    ],
)
def test_a_head_is_trained_only_if_something_uses_it(tmp_path, monkeypatch, changes, steps):
    calls, step = [], train.train_step
    monkeypatch.setattr(train, "train_step", lambda *arguments: calls.append(1) or step(*arguments))
    train.train(tiny.config(**{"method": HeadOnly.Config(), "epochs": 1, **changes}), tmp_path / "run")
    assert bool(calls) == steps


ADAPTED = {
    "lora": LoRA.Config(rank=3),
    "coda": CODAPrompt.Config(layers=(0,), pool_size=12, per_task=4),
    "vpt": VPT.Config(),
}


@pytest.mark.parametrize("name", ADAPTED)
def test_first_session_adaptation_trains_the_first_task_and_leaves_features_as_they_are(name, tmp_path):
    one = {"method": ADAPTED[name], "adapt": "first-task", "drift_images": 4, "projection": NoProjection.Config()}
    run = train.train(tiny.config(**one), tmp_path / "run")
    states = [run.load(CheckpointName(number))["method"] for number in (1, 2, 3)]
    for name, tensor in states[0].items():
        assert torch.equal(states[1][name], tensor) != name.startswith("head"), name
    lda = train.train(tiny.config(**one, readouts=(LDA.Config(),)), tmp_path / "lda")
    steps = [line["task"] for line in lda.events("train")]
    assert set(steps) == {0}  # no head is used, so later tasks train nothing
    assert torch.equal(lda.matrices()["lda"].nan_to_num(), run.matrices()["lda"].nan_to_num())


@pytest.mark.parametrize("mask", [False, True])
def test_first_session_adaptation_copies_no_prompts_over_those_that_images_select(mask, tmp_path):
    method = L2P.Config(pool_size=6, length=1, top_k=2, shared_pool=True, prompt_mask=mask)
    config = tiny.config(method=method, adapt="first-task", projection=NoProjection.Config())
    run = train.train(config, tmp_path / "run")
    first, last = (run.load(CheckpointName(number))["method"]["pool.prompts"] for number in (1, 3))
    assert torch.equal(first, last)


SINGLE = {
    "head": (HeadOnly.Config(), 0),
    "lora": (LoRA.Config(rank=3), 0),
    "adapter": (Adapter.Config(rank=3), 0),
    "vpt": (VPT.Config(length=2), 0),
    "vpt, norm penalty": (VPT.Config(length=2, norm_penalty=0.1), 1),
    "l2p": (L2P.Config(top_k=2), 1),  # keys are pulled to queries
}


@pytest.mark.parametrize("name", SINGLE)
def test_a_task_of_one_class_is_trained_only_if_it_can_change_something(name, tmp_path, monkeypatch):
    method, trains = SINGLE[name]
    one = {
        "method": method,
        "tasks": 6,
        "epochs": 1,
        "readouts": (MethodHead.Config(), LDA.Config(compensate="linear")),
    }
    run = train.train(tiny.config(**one), tmp_path / "run")
    assert bool(run.events("train")) == trains
    for kind in (HeadOnly, AdaptedEncoder, VPT):
        monkeypatch.setattr(kind, "can_learn", lambda *_: True)
    trained = train.train(tiny.config(**one), tmp_path / "trained")
    assert trained.events("train")
    ends = [final(one, "task-06") for one in (run, trained)]
    for key, tensor in ends[1].items():
        if key.startswith("/method"):
            assert torch.equal(ends[0][key], tensor), key
        elif key.startswith("/readouts"):  # what moved by nothing is computed again
            torch.testing.assert_close(ends[0][key], tensor, rtol=1e-6, atol=1e-6)
    assert run.matrices().keys() == trained.matrices().keys()


def test_weight_decay_is_applied_in_tasks_of_one_class(tmp_path):
    decays = Optimizer("adamw", lr=0.1, weight_decay=0.01)
    run = train.train(tiny.config(method=HeadOnly.Config(), tasks=6, epochs=1, optimizer=decays), tmp_path / "run")
    assert {event["task"] for event in run.events("train")} == set(range(6))


def test_images_pass_before_training_only_if_their_features_may_change(tmp_path, monkeypatch):
    calls, passed = [], observe.observe
    monkeypatch.setattr(observe, "observe", lambda *a, **k: calls.append(k.get("keep")) or passed(*a, **k))
    one = {"method": LoRA.Config(rank=3), "readouts": (LDA.Config(compensate="linear"),), "epochs": 1}
    passes = {}
    for name, changes in (
        ("every", {}),
        ("first", {"adapt": "first-task"}),
        ("single", {"tasks": 6}),
        ("head", {"method": HeadOnly.Config()}),
    ):
        train.train(tiny.config(**{**one, **changes}), tmp_path / name)
        passes[name], calls[:] = calls.count(True), []
    assert passes == {"every": 2, "first": 0, "single": 0, "head": 0}


def test_compensate_is_called_only_for_readouts_that_need_it(tmp_path, monkeypatch):
    called, compensate = [], StatisticsReadout.compensate
    monkeypatch.setattr(
        StatisticsReadout, "compensate", lambda self, *pair: called.append(self.name) or compensate(self, *pair)
    )
    readouts = (LDA.Config(), LDA.Config(compensate="nearby"), RanPAC.Config(dimensions=16))
    train.train(tiny.config(method=LoRA.Config(rank=3), epochs=1, readouts=readouts), tmp_path / "run")
    assert called == ["lda+nearby"] * 2


@pytest.mark.parametrize("method", [LoRA.Config(rank=3), tiny.DUALPROMPT], ids=["lora", "dualprompt"])
def test_it_is_told_when_experts_leave_nothing_to_protect(method, tmp_path):
    run = train.train(tiny.config(method=method, experts="task", epochs=1), tmp_path / "run")
    told = [event["warning"] for event in run.events("data") if "protects nothing" in event.get("warning", "")]
    shares = isinstance(method, DualPrompt.Config)  # its general prompts
    assert told == [] if shares else told[0].startswith("--projection orthogonal protects nothing: with --experts")


@pytest.mark.parametrize("energy", [0.0, 1.0])
def test_it_is_told_when_no_free_direction_is_left(energy, tmp_path):
    projection = Orthogonal.Config("input", energy=energy, apply_to="update")
    settings = tiny.config(
        method=LoRA.Config(rank=3, places=("fc2",), layers=(0,)), projection=projection, dataset=Synthetic()
    )
    run = train.train(settings, tmp_path / "run")
    warnings = [event["warning"] for event in run.events("data") if "warning" in event]
    full = [text for text in warnings if "no free direction is left" in text]
    if not energy:
        assert not full
        return
    assert full[0].startswith("task 2 of 3: no free direction is left for any protected parameter")
    states = [run.load(CheckpointName(number))["method"] for number in (1, 2)]
    for name, tensor in states[0].items():  # from then on, only the head learns
        torch.testing.assert_close(states[1][name], tensor, rtol=0, atol=1e-5 if "head" not in name else 9)
    assert not torch.equal(states[0]["head.weight"], states[1]["head.weight"])
