"""Small images are enlarged in batches on any device, as torchvision and Pillow enlarge them one by one."""

from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, v2

from pgp.datasets.base import ArraySplit, ConcatSplit
from pgp.datasets.enlarge import BICUBIC, BILINEAR, Crop, enlarge
from pgp.datasets.loader import LoaderOptions, SampleKey, TransformedSplit, batches, sequential_batches
from pgp.datasets.transforms import Transforms
from pgp.rng import derive_seed, make_generator

EXACT = any(name in torch.backends.cpu.get_cpu_capability() for name in ("AVX2", "AVX512"))
"""Whether torchvision itself resizes uint8 images in integers on this processor."""
SETTINGS = Transforms(size=64, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
PLAIN = Transforms(size=64)


def noise(count, height, width, seed=0):
    return torch.randint(256, (count, 3, height, width), generator=make_generator(seed, "noise"), dtype=torch.uint8)


def torchvision_train(transforms):
    crop = v2.RandomResizedCrop(transforms.size, transforms.scale, transforms.ratio, antialias=True)
    return v2.Compose([crop, v2.RandomHorizontalFlip(transforms.flip), *to_float(transforms)])


def torchvision_test(transforms):
    resize = v2.Resize(transforms.resized, InterpolationMode.BICUBIC, antialias=True)
    return v2.Compose([resize, v2.CenterCrop(transforms.size), *to_float(transforms)])


def to_float(transforms):
    return [v2.ToDtype(torch.float32, scale=True), v2.Normalize(transforms.mean, transforms.std)]


def assert_same(ours, theirs, std=(1, 1, 1)):
    if EXACT:
        assert torch.equal(ours, theirs)
        return
    steps = (ours - theirs).abs() * torch.tensor(std)[:, None, None] * 255
    assert steps.max() < 2.01  # each direction may round differently
    assert (steps > 0.5).float().mean() < 0.02


SHAPES = [(32, 32), (17, 32), (32, 5), (1, 32), (1, 1), (8, 8), (33, 32), (40, 90), (200, 150), (9, 1000)]
"""Height and width; the last four are not small for 64 px."""


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("transforms", [PLAIN, SETTINGS])
def test_views_and_their_draws_are_those_of_torchvision(shape, transforms):
    for number, image in enumerate(noise(8, *shape)):
        results = []
        for transform in (transforms.train(), torchvision_train(transforms)):
            torch.manual_seed(number)
            results.append(transform(image))
            results.append(torch.rand(3))  # as much was drawn
        assert torch.equal(results[1], results[3])
        assert_same(results[0], results[2], transforms.std)


@pytest.mark.parametrize("shape", SHAPES[:2] + SHAPES[5:9])
@pytest.mark.parametrize("resize", [None, 64, 97])
def test_test_views_are_those_of_torchvision(shape, resize):
    transforms = replace(SETTINGS, resize=resize)
    for image in noise(3, *shape):
        assert_same(transforms.test()(image), torchvision_test(transforms)(image), transforms.std)


def crops_of(height, width, count):
    """Return random boxes, half of them flipped, and the smallest and the largest one."""
    generator, crops = make_generator(1, "crops"), [Crop(0, 0, height, width, True), Crop(height - 1, 0, 1, 1, False)]
    for number in range(count - 2):
        rows, columns = (int(torch.randint(1, side + 1, (1,), generator=generator)) for side in (height, width))
        top = int(torch.randint(height - rows + 1, (1,), generator=generator))
        left = int(torch.randint(width - columns + 1, (1,), generator=generator))
        crops.append(Crop(top, left, rows, columns, number % 2 == 0))
    return crops


def enlarged(images, crops, kind=BILINEAR, size=64):
    return enlarge(images, torch.tensor(crops), (size, size), size, kind, lambda _: None)


@pytest.mark.parametrize(
    ("kind", "resample"), [(BILINEAR, Image.Resampling.BILINEAR), (BICUBIC, Image.Resampling.BICUBIC)]
)
@pytest.mark.parametrize("smooth", [False, True])
def test_views_are_those_of_pillow_within_rounding(kind, resample, smooth):
    images, crops = noise(24, 4 if smooth else 20, 4 if smooth else 32), crops_of(20, 32, 24)
    if smooth:  # as a photo is
        images = v2.functional.resize(images, [20, 32], InterpolationMode.BICUBIC)
    ours, theirs = enlarged(images, crops, kind), []
    for image, (top, left, height, width, flip) in zip(images, crops, strict=True):
        photo = Image.fromarray(image.permute(1, 2, 0).numpy()).crop((left, top, left + width, top + height))
        photo = photo.resize((64, 64), resample)
        turned = photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else photo
        theirs.append(torch.from_numpy(np.array(turned)).permute(2, 0, 1))
    difference = (ours - torch.stack(theirs)).abs()
    assert difference.max() <= 2  # of 255, once in thousands of pixels; Pillow's weights have 22 bits
    assert (difference > 0).float().mean() < (0.01 if kind is BICUBIC else 1e-4)


@pytest.mark.parametrize("kind", [BILINEAR, BICUBIC])
def test_neither_the_batch_nor_autocast_changes_a_pixel(kind):
    images, crops = noise(9, 20, 32), crops_of(20, 32, 9)
    whole = enlarged(images, crops, kind)
    assert torch.equal(whole, whole.round())
    assert 0 <= whole.min() < whole.max() <= 255
    backwards = enlarged(images.flip(0), crops[::-1], kind)
    assert torch.equal(backwards.flip(0), whole)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(enlarged(images, crops, kind), whole)
    for image, crop, view in zip(images, crops, whole, strict=True):
        assert torch.equal(enlarged(image[None], [crop], kind)[0], view)


def test_images_stay_on_their_device():
    images = noise(4, 20, 32).to("meta")  # where an operation that reads values fails
    for transform in (SETTINGS.train(), SETTINGS.test()):
        views = transform.batch(images, torch.tensor(crops_of(20, 32, 4)))
        assert (views.device.type, views.shape, views.dtype) == ("meta", (4, 3, 64, 64), torch.float32)


@pytest.mark.gpu
def test_a_gpu_changes_no_pixel():
    images, crops = noise(9, 20, 32), torch.tensor(crops_of(20, 32, 9))
    for transform in (SETTINGS.train(), SETTINGS.test()):
        on_gpu = transform.batch(images.cuda(), crops).cpu()
        # normalisation divides, which a GPU may round differently
        torch.testing.assert_close(on_gpu, transform.batch(images, crops), rtol=0, atol=1e-6)
    for kind in (BILINEAR, BICUBIC):
        ours = enlarge(images.cuda(), crops, (64, 64), 64, kind, lambda _: None)
        assert torch.equal(ours.cpu(), enlarged(images, crops.tolist(), kind))


def loaded(split, transform, **loading):
    viewed = TransformedSplit(split, transform, 3, ("view", 0), skip_bad=False)
    plan = sequential_batches(torch.arange(len(split)), 4)
    return list(batches(viewed, plan, LoaderOptions(**loading)))


def split_of(images):
    return ArraySplit(images, torch.arange(len(images)))


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_gives_the_views_of_single_images(workers):
    split, transform = split_of(noise(10, 32, 20)), SETTINGS.train()
    got = loaded(split, transform, workers=workers)
    assert [len(batch.images) for batch in got] == [4, 4, 2]
    expected = []
    for index in range(10):
        torch.manual_seed(derive_seed(3, "view", 0, 0, index))
        expected.append(torchvision_train(SETTINGS)(split.image(index)))
    assert_same(torch.cat([batch.images for batch in got]), torch.stack(expected), SETTINGS.std)
    assert torch.cat([batch.labels for batch in got]).tolist() == list(range(10))


def test_only_bytes_travel_if_images_are_small_and_of_one_size():
    small, other, large = (split_of(noise(4, *shape)) for shape in ((32, 20), (32, 24), (33, 20)))
    gray = ArraySplit(noise(4, 32, 20)[:, 0], torch.zeros(4))
    for split, travels in (
        (small, (4, 3, 32, 20)),
        (gray, (4, 3, 32, 20)),
        (large, (4, 3, 64, 64)),
        (ConcatSplit(small, other, other.labels), (8, 3, 64, 64)),
        (ConcatSplit(small, large, large.labels), (8, 3, 64, 64)),
    ):
        viewed = TransformedSplit(split, SETTINGS.train(), 3, ("view", 0), skip_bad=False)
        samples = viewed.collate([viewed[SampleKey(index, 0)] for index in range(len(split))])
        assert samples.images.shape == travels
        assert (samples.images.dtype == torch.uint8) == (samples.crops is not None) == (travels[2] == 32)
        batch = viewed.to_batch(samples, torch.device("cpu"))
        for index, view in enumerate(batch.images):
            torch.manual_seed(derive_seed(3, "view", 0, 0, index))
            assert_same(view, torchvision_train(SETTINGS)(split.image(index)), SETTINGS.std)


def test_images_are_loaded_to_the_device():
    for split in (split_of(noise(4, 32, 20)), split_of(noise(4, 33, 20))):
        (batch,) = loaded(split, SETTINGS.train(), device=torch.device("meta"))
        assert (batch.images.device.type, batch.labels.device.type) == ("meta", "cpu")


def test_as_many_splits_as_wanted_are_concatenated():
    """As many as the classes that a service was taught, one after the other."""
    images = torch.arange(1500, dtype=torch.uint8).reshape(-1, 1, 1)
    parts = [ArraySplit(images[number : number + 1], torch.zeros(1)) for number in range(1500)]
    together = functools.reduce(lambda first, second: ConcatSplit(first, second, second.labels), parts)
    assert [int(together.image(index)[0]) for index in range(1500)] == images.flatten().tolist()
    assert len(together.sources()) == len(together) == 1500
