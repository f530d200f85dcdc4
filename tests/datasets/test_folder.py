"""Folders of the user's own: which folder is what, and what is not used; nothing is dropped in silence."""

from __future__ import annotations

import inspect
import os
import shutil
import socket
import sys
import time
import unicodedata
from pathlib import Path

import pytest

from pgp.datasets.folder import Folder
from pgp.datasets.folder import _class_names as class_names
from pgp.datasets.scan import contents, images_below
from pgp.predict import images_in
from pgp.system.outputs import MARKER, make_output
from photos import CLASSES, fill, tree

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="names of any bytes, in any form and case; pipes and links")


def told(data):
    """What `data` says is ignored: numbers by reason."""
    return {reason: count for ignored in data.ignored for reason, count in ignored.counts.items()}


@pytest.mark.parametrize("test", ["valid", "VAL", "Test", "testing", "eval", "Validation"])
def test_the_test_part_is_found_by_any_of_its_names(tmp_path, test):
    data = Folder(tree(tmp_path, "train", test)).build()
    assert {path.relative_to(tmp_path).parts[0] for path in data.test.paths} == {test}
    assert (len(data.train), len(data.test)) == (6, 6)


def test_a_class_that_is_called_train_hides_no_other(tmp_path):
    for name in ("car", "plane", "train"):
        fill(tmp_path / name)
    with pytest.raises(ValueError, match=r"folders of classes in train/ only, got images in car/ beside it.*--dataset"):
        Folder(tmp_path).build()
    data = Folder(tmp_path, train_folder=".").build()
    assert data.class_names == ("car", "plane", "train")
    tree(tmp_path / "other", "train", classes=("car", "plane", "train"))
    assert Folder(tmp_path / "other").build().class_names == ("car", "plane", "train")


def test_the_test_folder_is_no_class(tmp_path):
    tree(tmp_path, "", "holdout", classes=("cat", "dog"))
    data = Folder(tmp_path, train_folder=".", test_folder="holdout").build()
    assert data.class_names == ("cat", "dog")
    assert not {*data.train.paths} & {*data.test.paths}


def test_a_test_without_classes_beside_a_good_one(tmp_path):
    tree(tmp_path, "train", "val")
    fill(tmp_path / "test", 5)
    data = Folder(tmp_path).build()
    assert {path.relative_to(tmp_path).parts[0] for path in data.test.paths} == {"val"}
    assert data.notes == (
        "the test images are those of val/, not those of test/, which has no folders of classes with images",
    )
    assert data.ignored[0].lines() == ["ignored: 5 images of a part that is not used: test/0.png, …"]
    shutil.rmtree(tmp_path / "val")
    with pytest.raises(ValueError, match=r"expected folders of classes with images in \['test'\] of .*, got none"):
        Folder(tmp_path).build()


def test_the_test_is_preferred_to_the_validation_part(tmp_path):
    data = Folder(tree(tmp_path, "train", "val", "test")).build()
    assert {path.relative_to(tmp_path).parts[0] for path in data.test.paths} == {"test"}
    assert data.notes == ("the test images are those of test/, not those of val/",)
    assert told(data) == {"unused_part": 6}
    data = Folder(tmp_path, test_folder="val").build()
    assert {path.relative_to(tmp_path).parts[0] for path in data.test.paths} == {"val"}
    assert told(data) == {"unused_part": 6}


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (["test"], r"no data folder at .*train, beside \['test'\]"),
        (["train", "training"], r"expected one folder of training images in .*, got \['train', 'training'\]"),
        (["train", "test", "testing"], r"expected one folder of test images in .*, got \['test', 'testing'\]"),
        (["train", "val", "valid"], r"expected one folder of test images in .*, got \['val', 'valid'\]"),
        (["train", "test", "extra"], r"classes in train/ only, got images in extra/ beside it"),
        (
            ["cat/train", "cat/test", "dog/train", "dog/test"],
            r"above all other folders, got train and test inside .*cat",
        ),
    ],
)
def test_what_cannot_be_told_apart_is_asked(tmp_path, parts, message):
    with pytest.raises(ValueError, match=message):
        Folder(tree(tmp_path, *parts)).build()


def test_folders_can_be_named(tmp_path):
    tree(tmp_path, "first", "second", "third")
    data = Folder(tmp_path, train_folder="first", test_folder="third").build()
    assert {path.relative_to(tmp_path).parts[0] for path in data.train.paths} == {"first"}
    assert {path.relative_to(tmp_path).parts[0] for path in data.test.paths} == {"third"}
    assert told(data) == {"unused_part": 6}
    with pytest.raises(ValueError, match=r"expected a folder fourth in .*got \['first', 'second', 'third'\]"):
        Folder(tmp_path, train_folder="fourth").build()


def test_a_test_folder_without_images_is_named(tmp_path):
    tree(tmp_path / "flat", "")
    (tmp_path / "flat" / "holdout").mkdir()
    with pytest.raises(ValueError, match=r"no images in .*holdout/<class>/: expected files ending in \.jpg"):
        Folder(tmp_path / "flat", train_folder=".", test_folder="holdout").build()
    tree(tmp_path / "domains", "train/art", "test")
    with pytest.raises(
        ValueError, match=r"expected folders DOMAIN/CLASS with images in .*test, got .*with none inside"
    ):
        Folder(tmp_path / "domains", domains=True).build()


def test_the_test_is_read_without_training_images_as_with_them(tmp_path):
    fill(tree(tmp_path, "val") / "test", 2)
    (tmp_path / "testing" / "cat").mkdir(parents=True)
    test = Folder(tmp_path).read_test(CLASSES)
    assert {path.relative_to(tmp_path).parts[0] for path in test.paths} == {"val"}
    shutil.rmtree(tmp_path / "val")
    assert Folder(tmp_path).read_test(CLASSES) is None
    assert Folder(tmp_path, test_folder="nowhere").read_test(CLASSES) is None


@pytest.mark.parametrize(
    ("train", "test"), [("a", "a"), (".", "."), ("a", "."), ("a/b", "a"), ("a", "a/b/c"), (".", "a/b"), ("a", "b/../a")]
)
def test_no_test_image_is_trained_on(tmp_path, train, test):
    tree(tmp_path, "a", "a/b", "a/b/c", "b")
    with pytest.raises(
        ValueError, match=r"expected a folder of test images apart from that of training images, .*--da"
    ):
        Folder(tmp_path, train_folder=train, test_folder=test).build()


def test_a_named_training_folder_is_not_for_the_test(tmp_path):
    data = Folder(tree(tmp_path, "test"), train_folder="test").build()
    assert (len(data.train), len(data.test)) == (4, 2)
    assert not {*data.train.paths} & {*data.test.paths}


@LINUX
def test_a_link_to_the_training_folder_is_not_for_the_test(tmp_path):
    tree(tmp_path, "train")
    (tmp_path / "test").symlink_to(tmp_path / "train", target_is_directory=True)
    with pytest.raises(ValueError, match="apart from that of training images"):
        Folder(tmp_path).build()


def test_the_test_folder_may_be_elsewhere(tmp_path):
    tree(tmp_path / "root", "train")
    tree(tmp_path / "away", "", "cat/deeper")
    for name in (str(tmp_path / "away"), "../away"):
        config = Folder(tmp_path / "root", test_folder=name)
        data = config.build()
        assert (len(data.train), len(data.test)) == (6, 12)
        assert "6 images lie deeper" in data.notes[0]
        assert config.read_test(CLASSES).paths == data.test.paths


@LINUX
def test_everything_that_is_not_used_is_counted_and_named(tmp_path):
    cat = tree(tmp_path, "").joinpath("cat")
    for name in ("a.heic", "b.HEIC", "c.txt", "notes", ".hidden.png", "Thumbs.db", ".DS_Store", "._0.png"):
        (cat / name).write_bytes(b"?")
    shutil.copy(cat / "0.png", cat / "picture")
    for name in ("@eaDir", "__MACOSX", "#recycle", ".Trash-1000", "deeper", "nothing"):
        fill(cat / name, 0 if name == "nothing" else 2)
    (cat / "away").symlink_to(tmp_path / "dog", target_is_directory=True)
    (cat / "gone.png").symlink_to(tmp_path / "nowhere")
    (cat / "round.png").symlink_to(cat / "round.png")
    os.mkfifo(cat / "pipe.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "loop").symlink_to(tmp_path, target_is_directory=True)
    fill(tmp_path, 1, "loose{}.png")
    fill(tmp_path / "$RECYCLE.BIN")
    data = Folder(tmp_path).build()
    assert data.class_names == CLASSES
    assert told(data) == {
        "unknown_suffix": 3,
        "no_suffix": 1,
        "image_without_suffix": 1,
        "outside_classes": 1,
        "empty_folder": 1,
        "folder_link": 2,
        "broken_link": 2,
        "special_file": 1,
        "system": 8,
        "hidden": 1,
    }
    lines = data.messages()
    assert (
        "ignored: 3 files whose suffix is not that of an image (.heic 2, .txt 1): cat/a.heic, cat/b.HEIC, cat/c.txt"
        in lines
    )
    assert "ignored: 1 images without a suffix, such as .jpg, which would make them count: cat/picture" in lines
    assert "2 images lie deeper than in the folder of their class, and count for it, such as cat/deeper/0.png" in lines
    found = data.ignored[0].to_json()
    assert found["unknown_suffix"] == {
        "count": 3,
        "examples": ["cat/a.heic", "cat/b.HEIC", "cat/c.txt"],
        "suffixes": {".heic": 2, ".txt": 1},
    }
    assert found["folder"] == str(tmp_path)


@LINUX
def test_links_to_folders_are_classes_but_not_twice(tmp_path):
    fill(tmp_path / "elsewhere" / "cat")
    fill(tmp_path / "photos" / "dog")
    (tmp_path / "photos" / "cat").symlink_to(tmp_path / "elsewhere" / "cat", target_is_directory=True)
    assert Folder(tmp_path / "photos").build().class_names == CLASSES
    (tmp_path / "photos" / "kitten").symlink_to(tmp_path / "photos" / "cat", target_is_directory=True)
    with pytest.raises(ValueError, match="got kitten and cat, which are the same by a link"):
        Folder(tmp_path / "photos").build()


def test_a_class_without_images_is_told_from_an_empty_folder(tmp_path):
    tree(tmp_path, "")
    (tmp_path / "later").mkdir()
    assert told(Folder(tmp_path).build()) == {"empty_folder": 1}
    (tmp_path / "later" / "a.heic").write_bytes(b"?")
    with pytest.raises(ValueError, match=r"none of \['later'\], 1 in all: add some.*\(.heic 1\): later/a.heic"):
        Folder(tmp_path).build()


@LINUX
def test_sockets_and_locked_folders(tmp_path, monkeypatch):
    tree(tmp_path, "")
    monkeypatch.chdir(tmp_path)  # names of sockets are short
    with socket.socket(socket.AF_UNIX) as open_socket:
        open_socket.bind("cat/s.png")
    (tmp_path / "dog" / "private").mkdir()
    scandir = os.scandir

    def locked(path):
        if str(path).endswith("private"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", locked)
    assert told(Folder(tmp_path).build()) == {"special_file": 1, "locked_folder": 1}


def test_the_order_is_that_of_paths_part_by_part(tmp_path):
    for name in ("a.png", "a/b.png", "a b/c.png", "B.png", "a.b/c.png"):
        fill(tmp_path / Path(name).parent, 1, Path(name).name)
    assert images_below(tmp_path) == sorted(tmp_path.rglob("*.png"))
    assert [path.name for path in contents(tmp_path).images] == ["B.png", "a.png"]


def test_deep_folders(tmp_path):
    limit = sys.getrecursionlimit()
    fill(tmp_path / "/".join("d" * 100), 1)
    sys.setrecursionlimit(len(inspect.stack()) + 60)
    try:
        found = images_below(tmp_path)
    finally:
        sys.setrecursionlimit(limit)
    assert len(found) == 1


@LINUX
class TestNames:
    """`café` is one class, whichever way it is spelled."""

    COMPOSED, DECOMPOSED = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))

    def test_forms_are_one_class(self, tmp_path):
        tree(tmp_path, "train", classes=(self.COMPOSED, "dog"))
        tree(tmp_path, "test", classes=(self.DECOMPOSED, "dog"))
        data = Folder(tmp_path).build()
        assert data.class_names == (self.COMPOSED, "dog")
        assert data.test.labels.tolist() == [0, 0, 0, 1, 1, 1]
        (tmp_path / "names.txt").write_text(f"{self.DECOMPOSED} A {self.DECOMPOSED}\ndog b\n", encoding="utf-8")
        assert Folder(tmp_path).build().class_names == (f"A {self.COMPOSED}", "b")

    def test_two_folders_of_one_name(self, tmp_path):
        tree(tmp_path, "", classes=(self.COMPOSED, self.DECOMPOSED, "dog"))
        with pytest.raises(
            ValueError, match=r"two folders 'café', whose names are spelled 'cafe\\u0301' and 'caf\\xe9'"
        ):
            Folder(tmp_path).build()

    def test_names_that_are_not_utf8(self, tmp_path):
        tree(tmp_path, "", classes=(os.fsdecode(b"caf\xe9"), "dog"))
        data = Folder(tmp_path).build()
        assert data.class_names == ("caf\N{REPLACEMENT CHARACTER}", "dog")
        assert data.notes == ("1 folders have names that are not UTF-8; what is not stands as"
                              " \N{REPLACEMENT CHARACTER}: caf\N{REPLACEMENT CHARACTER}",)  # fmt: skip
        fill(tmp_path / os.fsdecode(b"caf\xea"))
        with pytest.raises(ValueError, match=r"'caf\\udce9' and 'caf\\udcea'"):
            Folder(tmp_path).build()

    def test_names_that_differ_in_case(self, tmp_path):
        tree(tmp_path, "", classes=("cat", "Cat"))
        said = "classes whose names differ only in case are different classes: Cat, cat"
        assert Folder(tmp_path).build().notes == (said,)


def test_what_pgp_wrote_is_never_read(tmp_path):
    tree(tmp_path, "")
    before = Folder(tmp_path).build().train.names()
    for folder in ("runs", "cat/run", "dog/sweep"):
        make_output(tmp_path / folder)
        fill(tmp_path / folder / "more", 2)
    fill(tmp_path / "runs" / "own-seed42", 2, "accuracy{}.png")
    data = Folder(tmp_path).build()
    assert data.train.names() == before
    assert data.class_names == CLASSES
    assert told(data) == {"output": 3}
    assert len(images_in([tmp_path])) == 6
    assert len(images_in([tmp_path / "runs"])) == 4  # it is asked for
    make_output(tmp_path)
    assert not (tmp_path / MARKER).exists()  # a folder that holds something is somebody's own


def test_names_of_many_classes_take_no_time(tmp_path):
    folders = tuple(f"class {number}" for number in range(20_000))
    (tmp_path / "names.txt").write_text("".join(f"{folder}\ta thing of {folder}\n" for folder in folders))
    started = time.perf_counter()
    assert class_names(tmp_path / "names.txt", folders)[19_999] == "a thing of class 19999"
    assert time.perf_counter() - started < 5
    (tmp_path / "names.txt").write_text("a b\tone\n a  two\n")
    assert class_names(tmp_path / "names.txt", ("a", "a b")) == ("two", "one")


@LINUX
def test_a_text_file_is_read_as_it_was_meant(tmp_path):
    tree(tmp_path, "")
    names = tmp_path / "names.txt"
    for content, message in (
        ("cat Größe\ndog b\n".encode("latin-1"), r"as a text in UTF-8, got another encoding at byte 6, in line 1"),
        ("cat a\ndog b\n".encode("utf-16"), "as a text in UTF-8, got UTF-16: save it as UTF-8"),
        (b"cat a\ndog \0b\n", "it holds a zero byte, in line 2"),
        (b"cat a\ndog \n", r"expected a line 'FOLDER NAME' in .* for each folder, got none for \['dog'\]"),
        (b"cat a\ndog b\ncat c\n", "expected one line for each folder in .*, got several for 'cat'"),
    ):
        names.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            Folder(tmp_path).build()
    names.write_bytes("cat a\r\ndog b\r\n".encode("utf-8-sig"))
    assert Folder(tmp_path).build().class_names == ("a", "b")
    names.unlink()
    os.mkfifo(names)
    with pytest.raises(ValueError, match=r"cannot read .*names.txt as a text in UTF-8: expected a file, got a pipe"):
        Folder(tmp_path).build()
    names.unlink()
    names.mkdir()
    with pytest.raises(ValueError, match="expected a file, got a folder"):
        Folder(tmp_path).build()
    with pytest.raises(ValueError, match=r"expected a folder of images, got .*0.png, which is none"):
        Folder(tmp_path / "cat" / "0.png").build()
