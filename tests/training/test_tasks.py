"""What each setting brings, from the data's words to the figures, and that a run knows its data again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import unicodedata
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import tiny
from conftest import golden_clip
from pgp import progress, train
from pgp.analysis.checkpoints import evaluate_checkpoints
from pgp.backbones.base import Backbone
from pgp.backbones.clip import CLIP
from pgp.cli import main
from pgp.config import Config, Optimizer
from pgp.datasets.folder import Folder
from pgp.datasets.manifest import Manifest
from pgp.datasets.synthetic import Synthetic
from pgp.evaluation import metrics, online
from pgp.evaluation.online import OnlineAccuracy
from pgp.methods.clip_prompt import CLIPPrompt, ZeroShot
from pgp.methods.head_only import HeadOnly
from pgp.methods.lora import LoRA
from pgp.methods.vpt import VPT
from pgp.predict import Predictor
from pgp.readouts.head import MethodHead
from pgp.reports import figures, tables
from pgp.runs.data_paths import resolve_paths
from pgp.runs.run import Run
from pgp.system.storage import RunError
from pgp.training.devices import build_fabric
from pgp.training.session import Session
from pgp.training.tasks import (
    build_scenario,
    build_tasks,
    describe_data,
    single_class_warning,
    training_batches,
    unused_setting_warning,
    weight_decay_warning,
)

DOMAINS = Synthetic(classes=3, per_class=8, domains=3, noise=0.05)
TWO = Synthetic(classes=4, per_class=9, noise=0.05)


def write(folder, parts, classes="ant bee cat dog eel", each=3, size=(6, 4)):
    """A folder of images for each part and class."""
    for part in parts:
        for label, name in enumerate(classes.split()):
            for i in range(each):
                path = folder / part / name / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", size, (40 * label, 20 * i, 7)).save(path)
    return folder


@pytest.fixture
def photos(tmp_path):
    return write(tmp_path / "photos", ("train", "test"))


def config(folder, **changes):
    return tiny.config(
        **{"dataset": Folder(folder), "tasks": None, "epochs": 1, "method": HeadOnly.Config(), **changes}
    )


def scenario(config):
    config = resolve_paths(config)
    return build_scenario(config, config.dataset.build())


def names(scenario):
    return [(task.name, task.classes) for task in scenario.tasks]


def test_weight_decay_that_adam_makes_a_whole_step_is_a_warning(photos):
    one, two = (replace(config(photos, tasks=n), optimizer=Optimizer(weight_decay=1e-4)) for n in (1, 2))
    assert weight_decay_warning(one, scenario(one)) is None
    assert weight_decay_warning(two, scenario(two)).startswith(
        "weight decay 0.0001 with adam shrinks the head's weights"
    )
    mild = replace(two, optimizer=Optimizer("adamw", weight_decay=1e-4))
    assert weight_decay_warning(mild, scenario(mild)) is None


def test_settings_that_nothing_uses_are_a_warning():
    by_features = tiny.config(views=2)
    by_head = replace(by_features, readouts=(MethodHead.Config(),))
    assert unused_setting_warning(by_head) == "unused settings: views 2, because no readout is fitted to features"
    assert unused_setting_warning(by_features) is None
    assert unused_setting_warning(replace(by_head, views=0, expert_candidates=2)) == (
        "unused settings: expert_candidates 2, because there are no experts"
    )
    assert unused_setting_warning(replace(by_head, method=LoRA.Config(), experts="task", expert_candidates=2)) is None


def test_files_beside_the_data_decide_the_tasks(photos, tmp_path):
    assert [task.classes for task in scenario(config(photos)).tasks] == [(0, 1, 2), (3, 4)]
    assert single_class_warning(config(photos), scenario(config(photos))) is None
    single = scenario(config(photos, tasks=5))
    assert [task.classes for task in single.tasks] == [(i,) for i in range(5)]
    assert single_class_warning(config(photos), single).startswith(
        "a single class in task 1 of 5, task 2 of 5, task 3 of 5 and 2 more: "
    )
    assert single_class_warning(config(photos, method=HeadOnly.Config(learns=False)), single) is None
    assert [task.classes for task in scenario(config(photos, tasks=2)).tasks] == [(0, 1, 2), (3, 4)]
    (photos / "class_order.txt").write_text("dog\n eel\n\ncat\nant\nbee\n", encoding="utf-8-sig")
    assert [task.classes for task in scenario(config(photos, tasks=2)).tasks] == [(3, 4, 2), (0, 1)]
    (tmp_path / "order.txt").write_text("bee\nant\ncat\ndog\neel\n")
    own = config(photos, tasks=2, class_order=tmp_path / "order.txt")
    assert scenario(own).tasks[0].classes == (1, 0, 2)
    (photos / "class_order.txt").unlink()
    (photos / "tasks.json").write_text('{"pets": ["cat", "dog"], "small": ["bee", "ant", "eel"]}')
    assert names(scenario(config(photos))) == [("pets", (2, 3)), ("small", (1, 0, 4))]
    assert names(scenario(config(photos, tasks=2))) == names(scenario(config(photos)))
    assert names(scenario(own)) == [("", (1, 0, 2)), ("", (3, 4))]
    (tmp_path / "mine.json").write_text('{"all": ["ant", "bee", "cat", "dog", "eel"]}')
    assert names(scenario(config(photos, task_file=tmp_path / "mine.json"))) == [("all", (0, 1, 2, 3, 4))]


def test_the_first_task_may_be_larger_and_later_ones_have_an_increment(photos):
    half = config(photos, first_task=3, increment=1)
    assert [task.classes for task in scenario(half).tasks] == [(0, 1, 2), (3,), (4,)]
    assert [task.classes for task in scenario(config(photos, increment=2, tasks=9)).tasks] == [(0, 1), (2, 3), (4,)]
    named = config(photos, increment=3, class_order="seed-1993")
    order = np.random.RandomState(1993).permutation(5).tolist()
    assert [task.classes for task in scenario(named).tasks] == [tuple(order[:3]), tuple(order[3:])]
    assert resolve_paths(named).class_order == Path("seed-1993")
    assert Config.from_json(named.to_json()) == named
    with pytest.raises(ValueError, match="expected at most 5 classes in the first task"):
        scenario(config(photos, first_task=6, increment=1))
    with pytest.raises(ValueError, match="expected increment with first_task 2"):
        config(photos, first_task=2)
    with pytest.raises(ValueError, match="increment of at least 1, got 0"):
        config(photos, increment=0)
    with pytest.raises(ValueError, match="no increment with task_file or setting=dil"):
        config(photos, increment=1, setting="dil")
    (photos / "tasks.json").write_text('{"all": ["ant", "bee", "cat", "dog", "eel"]}')
    with pytest.raises(ValueError, match="says what the tasks are, and so does increment 2"):
        scenario(config(photos, increment=2))


def test_a_run_with_increments_resumes_and_takes_another_class(photos, tmp_path):
    settings = config(photos, first_task=3, increment=1, class_order="seed-1993", epochs=1)
    run = train.train(settings, tmp_path / "run")
    write(tmp_path / "more", ["train", "test"], "fox")
    more = train.resume(run.folder, add=Folder(tmp_path / "more"))
    assert [len(task) for task in more.data.tasks] == [3, 1, 1, 1]


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("class_order.txt", "ant bee", "unknown class 'ant bee' in .*class_order.txt: perhaps you meant 'bee'"),
        ("class_order.txt", "XYZ", r"unknown class 'XYZ' in .*class_order.txt: there are \['ant', "),
        ("class_order.txt", "ant\nbee\nbee\n", r"every class once in .*class_order.txt, got \['bee'\] again"),
        ("class_order.txt", "ant\nbee\n", r"every class in .*, got none of \['cat', 'dog', 'eel'\], 3 in all"),
        ("tasks.json", "{", "expected JSON in .*tasks.json: "),
        ("tasks.json", '["ant"]', "an object of task names .* got another value in .*tasks.json"),
        ("tasks.json", '{"a": "ant"}', "an object of task names .* got 'a' with 'ant' in"),
        ("tasks.json", '{"a": ["ant", 3]}', r"an object of task names .* got 'a' with \['ant', 3\]"),
        ("tasks.json", '{"a": []}', r"an object of task names .* got 'a' with \[\]"),
        ("tasks.json", '{"a": ["ant"], "a": ["bee"]}', r"every task once in .*, got \['a'\] again"),
        ("tasks.json", '{"a": ["ant", "bea"]}', "unknown class 'bea' in .*tasks.json: perhaps you meant 'bee'"),
        ("tasks.json", '{"a": ["ant"], "b": ["ant"]}', r"got \['ant'\] again; where tasks share .* --setting dil"),
        ("tasks.json", '{"a": ["ant"]}', "got none of .*, 4 in all"),
        ("tasks.json", b"\xff", "cannot read .*tasks.json as a text in UTF-8"),
    ],
)
def test_files_that_do_not_fit(photos, file, text, message):
    (photos / file).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message):
        scenario(config(photos))


@pytest.mark.skipif(sys.platform == "win32", reason="names that Windows refuses")
@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_files_beside_the_data_name_classes_in_any_unicode_form(tmp_path, form):
    other = {"NFC": "NFD", "NFD": "NFC"}[form]
    classes = [unicodedata.normalize(form, name) for name in ("café", "eel", "x\N{LINE SEPARATOR}y", " a")]
    for name in classes:
        write(tmp_path, [""], "")
        for i in range(3):
            (tmp_path / name).mkdir(exist_ok=True)
            Image.new("RGB", (6, 4), (9 * i, 1, 1)).save(tmp_path / name / f"{i}.png")
    order = ["eel", " a", "x\N{LINE SEPARATOR}y", unicodedata.normalize(other, "café")]
    (tmp_path / "class_order.txt").write_text("\n".join(order), encoding="utf-8-sig")
    ordered = scenario(config(tmp_path, tasks=2))
    assert [task.classes for task in ordered.tasks] == [(2, 0), (3, 1)]
    (tmp_path / "class_order.txt").unlink()
    (tmp_path / "tasks.json").write_text(json.dumps({"t": order}), encoding="utf-8")
    assert names(scenario(config(tmp_path))) == [("t", (2, 0, 3, 1))]
    (tmp_path / "tasks.json").write_text(f'{{"t": {"[" * 100_000}', encoding="utf-8")
    with pytest.raises(ValueError, match=r"expected JSON in .*tasks.json: maximum recursion depth"):
        scenario(config(tmp_path))
    (tmp_path / "tasks.json").unlink()
    (tmp_path / "class_order.txt").mkdir()
    with pytest.raises(ValueError, match=r"cannot read .*class_order.txt as a text in UTF-8: .*got a folder"):
        scenario(config(tmp_path))


def test_a_run_knows_its_images_whatever_form_their_names_are_copied_in(tmp_path):
    """Some systems store names in another Unicode form than they were given in."""
    for form in ("NFC", "NFD"):
        folder = tmp_path / form / "photos" / unicodedata.normalize(form, "café")
        folder.mkdir(parents=True)
        for name in ("é1", "ez", "f", "é"):
            Image.new("RGB", (6, 4)).save(folder / f"{unicodedata.normalize(form, name)}.png")
    one, other = (Folder(tmp_path / form / "photos").build() for form in ("NFC", "NFD"))
    assert describe_data(one, build_scenario(config(tmp_path), one)) == describe_data(
        other, build_scenario(config(tmp_path), other)
    )


def test_two_sources_of_an_order_are_refused(photos, tmp_path):
    everything = '{"a": ["ant", "bee", "cat", "dog"], "b": ["eel"]}'
    (photos / "tasks.json").write_text(everything)
    with pytest.raises(ValueError, match=r"expected 2 tasks, as .*tasks.json has it, got tasks 3: leave --tasks out"):
        scenario(config(photos, tasks=3))
    with pytest.raises(ValueError, match=r"tasks.json decides the order of classes, and so does shuffle"):
        scenario(config(photos, shuffle=True))
    (photos / "class_order.txt").write_text("ant\nbee\ncat\ndog\neel\n")
    with pytest.raises(ValueError, match=r"tasks.json and .*class_order.txt both decide the order of classes"):
        scenario(config(photos))
    (photos / "tasks.json").unlink()
    with pytest.raises(ValueError, match=r"class_order.txt decides the order of classes, and so does shuffle"):
        scenario(config(photos, shuffle=True))
    for changes in ({"class_order": Path("x"), "task_file": Path("y")}, {"task_file": Path("y"), "shuffle": True}):
        with pytest.raises(ValueError, match=f"expected one of {' and '.join(changes)}, got both: each decides"):
            config(photos, **changes)
    with pytest.raises(ValueError, match="expected task_file for the order of domains"):
        config(photos, class_order=Path("x"), setting="dil")
    with pytest.raises(ValueError, match="expected setting=oil for order=listed, got cil"):
        config(photos, order="listed")
    with pytest.raises(ValueError, match=r"cannot read .*nowhere.json as a text"):
        scenario(config(tmp_path / "photos", task_file=tmp_path / "nowhere.json"))


def listed(folder, rows):
    (folder / "list.csv").write_text("path,label,split,task\n" + "".join(",".join(row) + "\n" for row in rows))
    return config(folder, dataset=Manifest(folder / "list.csv"))


def test_a_table_names_its_tasks(photos):
    tasks = {"ant": "2", "bee": "10", "cat": "10", "dog": "2", "eel": "10"}
    rows = [
        (f"{part}/{name}/{i}.png", name, part, task)
        for part in ("train", "test")
        for name, task in tasks.items()
        for i in range(3)
    ]
    assert names(scenario(listed(photos, rows))) == [("2", (0, 3)), ("10", (1, 2, 4))]
    with pytest.raises(
        ValueError, match=r"every class once in the data's column of tasks, got \['ant'\] again; .* dil"
    ):
        scenario(listed(photos, [*rows[1:], (*rows[0][:3], "10")]))
    with pytest.raises(ValueError, match=r"every class in the data's column of tasks, got none of \['ant'\]"):
        scenario(listed(photos, [(*row[:3], "" if row[1] == "ant" else row[3]) for row in rows]))
    by_image = [(*row[:3], f"day {int(row[0][-5]) // 2}") for row in rows]
    days = scenario(replace(listed(photos, by_image), setting="dil"))
    assert [(task.name, len(task.classes), len(task.train)) for task in days.tasks] == [
        ("day 0", 5, 10),
        ("day 1", 5, 5),
    ]
    (photos / "tasks.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tasks.json and the data's own column of tasks both make tasks"):
        scenario(listed(photos, rows))


@pytest.mark.parametrize("parts", [["sketch", "photo"], [f"{part}/{d}" for part in ("train", "test") for d in "ba"]])
def test_domains_are_folders(tmp_path, parts):
    whole = scenario(config(write(tmp_path / "d", parts), setting="dil"))
    assert [task.name for task in whole.tasks] == sorted({Path(part).name for part in parts})
    assert all(task.classes == (0, 1, 2, 3, 4) for task in whole.tasks)
    assert whole.seen_classes(1) == (0, 1, 2, 3, 4)
    data = Folder(tmp_path / "d", domains=True).build()
    for task in whole.tasks:
        for split, indices in ((data.train, task.train), (data.test, task.test)):
            assert all(split.paths[i].parent.parent.name == task.name for i in indices.tolist())


def test_domains_in_another_order(tmp_path):
    root = write(tmp_path / "d", ["art", "photo", "sketch"])
    orders = {
        tuple(name for name, _ in names(scenario(config(root, setting="dil", shuffle=True, seed=s)))) for s in range(9)
    }
    assert len(orders) > 3
    (root / "tasks.json").write_text('{"flat": ["sketch", "art"], "real": ["photo"]}')
    whole = scenario(config(root, setting="dil"))
    assert [(task.name, len(task.train), len(task.test)) for task in whole.tasks] == [("flat", 20, 10), ("real", 10, 5)]
    with pytest.raises(ValueError, match=r"decides the order of domains, and so does shuffle"):
        scenario(config(root, setting="dil", shuffle=True))
    (root / "tasks.json").write_text('{"flat": ["ant"]}')
    with pytest.raises(ValueError, match=r"unknown domain 'ant' in .*tasks.json: perhaps you meant 'art'"):
        scenario(config(root, setting="dil"))


def test_data_without_domains(photos, tmp_path):
    with pytest.raises(
        ValueError, match=r"expected folders DOMAIN/CLASS .*in .*, got folders \['ant', .* with none inside"
    ):
        scenario(config(photos, setting="dil"))
    write(tmp_path / "d", ["art/train", "art/test"])
    with pytest.raises(
        ValueError, match=r"train and test above all other folders, got train and test inside .*art: turn"
    ):
        scenario(config(tmp_path / "d", setting="dil"))
    with pytest.raises(ValueError, match="expected data with domains for --setting dil: folders DOMAIN/CLASS"):
        scenario(tiny.config(setting="dil"))
    with pytest.raises(ValueError, match="expected 3 tasks, as dil with its domains has it, got tasks 5"):
        scenario(tiny.config(setting="dil", dataset=DOMAINS, tasks=5))
    write(tmp_path / "e", ["train/art", "test/art", "test/photo"])
    with pytest.raises(ValueError, match=r"expected every domain of .*test in .*train too, got \['photo'\]"):
        scenario(config(tmp_path / "e", setting="dil"))


class TinyCLIP(CLIP.Config):
    """The encoder of the goldens."""

    tag = "tiny-clip"

    def build(self, size: int) -> Backbone:
        return golden_clip(torch.float32)


METHODS = {
    "l2p": tiny.config().method,
    "dualprompt": tiny.DUALPROMPT,
    "head-only": HeadOnly.Config(),
    "clip": CLIPPrompt.Config(context=4),
    "clip, per class": CLIPPrompt.Config(context=4, per_class=True),
    "zero-shot": ZeroShot.Config(),
}


def of(method, **changes):
    """A run of a method in seconds."""
    encoder = {"backbone": TinyCLIP(weights="random")} if "clip" in method or method == "zero-shot" else {}
    return tiny.config(**{"method": METHODS[method], "epochs": 1, "tasks": None, **encoder, **changes})


def final(run):
    return load_file(run.folder / "checkpoints" / run.latest_checkpoint() / "state.safetensors")


def same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=0, equal_nan=True)


def interrupted(config, folder, monkeypatch, at):
    """A run that stopped before step number `at`, and went on."""
    train_step, calls = train.train_step, []

    def crash(*arguments, **named):
        calls.append(None)
        if len(calls) == at:
            raise KeyboardInterrupt
        return train_step(*arguments, **named)

    monkeypatch.setattr(train, "train_step", crash)
    with pytest.raises(KeyboardInterrupt):
        train.train(config, folder)
    monkeypatch.setattr(train, "train_step", train_step)
    return train.resume(folder)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns_domain_after_domain(tmp_path, monkeypatch, method):
    changes = {"dataset": DOMAINS, "setting": "dil", "save_every_steps": 2}
    run = train.train(of(method, **changes), tmp_path / "whole")
    assert run.config.tasks == 3
    assert [list(labels) for labels in run.data.tasks] == [[0, 1, 2]] * 3
    assert list(run.data.task_names) == ["tint 0", "tint 1", "tint 2"]
    assert [len(matrix) for matrix in run.matrices().values()] == [3, 3]
    assert metrics.average_accuracy(run.matrices()["lda"]) > 0.5  # chance is 1 in 3
    assert Predictor(run).classes == tuple(f"pattern {label}" for label in range(3))
    state = run.load()
    assert state["readouts"]["lda"]["counts"].tolist() == [24.0] * 3
    if method != "zero-shot":
        assert interrupted(of(method, **changes), tmp_path / "run", monkeypatch, at=6).latest_checkpoint() == "task-03"
        same(final(run), final(Run.open(tmp_path / "run")))


def test_clip_knows_a_class_by_the_context_of_the_last_domain_that_showed_it(tmp_path):
    run = train.train(of("clip", dataset=DOMAINS, setting="dil"), tmp_path / "run")
    session = Session(build_fabric(run.config), run.config, progress.no_progress())
    state = session.new_state()
    state.load_state_dict(run.load())
    last = session.scenario.tasks[2]
    with torch.no_grad():
        expected = torch.nn.functional.normalize(state.method.text_features(last), dim=-1)
    torch.testing.assert_close(state.method.head.text[list(last.classes)], expected)


def streamed(config, folder):
    run = train.train(config, folder)
    return run, list(run.events("stream"))


@pytest.mark.parametrize("method", ["l2p", "clip", "zero-shot"])
def test_what_comes_is_predicted_before_it_is_learned(tmp_path, monkeypatch, method):
    asked, learned, predict, train_step = [], [], OnlineAccuracy.predict, train.train_step

    def spied(self, method, images, labels, task, seen, query):
        assert query is None
        assert len(learned) == len(asked) or method.trainable_state_dict().keys() == {"head.text"}
        assert set(seen) == set(range(2 * task.index + 2))
        asked.append(labels)
        predict(self, method, images, labels, task, seen, query)

    def step(*arguments, **named):
        assert len(learned) == len(asked) - 1
        learned.append(arguments[3].labels)
        return train_step(*arguments, **named)

    monkeypatch.setattr(OnlineAccuracy, "predict", spied)
    monkeypatch.setattr(train, "train_step", step)
    run, looks = streamed(of(method, dataset=TWO, setting="oil", tasks=2, log_every_steps=1), tmp_path / "run")
    assert all(torch.equal(*pair) for pair in zip(asked, learned, strict=method != "zero-shot"))
    assert torch.cat(asked).bincount().tolist() == [9] * 4
    counts = run.load()["stream"]["counts"]
    assert counts[:, 1].tolist() == [18, 18]
    assert looks[-1]["images"] == 36
    assert looks[-1]["accuracy"] == pytest.approx(float(counts[:, 0].sum()) / 36)
    last = [event["stream_accuracy"] for event in run.events("task")]
    assert last == pytest.approx((counts[:, 0] / 18).tolist())
    if method != "zero-shot":
        assert [look["images"] for look in looks] == [8, 16, 18, 26, 34, 36]
        running = sum(look["recent"] * new for look, new in zip(looks, [8, 8, 2, 8, 8, 2], strict=True)) / 36
        assert looks[-1]["accuracy"] == pytest.approx(running)


def test_a_process_that_predicts_no_image_counts_on_its_device(monkeypatch):
    """NCCL adds only tensors of a GPU; torch's meta device stands in for it."""
    devices = []
    monkeypatch.setattr(online, "all_reduce_sum_", lambda own: devices.append(own.device.type) or own.new_zeros(2))
    stream = OnlineAccuracy(2, torch.device("meta"))
    stream.load_state_dict({"counts": torch.zeros(2, 2, dtype=torch.int64)})
    monkeypatch.setattr(torch.Tensor, "cpu", lambda own: torch.zeros(own.shape, dtype=own.dtype))
    stream.summarize(build_tasks(of("l2p", dataset=TWO, tasks=2))[1].tasks[0])
    assert devices == ["meta"]


def test_the_stream_is_what_the_head_would_have_said(tmp_path, monkeypatch):
    """Step by step, beside a plain loop over the same batches."""
    config = of("clip", dataset=TWO, setting="oil", tasks=2, log_every_steps=1)
    right, train_step = [], train.train_step

    def step(session, state, optimizer, batch, task, share):
        state.method.end_task(task)
        view = session.config.transforms.test()
        for i, label in zip(batch.indices.tolist(), batch.labels.tolist(), strict=True):
            with torch.no_grad():
                logits = state.method(view(session.data.train.image(i))[None])[0, : 2 * task.index + 2]
            right.append(int(logits.argmax()) == label)
        return train_step(session, state, optimizer, batch, task, share)

    monkeypatch.setattr(train, "train_step", step)
    _, looks = streamed(config, tmp_path / "run")
    assert looks[-1]["accuracy"] == pytest.approx(sum(right) / 36)
    assert 0 < sum(right) < 36


@pytest.mark.parametrize("method", [METHODS["l2p"], VPT.Config(length=2, norm_penalty=1.0)])
def test_predicting_changes_nothing_of_what_is_learned(tmp_path, method):
    config = of("l2p", dataset=TWO, tasks=2)
    ends = [
        final(train.train(replace(config, method=method, setting=setting), tmp_path / setting))
        for setting in ("cil", "oil")
    ]
    assert ends[1].pop("/stream/counts").sum() > 0
    same(*ends)


@pytest.mark.parametrize("method", ["dualprompt", "clip"])
def test_an_online_run_resumes_bitwise(tmp_path, monkeypatch, method):
    config = of(method, dataset=TWO, setting="oil", tasks=2, log_every_steps=2)
    run = train.train(config, tmp_path / "whole")
    resumed = interrupted(replace(config, save_every_steps=2), tmp_path / "run", monkeypatch, at=6)
    assert next(iter(resumed.events("resumed")))["step"] == 2
    same(final(run), final(resumed))
    assert tables._online_accuracy(run) == tables._online_accuracy(resumed)


def test_images_come_as_listed(tmp_path, monkeypatch):
    came, train_step = [], train.train_step

    def step(session, state, optimizer, batch, task, share):
        came.extend(batch.indices.tolist())
        return train_step(session, state, optimizer, batch, task, share)

    monkeypatch.setattr(train, "train_step", step)
    config = of("head-only", dataset=TWO, setting="oil", tasks=2, order="listed", epochs=3)
    train.train(config, tmp_path / "listed")
    assert came == list(range(36))
    came.clear()
    train.train(replace(config, order="shuffled"), tmp_path / "shuffled")
    assert sorted(came) == list(range(36)) != came


@pytest.mark.looks_at_figures
def test_reports_show_the_stream_where_there_is_one(tmp_path, capsys):
    online = of("head-only", dataset=TWO, setting="oil", tasks=2, log_every_steps=1)
    for seed in (1, 2):
        train.train(replace(online, seed=seed), tmp_path / f"oil{seed}")
    train.train(replace(online, setting="cil"), tmp_path / "cil")
    runs = {name: Run.open(tmp_path / name) for name in ("oil1", "oil2", "cil")}
    text = tables.markdown(tables.result_rows(list(runs.values())))
    assert "stream accuracy |" in text
    rows = [line.split(" | ") for line in text.splitlines()[2:]]
    assert {row[0]: "±" in row[-1] for row in rows} == {"| setting oil": True, "| setting cil": False}
    assert "stream" not in tables.markdown(tables.result_rows([runs["cil"]]))
    for name in runs:
        figures.draw_accuracy(tables.result_rows([runs[name]]), tmp_path / f"{name}.png")
    with Image.open(tmp_path / "oil1.png") as wide, Image.open(tmp_path / "cil.png") as narrow:
        assert wide.width > narrow.width  # a panel more
    main.main(["report", *(str(run.folder) for run in runs.values()), "--output", str(tmp_path / "out")])
    assert "stream" in capsys.readouterr().out


@pytest.mark.slow
def test_two_processes_see_one_stream(tmp_path):
    script = tmp_path / "two.py"
    script.write_text(
        "import sys, tiny, torch\n"
        "from pathlib import Path\n"
        "from pgp import train\n"
        "from pgp.config import Hardware\n"
        "from pgp.datasets.synthetic import Synthetic\n"
        "from pgp.methods.head_only import HeadOnly\n"
        "torch.set_num_threads(1)\n"
        "if __name__ == '__main__':\n"
        "    data = Synthetic(classes=4, per_class=9, noise=.05) if sys.argv[3] == 'oil' else Synthetic(domains=3)\n"
        "    hardware = Hardware('cpu', devices=int(sys.argv[1]))\n"
        "    config = tiny.config(hardware=hardware, setting=sys.argv[3], dataset=data, tasks=None, batch_size=7,\n"
        "                         method=HeadOnly.Config())\n"
        "    train.train(config, Path(sys.argv[2]))\n"
    )
    for setting in ("oil", "dil"):
        runs = []
        for devices in ("1", "2"):
            folder = tmp_path / f"{setting}{devices}"
            command = [sys.executable, str(script), devices, str(folder), setting]
            here = str(Path(__file__).parents[1])
            path = os.pathsep.join([here, os.environ.get("PYTHONPATH", "")])
            subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": path}, timeout=300)
            runs.append(Run.open(folder))
        one, two = (list(run.events("stream")) for run in runs)
        assert [look["images"] for look in one] == [look["images"] for look in two]
        assert all(abs(a["accuracy"] - b["accuracy"]) < 0.1 for a, b in zip(one, two, strict=True))
        for column, matrix in runs[0].matrices().items():
            assert (matrix - runs[1].matrices()[column]).nan_to_num().abs().max() < 0.2


def test_data_lie_where_they_lay_whatever_the_working_folder(photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.json").write_text('{"a": ["ant", "bee", "cat"], "b": ["dog", "eel"]}')
    run = train.train(config(Path("photos"), task_file=Path("mine.json")), tmp_path / "run")
    assert (run.config.dataset.root, run.config.task_file) == (photos, tmp_path / "mine.json")
    assert (run.config.tasks, list(run.data.task_names)) == (2, ["a", "b"])
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    (run.folder / "checkpoints" / "latest").write_text("task-01")
    assert len(train.resume(run.folder).matrices()["lda"]) == 2
    assert Config.from_json(run.config.to_json()) == run.config


def test_a_run_knows_its_data_again(photos, tmp_path):
    run = train.train(config(photos, tasks=2), tmp_path / "run")
    (run.folder / "checkpoints" / "latest").write_text("task-01")
    spare = photos / "train" / "ant" / "0.png"
    began = rf"expected the data that {run.folder} began with, but the"
    spare.rename(tmp_path / "0.png")
    with pytest.raises(RunError, match=rf"{began} numbers of training images differ \(9 before, 8 now\): restore"):
        train.resume(run.folder)
    (tmp_path / "0.png").rename(spare.with_name("00.png"))
    with pytest.raises(RunError, match=f"{began} labels or names of images differ"):
        train.resume(run.folder)
    with pytest.warns(UserWarning, match="evaluated on other images"):
        assert evaluate_checkpoints(run, run.config)  # the same classes
    spare.with_name("00.png").rename(spare)
    (photos / "class_order.txt").write_text("bee\nant\ncat\ndog\neel\n")
    for again in (lambda: train.resume(run.folder), lambda: evaluate_checkpoints(run, run.config)):
        with pytest.raises(RunError, match=rf"{began} classes in each task differ \(0 before, 1 now\)"):
            again()
    (photos / "class_order.txt").unlink()
    write(photos, ("train", "test"), "fly")
    with pytest.raises(RunError, match=rf"{began} classes differ \(5 of them before, 6 now\)"):
        train.resume(run.folder)
    for part in ("train", "test"):
        for path in (photos / part / "fly").iterdir():
            path.unlink()
        (photos / part / "fly").rmdir()
    assert train.resume(run.folder).latest_checkpoint() == "task-02"


def test_the_same_data_elsewhere_are_the_same_experiment(tmp_path):
    for place, seed in (("here", 1), ("there", 2)):
        write(tmp_path / place, ("train", "test"))
        train.train(config(tmp_path / place, seed=seed, tasks=2), tmp_path / f"run{seed}")
    (line, _) = tables.result_rows([Run.open(tmp_path / f"run{seed}") for seed in (1, 2)])
    assert len(line.matrices) == 2


def test_each_process_has_an_image_of_a_task_with_one():
    config = tiny.config(epochs=1, tasks=2)
    task = replace(build_tasks(config)[1].tasks[0], train=torch.tensor([7]))
    ((first, *rest),) = training_batches(config, task, world_size=4)
    assert [first.image, *(key.image for key in rest)] == [7] * 4
