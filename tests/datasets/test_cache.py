"""Image files are decoded once where memory allows, and never kept beyond the budget."""

from __future__ import annotations

import mmap
import multiprocessing
import pickle
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from PIL import Image

from pgp.datasets import cache, files, free_memory
from pgp.datasets.cache import ImageCache, PixelStore
from pgp.datasets.files import FileSplit, read_image
from pgp.datasets.loader import LoaderOptions, TransformedSplit, batches, sequential_batches
from pgp.datasets.transforms import Transforms
from pgp.sweeps import pool
from pgp.system import platforms

SIZES = [(8, 6), (5, 7), (10, 10), (4, 4)]


@pytest.fixture
def split(tmp_path, monkeypatch):
    """Four images of other sizes, random pixels, and memory for them, of which only Linux tells."""
    monkeypatch.setattr(cache, "free_memory", lambda: 1 << 24)
    monkeypatch.setattr(cache, "_shared", None)
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
    if workers and platforms.loader_start() != "fork":
        pytest.skip("processes that are spawned share no memory")
    viewed = TransformedSplit(split, Transforms(size=4, resize=4).test(), 0, ("test",), skip_bad=False)
    plan = sequential_batches(torch.arange(4), batch_size=1)
    passes = [[batch.images for batch in batches(viewed, plan, LoaderOptions(workers))] for _ in range(2)]
    assert all(torch.equal(one, same) for one, same in zip(*passes, strict=True))
    assert opened() == FILES


def test_the_budget_is_kept(split, opened):
    sizes = [3 * height * width for height, width in SIZES]
    split.memory = ImageCache(4, PixelStore(sizes[0] + sizes[1] + sizes[3]))
    for _ in range(3):
        for i in range(4):
            assert torch.equal(split.image(i), read_image(split.paths[i]))
    assert opened() == ["0.png", "1.png", "2.png", "2.png", "2.png", "3.png"]
    split.memory = ImageCache(0)
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

    monkeypatch.setattr(cache.mmap, "mmap", refuse)
    split.memory = ImageCache(4)
    for _ in range(2):
        assert torch.equal(split.image(0), read_image(split.paths[0]))
    assert opened() == ["0.png"] * 2


@pytest.fixture
def proc(tmp_path, monkeypatch):
    """A file system of a kernel, where 500 kB are available and no group has a limit."""
    monkeypatch.setattr(free_memory, "PROC", tmp_path / "proc")
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "meminfo").write_text("MemTotal:  900 kB\nMemAvailable:    500 kB\nHugePages_Total:       0\n")
    return tmp_path / "proc"


def group(folder, version, limit, used, cache=0):
    """Gives a control group a limit."""
    limits, usage, stat = {
        1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "inactive_file 7\ntotal_inactive_file"),
        2: ("memory.max", "memory.current", "inactive_file"),
    }[version]
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in ((limits, limit), (usage, used), ("memory.stat", f"anon 5\n{stat} {cache}\nlast 1")):
        (folder / name).write_text(f"{value}\n")


def mounted(proc, own, *mounts):
    """Tells in which groups the process is, and where they can be seen: each a root, a place, a kind and options."""
    (proc / "self" / "cgroup").write_text(own)
    lines = [
        f"3{i} 20 0:1 {root} {place} rw - {kind} none rw{more}" for i, (root, place, kind, more) in enumerate(mounts)
    ]
    (proc / "self" / "mountinfo").write_text("\n".join(["21 20 0:3 / / rw shared:1 - ext4 /dev/vda rw", *lines]))


def test_what_is_free_on_the_machine(proc):
    assert free_memory.free_memory() == 512_000
    (proc / "meminfo").unlink()
    assert free_memory.free_memory() == 0  # no Linux
    assert ImageCache(4).budget == 0


@pytest.mark.parametrize("deep", [0, 1, 2, 3])
@pytest.mark.parametrize("version", [1, 2])
def test_the_limit_of_any_parent_counts(proc, tmp_path, version, deep):
    tree, path = tmp_path / "cgroup" / "memory", ["job", "step", "task"]
    for depth in range(4):
        group(tree.joinpath(*path[:depth]), version, "max" if version == 2 else 9223372036854771712, 100_000)
    own = "5:cpu,cpuacct:/other\n4:hugetlb,memory:/job/step/task\n0::/else\n" if version == 1 else "0::/job/step/task\n"
    kind, options = ("cgroup", ",hugetlb,memory") if version == 1 else ("cgroup2", ",nsdelegate")
    mounted(proc, own, ("/", tmp_path / "cpu", "cgroup", ",cpu,cpuacct"), ("/", tree, kind, options))
    assert free_memory.free_memory() == 512_000
    group(tree.joinpath(*path[:deep]), version, 300_000, 250_000, cache=100_000)
    assert free_memory.free_memory() == 150_000
    group(tree.joinpath(*path[:deep]), version, 300_000, 350_000)
    assert free_memory.free_memory() == 0


def test_groups_as_containers_show_them(proc, tmp_path):
    tree = tmp_path / "c group"
    escaped = str(tree).replace(" ", "\\040")
    group(tree, 1, 300_000, 100_000)
    mounted(proc, "4:memory:/docker/1f\n", ("/docker/1f", escaped, "cgroup", ",memory"))
    assert free_memory.free_memory() == 200_000
    mounted(proc, "4:memory:/docker/1f/below\n", ("/docker/1f", escaped, "cgroup", ",memory"))
    group(tree / "below", 1, 200_000, 100_000)
    assert free_memory.free_memory() == 100_000
    mounted(proc, "4:memory:/../../elsewhere\n", ("/", escaped, "cgroup", ",memory"))
    assert free_memory.free_memory() == 200_000
    mounted(proc, "4:memory:/elsewhere\n", ("/docker/1f", escaped, "cgroup", ",memory"))
    assert free_memory.free_memory() == 200_000
    (tree / "memory.limit_in_bytes").unlink()
    assert free_memory.free_memory() == 512_000


def test_a_soft_limit_of_a_group_counts(proc, tmp_path):
    group(tmp_path / "cgroup" / "job", 2, "max", 100_000)
    (tmp_path / "cgroup" / "job" / "memory.high").write_text("150000\n")
    mounted(proc, "0::/job\n", ("/", tmp_path / "cgroup", "cgroup2", ""))
    assert free_memory.free_memory() == 50_000


@pytest.mark.parametrize(("limit", "used"), [("RLIMIT_AS", "VmSize"), ("RLIMIT_DATA", "VmData")])
def test_the_limits_of_the_process_count(proc, monkeypatch, limit, used):
    resource = pytest.importorskip("resource")
    number = getattr(resource, limit)
    (proc / "self" / "status").write_text(f"Name:\tpython\nVmPeak:\t 90 kB\n{used}:\t     100 kB\nThreads:\t1\n")
    monkeypatch.setattr(resource, "getrlimit", lambda asked: (409_600 if asked == number else -1, -1))
    assert free_memory.free_memory() == 300 * 1024


def test_all_splits_of_all_processes_have_one_budget(monkeypatch):
    monkeypatch.setattr(cache, "_shared", None)  # other tests may still hold theirs
    monkeypatch.setattr(cache, "free_memory", lambda: 500_000)
    splits = [ImageCache(3) for _ in range(20)]
    assert {split.budget for split in splits} == {100_000}
    image = torch.ones(3, 100, 100, dtype=torch.uint8)
    decoded = []
    for _ in range(2):
        for i, split in enumerate(splits):
            split.get_or_decode(0, lambda i=i: decoded.append(i) or image)
    assert sum(decoded.count(i) == 1 for i in range(20)) == 3  # 90,000 bytes are kept
    del split, splits
    assert cache._shared() is None
    monkeypatch.setattr(cache, "world_size", lambda: 4)
    assert ImageCache(3).budget == 25_000
    monkeypatch.setattr(cache, "processes", 5)
    assert ImageCache(3).budget == 5_000


def test_the_processes_of_a_sweep_share_the_budget(monkeypatch):
    monkeypatch.setattr(cache, "processes", 1)
    monkeypatch.setattr(pool.signal, "signal", lambda *_: None)  # this process goes on as it was
    monkeypatch.setattr(pool.threading, "Thread", Mock())
    pool._begin(4, [], multiprocessing.get_context("spawn").Value("i", 0))
    assert cache.processes == 4


def test_it_grows_no_more_when_memory_is_short(monkeypatch):
    monkeypatch.setattr(cache, "free_memory", lambda: 500_000)
    monkeypatch.setattr(cache, "CHECK_EVERY", 20_000)
    store = PixelStore(100_000)
    kept, image = ImageCache(9, store), torch.ones(3, 50, 50, dtype=torch.uint8)
    for i in range(3):
        kept.get_or_decode(i, lambda: image)
    monkeypatch.setattr(cache, "free_memory", lambda: 120_000)  # as another process wants it
    decoded = []
    for i in range(9):
        kept.get_or_decode(i, lambda i=i: decoded.append(i) or image)
    assert decoded == [3, 4, 5, 6, 7, 8]
    assert store.budget == 3 * 7_500
    assert torch.equal(kept.get_or_decode(2, pytest.fail), image)


def in_a_limited_address_space(path, results):
    """Tells what is free, how often a file is decoded for 16 splits and two passes, and what is then left."""
    import resource

    size = int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE
    resource.setrlimit(resource.RLIMIT_AS, (size + (1 << 30), resource.RLIM_INFINITY))
    before, decoded = free_memory.free_memory(), []
    files.read_image = lambda path: decoded.append(path) or read_image(path)
    cache._shared = None
    splits = [FileSplit([path], [0]) for _ in range(16)]
    for split in splits * 2:
        split.image(0)
    results.put((before, len(decoded), free_memory.free_memory()))


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="asks a Linux kernel")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_limited_address_space_is_left_to_others(tmp_path):
    """Sixteen splits take a fifth of it together, and yet keep images."""
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    child = context.Process(target=in_a_limited_address_space, args=(tmp_path / "a.png", results))
    child.start()
    child.join()
    assert child.exitcode == 0
    before, decoded, after = results.get()
    assert before <= 1 << 30
    assert decoded == 16
    assert after > 0.75 * before
