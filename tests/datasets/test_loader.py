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

from archives import Server
from pgp.datasets import fashion_mnist, transfer
from pgp.datasets.base import ArraySplit, BadImageError
from pgp.datasets.cifar100 import CIFAR100
from pgp.datasets.digits import Digits
from pgp.datasets.fashion_mnist import FashionMNIST
from pgp.datasets.files import read_image
from pgp.datasets.folder import Folder
from pgp.datasets.loader import LoaderOptions, TransformedSplit, batches, sequential_batches
from pgp.datasets.scan import images_below
from pgp.datasets.synthetic import Synthetic
from pgp.datasets.transforms import Transforms
from pgp.predict import images_in

DIGITS = [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
"""Images of each digit, by the documentation of the source (UCI ML hand-written digits, test part)."""


def test_digits():
    data = Digits().build()
    assert (len(data.train), len(data.test), data.classes) == (1437, 360, 10)
    assert data.train.image(0).shape == (3, 8, 8)
    seen = {image.numpy().tobytes() for image in data.train.images}
    assert sum(image.numpy().tobytes() in seen for image in data.test.images) <= 2  # the set has a few doubles itself
    assert (torch.bincount(data.train.labels) + torch.bincount(data.test.labels)).tolist() == DIGITS
    assert data.train.images.max() == 255
    again = Digits().build()
    for part in ("train", "test"):
        assert torch.equal(getattr(again, part).labels, getattr(data, part).labels)
        assert torch.equal(getattr(again, part).images, getattr(data, part).images)


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
        ("train-images-idx3-ubyte.gz", lambda b: b"plain" + b, "is damaged"),
        ("train-images-idx3-ubyte.gz", lambda b: b[:10] + b"\xff" + b[11:], "is damaged"),
        ("train-images-idx3-ubyte.gz", lambda b: gzip.compress(idx(np.zeros(6, np.uint8))), "no idx file of bytes"),
        ("train-labels-idx1-ubyte", lambda b: b[:-1], "no complete idx file"),
        ("train-labels-idx1-ubyte", lambda b: b"\1" + b[1:], "no idx file of bytes"),
        ("train-labels-idx1-ubyte", lambda b: b"", "no idx file of bytes"),
        ("train-labels-idx1-ubyte", lambda b: b + b"\0", "no complete idx file of 6 bytes"),
        ("train-labels-idx1-ubyte", lambda b: b[:4] + b"\xff" * 4 + b[8:], "no idx file of bytes"),
        ("train-images-idx3-ubyte.gz", lambda b: gzip.compress(b"\0\0\x08\x03" + b"\xff" * 12), "no idx file of bytes"),
        ("train-images-idx3-ubyte.gz", lambda b: gzip.compress(idx(np.zeros((0, 28, 28), np.uint8))), "no idx file of"),
        (
            "train-images-idx3-ubyte.gz",
            lambda b: gzip.compress(idx(np.zeros((6, 2, 2), np.uint8)) + bytes(1 << 20)),
            "no complete idx file of 24 bytes",
        ),
        ("train-labels-idx1-ubyte", lambda b: b[:-1] + b"\x0a", "expected a label below 10 for each image of train"),
        ("t10k-labels-idx1-ubyte", lambda b: idx(np.zeros(5, np.uint8)), "got 4 images and 5 labels"),
    ],
)
def test_damaged_fashion_mnist(garments, name, damage, message):
    (garments / name).write_bytes(damage((garments / name).read_bytes()))
    with pytest.raises(ValueError, match=message):
        FashionMNIST(garments).build()


@pytest.mark.parametrize("name", ["train-labels-idx1-ubyte", "t10k-images-idx3-ubyte.gz"])
def test_missing_fashion_mnist(garments, name):
    (garments / name).unlink()
    plain = name.removesuffix(".gz")
    with pytest.raises(ValueError, match=rf"expected {plain} or {plain}.gz in .*{garments.name}, got neither"):
        FashionMNIST(garments).build()


def test_fashion_mnist_where_torchvision_and_debian_put_it(garments, monkeypatch):
    raw = garments / "root" / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    monkeypatch.setattr(fashion_mnist, "DEBIAN", garments)
    assert len(FashionMNIST(garments / "root").build().train) == 6
    for path in garments.glob("*ubyte*"):
        path.rename(raw / path.name)
    assert len(FashionMNIST(garments / "root").build().train) == 6


@pytest.fixture
def published(tmp_path, monkeypatch):
    """A server of the four files, and no copy of Debian's."""
    monkeypatch.setattr(fashion_mnist, "DEBIAN", tmp_path / "nowhere")
    (tmp_path / "site").mkdir()
    resources = []
    for part, count in (("train", 6), ("t10k", 4)):
        images = np.arange(count * 784, dtype=np.uint8).reshape(count, 28, 28)
        for name, array in (("images-idx3", images), ("labels-idx1", np.arange(count, dtype=np.uint8))):
            path = tmp_path / "site" / f"{part}-{name}-ubyte.gz"
            path.write_bytes(gzip.compress(idx(array)))
            resources.append((path.name, hashlib.md5(path.read_bytes()).hexdigest()))
    monkeypatch.setattr(torchvision_sets.FashionMNIST, "resources", resources)
    monkeypatch.setattr(transfer, "PAUSE", 0)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with Server(tmp_path / "site") as server:
        monkeypatch.setenv("PGP_MIRROR", server.url)
        yield server


def test_fashion_mnist_is_fetched_once_and_goes_on_where_it_stopped(published, tmp_path):
    (tmp_path / "site" / "t10k-images-idx3-ubyte.gz").rename(tmp_path / "aside.gz")
    with pytest.raises(ValueError, match=r"Fashion-MNIST is neither in .* cannot fetch t10k-images-idx3-ubyte.gz"):
        FashionMNIST(tmp_path / "data").build()
    (tmp_path / "aside.gz").rename(tmp_path / "site" / "t10k-images-idx3-ubyte.gz")
    for _ in range(2):
        data = FashionMNIST(tmp_path / "data").build()
        assert (len(data.train), len(data.test)) == (6, 4)
    asked = [path for path, *_ in published.requests]
    assert len(asked) == 5
    assert len(set(asked)) == 4


def test_no_network(published, tmp_path, monkeypatch):
    monkeypatch.setenv("PGP_MIRROR", "http://127.0.0.1:9")
    with pytest.raises(ValueError, match=rf"neither in {tmp_path} nor in .*refused.* put it, as it is, into {tmp_path}"
                                         r"/FashionMNIST/raw; .*; or install Debian's"):  # fmt: skip
        FashionMNIST(tmp_path).build()
    with pytest.raises(ValueError, match=rf"Fashion-MNIST is neither in {tmp_path} nor in .*: pgp data get fetches it"):
        FashionMNIST(tmp_path).read()


class Trap:
    """Touches a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return type(self.path).touch, (self.path,)


def test_cifar100_never_unpickles_what_it_does_not_know(tmp_path):
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    for name in ("train", "test", "meta"):
        (folder / name).write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    with pytest.raises(ValueError, match="cifar-100-python is not the published CIFAR-100: the checksums"):
        CIFAR100(tmp_path).build()
    assert not (tmp_path / "sprung").exists()
    pickle.loads((folder / "meta").read_bytes())
    assert (tmp_path / "sprung").exists()  # the trap works


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
    with pytest.raises(ValueError, match=rf"no data folder at {tmp_path / 'nowhere'}"):
        Folder(tmp_path / "nowhere").build()
    (tmp_path / "half" / "test").mkdir(parents=True)
    with pytest.raises(ValueError, match=rf"no data folder at {tmp_path / 'half' / 'train'}, beside"):
        Folder(tmp_path / "half").build()
    (tmp_path / "whole" / "train").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"no images in .*train/<class>/"):
        Folder(tmp_path / "whole").build()
    for part in ("train", "test"):
        (tmp_path / part / "empty").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"expected folders of classes with images in \['test'\] of"):
        Folder(tmp_path).build()


def test_folder_takes_images_only_at_any_depth(photos):
    (photos / "train" / "b" / "notes.txt").write_text("not an image")
    (photos / "train" / "readme.png").write_text("not in a class")
    save(photos / "train" / "b" / "more" / "x.JPeG", Image.new("RGB", (4, 4)))
    data = Folder(photos).build()
    assert (len(data.train), data.train.labels.tolist()) == (7, [0] * 4 + [1] * 3)
    assert all(data.train.image(i).dtype == torch.uint8 for i in range(7))


def palette(transparency):
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 200, 100, 50])
    return image, {"transparency": 1} if transparency else {}


DEEP = Image.fromarray(np.full((4, 4), 200 * 257, dtype=np.uint16))


@pytest.mark.parametrize(
    ("name", "image", "options", "expected"),
    [
        ("color.png", Image.new("RGB", (4, 4), (200, 100, 50)), {}, (200, 100, 50)),
        ("gray.png", Image.new("L", (4, 4), 7), {}, (7, 7, 7)),
        ("gray.JPG", Image.new("L", (4, 4), 7), {}, (7, 7, 7)),
        ("bits.png", Image.new("1", (4, 4), 1), {}, (255, 255, 255)),
        ("deep.png", DEEP, {}, (200, 200, 200)),
        ("deep.tif", DEEP, {}, (200, 200, 200)),
        ("clear.png", Image.new("RGBA", (4, 4), (200, 100, 50, 0)), {}, (255, 255, 255)),
        ("half.png", Image.new("RGBA", (4, 4), (200, 100, 50, 51)), {}, (244, 224, 214)),
        ("solid.webp", Image.new("RGBA", (4, 4), (0, 0, 0, 255)), {"lossless": True}, (0, 0, 0)),
        ("gray clear.png", Image.new("LA", (4, 4), (7, 0)), {}, (255, 255, 255)),
        ("palette.png", *palette(transparency=False), (200, 100, 50)),
        ("palette clear.png", *palette(transparency=True), (255, 255, 255)),
        ("palette.gif", *palette(transparency=False), (200, 100, 50)),
        ("paper.jpg", Image.new("CMYK", (4, 4), (0, 0, 0, 0)), {}, (255, 255, 255)),
        ("cyan.jpg", Image.new("CMYK", (4, 4), (255, 0, 0, 0)), {}, (0, 255, 255)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_images_are_read_as_the_eye_sees_them(tmp_path, name, image, options, expected):
    pixels = read_image(save(tmp_path / name, image, **options))
    assert (pixels.shape, pixels.dtype) == ((3, 4, 4), torch.uint8)
    gap = (pixels.flatten(1).int() - torch.tensor(expected)[:, None]).abs().max()
    assert gap <= (1 if name.lower().endswith("jpg") else 0)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photos_are_turned_upright(tmp_path, orientation):
    image = Image.fromarray(np.arange(72, dtype=np.uint8).reshape(4, 6, 3))
    exif = image.getexif()
    exif[0x0112] = orientation
    pixels = read_image(save(tmp_path / "turned.png", image, exif=exif))
    turn = {1: [], 2: ["h"], 3: ["h", "v"], 4: ["v"], 5: ["t"], 6: ["t", "h"], 7: ["t", "h", "v"], 8: ["t", "v"]}
    expected = torch.arange(72, dtype=torch.uint8).reshape(4, 6, 3).permute(2, 0, 1)
    for step in turn[orientation]:
        expected = expected.mT if step == "t" else expected.flip(-1 if step == "h" else -2)
    assert torch.equal(pixels, expected)


@pytest.mark.parametrize("content", [b"", b"not an image"])
def test_bad_images_are_named_or_skipped(photos, content):
    bad = photos / "train" / "b" / "bad.jpg"
    bad.write_bytes(content)
    data = Folder(photos).build()
    with pytest.raises(BadImageError, match=r"cannot read the image .*bad\.jpg"):
        data.train.image(0)
    plan = sequential_batches(torch.arange(len(data.train)), 3)
    views = Transforms(size=8, resize=8).test()
    for workers in (0, 1) if content else (0,):  # torch waits 5 s for a worker that is left alone
        with pytest.raises(BadImageError, match=r"^cannot read the image .*bad\.jpg"):
            list(batches(TransformedSplit(data.train, views, 0, ("x",), skip_bad=False), plan, LoaderOptions(workers)))
    with pytest.warns(UserWarning, match=r"skipped: .*bad\.jpg"):
        got = list(batches(TransformedSplit(data.train, views, 0, ("x",), skip_bad=True), plan, LoaderOptions()))
    assert [batch.indices.tolist() for batch in got] == [[1, 2], [3, 4, 5], [6]]


def test_hidden_files_and_thumbnails_are_no_images(photos):
    before = Folder(photos).build().train.names()
    (photos / "train" / "b" / ".thumbnails").mkdir()
    for name in ("._no 0.PNG", ".thumbnails/no 0.PNG"):
        (photos / "train" / "b" / name).write_bytes(b"")
    assert Folder(photos).build().train.names() == before
    assert images_in([photos / "train" / "b"]) == images_below(photos / "train" / "b")
    assert not any(path.name.startswith(".") for path in images_in([photos]))


@pytest.mark.parametrize("name", ["val", "validation", "VALID", "Test", "testing", "Eval"])
@pytest.mark.parametrize("train", ["train", "Training"])
def test_other_names_of_the_parts(photos, name, train):
    data = Folder(photos).build()
    (photos / "test").rename(photos / "away")  # or a system that ignores case would find it there
    (photos / "away").rename(photos / name)
    (photos / "train").rename(photos / "away")
    (photos / "away").rename(photos / train)
    other = Folder(photos).build()
    assert (other.train.names(), other.test.names()) == (data.train.names(), data.test.names())
    assert (other.notes, other.ignored) == ((), ())


def test_names_of_ones_own_are_checked(photos):
    (photos / "names.txt").write_bytes("a caf\xe9\nb x\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"cannot read .*names\.txt as a text in UTF-8"):
        Folder(photos).build()
    names = sorted(path.name for path in (photos / "train").iterdir() if path.is_dir())
    (photos / "names.txt").write_text("".join(f"{name} same\n" for name in names))
    with pytest.raises(ValueError, match=r"a name of its own for each folder in .*names\.txt, got \['same'\]"):
        Folder(photos).build()


def test_a_cut_off_image_is_bad(photos):
    path = photos / "train" / "b" / "no 0.PNG"
    path.write_bytes(path.read_bytes()[:45])
    with pytest.raises(BadImageError, match=r"cannot read the image .*no 0\.PNG"):
        Folder(photos).build().train.image(0)


def test_a_batch_of_bad_images_is_empty(photos):
    for path in (photos / "train" / "b").iterdir():
        path.write_bytes(b"")
    viewed = TransformedSplit(
        Folder(photos).build().train, Transforms(size=8, resize=8).test(), 0, ("x",), skip_bad=True
    )
    with pytest.warns(UserWarning, match=r"skipped: .*no \d\.PNG"):
        first, second = batches(viewed, sequential_batches(torch.arange(6), 3), LoaderOptions())
    assert (len(first.images), len(first.labels), len(first.indices)) == (0, 0, 0)
    assert second.labels.tolist() == [1, 1, 1]


def loaded(data, views, plan, **loading):
    return list(
        batches(TransformedSplit(data.train, views, 3, ("view", 0), skip_bad=False), plan, LoaderOptions(**loading))
    )


def test_augmentation_is_addressed():
    data, views = Synthetic().build(), Transforms(size=16, resize=16, scale=(0.3, 1.0)).train()
    state = torch.get_rng_state()
    one = loaded(data, views, sequential_batches(torch.arange(12), 4))
    assert torch.equal(torch.get_rng_state(), state)
    backwards = loaded(data, views, sequential_batches(torch.arange(12).flip(0), 12))[0]
    with_workers = loaded(data, views, sequential_batches(torch.arange(12), 4), workers=2)
    assert torch.equal(torch.cat([b.images for b in one]), backwards.images.flip(0))
    assert all(torch.equal(a.images, b.images) for a, b in zip(one, with_workers, strict=True))
    again = loaded(data, views, sequential_batches(torch.arange(12), 4, epoch=1))
    assert not any(torch.equal(a, b) for a, b in zip(one[0].images, again[0].images, strict=True))
    assert 0 <= one[0].images.min() < one[0].images.max() <= 1


@pytest.mark.parametrize(("seed", "purpose"), [(4, ("view", 0)), (3, ("view", 1)), (3, ("observed", 0))])
def test_every_part_of_the_address_decides_the_crop(seed, purpose):
    data, views = Synthetic().build(), Transforms(size=16, resize=16, scale=(0.3, 1.0)).train()
    first = loaded(data, views, sequential_batches(torch.arange(4), 4))[0]
    viewed = TransformedSplit(data.train, views, seed, purpose, skip_bad=False)
    (other,) = batches(viewed, sequential_batches(torch.arange(4), 4), LoaderOptions())
    assert not any(torch.equal(a, b) for a, b in zip(first.images, other.images, strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_loading_leaves_the_global_generator_alone(workers):
    data, views = Synthetic().build(), Transforms(size=16, resize=16).train()
    ends = []
    for start in (1, 2):
        torch.manual_seed(start)
        state = torch.get_rng_state()
        ends.append(
            torch.cat(
                [batch.images for batch in loaded(data, views, sequential_batches(torch.arange(8), 4), workers=workers)]
            )
        )
        assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(*ends)


def test_processes_share_a_batch():
    data, views = Synthetic().build(), Transforms(size=16, resize=16, scale=(0.3, 1.0)).train()
    plan = sequential_batches(torch.tensor([7, 3, 11, 0, 5, 2]), 5)
    shares = [loaded(data, views, plan, rank=rank, world_size=2) for rank in (0, 1)]
    assert [[batch.indices.tolist() for batch in share] for share in shares] == [[[7, 11, 5], [2]], [[3, 0], []]]
    assert len(shares[1][1].images) == 0
    whole = loaded(data, views, plan)[0]
    for share, own in zip(shares, (slice(0, None, 2), slice(1, None, 2)), strict=True):
        assert torch.equal(share[0].images, whole.images[own])
        assert torch.equal(share[0].labels, whole.labels[own])


def test_synthetic_is_deterministic():
    one, same, other = Synthetic(seed=1).build(), Synthetic(seed=1).build(), Synthetic(seed=2).build()
    assert (len(one.train), len(one.test), one.classes) == (72, 24, 6)
    for part in ("train", "test"):
        assert torch.equal(getattr(one, part).images, getattr(same, part).images)
        assert not torch.equal(getattr(one, part).images, getattr(other, part).images)
    assert not torch.equal(one.train.image(0), one.train.image(1))
    assert not torch.equal(one.train.image(0), one.test.image(0))


@pytest.mark.parametrize(
    ("setting", "value"),
    [("classes", 0), ("per_class", 0), ("size", -1), ("domains", -1), ("noise", -0.1), ("noise", float("nan"))],
)
def test_synthetic_of_nothing_is_refused(setting, value):
    with pytest.raises(ValueError, match=rf"expected dataset\.{setting} of at least [01], got {value}"):
        Synthetic(**{setting: value})


def test_arrays_need_a_label_per_image():
    with pytest.raises(ValueError, match="one label per image, got 3 images and 2 labels"):
        ArraySplit(torch.zeros(3, 8, 8, dtype=torch.uint8), torch.zeros(2))


def test_test_view_is_the_centre():
    image = torch.zeros(3, 32, 64, dtype=torch.uint8)
    image[:, :, 24:40] = 255
    view = Transforms(size=16, resize=32, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)).test()(image)
    assert view.shape == (3, 16, 16)
    assert view.unique().tolist() == [1.0]


@pytest.mark.parametrize("shape", [(40, 64), (64, 40), (20, 20)])
def test_test_view_is_that_of_pil(shape):
    smooth = torch.rand(3, 5, 5, generator=torch.Generator().manual_seed(0))
    smooth = torch.nn.functional.interpolate(smooth[None], shape, mode="bilinear")[0]
    image = (smooth * 255).to(torch.uint8)
    view = Transforms(size=28).test()(image)  # the shorter side becomes 28 * 256 / 224 = 32
    wide = Image.fromarray(image.permute(1, 2, 0).numpy())
    width, height = (32 * side // min(wide.size) for side in wide.size)
    left, top = round((width - 28) / 2), round((height - 28) / 2)
    theirs = wide.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + 28, top + 28))
    assert (view.shape, view.dtype) == ((3, 28, 28), torch.float32)
    expected = torch.from_numpy(np.array(theirs)).permute(2, 0, 1) / 255
    assert (view - expected).abs().max() < 2.5 / 255


def test_views_map_bytes_to_shares():
    image = torch.full((3, 20, 20), 255, dtype=torch.uint8)
    image[:, 10:] = 0
    for view in (
        Transforms(size=16, resize=16).test(),
        Transforms(size=16, resize=16, scale=(1.0, 1.0), flip=0).train(),
    ):
        pixels = view(image)
        assert (pixels.shape, pixels.dtype) == ((3, 16, 16), torch.float32)
        assert (pixels.min(), pixels.max()) == (0, 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 32, "resize": 31}, r"transforms\.resize of at least transforms\.size 32, got 31"),
        ({"size": 0}, r"transforms\.size of at least 1, got 0"),
        ({"scale": (0, 1)}, r"transforms\.scale \(low, high\) with 0 < low <= high <= 1, got \(0, 1\)"),
        ({"scale": (0.5, 0.4)}, r"transforms\.scale .*got \(0\.5, 0\.4\)"),
        ({"scale": (0.5, 1.4)}, r"transforms\.scale .*got \(0\.5, 1\.4\)"),
        ({"ratio": (1.5, 0.5)}, r"transforms\.ratio .*got \(1\.5, 0\.5\)"),
        ({"flip": 2.0}, r"transforms\.flip .*got 2"),
        ({"std": (0.5, 0.0, 0.5)}, r"transforms\.std .*got \(0\.5, 0\.0, 0\.5\)"),
    ],
)
def test_bad_views(settings, message):
    with pytest.raises(ValueError, match=message):
        Transforms(**settings)


def test_folders_may_be_called_otherwise(photos):
    names = photos / "names.txt"
    for text in ("b only\n", "b\ncafé au lait x\n", ""):
        names.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=r"a line 'FOLDER NAME' .*names.txt for each folder, got none for"):
            Folder(photos).build()
    names.write_text("café au lait\tGroßer Bär\n\nb a bee \n", encoding="utf-8")
    assert Folder(photos).build().class_names == ("a bee", "Großer Bär")


@pytest.mark.parametrize("inside", ["", "train"])
def test_a_folder_without_a_test_part_is_split_class_by_class(tmp_path, inside):
    for name, count in (("a", 10), ("b", 2), ("c", 3)):
        for i in range(count):
            save(tmp_path / inside / name / f"{i}.png", Image.new("RGB", (4, 4)))
    (tmp_path / inside / ".hidden").mkdir()
    data = Folder(tmp_path, test_share=0.3).build()
    assert data.class_names == ("a", "b", "c")
    assert torch.bincount(data.test.labels).tolist() == [3, 1, 1]
    assert torch.bincount(data.train.labels).tolist() == [7, 1, 2]
    assert not {*data.train.paths} & {*data.test.paths}
    assert Folder(tmp_path, test_share=0.3).build().test.paths == data.test.paths
    assert Folder(tmp_path, test_share=0.3, split_seed=1).build().test.paths != data.test.paths
    (tmp_path / inside / "b" / "1.png").unlink()
    single = Folder(tmp_path).build()  # it is learned, and not tested
    assert torch.bincount(single.train.labels)[1] == 1
    assert 1 not in single.test.labels
    with pytest.raises(ValueError, match="test_share between 0 and 1, got 1"):
        Folder(tmp_path, test_share=1)
