"""Archives are fetched once, proved, and unpacked whole or not at all; what the user has stays as it is."""

from __future__ import annotations

import contextlib
import errno
import io
import multiprocessing
import os
import random
import re
import shutil
import stat
import sys
import tarfile
import threading
import time
import zipfile
from pathlib import Path

import filelock
import pytest
from rich.progress import Progress

from archives import Server, pack, signed, tree
from pgp.datasets import archives, transfer
from pgp.datasets.archives import Archive, ArchiveError
from pgp.datasets.download import fetched, unpacked

BLOB = os.urandom(900_000)


@pytest.fixture(autouse=True)
def _hurry(monkeypatch):
    monkeypatch.setattr(transfer, "PAUSE", 0)
    monkeypatch.setattr(os, "sync", lambda: None)  # the disk of this machine is not the test's to wait for
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "PGP_MIRROR"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def server(tmp_path):
    (tmp_path / "site").mkdir()
    with Server(tmp_path / "site") as running:
        yield running


@pytest.fixture(params=["toy.tar", "toy.tgz", "toy.zip"])
def toy(request, tmp_path, server):
    """An archive of two files on the server."""
    return publish(server, tmp_path, request.param)


@pytest.fixture
def tape(tmp_path, server):
    return publish(server, tmp_path, "toy.tgz")


def publish(server, tmp_path, name):
    folder = tmp_path / "origin" / "toy"
    (folder / "in ner").mkdir(parents=True)
    (folder / "blob").write_bytes(BLOB)
    (folder / "in ner" / "ü.txt").write_text("text")
    return pack(folder, Archive(name, f"{server.url}/{name}", "", "toy"), server.folder)


WHOLE = {"toy": None, "toy/blob": BLOB, "toy/in ner": None, "toy/in ner/ü.txt": b"text"}


def test_an_archive_is_fetched_and_unpacked_once(toy, server, tmp_path):
    root = tmp_path / "new" / "data"
    assert unpacked(toy, root) == root / "toy"
    assert tree(root) == {**WHOLE, toy.name: (server.folder / toy.name).read_bytes()}
    assert server.requests == [(f"/{toy.name}", None, None)]
    unpacked(toy, root)
    shutil.rmtree(root / "toy")
    assert tree(unpacked(toy, root).parent) == {**WHOLE, toy.name: (server.folder / toy.name).read_bytes()}
    assert fetched(toy, root) == root / toy.name
    assert len(server.requests) == 1  # the archive stayed
    assert [path.name for path in (root / ".pgp").iterdir() if path.suffix != ".lock"] == []


def test_files_have_usual_modes(tape, tmp_path):
    folder = unpacked(tape, tmp_path / "data")
    (tmp_path / "plain").write_text("")
    usual = stat.S_IMODE((tmp_path / "plain").stat().st_mode)
    for path in (folder / "blob", tmp_path / "data" / tape.name):
        assert stat.S_IMODE(path.stat().st_mode) == usual
    (tmp_path / "usual").mkdir()
    assert folder.stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_a_broken_transfer_goes_on(tape, server, tmp_path):
    server.breaks = [300_000, 100_000]
    assert tree(unpacked(tape, tmp_path / "data")) == {key[4:]: value for key, value in WHOLE.items() if key[3:]}
    first, *others = server.requests
    assert first[1:] == (None, None)
    starts = [int(wanted.removeprefix("bytes=").removesuffix("-")) for _, wanted, _ in others]
    assert len(starts) == 2
    assert 0 < starts[0] <= 300_000 < starts[1] <= 400_000
    assert {condition for *_, condition in others} == {'"one"'}


def test_the_next_start_goes_on(tape, server, tmp_path):
    server.breaks = [300_000] + [0] * transfer.FAILURES
    with pytest.raises(ArchiveError, match=r"cannot fetch toy\.tgz .*; [23]..,... bytes of it are kept for the next"):
        unpacked(tape, tmp_path / "data")
    assert set(tree(tmp_path / "data")) == set()
    asked = len(server.requests)
    unpacked(tape, tmp_path / "data")
    ((_, wanted, condition),) = server.requests[asked:]
    assert int(wanted[6:-1]) > 200_000
    assert condition == '"one"'


def interrupted(tape, server, root):
    """Leaves a part of `tape` in `root`."""
    server.breaks = [300_000] + [0] * transfer.FAILURES
    with pytest.raises(ArchiveError, match="are kept for the next start"):
        unpacked(tape, root)
    server.breaks, server.requests = [], []


def test_a_file_that_changed_is_not_glued_together(tape, server, tmp_path):
    interrupted(tape, server, tmp_path / "data")
    (tmp_path / "origin" / "toy" / "blob").write_bytes(BLOB[::-1])
    changed = pack(tmp_path / "origin" / "toy", tape, server.folder)
    server.version = '"two"'
    assert (unpacked(changed, tmp_path / "data") / "blob").read_bytes() == BLOB[::-1]
    assert [wanted is None for _, wanted, _ in server.requests] == [False]  # and the answer was the whole


@pytest.mark.parametrize("version", [None, 'W/"weak"'])
def test_a_server_that_tells_no_version_may_glue_but_the_digest_tells(tape, server, tmp_path, version):
    server.version = version
    interrupted(tape, server, tmp_path / "data")
    (tmp_path / "origin" / "toy" / "blob").write_bytes(BLOB[::-1])
    changed = pack(tmp_path / "origin" / "toy", tape, server.folder)
    assert (unpacked(changed, tmp_path / "data") / "blob").read_bytes() == BLOB[::-1]
    assert {condition for *_, condition in server.requests} == {None}
    assert server.requests[-1][1] is None  # from the first byte, in the end


@pytest.mark.parametrize("server_can", ["no ranges", "no length", "date"])
def test_poor_servers(tape, server, tmp_path, server_can):
    server.ranges, server.length = server_can != "no ranges", server_can != "no length"
    if server_can == "date":
        server.version, server.headers = None, {"Last-Modified": "Wed, 21 Oct 2015 07:28:00 GMT"}
        server.breaks = [300_000]
    elif server_can == "no ranges":
        server.breaks = [300_000]
    unpacked(tape, tmp_path / "data")
    assert (tmp_path / "data" / "toy" / "blob").read_bytes() == BLOB


def test_a_server_that_tells_no_length_may_break_too(tape, server, tmp_path):
    server.length, server.breaks = False, [300_000]
    unpacked(tape, tmp_path / "data")
    assert [wanted for _, wanted, _ in server.requests] == [None, "bytes=300000-"]


def test_compression_is_left_alone(tape, server, tmp_path):
    server.headers = {"Content-Encoding": "x-gzip"}  # as some servers say of a .tgz
    unpacked(tape, tmp_path / "data")
    assert (tmp_path / "data" / tape.name).read_bytes() == (server.folder / tape.name).read_bytes()


def test_a_crash_before_the_renaming_costs_nothing(tape, server, tmp_path):
    interrupted(tape, server, tmp_path / "data")
    shutil.copy(server.folder / tape.name, tmp_path / "data" / ".pgp" / "toy.tgz.part")
    unpacked(tape, tmp_path / "data")
    assert server.requests == []
    (tmp_path / "again" / ".pgp").mkdir(parents=True)
    shutil.copy(server.folder / tape.name, tmp_path / "again" / ".pgp" / "toy.tgz")
    unpacked(tape, tmp_path / "again")
    assert server.requests == []


@pytest.mark.parametrize("note", ['["http', "[" * 100_000, "5", '["a", 1, "b"]', '{"url": 1}', "\0"])
def test_a_part_without_its_note_is_fetched_anew(tape, server, tmp_path, note):
    interrupted(tape, server, tmp_path / "data")
    (tmp_path / "data" / ".pgp" / "toy.tgz.part.json").write_text(note)
    unpacked(tape, tmp_path / "data")
    assert [wanted for _, wanted, _ in server.requests] == [None]


def test_busy_servers_are_asked_again(tape, server, tmp_path):
    server.statuses = [503, 503]
    unpacked(tape, tmp_path / "data")
    assert len(server.requests) == 3
    server.statuses = [503] * 9
    with pytest.raises(ArchiveError, match=r"cannot fetch toy\.tgz \(503 Service Unavailable, 5 requests in a row\)"):
        unpacked(tape, tmp_path / "else")
    assert len(server.requests) == 3 + transfer.FAILURES


def waits(monkeypatch):
    """Seconds that are waited for, all of them short."""
    seconds, sleep = [], time.sleep
    monkeypatch.setattr(transfer.time, "sleep", lambda wait: seconds.append(wait) or sleep(0))
    return seconds


def test_a_server_may_ask_for_some_patience_only(tape, server, tmp_path, monkeypatch):
    seconds = waits(monkeypatch)
    server.headers, server.statuses = {"Retry-After": "120"}, [429, 503]
    unpacked(tape, tmp_path / "data")
    assert [wait for wait in seconds if wait] == [120, 120]
    server.statuses = [503] * 9
    with pytest.raises(ArchiveError, match=r"503 .*, asking to wait 120 seconds; pgp waits no more than 300 seconds"):
        unpacked(tape, tmp_path / "else")
    assert sum(seconds) == 480
    seconds.clear()
    for later, told in (
        ("1000000000", "1,000,000,000"),
        ("9" * 999, "inf"),
        ("Fri, 01 Jan 2999 00:00:00 GMT", r"30,...,...,..."),
    ):
        server.headers, server.statuses = {"Retry-After": later}, [429]
        with pytest.raises(ArchiveError, match=rf"\(429 Too Many Requests, asking to wait {told} seconds; pgp waits"):
            unpacked(tape, tmp_path / "else")
    assert not any(seconds)


@pytest.mark.parametrize(
    "later", ["soon", "", "-5", "1.5e3", "Mon, 99 Foo 99999 99:99:99", "Fri, 01 Jan 1999 00:00:00 GMT"]
)
def test_a_server_that_asks_for_nothing_sensible(tape, server, tmp_path, later):
    server.headers, server.statuses = {"Retry-After": later}, [503]
    unpacked(tape, tmp_path / "data")
    assert len(server.requests) == 2


@pytest.mark.parametrize(
    "span", ["bytes 300000-300000/{size}", "bytes 0-9/{size}", "bytes 300000-/7", "nonsense", "416"]
)
def test_a_server_that_answers_ranges_wrongly_is_asked_a_few_times(tape, server, tmp_path, span):
    """It says that it goes on, and gives a byte a connection, or it does not go on."""
    server.span = span.format(size=tape.size)
    server.breaks = [300_000] + [1, 300_000] * 50
    if span == "416":
        answer = server.answer
        server.answer = lambda handler: (
            (server.requests.append((handler.path, "", "")), handler.send_error(416))
            if handler.headers.get("Range")
            else answer(handler)
        )
        server.breaks = [300_000] * 50
    with pytest.raises(ArchiveError, match=r"cannot fetch toy\.tgz \(.*\); [\d,]+ bytes of it are kept"):
        unpacked(tape, tmp_path / "data")
    assert len(server.requests) < 20


def test_a_server_that_gives_a_byte_a_connection(tape, server, tmp_path):
    server.breaks = [1] * 500
    with pytest.raises(ArchiveError, match=r"toy\.tgz \(.*, 5 requests in a row\); 5 bytes of it are kept"):
        unpacked(tape, tmp_path / "data")
    assert len(server.requests) == 5


def test_a_server_that_breaks_for_ever_after_a_little(tape, server, tmp_path, monkeypatch):
    monkeypatch.setattr(transfer, "LEAST", 1)
    monkeypatch.setattr(transfer, "ATTEMPTS", 7)
    server.breaks = [10] * 500
    with pytest.raises(
        ArchiveError, match=r"toy\.tgz \(.*, and the file is not complete after 7 requests\); 70 bytes of it are"
    ):
        unpacked(tape, tmp_path / "data")
    server.breaks = []
    unpacked(tape, tmp_path / "data")
    assert [wanted for _, wanted, _ in server.requests[7:]] == ["bytes=70-"]


def test_a_server_without_ranges_that_breaks_for_ever(tape, server, tmp_path):
    server.ranges, server.breaks = False, [200_000, 400_000] * 50
    with pytest.raises(
        ArchiveError, match=r"the server has broken off 4 times, and cannot continue from where it stopped"
    ):
        unpacked(tape, tmp_path / "data")
    assert len(server.requests) == 5


@pytest.mark.parametrize("size", ["published", "unknown"])
def test_a_server_that_is_too_slow(tape, server, tmp_path, monkeypatch, size):
    """And keeps the connection alive, a few bytes at a time."""
    monkeypatch.setattr(transfer, "MINUTE", 0.05)
    monkeypatch.setattr(transfer, "FAILURES", 2)
    server.piece, server.pause, server.breaks = 100, 0.01, [3000] * 9
    server.length = size == "published"
    tape = tape if server.length else tape._replace(size=None)
    with pytest.raises(
        ArchiveError, match=r"\(the server gives [\d,]+ bytes in 0 seconds, 2 requests in a row\); .* kept"
    ):
        unpacked(tape, tmp_path / "data")
    assert len(server.requests) == 2


def test_a_server_that_never_ends_its_head(tape, server, tmp_path, monkeypatch):
    """A byte now and then, so that no byte is late."""

    def answer(handler):
        server.requests.append((handler.path, None, None))
        with contextlib.suppress(ConnectionError):
            for _ in range(30):
                handler.wfile.write(b"HTTP/1.1 200 OK\r\nX-More: "[:1])
                time.sleep(0.01)

    server.answer = answer
    monkeypatch.setattr(transfer, "ANSWER", 0.05)
    monkeypatch.setattr(transfer, "FAILURES", 2)
    with pytest.raises(ArchiveError, match=r"\(the server has not answered in 0 seconds, 2 requests in a row\)"):
        unpacked(tape, tmp_path / "data")
    assert len(server.requests) == 2


def test_no_more_bytes_than_the_file_has(tape, server, tmp_path, monkeypatch):
    """Neither told nor untold: the disk is not the server's."""
    server.more = 1 << 20
    server.length = False
    with pytest.raises(
        ArchiveError, match=rf"expected {tape.size:,} bytes, got more than {tape.size:,}\. Get toy\.tgz else"
    ):
        unpacked(tape, tmp_path / "data")
    assert not list((tmp_path / "data" / ".pgp").glob("*.part"))
    monkeypatch.setattr(transfer, "LARGEST", 500_000)
    with pytest.raises(ArchiveError, match=r"expected at most 500,000 bytes, got more than 500,000"):
        unpacked(tape._replace(size=None), tmp_path / "data")
    server.length = True
    with pytest.raises(ArchiveError, match=rf"expected at most 500,000 bytes, got {tape.size:,}"):
        unpacked(tape._replace(size=None), tmp_path / "data")


def test_a_page_instead_of_the_file_costs_nothing_that_came(tape, server, tmp_path):
    """As a network gives that wants a login."""
    interrupted(tape, server, tmp_path / "data")
    file = server.folder / tape.name
    whole = file.read_bytes()
    file.write_bytes(b"<html>")
    server.ranges = False
    with pytest.raises(ArchiveError, match=rf"does not give the published file: expected {tape.size:,} bytes, got 6"):
        unpacked(tape, tmp_path / "data")
    file.write_bytes(whole)
    server.ranges = True
    unpacked(tape, tmp_path / "data")
    assert server.requests[-1][1] == "bytes=300000-"


def test_a_disk_keeps_its_reserve_while_bytes_come(tape, server, tmp_path, monkeypatch):
    """Where nobody tells a size, and where others fill the disk."""
    server.length = False
    usage = shutil.disk_usage(tmp_path)
    free = [archives.RESERVE + 400_000]

    def less(_):
        free[0] -= 65_536
        return usage._replace(free=free[0])

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", less)
        with pytest.raises(ArchiveError, match=r"no room in .*; choose another folder .* What has come so far is kept"):
            unpacked(tape._replace(size=None), tmp_path / "data")
    assert 100_000 < (tmp_path / "data" / ".pgp" / "toy.tgz.part").stat().st_size < 400_000


@pytest.mark.skipif(sys.platform == "win32", reason="links take rights on Windows")
def test_what_others_left_in_our_working_folder_is_not_written_through(tape, tmp_path):
    work = tmp_path / "data" / ".pgp"
    work.mkdir(parents=True)
    (tmp_path / "precious").write_text("mine")
    (work / "toy.tgz.part").symlink_to(tmp_path / "precious")
    with pytest.raises(ArchiveError, match=r"toy\.tgz\.part is a link or a device, which pgp never makes there"):
        unpacked(tape, tmp_path / "data")
    assert (tmp_path / "precious").read_text() == "mine"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such pipes, and links take rights")
@pytest.mark.parametrize("kind", ["folder", "pipe", "dangling link"])
def test_what_is_no_file_is_no_archive(tape, server, tmp_path, kind):
    path = tmp_path / tape.name
    {"folder": path.mkdir, "pipe": lambda: os.mkfifo(path), "dangling link": lambda: path.symlink_to("nowhere")}[kind]()
    with pytest.raises(ArchiveError, match=rf"expected a file at {path}, got something else"):
        unpacked(tape, tmp_path)
    assert not server.requests


def test_a_wrong_file_from_the_server(tape, server, tmp_path):
    wrong = tape._replace(digest="md5:" + "0" * 32)
    with pytest.raises(ArchiveError, match=rf"(?s){server.url}/toy\.tgz does not give the published file.*md5:000.*"
                                           rf"{tape.digest[4:]}.*Get toy\.tgz elsewhere and put it into"):  # fmt: skip
        unpacked(wrong, tmp_path / "data")
    assert tree(tmp_path / "data") == {}
    assert not (tmp_path / "data" / ".pgp" / tape.name).exists()


def test_a_wrong_file_of_the_user_stays(tape, server, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / tape.name).write_bytes((server.folder / tape.name).read_bytes()[:1000])
    before = tree(tmp_path / "data")
    with pytest.raises(ArchiveError, match=rf"toy\.tgz is not the published file: expected {tape.digest}, got md5:\w+"
                                           r" \(1,000 bytes of [89]..,...\)\. Move it away"):  # fmt: skip
        unpacked(tape, tmp_path / "data")
    assert tree(tmp_path / "data") == before
    assert server.requests == []


def test_an_archive_of_the_user_is_unpacked_and_stays(toy, server, tmp_path):
    (tmp_path / "data").mkdir()
    shutil.copy(server.folder / toy.name, tmp_path / "data")
    (tmp_path / "data" / "toy").mkdir()  # an empty folder is no data set
    (tmp_path / "data" / f"{toy.name}.part").write_text("of a browser")
    before = tree(tmp_path / "data")
    unpacked(toy, tmp_path / "data")
    assert tree(tmp_path / "data") == {**before, **WHOLE}
    assert server.requests == []


def test_an_archive_that_the_user_brings_meanwhile_stays(tape, server, tmp_path, monkeypatch):
    fetch = transfer.Transfer.__call__

    def meanwhile(*args):
        fetch(*args)
        (tmp_path / "data" / tape.name).write_text("mine")

    monkeypatch.setattr(transfer.Transfer, "__call__", meanwhile)
    unpacked(tape, tmp_path / "data")
    assert tree(tmp_path / "data") == {**WHOLE, tape.name: b"mine"}


def test_no_network(tape, server, tmp_path):
    nowhere = tape._replace(url="http://127.0.0.1:9/toy.tgz")
    with pytest.raises(ArchiveError, match=rf"cannot fetch toy\.tgz .*refused.* get it from {nowhere.url} elsewhere and"
                                           rf" put it, as it is, into {tmp_path}; or set PGP_MIRROR"):  # fmt: skip
        unpacked(nowhere, tmp_path)
    (server.folder / tape.name).unlink()
    with pytest.raises(ArchiveError, match=r"cannot fetch toy\.tgz .*404"):
        fetched(tape, tmp_path)


def test_a_mirror(tape, server, tmp_path, monkeypatch):
    (server.folder / "below").mkdir()
    (server.folder / tape.name).rename(server.folder / "below" / tape.name)
    monkeypatch.setenv("PGP_MIRROR", f"{server.url}/below/")
    unpacked(tape._replace(url="http://127.0.0.1:9/x"), tmp_path / "data")
    assert [path for path, *_ in server.requests] == ["/below/toy.tgz"]
    monkeypatch.setenv("PGP_MIRROR", "mirror")
    with pytest.raises(ArchiveError, match=r"cannot fetch toy\.tgz .*'mirror/toy\.tgz'"):
        unpacked(tape, tmp_path / "else")


@pytest.mark.parametrize("name", ["toy.tar", "toy.tgz", "toy.zip"])
def test_truncated_archives(tmp_path, server, name):
    archive = publish(server, tmp_path, name)
    data = tmp_path / "data"
    data.mkdir()
    (data / name).write_bytes((server.folder / name).read_bytes()[:500_000])
    with pytest.raises(ArchiveError, match="is not the published file"):
        unpacked(archive, data)
    with pytest.raises(ArchiveError, match=rf"{name} is damaged \(.*\): fetch it again"):
        unpacked(signed(archive, data / name), data)  # published broken
    assert set(tree(data)) == {name}


def member(name, kind=tarfile.REGTYPE, link=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, 3 if kind == tarfile.REGTYPE else 0
    return info


@pytest.mark.parametrize(
    ("evil", "message"),
    [
        (member("toy/../../evil"), "would lie outside"),
        (member("../evil"), "would lie outside"),
        (member("/tmp/evil"), "would lie outside"),
        (member("toy\\..\\..\\evil"), "would lie outside"),
        (member("C:evil"), "would lie outside"),
        (member("toy/link", tarfile.SYMTYPE, "../../.."), "is a link to '../../..'"),
        (member("toy/hard", tarfile.LNKTYPE, "/etc/passwd"), "is a link to '/etc/passwd'"),
        (member("toy/device", tarfile.CHRTYPE), "is no plain file"),
        (member("toy/pipe", tarfile.FIFOTYPE), "is no plain file"),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_harmful_tapes_are_refused(tmp_path, evil, message):
    data = tmp_path / "data"
    data.mkdir()
    with tarfile.open(data / "toy.tar", "w") as tape:
        tape.addfile(member("toy/good"), io.BytesIO(b"abc"))
        tape.addfile(evil, io.BytesIO(b"abc") if evil.size else None)
    archive = signed(Archive("toy.tar", "", "", "toy"), data / "toy.tar")
    before = tree(tmp_path)
    with pytest.raises(ArchiveError, match=rf"toy\.tar was not unpacked: its member .* {message}"):
        unpacked(archive, data)
    assert tree(tmp_path) == before


@pytest.mark.parametrize(("name", "mode", "message"), [
    ("toy/../../evil", 0, "would lie outside"),
    ("/evil", 0, "would lie outside"),
    ("toy/link", stat.S_IFLNK | 0o777, "is no plain file"),
])  # fmt: skip
def test_harmful_zips_are_refused(tmp_path, name, mode, message):
    data = tmp_path / "data"
    data.mkdir()
    with zipfile.ZipFile(data / "toy.zip", "w") as zipped:
        zipped.writestr("toy/good", b"abc")
        info = zipfile.ZipInfo(name)
        info.external_attr = mode << 16
        zipped.writestr(info, b"/etc/passwd")
    archive = signed(Archive("toy.zip", "", "", "toy"), data / "toy.zip")
    before = tree(tmp_path)
    with pytest.raises(ArchiveError, match=rf"toy\.zip was not unpacked: its member .* {message}"):
        unpacked(archive, data)
    assert tree(tmp_path) == before


def small(path, size=3000):
    """Writes an archive of two files in a folder `toy`, in the format that the name says."""
    content = {"toy/a.txt": b"abc" * (size // 3), "toy/in/b.bin": BLOB[:size]}
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as zipped:
            for name, data in content.items():
                zipped.writestr(name, data)
    else:
        mode = {".tar": "w", ".tgz": "w:gz", ".tbz": "w:bz2", ".txz": "w:xz"}[path.suffix]
        with tarfile.open(path, mode) as tape:
            for name, data in content.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tape.addfile(info, io.BytesIO(data))
    return path


def taken(path, target):
    """What `extract` leaves of the archive at `path`; one line where it refuses."""
    target.mkdir()
    try:
        with Progress(disable=True) as progress:
            archives.extract(path, "toy", target, progress)
    except ArchiveError as error:
        return str(error)
    return tree(target)


FORMATS = ["toy.tar", "toy.tgz", "toy.tbz", "toy.txz", "toy.zip"]


@pytest.mark.parametrize("name", FORMATS)
def test_random_damage_of_archives(tmp_path, name):
    """Is refused in one line, or was not noticed where the format has no checksum; nothing else is ever raised."""
    whole = small(tmp_path / name).read_bytes()
    assert isinstance(taken(tmp_path / name, tmp_path / "good"), dict)
    draw, refused = random.Random(0), 0
    for trial in range(60):
        data = bytearray(whole)
        if trial % 3 == 0:
            del data[draw.randrange(len(data)) :]
        for _ in range(draw.choice([1, 1, 4, 50]) if data else 0):
            data[draw.randrange(len(data))] = draw.randrange(256)
        (tmp_path / name).write_bytes(data)
        refused += isinstance(taken(tmp_path / name, tmp_path / str(trial)), str)
    assert refused > 15
    assert {path.name for path in tmp_path.iterdir()} == {name, "good", *map(str, range(60))}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("what", ["text", "nothing", "the middle", "another format"])
def test_what_is_no_archive(tmp_path, name, what):
    data = small(tmp_path / name).read_bytes()
    other = small(tmp_path / ("other.zip" if "zip" not in name else "other.tar")).read_bytes()
    data = {"text": b"<html>" * 300, "nothing": b"", "the middle": data[600:], "another format": other}[what]
    (tmp_path / name).write_bytes(data)
    assert "is damaged (" in taken(tmp_path / name, tmp_path / "out")


def test_an_encrypted_archive(tmp_path):
    data = bytearray(small(tmp_path / "toy.zip").read_bytes())
    for header, flags in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        data[data.rindex(header) + flags] |= 1
    (tmp_path / "toy.zip").write_bytes(data)
    assert "its member 'toy/in/b.bin' is encrypted" in taken(tmp_path / "toy.zip", tmp_path / "out")


def test_archives_that_would_unpack_to_very_much(tmp_path, monkeypatch):
    """Bombs: repeated bytes, a size that nobody has, and a sparse file."""
    monkeypatch.setattr(archives, "SMALL", 1_000_000)
    for name in ("toy.zip", "toy.tgz"):
        small(tmp_path / name)
        assert isinstance(taken(tmp_path / name, tmp_path / f"good-{name}"), dict)
    with zipfile.ZipFile(tmp_path / "toy.zip", "w", zipfile.ZIP_DEFLATED) as zipped:
        zipped.writestr("toy/zeros", bytes(5_000_000))
    with tarfile.open(tmp_path / "toy.tgz", "w:gz") as tape:
        tape.addfile(sized("toy/zeros", 5_000_000), io.BytesIO(bytes(5_000_000)))
    with tarfile.open(tmp_path / "toy.tar", "w") as tape:
        tape.addfile(sized("toy/absurd", 1 << 60))
    sparse = sized("toy/sparse", 512)
    sparse.pax_headers = {"GNU.sparse.size": str(1 << 50), "GNU.sparse.numblocks": "1", "GNU.sparse.map": "0,512"}
    with tarfile.open(tmp_path / "sparse.tar", "w", format=tarfile.PAX_FORMAT) as tape:
        tape.addfile(sparse, io.BytesIO(bytes(512)))
    for name in ("toy.zip", "toy.tgz", "toy.tar", "sparse.tar"):
        said = taken(tmp_path / name, tmp_path / f"out-{name}")
        assert re.search(r"its members would take more than 1,0..,000 bytes, too many for an archive of \d", said)
        assert tree(tmp_path / f"out-{name}") == {}


def sized(name, size):
    info = tarfile.TarInfo(name)
    info.size = size
    return info


def test_headers_that_follow_each_other_for_ever(tmp_path):
    long = sized("././@LongLink", 4)
    long.type = tarfile.GNUTYPE_LONGNAME
    (tmp_path / "toy.tar").write_bytes((long.tobuf(tarfile.GNU_FORMAT) + b"toy\0".ljust(512, b"\0")) * 5000)
    assert "toy.tar is damaged (maximum recursion depth" in taken(tmp_path / "toy.tar", tmp_path / "out")


def test_members_that_stand_in_each_others_way(tmp_path):
    with tarfile.open(tmp_path / "toy.tar", "w") as tape:
        for name in ("toy/a", "toy/a/b"):
            tape.addfile(sized(name, 3), io.BytesIO(b"abc"))
    assert "toy.tar is damaged (" in taken(tmp_path / "toy.tar", tmp_path / "out")
    with tarfile.open(tmp_path / "toy.tar", "w", format=tarfile.PAX_FORMAT) as tape:
        evil = sized("toy/a", 3)
        evil.pax_headers = {"path": "toy/b\0/../.."}
        tape.addfile(evil, io.BytesIO(b"abc"))
    assert "would lie outside the folder" in taken(tmp_path / "toy.tar", tmp_path / "again")


def test_what_lies_beside_the_folder_is_left_out(tmp_path):
    with tarfile.open(tmp_path / "toy.tar", "w") as tape:
        for name in ("./toy/good", "stray.txt", "toys/other"):
            tape.addfile(member(name), io.BytesIO(b"abc"))
    archive = signed(Archive("toy.tar", "", "", "toy"), tmp_path / "toy.tar")
    unpacked(archive, tmp_path)
    assert set(tree(tmp_path)) == {"toy.tar", "toy", "toy/good"}
    with pytest.raises(
        ArchiveError, match=r"expected files in a folder cubs in .*, got \['stray.txt', 'toy', 'toys'\]"
    ):
        unpacked(archive._replace(folder="cubs"), tmp_path)


def test_a_full_disk(tape, server, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(archives.shutil, "copyfileobj", full)
    with pytest.raises(
        ArchiveError, match=rf"no room left in {tmp_path}/data for toy\.tgz \({tape.size:,} bytes packed"
    ):
        unpacked(tape, tmp_path / "data")
    assert set(tree(tmp_path / "data")) == {tape.name}
    monkeypatch.undo()
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(
        ArchiveError, match=r"no room to unpack .*toy\.tgz: 900,004 bytes are needed and 1,000 are free"
    ):
        unpacked(tape, tmp_path / "data")
    with pytest.raises(ArchiveError, match=rf"no room in {tmp_path}/else for toy\.tgz: {tape.size:,} bytes more needed"
                                           r" and 1,000 are free"):  # fmt: skip
        unpacked(tape, tmp_path / "else")
    assert tree(tmp_path / "else") == {}


def test_a_disk_that_fills_while_fetching(tape, server, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(ArchiveError, match=r"no room left in .*; what has come so far is kept"):
            unpacked(tape, tmp_path / "data")
    assert tree(tmp_path / "data") == {}
    unpacked(tape, tmp_path / "data")
    assert len(server.requests) == 1  # nothing came twice


def test_a_folder_that_cannot_be_written(tape, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(ArchiveError, match=rf"cannot write in {tmp_path}/data \(Read-only file system\): choose another"
                                           r" folder by --dataset.root, or put toy there, unpacked"):  # fmt: skip
        unpacked(tape, tmp_path / "data")


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_crash_leaves_no_folder(tape, tmp_path, monkeypatch):
    def die(*_):
        (data / "beside").write_text(str(list((data / ".pgp").glob("unpacking-*/toy"))))
        os._exit(9)

    data = tmp_path / "data"
    with monkeypatch.context() as patched:
        patched.setattr(archives, "_write", die)
        child = multiprocessing.get_context("fork").Process(target=unpacked, args=(tape, data))
        child.start()
        child.join()
    assert child.exitcode == 9
    assert set(tree(data)) == {tape.name, "beside"}
    assert len(list((data / ".pgp").glob("unpacking-*"))) == 1
    unpacked(tape, data)
    assert set(tree(data)) == {tape.name, "beside", *WHOLE}
    assert list((data / ".pgp").glob("unpacking-*")) == []


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("kind", ["threads", "processes"])
def test_two_at_once(tape, server, tmp_path, kind):
    if kind == "processes" and sys.platform == "win32":
        pytest.skip("needs fork")
    server.seconds = 0.2
    make = threading.Thread if kind == "threads" else multiprocessing.get_context("fork").Process
    workers = [make(target=unpacked, args=(tape, tmp_path / "data")) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert kind == "threads" or [worker.exitcode for worker in workers] == [0, 0, 0]
    assert len(server.requests) == 1
    assert tree(tmp_path / "data") == {**WHOLE, tape.name: (server.folder / tape.name).read_bytes()}


def test_it_is_said_that_another_process_is_waited_for(tape, tmp_path):
    said, work = [], tmp_path / "data" / ".pgp"
    work.mkdir(parents=True)
    lock = filelock.FileLock(work / f"{tape.name}.lock")
    with Progress(disable=True) as progress:
        add = progress.add_task
        progress.add_task = lambda text, **rest: said.append(text) or lock.release() or add(text, **rest)
        lock.acquire()
        unpacked(tape, tmp_path / "data", progress)
    assert said[0] == "waiting for another process that fetches toy.tgz"


def test_progress_is_shown(tape, tmp_path, capsys):
    with Progress(disable=True) as progress:
        said = []
        add = progress.add_task
        progress.add_task = lambda text, **rest: said.append((text, rest["total"])) or add(text, **rest)
        unpacked(tape, tmp_path / "data", progress)
    assert said == [("fetching toy.tgz", tape.size), ("unpacking toy.tgz", 900_004)]
    assert progress.tasks == []
    shutil.rmtree(tmp_path / "data")
    unpacked(tape, tmp_path / "data")
    printed = capsys.readouterr()
    assert printed.out == ""
