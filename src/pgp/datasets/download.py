"""Download and unpack published archives. Both are atomic, and both can be resumed after an interruption.

Unfinished files are in `.pgp` in the data folder. Files of the user are read, and never moved or deleted.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import filelock
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from pgp.datasets.archives import Archive, ArchiveError, extract
from pgp.system import locks, platforms

WORK = ".pgp"
"""Folder for locks and unfinished files in the data folder."""
MIRROR = "PGP_MIRROR"
"""Environment variable with the URL of a mirror, from which archives are downloaded by name."""


def unpacked(archive: Archive, root: Path, progress: Progress | None = None) -> Path:
    """Return the folder below `root` that `archive` unpacks to. If it is missing, download and unpack the archive.

    An existing folder is used without checks. The archive stays in `root`. Only one process downloads; others wait for
    it.

    Raises:
        ArchiveError: If the archive cannot be downloaded, is not the published one, or cannot be unpacked.
    """
    root = root.expanduser().absolute()
    folder = root / archive.folder
    if there(folder):
        return folder
    with _shown(progress) as bars, _explained(archive, root), _alone(archive, root, bars):
        if not there(folder):
            path = _had(archive, root, bars)
            with tempfile.TemporaryDirectory(dir=root / WORK, prefix=_scratch(archive)) as scratch:
                extract(path, archive.folder, Path(scratch), bars)
                platforms.sync_all()  # otherwise a power cut could leave a complete folder of empty files
                platforms.move_folder(Path(scratch) / archive.folder, folder)
    return folder


def fetched(archive: Archive, root: Path, progress: Progress | None = None) -> Path:
    """Return the path of the archive in `root`, checked by its digest. If it is missing, download it.

    Raises:
        ArchiveError: If it cannot be had, or is not the published one.
    """
    root = root.expanduser().absolute()
    with _shown(progress) as bars, _explained(archive, root), _alone(archive, root, bars):
        return _had(archive, root, bars)


def there(folder: Path) -> bool:
    """Return whether `folder` is a folder that is not empty."""
    return folder.is_dir() and any(folder.iterdir())


def address(archive: Archive) -> str:
    """Return the URL of the archive: that of its authors, or of the mirror in `PGP_MIRROR`."""
    mirror = os.environ.get(MIRROR)
    return f"{mirror.rstrip('/')}/{archive.name}" if mirror else archive.url


def _had(archive: Archive, root: Path, bars: Progress) -> Path:
    path = root / archive.name
    if path.exists() or path.is_symlink():
        _prove(archive, path)
        return path
    downloaded = _downloaded(archive, root, bars)
    if path.exists():  # someone else put it there in the meantime: do not replace it
        return downloaded
    platforms.replace(downloaded, path)
    return path


def _prove(archive: Archive, path: Path) -> None:
    import pooch  # imported here, because it is slow and needed only for downloads

    if not path.is_file():
        raise ArchiveError(f"expected a file at {path}, got something else: move it away and start again")
    method, _, wanted = archive.digest.partition(":")
    if (got := pooch.file_hash(str(path), method)) != wanted.lower():
        size = f"{path.stat().st_size:,} bytes" + (f" of {archive.size:,}" if archive.size else "")
        raise ArchiveError(
            f"{path} is not the published file: expected {archive.digest}, got {method}:{got} ({size}). Move it away"
            f" and start again, or put in its place what {address(archive)} gives"
        )


def _downloaded(archive: Archive, root: Path, bars: Progress) -> Path:
    """Download the archive to our working folder, check it, and return its path."""
    import pooch
    import requests

    from pgp.datasets.transfer import Transfer

    url, work = address(archive), root / WORK
    pooch.get_logger().setLevel("WARNING")
    while True:
        transfer = Transfer(work / f"{archive.name}.part", archive.size, bars)
        try:
            return Path(pooch.retrieve(url, archive.digest, archive.name, work, downloader=transfer))
        except ArchiveError:
            raise
        except requests.RequestException as error:  # before ValueError, because some of them are subclasses of it
            kept = f"; {transfer.have:,} bytes of it are kept for the next start" if transfer.have else ""
            raise ArchiveError(
                f"cannot fetch {archive.name} ({error}){kept}. Without a network, get it from {archive.url}"
                f" elsewhere and put it, as it is, into {root}; or set {MIRROR} to an address that has it"
            ) from error
        except ValueError as error:  # pooch deleted what has another digest
            if not transfer.continued:
                reason = str(error).partition(". ")[0]
                raise ArchiveError(f"{url} does not give the published file ({reason}). Get {archive.name} elsewhere"
                                   f" and put it into {root}") from error  # fmt: skip


@contextmanager
def _alone(archive: Archive, root: Path, bars: Progress) -> Iterator[None]:
    """Lock the archive in `root` against other processes, and remove what an earlier crash left."""
    work = root / WORK
    work.mkdir(parents=True, exist_ok=True)
    for path in (work, *work.iterdir()):
        known = (
            path.is_file() or path.is_dir() or not path.exists()
        )  # it may be missing because another process has just renamed it
        if path.is_symlink() or not known:
            raise ArchiveError(f"{path} is a link or a device, which pgp never makes there: remove it and start again")
    path = work / f"{archive.name}.lock"
    try:
        lock = locks.acquire(path, timeout=0)
    except filelock.Timeout:
        bar = bars.add_task(f"waiting for another process that fetches {archive.name}", total=None)
        lock = locks.acquire(path)
        bars.remove_task(bar)
    try:
        for stale in work.glob(f"{_scratch(archive)}*"):
            shutil.rmtree(stale, ignore_errors=True)
        yield
    finally:
        locks.release(lock)


def _scratch(archive: Archive) -> str:
    return f"unpacking-{archive.name}-"


@contextmanager
def _explained(archive: Archive, root: Path) -> Iterator[None]:
    """Convert errors of the disk to errors that say what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            needs = f" ({archive.size:,} bytes packed, and as many again unpacked)" if archive.size else ""
            raise ArchiveError(f"no room left in {root} for {archive.name}{needs}: make room, or choose another folder"
                               f" by --dataset.root; what has come so far is kept") from error  # fmt: skip
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise ArchiveError(f"cannot write in {root} ({error.strerror}): choose another folder by --dataset.root,"
                               f" or put {archive.folder} there, unpacked") from error  # fmt: skip
        raise


def _shown(progress: Progress | None) -> AbstractContextManager[Progress]:
    """Return where to draw bars: `progress`, or new bars on standard error."""
    if progress is not None:
        return nullcontext(progress)
    left = (TransferSpeedColumn(), TextColumn("left"), TimeRemainingColumn())
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), *left)
    return Progress(*columns, console=Console(stderr=True), redirect_stdout=False)
