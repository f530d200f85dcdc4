"""What a run records of each test image is what it predicts, and agrees with its accuracies."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import tiny
from pgp import train
from pgp.datasets.synthetic import Synthetic
from pgp.evaluation import predictions as per_image
from pgp.evaluation.predictions import Predictions, top_classes
from pgp.predict import Predictor
from pgp.runs.run import Run
from pgp.training.tasks import build_tasks

NOISY = Synthetic(noise=0.6)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    config = tiny.config(dataset=NOISY, drift_images=100)
    return train.train(config, tmp_path_factory.mktemp("predictions") / "run")


@pytest.mark.parametrize("column", ["head", "lda"])
def test_they_are_what_the_finished_run_predicts(run, column):
    found, (data, _) = run.predictions(), build_tasks(run.config)
    assert found.images.tolist() == list(range(len(data.test)))
    assert found.labels.equal(data.test.labels)
    predicted = Predictor(run, column)([data.test.image(i) for i in range(len(data.test))], top=5)
    names = run.data.class_names
    assert [tuple(names[i] for i in row) for row in found.top[column].tolist()] == [one.names for one in predicted]
    confidence = torch.tensor([one.probabilities[0] for one in predicted])
    assert (found.confidence[column] - confidence).abs().max() < 1e-3


def test_they_agree_with_the_accuracies(run):
    found, last = run.predictions(), run.events("task")[-1]
    for column, matrix in run.matrices().items():
        assert per_image.task_accuracy(found, column, 3).tolist() == pytest.approx(matrix[-1].tolist())
        tasks = torch.tensor([0, 0, 1, 1, 2, 2])
        confusion = per_image.task_confusion(found, column, tasks, 3).double()
        identified = confusion.diagonal() / confusion.sum(1)
        assert identified.tolist() == pytest.approx(last["identified"][column])
        by_class = per_image.class_confusion(found, column, 6).double()
        assert per_image.class_accuracy(found, column, 6).tolist() == pytest.approx(
            (by_class.diagonal() / by_class.sum(1)).tolist()
        )
        assert by_class.sum() == len(found.images)
        top = [per_image.task_accuracy(found, column, 3, k).mean() for k in (1, 3, 5)]
        assert 0 < top[0] < top[1] < top[2] <= 1


def test_prompts_that_images_select_agree_with_the_drift_meter(run):
    usage = run.predictions().usage
    assert usage.shape == (3, 10)
    assert usage.sum(1).tolist() == pytest.approx([2, 2, 2])  # top_k
    assert usage.mean(0).tolist() == pytest.approx(run.events("task")[-1]["drift"]["usage"])  # tasks of equal size


def test_a_resumed_run_records_the_same(tmp_path, run):
    half = Path(shutil.copytree(run.folder, tmp_path / "half"))
    (half / "checkpoints" / "latest").write_text("task-01")
    assert Run.open(half).predictions().labels.unique().tolist() == [0, 1]
    again, whole = train.resume(half).predictions(), run.predictions()
    for one, other in zip(_tensors(again), _tensors(whole), strict=True):
        assert one.equal(other)


def test_a_run_of_an_older_pgp_has_none_and_resumes(tmp_path, monkeypatch):
    state_dict = train.TrainState.state_dict
    with monkeypatch.context() as patch:
        patch.setattr(
            train.TrainState,
            "state_dict",
            lambda state: {key: value for key, value in state_dict(state).items() if key != "predictions"},
        )
        old = train.train(tiny.config(epochs=1, drift_images=0), tmp_path / "run")
    assert old.predictions() is None
    (old.folder / "checkpoints" / "latest").write_text("task-02")
    assert len(train.resume(old.folder).predictions().labels) == 24


def test_they_take_few_bytes(run):
    state = run.load(parts={"predictions"})["predictions"]
    size = sum(tensor.element_size() * tensor.numel() for tensor in _tensors(Predictions(**state)))
    assert size == 24 * (8 + 2 * 12) + 4 * state["usage"].numel()


def test_damaged_ones_are_refused(run):
    state = run.load(parts={"predictions"})["predictions"]
    with pytest.raises(ValueError, match="expected a value for each of 24 images, got 23"):
        Predictions.from_state({**state, "labels": state["labels"][1:]})


def test_of_equal_logits_the_prediction_is_the_first():
    logits = torch.zeros(1, 4)
    for predicted in range(4):
        assert top_classes(logits, torch.tensor([predicted]), 2)[0, 0] == predicted


def test_with_the_task_given_only_its_classes_are_recorded(tmp_path):
    run = train.train(replace(tiny.config(epochs=1, drift_images=0), setting="til"), tmp_path / "run")
    found = run.predictions()
    assert found.top["lda"].shape == (24, 5)
    assert (found.top["lda"][:, 2:] == -1).all()
    assert (found.top["lda"][:, :2] // 2 == found.tasks[:, None]).all()


def _tensors(found: Predictions) -> list[torch.Tensor]:
    return [found.images, found.labels, found.tasks, *found.top.values(), *found.confidence.values(), found.usage]
