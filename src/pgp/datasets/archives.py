"""Archives of published data sets, and safe unpacking that writes only below the target folder."""

from __future__ import annotations

import errno
import shutil
import stat
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO, NamedTuple

from rich.progress import Progress

CHUNK = 1 << 20
RESERVE = 100_000_000
"""Number of bytes to leave free on a disk."""
RATIO = 100
"""Maximum ratio of unpacked to packed size."""
SMALL = 1 << 26
"""Unpacked size in bytes that is accepted for any archive."""
DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EMFILE, errno.ENFILE}
"""Numbers of errors that come from the disk or the system, not from an archive."""


class ArchiveError(ValueError):
    """An archive that cannot be downloaded or unpacked. The message says what to do."""


class Archive(NamedTuple):
    """A published archive of a data set."""

    name: str
    """File name in the data folder and on a mirror."""
    url: str
    """URL of its authors."""
    digest: str
    """Expected digest, such as `md5:…` or `sha256:…`."""
    folder: str
    """Folder of the data set inside the archive."""
    size: int | None = None
    """Size in bytes, if known."""


class _Member(NamedTuple):
    """A file or a folder in an archive."""

    name: str
    size: int
    kind: str
    """`file`, `folder`, or a description of anything else."""
    open: Callable[[], IO[bytes]]

    @property
    def path(self) -> PurePosixPath:
        return PurePosixPath(self.name)


def extract(archive: Path, folder: str, target: Path, progress: Progress) -> None:
    """Unpack `folder` of the archive to `target/folder`; other members of the archive are left out.

    Every member is checked before writing: paths outside the target, links and devices are refused.

    Raises:
        ArchiveError: If the archive is damaged or refused, or the disk has too little room.
        OSError: If it cannot be written.
    """
    try:
        with _members(archive) as members:
            selected = _proved(archive, folder, members)
            size = sum(member.size for member in selected)
            if (free := shutil.disk_usage(target).free) < size + RESERVE:
                raise ArchiveError(f"no room to unpack {archive}: {size:,} bytes are needed and {free:,} are free, of"
                                   f" which {RESERVE:,} are left to others")  # fmt: skip
            bar = progress.add_task(f"unpacking {archive.name}", total=size)
            for member in selected:
                _write(member, target)
                progress.advance(bar, member.size)
            progress.remove_task(bar)
    except ArchiveError:
        raise
    except Exception as error:  # the standard library raises errors of many types for damaged archives
        if isinstance(error, OSError) and error.errno in DISK:
            raise
        raise ArchiveError(f"{archive} is damaged ({str(error) or type(error).__name__}): fetch it again") from error


def _proved(archive: Path, folder: str, members: Iterable[_Member]) -> list[_Member]:
    """Yield the members of `folder`, after checking that all of `members` are harmless."""
    packed = archive.stat().st_size
    most = max(SMALL, RATIO * packed)
    size, seen = 0, []
    for member in members:
        seen.append(member)
        size += member.size
        if member.size < 0 or size > most:
            raise ArchiveError(f"{archive} was not unpacked: its members would take more than {most:,} bytes, too"
                               f" many for an archive of {packed:,}")  # fmt: skip
        path = PureWindowsPath(member.name)  # handles both slashes and drive letters
        if path.anchor or ".." in path.parts or "\0" in member.name:
            raise ArchiveError(f"{archive} was not unpacked: its member {member.name!r} would lie outside the folder")
        if member.kind not in ("file", "folder"):
            raise ArchiveError(f"{archive} was not unpacked: its member {member.name!r} is {member.kind}")
    selected = [member for member in seen if member.path.parts[:1] == (folder,)]
    if not any(member.kind == "file" for member in selected):
        tops = sorted({member.path.parts[0] for member in seen if member.path.parts})
        raise ArchiveError(f"expected files in a folder {folder} in {archive}, got {tops[:5]}")
    return selected


def _write(member: _Member, target: Path) -> None:
    path = target / member.path
    if member.kind == "folder":
        path.mkdir(parents=True, exist_ok=True)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with member.open() as source, path.open("wb") as sink:
        shutil.copyfileobj(source, sink, CHUNK)


@contextmanager
def _members(archive: Path) -> Iterator[Iterator[_Member]]:
    """Yield all members in the order of the archive."""
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive) as zipped:
            yield (
                _Member(info.filename, info.file_size, _zip_kind(info), partial(zipped.open, info))
                for info in zipped.infolist()
            )
        return
    with tarfile.open(archive) as tape:
        yield (_Member(info.name, info.size, _tar_kind(info), partial(_tar_open, tape, info)) for info in tape)


def _zip_kind(info: zipfile.ZipInfo) -> str:
    mode = info.external_attr >> 16  # as Unix has it; 0 where the archive was made elsewhere
    if info.is_dir():
        return "folder"
    if info.flag_bits & 1:
        return "encrypted"
    return "file" if stat.S_IFMT(mode) in (0, stat.S_IFREG) else "no plain file"


def _tar_kind(info: tarfile.TarInfo) -> str:
    if info.isfile():
        return "file"
    if info.isdir():
        return "folder"
    return f"a link to {info.linkname!r}" if info.issym() or info.islnk() else "no plain file"


def _tar_open(tape: tarfile.TarFile, info: tarfile.TarInfo) -> IO[bytes]:
    file = tape.extractfile(info)
    assert file is not None  # only regular files get here
    return file
