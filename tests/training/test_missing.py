"""A run learns new classes from its own folder alone: no old image is needed or opened."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_added import config, contents, names_and_tasks, photos

from pgp import recipes, train
from pgp.cli import main
from pgp.datasets.folder import Folder
from pgp.evaluation import metrics
from pgp.predict import Predictor
from pgp.reports import tables
from pgp.runs.run import Run
from pgp.system.storage import RunError

OPENED: list[str] | None = None


def _record(event, arguments):
    if OPENED is not None and event in ("open", "os.scandir", "os.listdir"):
        OPENED.append(str(arguments[0]))


sys.addaudithook(_record)


@pytest.fixture
def opened(monkeypatch):
    """Paths that this process opens or lists, while the test runs."""
    paths: list[str] = []
    monkeypatch.setattr(sys.modules[__name__], "OPENED", paths)
    return paths


def quick(folder, **changes):
    return replace(recipes.without_training(config(folder)), views=1, **changes)


@pytest.mark.filterwarnings("default:the old images")
@pytest.mark.parametrize("learns", [True, False])
def test_classes_are_added_after_the_old_photos_were_moved_away(tmp_path, monkeypatch, capsys, opened, learns):
    monkeypatch.chdir(tmp_path)
    old = photos(tmp_path / "old", "bee", "cat", "dog")
    run = train.train((config if learns else quick)(old, drift_images=4 * learns), tmp_path / "run")
    matrices, description = run.matrices(), run.data
    hidden = tmp_path / "moved away"
    old.rename(hidden)
    opened.clear()
    photos(tmp_path / "new", "ant", "eel")
    main.main(["add", "run", "new"])
    told = capsys.readouterr()
    assert f"the old images in {old} are not evaluated: no data folder at" in " ".join(told.err.split())
    assert "average accuracy not measured" in told.err
    assert "not measured" in told.out
    photos(tmp_path / "more", "dim")
    main.main(["train", "--resume", "run", "--add", "more"])
    images = {Path(path) for path in opened if path.endswith(".png") and "/run/" not in path}
    assert images == {*Path(tmp_path / "new").rglob("*.png"), *Path(tmp_path / "more").rglob("*.png")}
    assert not any(str(hidden) in path for path in opened)

    again = Run.open(tmp_path / "run")
    assert names_and_tasks(again) == (["bee", "cat", "dog", "ant", "eel", "dim"], [[0, 1], [2], [3, 4], [5]])
    assert again.data.first_tasks(2).fingerprints == description.fingerprints
    assert again.data.train_images[:2] == description.train_images
    for column, matrix in again.matrices().items():
        assert torch.equal(matrix[:2, :2].nan_to_num(), matrices[column].nan_to_num())
        assert matrix.isfinite().tolist() == [
            [True, False, False, False],
            [True, True, False, False],
            [False, False, True, False],
            [False, False, True, True],
        ]
    assert "not measured" in tables.markdown(tables.result_rows([again]))
    assert not any(row.calibration for row in tables.result_rows([again]))  # it would be that of some tasks
    assert "nan" not in (again.folder / "metrics.jsonl").read_text().lower().replace('"ignored"', "")
    assert "nan" not in (again.folder / "report.md").read_text()
    predicted = Predictor(again)([tiny_image(hidden / "bee"), tiny_image(tmp_path / "new" / "eel")])
    if not learns:
        assert [prediction.names[0] for prediction in predicted] == ["bee", "eel"]

    hidden.rename(old)  # photos that are there again are evaluated again
    photos(tmp_path / "last", "ape")
    again = train.resume(again.folder, add=Folder(tmp_path / "last"))
    assert torch.stack(list(again.matrices().values()))[:, 4].isfinite().all()
    assert metrics.average_accuracy(next(iter(again.matrices().values()))) > 0


def tiny_image(folder):
    return next(iter(sorted(folder.iterdir())))


def test_it_is_the_run_that_was_given_all_classes_at_once(tmp_path):
    """In closed form, on frozen features, adding a task and having had it from the start are the same to rounding."""
    first, second = photos(tmp_path / "first", "bee", "cat", "dog"), photos(tmp_path / "second", "ant", "eel")
    run = train.train(quick(first), tmp_path / "run")
    shutil.rmtree(first)
    with pytest.warns(UserWarning, match="are not evaluated"):
        run = train.resume(run.folder, add=Folder(second))
    photos(tmp_path / "all", "bee", "cat", "dog", "ant", "eel")
    order = tmp_path / "tasks.json"
    order.write_text('{"a": ["bee", "cat"], "b": ["dog"], "c": ["ant", "eel"]}')
    whole = train.train(quick(tmp_path / "all", tasks=None, task_file=order), tmp_path / "whole")
    ours, theirs = (one.load()["readouts"]["lda+patches+normalize"] for one in (run, whole))
    names = [list(one.data.class_names) for one in (run, whole)]
    rows = [names[1].index(name) for name in names[0]]
    torch.testing.assert_close(ours["counts"], theirs["counts"][rows])
    assert ours["sums"].shape == theirs["sums"].shape
    images = [path for folder in sorted((tmp_path / "all").iterdir()) for path in sorted(folder.iterdir())]
    one, other = Predictor(run), Predictor(whole)
    columns = [other.classes.index(name) for name in one.classes]
    assert torch.equal(one.probabilities(images).argmax(1), other.probabilities(images)[:, columns].argmax(1))


def test_photos_that_have_changed_are_not_evaluated(tmp_path):
    """Somebody deleted some of the old photos: this run can learn, and says why the others do not count."""
    old = photos(tmp_path / "old", "bee", "cat", "dog")
    run = train.train(quick(old), tmp_path / "run")
    tiny_image(old / "cat").unlink()
    with pytest.warns(UserWarning, match="they are other images than those that were learned"):
        again = train.resume(run.folder, add=Folder(photos(tmp_path / "new", "ant", "eel")))
    assert again.matrices()["lda+patches+normalize"][2].isfinite().tolist() == [False, False, True]


@pytest.mark.parametrize("learns", [True, False])
def test_test_images_are_evaluated_after_the_training_images_were_deleted(tmp_path, learns):
    old, make = tmp_path / "old", config if learns else quick
    for part in ("train", "test"):
        photos(old / part, "bee", "cat", "dog")
    (old / "names.txt").write_text("bee wasp\ncat cat\ndog dog\n")
    run = train.train(make(old, drift_images=4 * learns), tmp_path / "run")
    shutil.rmtree(old / "train")
    first = train.resume(run.folder, add=Folder(photos(tmp_path / "new", "ant", "eel")))
    assert first.data.class_names[:3] == ("wasp", "cat", "dog")
    assert first.data.train_images[:2] == run.data.train_images[:2] == (10, 5)
    assert first.data.test_images[:2] == run.data.test_images[:2] == (10, 5)
    for matrix in first.matrices().values():
        assert matrix[2].isfinite().all()
    tiny_image(old / "test" / "cat").unlink()
    with pytest.warns(UserWarning, match="the old images in .* are not evaluated: no data folder at"):
        second = train.resume(run.folder, add=Folder(photos(tmp_path / "more", "dim")))
    assert next(iter(second.matrices().values()))[3].isfinite().tolist() == [False, False, True, True]


@pytest.mark.parametrize("learns", [True, False])
def test_one_image_of_a_class_suffices_with_a_word_about_it(tmp_path, learns):
    old = photos(tmp_path / "old", "bee", "cat", "dog")
    make = config if learns else quick
    run = train.train(make(old, drift_images=4 * learns), tmp_path / "run")
    new = photos(tmp_path / "new", "ant")
    for image in sorted((new / "ant").iterdir())[1:]:
        image.unlink()
    with pytest.warns(
        UserWarning, match=r"no test images of \['ant'\] \(1 in all\), so their accuracy is not measured"
    ):
        run = train.resume(run.folder, add=Folder(new))
    matrix = next(iter(run.matrices().values()))
    assert matrix.isfinite().tolist() == [[True, False, False], [True, True, False], [True, True, False]]
    if not learns:
        assert Predictor(run)([tiny_image(new / "ant")])[0].names == ("ant",)
    again = train.resume(run.folder, add=Folder(photos(tmp_path / "more", "eel")))  # and the run goes on
    assert again.progress() == (4, 4)
    assert next(iter(again.matrices().values()))[3].isfinite().tolist() == [True, True, False, True]


def test_an_interrupted_add_leaves_the_run_as_it_was(tmp_path, monkeypatch):
    run = train.train(config(photos(tmp_path / "old", "bee", "cat", "dog")), tmp_path / "run")
    shutil.rmtree(tmp_path / "old")
    before = contents(run.folder)
    new = photos(tmp_path / "new", "ant", "eel")
    save = train.end_task

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(train, "end_task", full)
    with pytest.warns(UserWarning, match="are not evaluated"), pytest.raises(OSError, match="No space left"):
        train.resume(run.folder, add=Folder(new))
    assert contents(run.folder) == before
    monkeypatch.setattr(train, "end_task", save)
    with pytest.warns(UserWarning, match="are not evaluated"):
        assert len(train.resume(run.folder, add=Folder(new)).data.tasks) == 3


def test_without_add_old_images_are_needed_as_before(tmp_path):
    run = train.train(config(photos(tmp_path / "old", "bee", "cat", "dog")), tmp_path / "run")
    (tmp_path / "old").rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="no data folder at"):
        train.resume(run.folder)
    new = photos(tmp_path / "new", "ant", "eel")
    with pytest.raises((ValueError, RunError), match=r"no data folder at|expected"):
        train.resume(run.folder, add=Folder(new), data=[tmp_path / "nowhere"])
    train.resume(run.folder, add=Folder(new), data=[tmp_path / "elsewhere"])
    assert torch.stack(list(run.matrices().values()))[:, 2].isfinite().all()


def test_pgp_add_needs_a_run_and_images(capsys):
    for words in ([], ["runs/x"], ["--add", "x"]):
        with pytest.raises(SystemExit):
            main.main(["add", *words])
        assert "expected a run folder and new images" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="0"):
        main.main(["add", "--help"])
    assert "pgp add RUN DATA" in " ".join(capsys.readouterr().out.replace("│", " ").split())


def test_runs_whose_data_have_changed_in_their_place_have_labels_of_their_own(tmp_path):
    for name, seed in (("before", 42), ("after", 42), ("again", 43)):
        data = photos(tmp_path / "photos", "bee", "cat")
        if name != "before":
            (data / "bee" / "0.png").unlink()
        train.train(quick(data, seed=seed, tasks=1), tmp_path / name)
        shutil.rmtree(data)
    groups = tables.group_runs([Run.open(tmp_path / name) for name in ("before", "after", "again")])
    assert [(label.rpartition(", ")[2], len(runs)) for label, runs in groups] == [("before", 1), ("after", 2)]
