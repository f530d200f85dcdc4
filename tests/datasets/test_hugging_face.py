from __future__ import annotations

import re
import sys
import unicodedata

import pytest
import torch
from PIL import Image

import tiny
from pgp import train
from pgp.datasets.base import BadImageError
from pgp.datasets.hugging_face import HuggingFace
from pgp.datasets.loader import LoaderOptions, TransformedSplit, batches, sequential_batches
from pgp.datasets.own import dataset_from_path
from pgp.datasets.transforms import Transforms
from pgp.methods.head_only import HeadOnly

hub = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def _quiet(tmp_path, monkeypatch):
    hub.disable_progress_bars()
    monkeypatch.setattr(hub.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def rows(count, labels=None, **more):
    """Images whose red is their number, of the classes cat, dog and eel in turn."""
    pixels = [Image.new("RGB", (6, 4), (10 * i, 0, 0)) for i in range(count)]
    columns = {"picture": pixels, "kind": labels or [i % 3 for i in range(count)], **more}
    kind = hub.Value("string") if labels else hub.ClassLabel(names=["cat", "dog", "eel"])
    known = hub.Features({"picture": hub.Image(), "kind": kind} | {name: hub.Value("string") for name in more})
    return hub.Dataset.from_dict(columns, features=known)


def test_parts_saved_to_disk(tmp_path):
    hub.DatasetDict(train=rows(9), validation=rows(3), test=rows(6)).save_to_disk(str(tmp_path / "saved"))
    data = dataset_from_path(f"hf:{tmp_path / 'saved'}").build()
    assert (len(data.train), len(data.test), data.class_names) == (9, 6, ("cat", "dog", "eel"))
    assert data.train.labels.tolist() == [0, 1, 2] * 3
    assert data.test.image(4)[:, 0, 0].tolist() == [40, 0, 0]
    assert data.train.image(0).shape == (3, 4, 6)
    viewed = TransformedSplit(data.train, Transforms(size=4, resize=4).test(), 0, ("x",), skip_bad=False)
    first, second = batches(viewed, sequential_batches(torch.tensor([8, 0, 5]), 2), LoaderOptions(workers=2))
    assert (first.labels.tolist(), second.labels.tolist()) == ([2, 0], [2])


def test_parts_that_number_their_classes_differently(tmp_path):
    test = rows(6).filter(lambda kind: kind != 0, input_columns="kind")
    known = test.features | {"kind": hub.ClassLabel(names=["ox", "eel", "dog"])}
    test = test.map(lambda kind: {"kind": 3 - kind}, input_columns="kind").cast(hub.Features(known))
    hub.DatasetDict(train=rows(6), test=test).save_to_disk(str(tmp_path / "saved"))
    data = HuggingFace(str(tmp_path / "saved")).build()
    assert data.class_names == ("cat", "dog", "eel", "ox")
    named = [(data.class_names[label], int(data.test.image(i)[0, 0, 0])) for i, label in enumerate(data.test.labels)]
    assert named == [("dog", 10), ("eel", 20), ("dog", 40), ("eel", 50)]

    numbers = test.cast(hub.Features(known | {"kind": hub.Value("int64")}))
    hub.DatasetDict(train=rows(6), test=numbers).save_to_disk(str(tmp_path / "numbers"))
    with pytest.raises(ValueError, match="expected names of the values of kind in each split, got a split without"):
        HuggingFace(str(tmp_path / "numbers")).build()


def test_secret_labels_are_no_test(tmp_path):
    secret = rows(6, None).remove_columns("kind").add_column("kind", [-1] * 6, feature=rows(1).features["kind"])
    hub.DatasetDict(train=rows(9), validation=rows(3), test=secret).save_to_disk(str(tmp_path / "saved"))
    assert len(HuggingFace(str(tmp_path / "saved")).build().test) == 3
    without, empty = secret.remove_columns("kind"), secret.map(lambda: {"kind": None}, input_columns=[])
    for name, test in (("without", without), ("empty", empty)):
        hub.DatasetDict(train=rows(10), test=test).save_to_disk(str(tmp_path / name))
        assert len(HuggingFace(str(tmp_path / name)).build().test) == 3  # a fifth of each class, but at least one
    some = rows(6).map(lambda kind: {"kind": -1 if kind == 1 else kind}, input_columns="kind")
    hub.DatasetDict(train=rows(9), validation=rows(3), test=some).save_to_disk(str(tmp_path / "both"))
    assert len(HuggingFace(str(tmp_path / "both")).build().test) == 3
    hub.DatasetDict(train=rows(9), test=some).save_to_disk(str(tmp_path / "some"))
    with pytest.raises(ValueError, match="expected a value of kind in every row, got none in row 1"):
        HuggingFace(str(tmp_path / "some")).build()
    hub.DatasetDict(train=rows(9), test=rows(6).remove_columns("picture")).save_to_disk(str(tmp_path / "blind"))
    with pytest.raises(ValueError, match=r"expected column picture in each split of .*, got a split with only .*kind"):
        HuggingFace(str(tmp_path / "blind")).build()
    hub.DatasetDict(train=secret).save_to_disk(str(tmp_path / "none"))
    with pytest.raises(ValueError, match="expected a value of kind in every row, got none in row 0"):
        HuggingFace(str(tmp_path / "none")).build()


@pytest.mark.parametrize(
    ("parts", "sizes", "notes"),
    [
        ({"train": 9, "test": 3, "validation": 6, "more": 4}, (9, 3), ["not used: validation (6 rows), more (4 rows)"]),
        ({"validation": 3, "all": 9}, (9, 3), ["images are those of split all"]),
        ({"test": 9}, (6, 3), ["images are those of split test"]),
    ],
)
def test_unexpected_splits_are_named(tmp_path, parts, sizes, notes):
    hub.DatasetDict({name: rows(count) for name, count in parts.items()}).save_to_disk(str(tmp_path / "saved"))
    data = HuggingFace(str(tmp_path / "saved")).build()
    assert (len(data.train), len(data.test)) == sizes
    assert all(line.endswith(note) for line, note in zip(data.messages(), notes, strict=True))


@pytest.mark.parametrize("parts", [["left", "right"], ["validation", "test"], []])
def test_without_a_split_train_there_is_no_guess(tmp_path, parts):
    hub.DatasetDict({name: rows(3) for name in parts}).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(ValueError, match=f"expected a split train in .*, got splits {re.escape(str(parts))}: save"):
        HuggingFace(str(tmp_path / "saved")).build()


@pytest.mark.parametrize("labels", [["a", None], [True, False], [1, 2], [1, 0.5], [[1], [2]], [{"a": 1}, {"a": 2}]])
def test_only_texts_and_whole_numbers_are_classes(tmp_path, labels):
    pictures = hub.Dataset.from_dict({"picture": [Image.new("RGB", (6, 4))] * 2}).cast_column("picture", hub.Image())
    pictures.add_column("label", labels).save_to_disk(str(tmp_path / "saved"))
    config = HuggingFace(str(tmp_path / "saved"))
    if all(isinstance(label, int) for label in labels):
        assert config.build().class_names == tuple(map(str, labels))
        return
    with pytest.raises(
        ValueError, match=r"expected a (text or a whole number as label|value of label) in every row, got"
    ):
        config.build()


def test_a_saved_set_has_no_subset(tmp_path):
    rows(6).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(ValueError, match=r"expected no dataset.subset for .*saved, .* got 'small': leave it out"):
        HuggingFace(str(tmp_path / "saved"), subset="small").build()


@pytest.mark.parametrize("file", ["dataset_dict.json", "train/state.json", "train/dataset_info.json"])
@pytest.mark.parametrize("content", ["{}", "[]", "{", '{"splits": 3, "features": 3}'])
def test_damaged_files_of_a_saved_set(tmp_path, file, content):
    hub.DatasetDict(train=rows(9)).save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "saved" / file).write_text(content)
    if (file, content) == ("train/dataset_info.json", "{}"):  # the table holds the same
        assert len(HuggingFace(str(tmp_path / "saved")).build().train) == 6
        return
    with pytest.raises(ValueError, match=r"cannot load .*saved': .*\. A file is damaged or missing, .*: save it again"):
        HuggingFace(str(tmp_path / "saved")).build()


def test_damaged_rows_of_a_saved_set(tmp_path):
    rows(9).save_to_disk(str(tmp_path / "saved"))
    (table,) = (tmp_path / "saved").glob("*.arrow")
    whole = table.read_bytes()
    for content in (whole[:-200], b"", bytes(len(whole)), None):
        table.unlink()
        if content is not None:
            table.write_bytes(content)
        with pytest.raises(ValueError, match="A file is damaged or missing"):
            HuggingFace(str(tmp_path / "saved")).build()
        table.write_bytes(b"")


def test_one_part_of_parquet_files_with_names_and_domains(tmp_path):
    labels = ["wolf", "ant", "wolf", "ant"] * 5
    domains = ["photo"] * 10 + ["art"] * 10
    (tmp_path / "mine").mkdir()
    rows(20, labels, style=domains).to_parquet(str(tmp_path / "mine" / "all.parquet"))
    config = HuggingFace(str(tmp_path / "mine"), label="kind", domain="style")
    data = config.build()
    assert (data.class_names, data.domains) == (("wolf", "ant"), ("photo", "art"))
    assert torch.bincount(data.test.labels + 2 * data.test.domains).tolist() == [1, 1, 1, 1]
    assert (len(data.train), len(data.test.domains)) == (16, 4)
    assert data.folder == tmp_path / "mine"
    red = sorted(int(split.image(i)[0, 0, 0]) for split in (data.train, data.test) for i in range(len(split)))
    assert red == [10 * i for i in range(20)]
    with pytest.raises(ValueError, match=r"expected one label column in .*, got none among .*--dataset.label"):
        HuggingFace(str(tmp_path / "mine")).build()
    with pytest.raises(ValueError, match=r"as dataset.image, one of .*'picture', .*got 'photo'"):
        HuggingFace(str(tmp_path / "mine"), image="photo").build()


def test_trains_from_any_working_folder(tmp_path, monkeypatch):
    rows(24, None).save_to_disk(str(tmp_path / "saved"))
    monkeypatch.chdir(tmp_path)
    config = tiny.config(dataset=HuggingFace("saved"), method=HeadOnly.Config(), epochs=1)
    run = train.train(config, tmp_path / "run")
    assert run.config.dataset.name == str(tmp_path / "saved")
    assert HuggingFace("nowhere/beans").with_absolute_paths().name == "nowhere/beans"


def test_names_are_the_same_in_every_unicode_form(tmp_path):
    composed, decomposed = (unicodedata.normalize(form, "é") for form in ("NFC", "NFD"))
    rows(20, [composed, decomposed, "b", "b"] * 5).save_to_disk(str(tmp_path / "texts"))
    assert HuggingFace(str(tmp_path / "texts"), label="kind").build().class_names == (composed, "b")
    features = hub.Features({"picture": hub.Image(), "kind": hub.ClassLabel(names=[composed, decomposed])})
    part = hub.Dataset.from_dict({"picture": [Image.new("RGB", (6, 4))] * 4, "kind": [0, 1] * 2}, features=features)
    part.save_to_disk(str(tmp_path / "labels"))
    with pytest.raises(
        ValueError, match=r"expected a name of its own for each value of kind, got \['é'\] more than once"
    ):
        HuggingFace(str(tmp_path / "labels")).build()


def test_bad_images_are_named(tmp_path):
    raw = [{"bytes": b"no image", "path": "x.jpg"}, None] * 6
    features = hub.Features({"picture": hub.Image(decode=False), "label": hub.Value("int64")})
    part = hub.Dataset.from_dict({"picture": raw, "label": [0, 1] * 6}, features=features)
    part.save_to_disk(str(tmp_path / "saved"))
    data = HuggingFace(str(tmp_path / "saved")).build()
    assert data.class_names == ("0", "1")
    for place in (0, 1):
        with pytest.raises(BadImageError, match=r"cannot read the image \d \((x.jpg|unnamed)\) of .*saved"):
            data.train.image(place)


def test_what_cannot_be_loaded(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"cannot load the Hugging Face data set .*Check its name and the network"):
        HuggingFace(str(tmp_path)).build()

    def offline(*_, **__):
        raise ConnectionError("Couldn't reach 'beans' on the Hub")

    monkeypatch.setattr(hub, "load_dataset", offline)
    with pytest.raises(ValueError, match=r"cannot load .*'beans': Couldn't reach 'beans' on the Hub"):
        HuggingFace("beans").build()
    monkeypatch.setattr(hub, "__version__", "3.6.0")
    with pytest.raises(ValueError, match=r"from version 4 on, which runs no code of the hub, got 3\.6\.0: pip install"):
        HuggingFace("beans").build()
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"not installed .*pip install 'prompt-gradient-projection\[hf\]'"):
        HuggingFace("beans").build()


def test_what_is_read_from_this_disk_asks_no_hub(monkeypatch):
    """A report of a run needs its test images, which may be on the hub."""
    asked = []
    part = rows(9)

    def load(*_):
        asked.append(not hub.config.HF_HUB_OFFLINE)
        return part

    monkeypatch.setattr(hub, "load_dataset", load)
    for use in (HuggingFace("beans").read, HuggingFace("beans").build):
        assert len(use().train) == 6
    assert asked == [False, True]
