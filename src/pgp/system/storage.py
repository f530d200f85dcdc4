"""Files of a run on disk: only regular files are read, writing is atomic, and errors name path and cause."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pgp.system import platforms

LARGEST = 1 << 30
"""Maximum size in bytes of a text or JSON file that is read; no run writes larger ones."""


DIGEST = "sha256"
"""Key of the digest in a sealed JSON file; the digest is that of the rest of the file."""


KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFLNK: "a link",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}
ADVICE = {
    errno.ENOSPC: "make room",
    errno.EDQUOT: "make room, your quota is used up",
    errno.EFBIG: "allow larger files, see ulimit -f",
    errno.EROFS: "choose a folder that is not mounted read-only",
    errno.EACCES: "choose a folder in which you may write, or change its permissions",
    errno.EPERM: "choose a folder in which you may write, or change its permissions",
    errno.EIO: "look after the disk",
    errno.ENAMETOOLONG: "choose a shorter path",
    errno.EMFILE: "allow more open files, see ulimit -n",
}
"""Advice for errors of the operating system, by error number."""


class RunError(RuntimeError):
    """A run folder that cannot be used, or a run that had to stop. The message says what to do."""


def write_error(action: str, path: Path, error: OSError) -> RunError:
    """Return the error for a failed `action` on `path`, with its cause and advice."""
    advice = ADVICE.get(error.errno or 0)
    return RunError(f"cannot {action} {path}: {error.strerror or error}" + (f": {advice}" if advice else ""))


@contextlib.contextmanager
def advised(advice: str, what: str = "") -> Iterator[None]:
    """Add `what` before and `advice` after the message of a RunError inside a `with` block."""
    try:
        yield
    except RunError as error:
        raise RunError(f"{what}{error}. {advice}") from error


def exists(path: Path) -> bool:
    """Return whether anything exists at `path`, including a broken link."""
    return os.path.lexists(path)


def require_folder(path: Path) -> Path:
    """Return `path`.

    Raises:
        RunError: If it is no folder, or only a link to one.
    """
    _require_kind(path, stat.S_IFDIR, "a folder")
    return path


def require_file(path: Path) -> None:
    """Raise if there is no regular file at `path`. The file is not opened.

    Raises:
        RunError: If there is none, or only a link to one.
    """
    _require_kind(path, stat.S_IFREG, "a file")


def make_folder(path: Path) -> None:
    """Create a folder if it does not exist.

    Raises:
        RunError: If the system refuses, or there is something else, such as a link to a folder.
    """
    try:
        path.mkdir(exist_ok=True)
    except FileExistsError:
        pass  # reported below
    except OSError as error:
        raise write_error("write", path, error) from error
    require_folder(path)


def read(path: Path, largest: int = LARGEST) -> bytes:
    """Return the content of a regular file. Links are not followed, and pipes and devices are not opened.

    Raises:
        RunError: If there is none, it is something else, is larger than `largest`, or cannot be read.
    """
    _require_kind(path, stat.S_IFREG, "a file")
    try:
        with open(path, "rb", opener=_without_links) as file:  # Path.open has no argument for an opener
            _require_regular(path, file.fileno())
            if (size := os.fstat(file.fileno()).st_size) > largest:
                raise RunError(f"{path} has {size:,} bytes, more than the {largest:,} that it may have: restore it")
            return file.read(largest + 1)
    except OSError as error:
        raise write_error("read", path, error) from error


def read_json(path: Path) -> Any:
    """Return the JSON value in a file.

    Raises:
        RunError: If it cannot be read, or holds no JSON.
    """
    try:
        return json.loads(read(path))
    except (ValueError, RecursionError) as error:  # also raised for bytes that are not UTF-8
        raise RunError(f"{path} is damaged, it holds no readable JSON: {error}") from error


def write(path: Path, content: bytes | str) -> None:
    """Write a file atomically, text in UTF-8. A link at `path` is replaced, not followed.

    Raises:
        RunError: If the system refuses.
    """
    data = _bytes(content)
    try:
        with platforms.atomic_file(path) as partial:
            partial.unlink(missing_ok=True)
            with open(partial, "xb", opener=_without_links) as file:
                file.write(data)
    except OSError as error:
        raise write_error("write", path, error) from error


def append(path: Path, lines: str) -> None:
    """Append lines to a text file, which is created if it is missing. An incomplete last line is ended first.

    Raises:
        RunError: If there is something else than a regular file, or the system refuses.
    """
    if exists(path):
        _require_kind(path, stat.S_IFREG, "a file")
    try:
        with open(path, "ab+", opener=_without_links) as file:
            _require_regular(path, file.fileno())
            if file.tell():
                file.seek(-1, os.SEEK_END)
                lines = lines if file.read(1) == b"\n" else "\n" + lines
            file.write(_bytes(lines))
    except OSError as error:
        raise write_error("write", path, error) from error


def digest(content: bytes | str) -> str:
    """Return the SHA-256 of some content, of text in UTF-8."""
    return hashlib.sha256(_bytes(content)).hexdigest()


def _bytes(content: bytes | str) -> bytes:
    """Encode text as UTF-8, with a question mark for characters that cannot be encoded."""
    return content.encode(errors="replace") if isinstance(content, str) else content


def sealed(tree: dict[str, Any]) -> dict[str, Any]:
    """Return `tree` as JSON values with a digest of its content, which `read_sealed` checks."""
    plain: dict[str, Any] = json.loads(json.dumps(tree))  # keys as strings, which sort otherwise than numbers
    return {**plain, DIGEST: digest(json.dumps(plain, sort_keys=True))}


def read_sealed(path: Path) -> dict[str, Any]:
    """Return the content of a JSON file that was `sealed`, without its digest.

    Raises:
        RunError: If it cannot be read, or is not as it was written.
    """
    tree = read_json(path)
    if not isinstance(tree, dict) or DIGEST not in tree:
        raise RunError(f"{path} carries no digest: expected a file of this version of pgp, got one of another program"
                       " or of an older pgp, whose runs have to be trained again")  # fmt: skip
    found = tree.pop(DIGEST)
    try:
        intact = found == digest(json.dumps(tree, sort_keys=True))
    except RecursionError:
        intact = False
    if not intact:
        raise RunError(f"{path} was changed or damaged after pgp wrote it")
    return tree


def remove_folder(path: Path) -> None:
    """Delete a folder and its content as far as the system permits; a link to a folder is not followed."""
    shutil.rmtree(path, ignore_errors=True)


def remove_abandoned(folder: Path) -> None:
    """Delete the unfinished files in `folder` whose process no longer runs."""
    for path in folder.iterdir() if folder.is_dir() and not folder.is_symlink() else ():
        with contextlib.suppress(OSError):  # its process may have renamed it in the meantime
            if platforms.is_abandoned(path) and not path.is_dir():
                path.unlink()


def _require_kind(path: Path, kind: int, what: str) -> None:
    try:
        found = stat.S_IFMT(path.lstat().st_mode)
    except OSError as error:
        raise write_error("read", path, error) from error
    if found != kind:
        raise RunError(f"expected {what} at {path}, got {KINDS.get(found, 'a file')}: put back what pgp wrote there")


def _require_regular(path: Path, descriptor: int) -> None:
    """Raise if an opened file is not regular; it may have been replaced since it was checked."""
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        raise RunError(f"expected a file at {path}, got something else: put back what pgp wrote there")


def _without_links(path: str, flags: int) -> int:
    """Open a file so that a link is an error and a FIFO does not block; a new file gets the mode of the umask."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0), 0o666)
