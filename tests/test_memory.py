"""Image files are decoded once where memory allows, and never kept beyond the budget."""

from __future__ import annotations

import pickle

import pytest
import torch
from PIL import Image

from pgp.datasets import Loading, Viewed, Views, batches, files, in_order, memory
from pgp.datasets.files import FileSplit, read_image
from pgp.datasets.memory import Memory, free_memory

SIZES = [(8, 6), (5, 7), (10, 10), (4, 4)]


@pytest.fixture
def split(tmp_path):
    """Four images of other sizes, random pixels."""
    for i, size in enumerate(SIZES):
        pixels = torch.randint(256, (*size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(i))
        Image.fromarray(pixels.numpy()).save(tmp_path / f"{i}.png")
    return FileSplit([tmp_path / f"{i}.png" for i in range(4)], [0, 1, 2, 3])


@pytest.fixture
def opened(monkeypatch, tmp_path):
    """Names of the files that were decoded, in any process."""
    log, read = tmp_path / "log", files.read_image

    def noted(path):
        with log.open("a") as file:
            file.write(f"{path.name}\n")
        return read(path)

    log.touch()
    monkeypatch.setattr(files, "read_image", noted)
    return lambda: sorted(log.read_text().split())


FILES = ["0.png", "1.png", "2.png", "3.png"]


def test_a_file_is_decoded_once(split, opened):
    first = [split.image(i) for i in range(4)]
    second = [split.image(i) for i in (2, 0, 3, 1)]
    assert opened() == FILES
    for i, again in zip((2, 0, 3, 1), second, strict=True):
        assert torch.equal(first[i], again)
        assert (again.dtype, tuple(again.shape)) == (torch.uint8, (3, *SIZES[i]))
        assert torch.equal(again, read_image(split.paths[i]))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_file_is_decoded_once_over_two_passes(split, opened, workers):
    viewed = Viewed(split, Views(size=4, resize=4).test(), 0, ("test",), skip_bad=False)
    plan = in_order(torch.arange(4), batch_size=1)
    passes = [[batch.images for batch in batches(viewed, plan, Loading(workers))] for _ in range(2)]
    assert all(torch.equal(one, same) for one, same in zip(*passes, strict=True))
    assert opened() == FILES


def test_the_budget_is_kept(split, opened):
    sizes = [3 * height * width for height, width in SIZES]
    split.memory = Memory(4, budget=sizes[0] + sizes[1] + sizes[3])
    for _ in range(3):
        for i in range(4):
            assert torch.equal(split.image(i), read_image(split.paths[i]))
    assert opened() == ["0.png", "1.png", "2.png", "2.png", "2.png", "3.png"]
    split.memory = Memory(4, budget=0)
    for _ in range(2):
        split.image(0)
    assert opened().count("0.png") == 3


def test_processes_that_do_not_share_it_do_without(split, opened):
    split.image(0)
    copy = pickle.loads(pickle.dumps(split))
    assert torch.equal(copy.image(0), split.image(0))
    copy.image(0)
    assert opened() == ["0.png"] * 3


def test_a_system_that_grants_nothing(split, opened, monkeypatch):
    def refuse(*_):
        raise OSError("Cannot allocate memory")

    monkeypatch.setattr(memory.mmap, "mmap", refuse)
    split.memory = Memory(4)
    for _ in range(2):
        assert torch.equal(split.image(0), read_image(split.paths[0]))
    assert opened() == ["0.png"] * 2


def test_what_is_free(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    assert free_memory() == 0  # no Linux
    assert Memory(4).budget == 0
    (tmp_path / "meminfo").write_text("MemTotal:  900 kB\nMemAvailable:    500 kB\nHugePages_Total:       0\n")
    assert free_memory() == 512_000
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("100000\n")
    assert free_memory() == 512_000
    (tmp_path / "memory.max").write_text("300000\n")
    assert free_memory() == 200_000
    assert Memory(4).budget == 40_000
    monkeypatch.setattr(memory, "world", lambda: 4)
    assert Memory(4).budget == 10_000
    (tmp_path / "memory.max").write_text("50000\n")
    assert free_memory() == 0
