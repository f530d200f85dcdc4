"""ContinualImageClassifier: the interface of scikit-learn over the code of `pgp train` and `Predictor`."""

from __future__ import annotations

import gc
import os
import pickle
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import joblib
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.utils import estimator_checks

import tiny
from pgp import ContinualImageClassifier, Predictor, estimator, recipes, train
from pgp.cli import main
from pgp.datasets.base import BadImageError
from pgp.datasets.folder import Folder
from pgp.datasets.in_memory import as_image
from pgp.datasets.synthetic import Synthetic
from pgp.readouts.lda import LDA
from pgp.system.storage import RunError

TRAINED = tiny.config(readouts=(LDA.Config(),), epochs=1)
QUICK = replace(recipes.without_training(tiny.config()), views=0)


def images(per_class=6, classes=6):
    """Arrays (n, 32, 32, 3) and labels, class by class."""
    split = Synthetic(noise=0.05, per_class=per_class).build().train
    order = split.labels.argsort(stable=True)
    order = order[split.labels[order] < classes]
    pixels = np.stack([split.image(index).permute(1, 2, 0).numpy() for index in order.tolist()])
    return pixels, split.labels[order].numpy()


X, Y = images()


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    """The folder of temporary folders, and the current one."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    monkeypatch.chdir(tmp_path)
    return folder


@pytest.fixture
def files(tmp_path):
    """The images as files `photos/<class>/<number>.png`, in the same order."""
    paths = []
    for number, (image, label) in enumerate(zip(X, Y, strict=True)):
        path = tmp_path / "photos" / f"{label}" / f"{number:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
        paths.append(path)
    return paths


def fitted(config=QUICK, selected=slice(None), **changes):
    return ContinualImageClassifier(config, **changes).fit(X[selected], Y[selected])


def logits(classifier, monkeypatch):
    """The logits of all images for `classes_`, up to a constant for each image."""
    monkeypatch.setattr(classifier._predictor._readout, "probabilities", lambda logits: logits)
    values = classifier.predict_proba(X)
    return values - values.mean(1, keepdims=True)


@pytest.mark.filterwarnings("ignore:no test images of")
@pytest.mark.parametrize("config", [replace(QUICK, views=1), TRAINED], ids=["quick", "trained"])
def test_it_gives_the_numbers_of_pgp_train_and_predictor(files, config):
    run = train.train(replace(config, dataset=Folder("photos", test_share=0), tasks=1), "run")
    expected = Predictor(run).probabilities(files).numpy()
    given = {
        "arrays": X,
        "list of arrays": list(X),
        "read-only": np.broadcast_to(X, X.shape),
        "upside down in memory": np.ascontiguousarray(X[:, ::-1])[:, ::-1],
        "paths": files,
        "texts": [str(path) for path in files],
        "series": pd.Series([str(path) for path in files], index=range(7, 7 + len(files))),
        "Pillow": [Image.open(path) for path in files],
        "all kinds": [kind for group in zip(X[::2], files[1::2], strict=True) for kind in group],
    }
    for name, some in given.items():
        classifier = ContinualImageClassifier(config).fit(some, Y)
        np.testing.assert_array_equal(classifier.predict_proba(some), expected, err_msg=name)
    assert classifier.classes_.tolist() == list(range(6))
    assert classifier.predict(X).dtype == Y.dtype
    assert (classifier.predict(X) == expected.argmax(1)).all()
    assert classifier.score(X, Y) == (expected.argmax(1) == Y).mean() > 0.8
    np.testing.assert_array_equal(classifier.unknown_scores(X), Predictor(run).unknown_scores(files).numpy())


def test_gray_arrays_are_gray_images(files):
    gray = X[..., 0]
    classifier = ContinualImageClassifier(QUICK).fit(gray, Y)
    np.testing.assert_array_equal(classifier.predict_proba(gray), classifier.predict_proba(np.stack([gray] * 3, -1)))
    assert torch.equal(as_image(gray[0]), as_image(Image.fromarray(gray[0])))


@pytest.mark.parametrize("order", [[(0, 1), (2, 3), (4, 5)], [(5, 2), (0,), (1, 3, 4)]])
def test_any_tasks_give_what_all_classes_at_once_give(order, monkeypatch, temporary):
    """To rounding: statistics of frozen features are sums. There are no views, which are drawn by an image's number."""
    whole = logits(fitted(), monkeypatch)
    classifier = ContinualImageClassifier(QUICK)
    for task in order:
        own = np.isin(Y, task)
        some, labels = X[own].copy(), Y[own].copy()
        assert classifier.partial_fit(some, labels) is classifier
        some[:] = 0  # the estimator does not need them any more
    assert classifier.classes_.tolist() == list(range(6))
    np.testing.assert_allclose(logits(classifier, monkeypatch), whole, rtol=1e-4, atol=1e-3)
    assert len(list(temporary.iterdir())) == 1  # of `classifier`: that of `whole` is gone


def test_an_interrupted_call_can_be_repeated(monkeypatch):
    """The checkpoint inside the task that it left is dropped."""
    first, second = Y < 3, Y >= 3
    classifier = fitted(TRAINED, first)
    predictions = classifier.predict(X).tolist()
    step, steps = train.train_step, []

    def interrupted(*arguments):
        steps.append(1)
        if len(steps) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            classifier.partial_fit(X[second], Y[second])
    assert classifier.predict(X).tolist() == predictions
    classifier.partial_fit(X[second], Y[second])
    assert classifier.classes_.tolist() == list(range(6))


def test_images_of_earlier_calls_can_be_deleted(files, tmp_path):
    classifier = ContinualImageClassifier(TRAINED)
    for labels in ((0, 1, 2), (3, 4), (5,)):
        own = [path for path, label in zip(files, Y, strict=True) if label in labels]
        classifier.partial_fit(own, [f"class {path.parent.name}" for path in own], classes=[f"class {i}" for i in Y])
        for label in labels:
            shutil.move(tmp_path / "photos" / str(label), tmp_path / f"gone {label}")
    assert classifier.run_.progress() == (3, 3)
    assert classifier.run_.data.train_images == (18, 12, 6)
    assert classifier.predict(X)[0] in [f"class {i}" for i in range(6)]


def test_more_images_of_learned_classes_are_a_domain(monkeypatch):
    settings = {"setting": "dil"}
    classifier, half = ContinualImageClassifier(QUICK, settings=settings), np.arange(len(Y)) % 2 == 0
    classifier.partial_fit(X[half], Y[half]).partial_fit(X[~half], Y[~half])
    np.testing.assert_allclose(
        logits(classifier, monkeypatch), logits(fitted(settings=settings), monkeypatch), rtol=1e-4, atol=1e-3
    )
    message = r"classes that were learned before, because setting is dil, got \[6, 7\]"
    with pytest.raises(ValueError, match=message):
        classifier.partial_fit(X[:3], [0, 6, 7])


@pytest.mark.parametrize(
    "labels",
    [
        np.array(["ash", "bee", "cat", "dog", "eel", "fly"])[Y],
        np.array(["ash", "bee", "cat", "dog", "eel", "fly"], dtype=object)[Y],
        [["ash", "bee", "cat", "dog", "eel", "fly"][label] for label in Y],
        pd.Series(Y * 10 - 7, index=Y[::-1]),
        Y.astype(float),
        Y.astype(np.uint8),
    ],
    ids=["texts", "objects", "list", "series", "floats", "bytes"],
)
def test_labels_of_any_kind(labels):
    classifier, numbers = ContinualImageClassifier(QUICK).fit(X, labels), fitted()
    np.testing.assert_array_equal(classifier.classes_, np.unique(np.asarray(labels)))
    np.testing.assert_array_equal(classifier.predict_proba(X), numbers.predict_proba(X))
    assert (classifier.predict(X) == np.asarray(labels)[np.unique(Y, return_index=True)[1]][numbers.predict(X)]).all()
    assert classifier.run_.data.class_names == tuple(str(label) for label in classifier.classes_.tolist())


def test_columns_follow_sorted_classes_whatever_came_first():
    classifier = ContinualImageClassifier(QUICK)
    for label, name in ((3, "z"), (2, "m"), (4, "a")):
        classifier.partial_fit(X[label == Y], [name] * 6)
    assert classifier.classes_.tolist() == ["a", "m", "z"]
    assert classifier._predictor.classes == ("z", "m", "a")
    probabilities = classifier.predict_proba(X[Y == 4])
    np.testing.assert_allclose(probabilities.sum(1), 1, rtol=1e-5)
    assert (probabilities.argmax(1) == 0).all()


def test_several_tasks_at_once():
    assert fitted(TRAINED, settings={"tasks": 3}).run_.data.tasks == ((0, 1), (2, 3), (4, 5))


FLOATS = X / 255


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")  # of scikit-learn, for the NaN
@pytest.mark.parametrize(
    ("given", "labels", "error", "message"),
    [
        (FLOATS, Y, ValueError, r"uint8, from 0 \(black\) to 255, got float64: .* by \(255 \* X\)\.round\(\)\.astype"),
        (np.full_like(FLOATS, np.nan), Y, ValueError, r"expected images of uint8, .* got float64"),
        (
            X.astype(int),
            Y,
            ValueError,
            r"expected images of uint8, .* got int64: .* as by X\.astype\('uint8'\)",
        ),
        (X.transpose(0, 3, 1, 2), Y, ValueError, r"got \(3, 32, 32\): channels come last, as in X\.transpose\(0, 2, 3"),
        (X[..., :2], Y, ValueError, r"expected images \(H, W, 3\) or \(H, W\), got \(32, 32, 2\)$"),
        (X[:, :0], Y, ValueError, r"expected images \(H, W, 3\) or \(H, W\), got \(0, 32, 3\)$"),
        (X[None], Y[:1], ValueError, r"expected images .* got \(36, 32, 32, 3\)"),
        (X.reshape(len(X), -1), Y, ValueError, r"got \(36, 3072\): if each row .* pass X\.reshape\(n, H, W\)"),
        (pd.DataFrame({"path": ["a.png"]}), [0], ValueError, r"expected images .* got \(1, 1\)"),
        (np.array(5), [0], ValueError, r"expected images .* got \(\)"),
        (X[:0], Y[:0], ValueError, "expected at least one image, got none"),
        ([], [], ValueError, "expected at least one image, got none"),
        (X, Y[:-1], ValueError, r"inconsistent numbers of samples: \[36, 35\]"),
        (X, None, ValueError, "requires y to be passed, but the target y is None"),
        (X, np.stack([Y, Y], 1), ValueError, r"y should be a 1d array, got an array of shape \(36, 2\)"),
        (X, Y + 0.5, ValueError, "Unknown label type: continuous"),
        (X[:2], [0, np.nan], ValueError, "contains NaN"),
        ("a.png", [0], TypeError, r"expected a list of images, got a single path: pass \['a\.png'\]"),
        (Path("a.png"), [0], TypeError, r"got a single path: pass \['a\.png'\]"),
        ([5], [0], TypeError, r"expected an image as a path, an array or an image of Pillow, got int: 5"),
        (torch.from_numpy(X), Y, TypeError, r"expected an image as a path, .* got Tensor: tensor"),
        (["gone.png", "gone too.png"], [0, 1], BadImageError, r"cannot read the image gone\.png: No such file"),
        ([""], [0], ValueError, r"expected the path of an image, got ''"),
    ],
)
def test_what_is_no_image_or_no_label_is_an_error(given, labels, error, message, temporary):
    with pytest.raises(error, match=message):
        ContinualImageClassifier(QUICK).fit(given, labels)
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize("given", [FLOATS, X[:0], "a.png", X.reshape(len(X), -1)])
def test_predictions_need_images_too(given):
    classifier = fitted(settings={"views": 0}, selected=slice(12))
    for method in (classifier.predict, classifier.predict_proba, classifier.unknown_scores):
        with pytest.raises((ValueError, TypeError), match="expected"):
            method(given)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recipe": "quik"}, r"unknown recipe 'quik': perhaps you meant 'quick'; see pgp list"),
        ({"settings": {"epoch": 2}}, r"unknown setting 'epoch': perhaps you meant 'epochs'"),
        ({"settings": {"optimizer.rl": 2}}, r"unknown setting 'optimizer\.rl': .*see pgp train RECIPE --help"),
        ({"settings": {"optimizer.lr.x": 2}}, r"unknown setting 'optimizer\.lr\.x': see pgp train"),
        ({"settings": {"method.tag": "vpt"}}, r"unknown setting 'method\.tag'"),
        ({"settings": {"epochs": "2"}}, r"expected a value of type int, got '2'"),
        ({"settings": {"epochs": 0}}, r"expected epochs of at least 1, got 0"),
        ({"settings": {"backbone": "demo"}}, r"unknown backbone 'demo': perhaps you meant 'demo-"),
        ({"settings": {"readouts": ["lda", "ldb"]}}, r"unknown readouts 'ldb': perhaps you meant 'lda'"),
        ({"random_state": None}, r"expected a value of type int, got None"),
        ({"folder": ""}, r"expected the path of a folder for runs, got ''"),
    ],
)
def test_settings_that_cannot_be_are_an_error(changes, message, temporary):
    with pytest.raises(ValueError, match=message):
        ContinualImageClassifier(**{"recipe": QUICK, **changes}).fit(X, Y)
    assert list(temporary.iterdir()) == []


def test_settings_are_named_as_flags():
    words = ["own", "--backbone", "demo-vit", "--optimizer.lr", "0.5", "--workers", "2", "--readouts", "lda", "head"]
    asked = main.parse.train_command([*words, "--views", "3", "--projection", "released"], "pgp train").config
    settings = {"backbone": "demo-vit", "optimizer.lr": np.float64(0.5), "workers": 2, "readouts": ("lda", "head")}
    assert recipes.configure("own", {**settings, "views": np.int64(3), "projection": "released"}) == asked
    assert recipes.configure(TRAINED, {"eval-batch-size": 7}) == replace(TRAINED, eval_batch_size=7)


def test_a_class_is_learned_once(temporary):
    classifier = fitted(selected=Y < 4)
    before = classifier.predict_proba(X)
    with pytest.raises(ValueError, match=r"class 3 was learned already: .*settings=\{'setting': 'dil'\}; or fit again"):
        classifier.partial_fit(X[Y > 2], Y[Y > 2])
    with pytest.raises(ValueError, match="Mix of label input types"):
        classifier.partial_fit(X[Y == 4], ["four"] * 6)
    with pytest.raises(ValueError, match=r"expected labels among classes, got \[4\]"):
        classifier.partial_fit(X[Y == 4], Y[Y == 4], classes=[0, 1, 2, 3])
    with pytest.raises(BadImageError, match=r"cannot read the image gone\.png"):
        classifier.partial_fit(["gone.png"], [4])
    assert classifier.classes_.tolist() == [0, 1, 2, 3]
    np.testing.assert_array_equal(classifier.predict_proba(X), before)
    assert classifier.partial_fit(X[Y == 4], Y[Y == 4]).classes_.tolist() == [0, 1, 2, 3, 4]


def test_a_single_class_is_all_that_is_predicted():
    classifier = fitted(selected=Y == 2)
    assert classifier.predict(X).tolist() == [2] * len(X)
    np.testing.assert_array_equal(classifier.predict_proba(X), 1)


def test_nothing_is_left_and_nothing_of_the_user_is_touched(temporary, files, tmp_path):
    there = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    pixels, labels = X.copy(), Y.copy()
    classifier = fitted()
    (first,) = temporary.iterdir()
    assert classifier.run_.folder.parent == first
    (second,) = {classifier.fit(files, Y).run_.folder.parent}
    assert list(temporary.iterdir()) == [second]
    with pytest.raises(BadImageError):
        classifier.fit(["gone.png"], [0])
    assert classifier.predict(files).tolist() == Y.tolist()  # that fit has changed nothing
    estimator._delete(second, os.getpid() + 1)  # a forked process does not delete it
    assert list(temporary.iterdir()) == [second]
    del classifier
    gc.collect()
    assert list(temporary.iterdir()) == []
    assert (pixels == X).all()
    assert (labels == Y).all()
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == there


def test_a_folder_keeps_every_run(tmp_path, temporary):
    classifier = fitted(folder="runs")
    first, before = classifier.run_.folder, classifier.predict_proba(X)
    assert first == tmp_path / "runs" / "tiny-seed42"
    again = pickle.loads(pickle.dumps(classifier))
    joblib.dump(classifier, "classifier.joblib")
    for other in (again, joblib.load("classifier.joblib")):
        np.testing.assert_array_equal(other.predict_proba(X), before)
    assert again.partial_fit([np.zeros((8, 8), np.uint8)], [9]).classes_.tolist() == [*range(6), 9]
    assert classifier.fit(X[:12], Y[:12]).run_.folder == tmp_path / "runs" / "tiny-seed42-2"
    with pytest.raises(BadImageError):
        classifier.fit(["gone.png"], [0])
    assert sorted(path.name for path in first.parent.iterdir() if path.is_dir()) == ["tiny-seed42", "tiny-seed42-2"]
    assert fitted(folder=tmp_path / "runs", random_state=1).run_.folder.name == "tiny-seed1"
    shutil.rmtree(first)
    with pytest.raises(RunError, match="no run at"):
        joblib.load("classifier.joblib").predict(X)
    assert list(temporary.iterdir()) == []


def test_a_run_that_was_changed_elsewhere_is_not_used():
    first = fitted(selected=slice(24), folder="runs")
    copy = pickle.loads(pickle.dumps(first))
    copy.partial_fit(X[24:], Y[24:])
    before = copy.predict(X)
    for use in (lambda: first.predict(X), lambda: first.partial_fit(X[24:], Y[24:])):
        with pytest.raises(ValueError, match="as this classifier left it, but it has been changed since: fit again"):
            use()
    with copy.run_.writing():
        copy.run_.undo_add()
    np.testing.assert_array_equal(copy.predict(X), before)  # with what it read before
    with pytest.raises(ValueError, match="it has been changed since"):
        pickle.loads(pickle.dumps(copy)).predict(X)
    assert set(first.predict(X)) <= set(range(4))  # the run is again as it left it


def test_without_a_folder_a_fitted_estimator_is_not_pickled():
    with pytest.raises(ValueError, match=r"expected a folder, to pickle a fitted .* fit it with folder='runs'"):
        pickle.dumps(fitted())
    assert pickle.loads(pickle.dumps(ContinualImageClassifier())).recipe == "quick"


@pytest.mark.filterwarnings("ignore:the old images")
def test_the_run_is_one_for_the_command_line(files, tmp_path, capsys):
    folder = str(fitted(folder="runs", selected=Y < 4).run_.folder)
    main.main(["predict", folder, str(files[0])])
    assert "000.png\t0 " in capsys.readouterr().out
    shutil.copytree("photos/5", "new/eel")
    main.main(["add", folder, "new"])
    assert set(Predictor(folder).classes) == {"0", "1", "2", "3", "eel"}
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main.main(["eval", folder])
    assert "they were in the memory of the program that started it" in capsys.readouterr().err


def test_not_fitted():
    for method in ("predict", "predict_proba", "unknown_scores"):
        with pytest.raises(NotFittedError):
            getattr(ContinualImageClassifier(), method)(X)


def test_parameters_are_those_of_scikit_learn():
    classifier = ContinualImageClassifier(QUICK, settings={"views": 0}, random_state=3, folder="runs")
    assert classifier.get_params() == {"recipe": QUICK, "settings": {"views": 0}, "random_state": 3, "folder": "runs"}
    copy = clone(classifier.set_params(random_state=4))
    assert copy.get_params() == classifier.get_params()
    assert not hasattr(clone(copy.set_params(folder=None).fit(X[:12], Y[:12])), "run_")


def test_in_a_pipeline_a_search_and_cross_validation(temporary):
    scale = FunctionTransformer(lambda values: (255 * values).round().astype("uint8"))
    classifier = ContinualImageClassifier(QUICK)
    pipeline = make_pipeline(scale, classifier).fit(X / 255, Y)
    np.testing.assert_array_equal(pipeline.predict_proba(X / 255), clone(classifier).fit(X, Y).predict_proba(X))
    assert (cross_val_score(classifier, X, Y, cv=3) > 0.8).all()
    search = GridSearchCV(classifier, {"settings": [{"views": 0}, {"views": 1}], "random_state": [1]}, cv=2).fit(X, Y)
    assert search.best_estimator_.run_.config.seed == 1
    assert search.best_score_ > 0.8
    del search, pipeline, classifier
    gc.collect()
    assert list(temporary.iterdir()) == []


def test_tags_say_what_it_takes():
    tags = ContinualImageClassifier().__sklearn_tags__()
    assert tags.estimator_type == "classifier"
    assert tags.target_tags.required
    assert not tags.input_tags.two_d_array
    assert tags.input_tags.three_d_array
    assert tags.input_tags.string


CHECKS = (
    "check_estimator_cloneable",
    "check_estimator_repr",
    "check_valid_tag_types",
    "check_no_attributes_set_in_init",
    "check_parameters_default_constructible",
    "check_get_params_invariance",
    "check_set_params",
    "check_mixin_order",
    "check_do_not_raise_errors_in_init_or_set_params",
    "check_requires_y_none",
    "check_estimators_unfitted",
)
"""The checks of scikit-learn that pass an estimator no table of numbers. All others fit it to an array (n, features),
which is an error here, with advice."""


@pytest.mark.parametrize("check", CHECKS)
def test_it_passes_the_checks_of_scikit_learn_that_need_no_table(check):
    getattr(estimator_checks, check)("ContinualImageClassifier", ContinualImageClassifier(QUICK))


def test_labels_may_come_as_numbers_of_another_type():
    classifier = ContinualImageClassifier(QUICK).fit(X[Y < 3], Y[Y < 3])
    classifier.partial_fit(X[(Y > 2) & (Y < 5)], Y[(Y > 2) & (Y < 5)].astype(float))
    classifier.partial_fit(X[Y == 5], Y[Y == 5])
    assert classifier.classes_.tolist() == [0, 1, 2, 3, 4, 5]
    assert classifier.score(X, Y) > 0.8
    with pytest.raises(ValueError, match=r"class 1\.0 was learned already"):
        classifier.partial_fit(X[Y == 1], Y[Y == 1].astype(float))
