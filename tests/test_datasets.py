from __future__ import annotations

import gzip
import hashlib
import pickle
import struct

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets as torchvision_sets

from pgp.datasets import BadImageError, Loading, Viewed, Views, batches, fashion_mnist, in_order
from pgp.datasets.cifar100 import CIFAR100
from pgp.datasets.digits import Digits
from pgp.datasets.fashion_mnist import FashionMNIST
from pgp.datasets.folder import Folder, read_image
from pgp.datasets.synthetic import Synthetic


def test_digits():
    data = Digits().build()
    assert (len(data.train), len(data.test), data.classes) == (1437, 360, 10)
    assert data.train.image(0).shape == (3, 8, 8)
    seen = {image.numpy().tobytes() for image in data.train.images}
    assert sum(image.numpy().tobytes() in seen for image in data.test.images) <= 2  # the set has a few doubles itself
    assert torch.equal(Digits().build().test.labels, data.test.labels)


def idx(array):
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


@pytest.fixture
def garments(tmp_path, monkeypatch):
    monkeypatch.setattr(fashion_mnist, "DEBIAN", tmp_path / "nowhere")
    for part, count in (("train", 6), ("t10k", 4)):
        images = np.arange(count * 784, dtype=np.uint8).reshape(count, 28, 28)
        (tmp_path / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
        (tmp_path / f"{part}-labels-idx1-ubyte").write_bytes(idx(np.arange(count, dtype=np.uint8)))
    return tmp_path


def test_fashion_mnist_in_place(garments):
    data = FashionMNIST(garments).build()
    assert (len(data.train), len(data.test), data.class_names[9]) == (6, 4, "Ankle boot")
    assert data.train.image(1)[0, 0, :3].tolist() == [16, 17, 18]
    assert data.test.labels.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("train-images-idx3-ubyte.gz", lambda b: b[:200], "is damaged"),
        ("train-labels-idx1-ubyte", lambda b: b[:-1], "no complete idx file"),
        ("train-labels-idx1-ubyte", lambda b: b"\1" + b[1:], "no complete idx file"),
        ("train-labels-idx1-ubyte", lambda b: b"", "no complete idx file"),
    ],
)
def test_damaged_fashion_mnist(garments, name, damage, message):
    (garments / name).write_bytes(damage((garments / name).read_bytes()))
    with pytest.raises(ValueError, match=message):
        FashionMNIST(garments).build()


def test_no_network(tmp_path, monkeypatch):
    def offline(*_, **__):
        raise RuntimeError("no route to host")

    monkeypatch.setattr(fashion_mnist, "DEBIAN", tmp_path / "nowhere")
    monkeypatch.setattr(torchvision_sets.FashionMNIST, "download", offline)
    monkeypatch.setattr(torchvision_sets.CIFAR100, "download", offline)
    with pytest.raises(ValueError, match=r"no route to host.*put its four idx files there"):
        FashionMNIST(tmp_path).build()
    with pytest.raises(ValueError, match=r"no route to host.*cifar-100-python\.tar\.gz"):
        CIFAR100(tmp_path).build()


def test_cifar100_reads_a_folder_in_place(tmp_path, monkeypatch):
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    sums = {}
    for name, count in (("train", 5), ("test", 3)):
        entry = {
            "data": np.arange(count * 3072, dtype=np.uint8).reshape(count, 3072),
            "fine_labels": list(range(count)),
        }
        (folder / name).write_bytes(pickle.dumps(entry))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": [f"c{i}" for i in range(100)]}))
    for name in ("train", "test", "meta"):
        sums[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    fake = torchvision_sets.CIFAR100
    monkeypatch.setattr(fake, "train_list", [["train", sums["train"]]])
    monkeypatch.setattr(fake, "test_list", [["test", sums["test"]]])
    monkeypatch.setattr(fake, "meta", {"filename": "meta", "key": "fine_label_names", "md5": sums["meta"]})
    data = CIFAR100(tmp_path).build()
    assert (len(data.train), len(data.test), data.classes) == (5, 3, 100)
    assert data.train.image(0)[:, 0, 0].tolist() == [0, 0, 0]
    assert data.train.image(0)[0, 0, :3].tolist() == [0, 1, 2]


def save(path, image, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


@pytest.fixture
def photos(tmp_path):
    for part, count in (("train", 3), ("test", 2)):
        for name in ("café au lait", "b"):
            for i in range(count):
                save(tmp_path / part / name / f"no {i}.PNG", Image.new("RGB", (20, 12), (40 * i, 10, 200)))
    return tmp_path


def test_folder(photos):
    data = Folder(photos).build()
    assert data.class_names == ("b", "café au lait")
    assert (len(data.train), data.test.labels.tolist()) == (6, [0, 0, 1, 1])
    assert data.train.image(1).shape == (3, 12, 20)
    save(photos / "test" / "stranger" / "x.png", Image.new("RGB", (4, 4)))
    with pytest.raises(ValueError, match=r"\['stranger'\] in test only"):
        Folder(photos).build()


def test_folders_that_do_not_fit(tmp_path):
    with pytest.raises(ValueError, match="no data folder at"):
        Folder(tmp_path / "nowhere").build()
    for part in ("train", "test"):
        (tmp_path / part / "empty").mkdir(parents=True)
    with pytest.raises(ValueError, match="no images in"):
        Folder(tmp_path).build()


def test_images_are_read_as_the_eye_sees_them(tmp_path):
    deep = Image.fromarray(np.full((4, 4), 65535, dtype=np.uint16))
    assert read_image(save(tmp_path / "16.png", deep)).unique().tolist() == [255]
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert read_image(save(tmp_path / "clear.png", clear)).unique().tolist() == [255]
    assert read_image(save(tmp_path / "gray.jpg", Image.new("L", (4, 4), 7))).shape == (3, 4, 4)
    assert read_image(save(tmp_path / "ink.jpg", Image.new("CMYK", (4, 4)))).unique().tolist() == [255]
    turned = Image.new("RGB", (6, 4))
    exif = turned.getexif()
    exif[0x0112] = 6
    assert read_image(save(tmp_path / "turned.jpg", turned, exif=exif)).shape == (3, 6, 4)


@pytest.mark.parametrize("content", [b"", b"not an image"])
def test_bad_images_are_named_or_skipped(photos, content):
    bad = photos / "train" / "b" / "bad.jpg"
    bad.write_bytes(content)
    data = Folder(photos).build()
    with pytest.raises(BadImageError, match=r"cannot read the image .*bad\.jpg"):
        data.train.image(0)
    plan = in_order(torch.arange(len(data.train)), 3)
    views = Views(size=8, resize=8).test()
    with pytest.raises(BadImageError):
        list(batches(Viewed(data.train, views, 0, ("x",), skip_bad=False), plan, Loading()))
    with pytest.warns(UserWarning, match=r"skipped: .*bad\.jpg"):
        got = list(batches(Viewed(data.train, views, 0, ("x",), skip_bad=True), plan, Loading()))
    assert [len(batch.indices) for batch in got] == [2, 3, 1]


def loaded(data, views, plan, **loading):
    return list(batches(Viewed(data.train, views, 3, ("view", 0), skip_bad=False), plan, Loading(**loading)))


def test_augmentation_is_addressed():
    data, views = Synthetic().build(), Views(size=16, resize=16, scale=(0.3, 1.0)).train()
    state = torch.get_rng_state()
    one = loaded(data, views, in_order(torch.arange(12), 4))
    assert torch.equal(torch.get_rng_state(), state)
    backwards = loaded(data, views, in_order(torch.arange(12).flip(0), 12))[0]
    with_workers = loaded(data, views, in_order(torch.arange(12), 4), workers=2)
    assert torch.equal(torch.cat([b.images for b in one]), backwards.images.flip(0))
    assert all(torch.equal(a.images, b.images) for a, b in zip(one, with_workers, strict=True))
    again = loaded(data, views, in_order(torch.arange(12), 4, passes=1))
    assert not torch.equal(one[0].images, again[0].images)
    assert 0 <= one[0].images.min() < one[0].images.max() <= 1


def test_processes_share_a_batch():
    data, views = Synthetic().build(), Views(size=16, resize=16).test()
    shares = [loaded(data, views, in_order(torch.arange(5), 5), rank=rank, world=2)[0] for rank in (0, 1)]
    assert [share.indices.tolist() for share in shares] == [[0, 2, 4], [1, 3]]


def test_test_view_is_the_centre():
    image = torch.zeros(3, 32, 64, dtype=torch.uint8)
    image[:, :, 24:40] = 255
    view = Views(size=16, resize=32, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)).test()(image)
    assert view.shape == (3, 16, 16)
    assert view.unique().tolist() == [1.0]
