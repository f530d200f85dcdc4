"""Published data sets: downloaded where missing, read in every layout in which they are found, file by file."""

from __future__ import annotations

import os
import shutil

import pytest
import torch
from rich.progress import Progress

from archives import (
    Server,
    imagenet_r_lists,
    make_cifar100,
    make_cub200,
    make_imagenet_r,
    make_tiny_imagenet,
    pack,
    proved,
    told,
    tree,
)
from pgp.datasets import transfer
from pgp.datasets.base import DatasetSize
from pgp.datasets.check import IntegrityReport, check_images
from pgp.datasets.cifar100 import CIFAR100
from pgp.datasets.cub200 import CUB200
from pgp.datasets.digits import Digits
from pgp.datasets.imagenet_r import ImageNetR
from pgp.datasets.tiny_imagenet import TinyImageNet

MAKERS = {
    CIFAR100: make_cifar100,
    ImageNetR: make_imagenet_r,
    TinyImageNet: make_tiny_imagenet,
    CUB200: make_cub200,
}
PHOTOS = [ImageNetR, TinyImageNet, CUB200]


@pytest.fixture(autouse=True)
def _hurry(monkeypatch):
    monkeypatch.setattr(transfer, "PAUSE", 0)
    monkeypatch.setattr(os, "sync", lambda: None)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "PGP_MIRROR"):
        monkeypatch.delenv(name, raising=False)


def entries(split):
    """Class folder or label, and file name, of each image in order."""
    return [(int(label), path.name) for path, label in zip(split.paths, split.labels, strict=True)]


@pytest.mark.parametrize("kind", MAKERS)
def test_sets_are_fetched_and_read(kind, tmp_path, monkeypatch):
    folder = MAKERS[kind](tmp_path / "origin")
    if kind is CIFAR100:
        proved(monkeypatch, folder)
    (tmp_path / "site").mkdir()
    (published,) = kind.archives
    monkeypatch.setattr(kind, "archives", (pack(folder, published, tmp_path / "site"),))
    config = kind(tmp_path / "data")
    with pytest.raises(
        ValueError, match=rf"no data folder at {tmp_path}/data/{published.folder}: pgp data get fetches"
    ):
        config.read()
    with Server(tmp_path / "site") as server:
        monkeypatch.setenv("PGP_MIRROR", server.url)
        with Progress(disable=True) as progress:
            config.fetch(progress)
        data = config.build()
        config.fetch()
        assert [path for path, *_ in server.requests] == [f"/{published.name}"]
    unpacked = tree(tmp_path / "data")
    assert unpacked.pop(published.name) == (tmp_path / "site" / published.name).read_bytes()
    assert unpacked == tree(tmp_path / "origin")
    assert (len(data.train), len(data.test), data.classes) == {
        CIFAR100: (100, 100, 100),
        ImageNetR: (16, 8, 4),
        TinyImageNet: (24, 8, 4),
        CUB200: (16, 8, 4),
    }[kind]


@pytest.mark.parametrize("kind", MAKERS)
def test_offline_it_is_said_what_to_put_where(kind, tmp_path, monkeypatch):
    monkeypatch.setenv("PGP_MIRROR", "http://127.0.0.1:9")
    (published,) = kind.archives
    with pytest.raises(ValueError, match=rf"cannot fetch {published.name} .* get it from {published.url} elsewhere and"
                                         rf" put it, as it is, into {tmp_path}; or set PGP_MIRROR"):  # fmt: skip
        kind(tmp_path).build()


LAYOUTS = [
    (ImageNetR, {}),
    (ImageNetR, {"parts": True}),
    (TinyImageNet, {"layout": "published"}),
    (TinyImageNet, {"layout": "val"}),
    (TinyImageNet, {"layout": "test"}),
    (CUB200, {}),
    (CUB200, {"parts": True}),
]


@pytest.mark.parametrize(("kind", "layout"), LAYOUTS, ids=str)
@pytest.mark.parametrize("inside", [False, True])
def test_every_image_has_its_label_and_part(kind, layout, inside, tmp_path):
    folder = MAKERS[kind](tmp_path, **layout)
    (next(folder.rglob("*/*.[jJ]*")).parent / "._x.jpg").write_bytes(b"left by another system")
    before = tree(tmp_path)
    data = kind(folder if inside else tmp_path).build()
    seen = set()
    for part, split in (("train", data.train), ("test", data.test)):
        for i, label in enumerate(split.labels.tolist()):
            said = told(split.image(i))
            assert said[:2] == (label, part)
            seen.add(said)
    assert len(seen) == len(data.train) + len(data.test) == {TinyImageNet: 32}.get(kind, 24)
    assert torch.bincount(data.test.labels).tolist() == [2] * 4
    assert tree(tmp_path) == before


@pytest.mark.parametrize("kind", PHOTOS)
def test_the_order_is_that_of_the_names_in_every_layout(kind, tmp_path):
    orders = []
    for number, (_, layout) in enumerate(pair for pair in LAYOUTS if pair[0] is kind):
        MAKERS[kind](tmp_path / str(number), per_class=12, **layout)
        data = kind(tmp_path / str(number)).build()
        orders.append((entries(data.train), entries(data.test), data.class_names))
    assert all(order == orders[0] for order in orders)
    assert all(entry == sorted(entry) for entry in orders[0][:2])


def test_class_names(tmp_path):
    for make in (make_imagenet_r, make_tiny_imagenet, make_cub200):
        make(tmp_path)
    assert ImageNetR(tmp_path).build().class_names == ("goldfish", "great white shark", "hammerhead", "stingray")
    assert TinyImageNet(tmp_path).build().class_names == ("thing 0", "thing 1", "thing 2", "thing 3")
    birds = ("Black footed Albatross", "Laysan Albatross", "Sooty Albatross", "Groove billed Ani")
    assert CUB200(tmp_path).build().class_names == birds


def test_published_counts_and_lists():
    wnids, listed = imagenet_r_lists()
    assert (len(set(wnids)), len(set(listed))) == (200, 6000)
    assert {name.split("/")[0] for name in listed} == set(wnids)
    assert (ImageNetR.expected, TinyImageNet.expected) == ((24_000, 6_000, 200), (100_000, 10_000, 200))
    assert (CUB200.expected, CIFAR100.expected) == ((5_994, 5_794, 200), (50_000, 10_000, 100))


def test_imagenet_r_may_lie_half_moved(tmp_path):
    folder = make_imagenet_r(tmp_path)
    whole = ImageNetR(tmp_path).build()
    for name in ("n01443537", "n01484850"):
        shutil.copytree(folder / name, folder / "train" / name)
    shutil.rmtree(folder / "n01443537")
    (folder / "test" / "n01484850").mkdir(parents=True)
    shutil.move(next((folder / "n01484850").iterdir()), folder / "test" / "n01484850")
    again = ImageNetR(tmp_path).build()
    assert (entries(again.train), entries(again.test)) == (entries(whole.train), entries(whole.test))


def test_imagenet_r_split_at_random(tmp_path):
    make_imagenet_r(tmp_path / "flat", per_class=25)
    make_imagenet_r(tmp_path / "parts", per_class=25, parts=True)
    data = ImageNetR(tmp_path / "flat", split="random:7").build()
    train, test = entries(data.train), entries(data.test)
    assert (len(train), len(test)) == (80, 20)  # of the whole set, not of each class
    assert len({*train, *test}) == 100
    for root, split, same in (("flat", "random:7", True), ("parts", "random:7", True), ("flat", "random:8", False)):
        assert (entries(ImageNetR(tmp_path / root, split=split).build().test) == test) is same
    assert entries(ImageNetR(tmp_path / "flat").build().test) != test


def test_imagenet_r_split_by_folders(tmp_path):
    folder = make_imagenet_r(tmp_path, parts=True)
    moved = next((folder / "train" / "n01443537").iterdir())
    moved.rename(folder / "test" / "n01443537" / moved.name)
    assert len(ImageNetR(tmp_path, split="folders").build().test) == 9
    assert len(ImageNetR(tmp_path).build().test) == 8
    shutil.copy(folder / "test" / "n01443537" / moved.name, moved)
    with pytest.raises(
        ValueError, match=rf"1 images are in .*train and in .*test, such as n01443537/{moved.name}: delete"
    ):
        ImageNetR(tmp_path, split="folders").build()
    shutil.rmtree(folder / "test")
    with pytest.raises(ValueError, match=r"training and test images of split folders in .*, got \d+ and 0"):
        ImageNetR(tmp_path, split="folders").build()


@pytest.mark.parametrize(
    "split", ["", "Shared", "random", "random:", "random:-1", "random:1.5", "random:x", "folders "]
)
def test_imagenet_r_splits_are_checked(split):
    with pytest.raises(ValueError, match=rf"dataset\.split shared, folders or random:SEED .*, got '{split}'"):
        ImageNetR(split=split)


def test_imagenet_r_that_is_something_else(tmp_path):
    (tmp_path / "imagenet-r" / "n01443537").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"training and test images of split shared in .*imagenet-r, got 0 and 0"):
        ImageNetR(tmp_path).build()
    make_imagenet_r(tmp_path)
    (tmp_path / "imagenet-r" / "n01443537").rename(tmp_path / "imagenet-r" / "n99999999")
    with pytest.raises(ValueError, match=r"the 200 classes of ImageNet-R, got \['n99999999'\] too"):
        ImageNetR(tmp_path).build()


def test_tiny_imagenet_that_is_not_whole(tmp_path):
    folder = make_tiny_imagenet(tmp_path)
    index = folder / "val" / "val_annotations.txt"
    (folder / "val" / "images" / "val_3.JPEG").unlink()
    with pytest.raises(
        ValueError, match=r"1 of 8 files that .*val_annotations\.txt names are missing, such as .*val_3"
    ):
        TinyImageNet(tmp_path).build()
    text = index.read_text()
    for line in ("val_9.JPEG\tn77777777\t0\t0\t9\t9\n", "val_9.JPEG\n"):
        index.write_text(text + line)
        with pytest.raises(ValueError, match=r"lines of an image and a class of .*train in .*val_ann.*, got \['val_9"):
            TinyImageNet(tmp_path).build()
    index.unlink()
    with pytest.raises(ValueError, match=r"expected test images in .*: val/images with val/val_annotations\.txt, or"):
        TinyImageNet(tmp_path).build()
    (folder / "val" / "n77777777").mkdir()
    with pytest.raises(ValueError, match=r"every class of .*val in .*train too, got \['n77777777'\]"):
        TinyImageNet(tmp_path).build()
    shutil.rmtree(folder / "train")
    with pytest.raises(ValueError, match=r"expected images in .*train/<wnid>/images, got none"):
        TinyImageNet(tmp_path).build()


def test_tiny_imagenet_without_words(tmp_path):
    words = make_tiny_imagenet(tmp_path) / "words.txt"
    words.write_text(words.read_text().replace("n01443574\t", "n5\t"))
    with pytest.raises(ValueError, match=r"a line 'WNID<tab>NAME' in .*words\.txt .*none for \['n01443574'\]"):
        TinyImageNet(tmp_path).build()
    words.unlink()
    with pytest.warns(UserWarning, match=r"no .*words\.txt: classes are called by their WordNet ids"):
        assert TinyImageNet(tmp_path).build().class_names[1] == "n01443574"


def test_cub200_that_is_not_whole(tmp_path):
    folder = make_cub200(tmp_path)
    index = folder / "image_class_labels.txt"
    text = index.read_text()
    for damaged in (text.replace("3 1\n", ""), text.replace("3 1\n", "3 77\n")):
        index.write_text(damaged)
        with pytest.raises(ValueError, match=r"the same images in images\.txt, .*: unpack the archive again"):
            CUB200(tmp_path).build()
    index.unlink()
    with pytest.raises(ValueError, match=r"expected .*image_class_labels\.txt beside the images, got none"):
        CUB200(tmp_path).build()
    index.write_text(text)
    for path in sorted(folder.rglob("*.jpg"))[:5]:
        path.unlink()
    with pytest.raises(
        ValueError, match=r"5 of 24 files that .*images\.txt names are missing, such as (.*, ){2}.*: unpack"
    ):
        CUB200(tmp_path).build()
    shutil.rmtree(folder / "images")
    with pytest.raises(ValueError, match=r"expected training and test images in .*CUB_200_2011, got 0 and 0"):
        CUB200(tmp_path).build()
    (folder / "test" / "004.X").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"every class of .*test in .*train, got \['004\.X'\] too"):
        CUB200(tmp_path).build()


@pytest.mark.parametrize("kind", PHOTOS)
def test_a_set_is_checked_image_by_image(kind, tmp_path, monkeypatch):
    folder = MAKERS[kind](tmp_path)
    found = check_images(kind(tmp_path))
    assert (found.bad, found.without, found.is_complete) == ((), (), False)
    size = ("24" if kind is TinyImageNet else "16") + " training and 8 test images of 4 classes"
    published = "expected {:,} training and {:,} test images of {:,} classes".format(*kind.expected)
    assert found.lines() == [size, published]
    monkeypatch.setattr(kind, "expected", found.found)
    with Progress(disable=True) as progress:
        assert check_images(kind(tmp_path), progress).is_complete
        assert progress.tasks[0].completed == progress.tasks[0].total
    image = kind(tmp_path).build().train.paths[3]
    image.write_bytes(image.read_bytes()[:-200])  # its header is good
    found = check_images(kind(tmp_path))
    assert not found.is_complete
    assert found.lines()[1:] == [message for message in found.bad if str(image) in message]
    assert len(found.bad) == 1
    assert folder in image.parents


def test_a_set_without_files_is_checked(tmp_path, monkeypatch):
    assert check_images(Digits()) == IntegrityReport(DatasetSize(1437, 360, 10), None, (), ())
    assert check_images(Digits()).is_complete
    proved(monkeypatch, make_cifar100(tmp_path, classes=100))
    (tmp_path / "imagenet-r").mkdir()
    assert check_images(CIFAR100(tmp_path)).lines()[0] == "100 training and 100 test images of 100 classes"
    with pytest.raises(ValueError, match=r"no data folder at .*imagenet-r: pgp data get fetches it"):
        check_images(ImageNetR(tmp_path))


def test_classes_that_lack_images_are_told(tmp_path):
    folder = make_cub200(tmp_path, parts=True)
    shutil.rmtree(folder / "test" / "002.Laysan_Albatross")
    found = check_images(CUB200(tmp_path))
    assert found.without == ("Laysan Albatross",)
    assert "no training or no test image of Laysan Albatross" in found.lines()


@pytest.mark.parametrize(
    ("kind", "name", "content", "message"),
    [
        (
            CUB200,
            "classes.txt",
            "1 001.Größe\n".encode("latin-1"),
            r"classes\.txt as a text in UTF-8, got another encoding",
        ),
        (
            CUB200,
            "classes.txt",
            b"one 001.X\n2 002.Y\n3 003.Z\n4 004.W\n1 00.V\n",
            r"a number and a name in .*, got 'one'",
        ),
        (TinyImageNet, "words.txt", b"n01443537\tgr\xf6\n", r"words\.txt as a text in UTF-8, got another encoding"),
        (TinyImageNet, "val/val_annotations.txt", "x\ty\n".encode("utf-16"), r"val_annotations\.txt .*, got UTF-16"),
    ],
)
def test_index_files_in_another_encoding_are_named(kind, name, content, message, tmp_path):
    (MAKERS[kind](tmp_path) / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        kind(tmp_path).read()
