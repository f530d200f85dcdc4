"""Download of one file over HTTP, with retries. A partial file is kept and continued at the next start."""

from __future__ import annotations

import json
import queue
import shutil
import threading
import time
from collections.abc import Iterator
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import requests
import urllib3
from rich.progress import Progress

from pgp.datasets.archives import RESERVE, ArchiveError
from pgp.system import platforms

CHUNK = 1 << 16
TIMEOUT = (15, 60)
"""Timeout in seconds for a connection, and for the next bytes."""
ANSWER = 90.0
"""Timeout in seconds until a response begins, including redirects."""
BUSY = (429, 500, 502, 503, 504)
"""HTTP status codes of temporary errors."""
ATTEMPTS = 100
"""Maximum number of requests for one file."""
FAILURES = 5
"""Maximum number of failed requests in a row."""
LEAST = 1 << 16
"""Minimum number of bytes per request, and per `MINUTE`; a request with fewer bytes counts as failed."""
MINUTE = 60.0
"""Length in seconds of the window in which the speed is measured."""
RESTARTS = 3
"""Maximum number of restarts from the first byte, if the server does not continue a partial download."""
PAUSE = 0.25
"""Seconds to wait before the next request; doubled after each failure in a row."""
PATIENCE = 300.0
"""Maximum total waiting time in seconds for one file, whatever the server asks for."""
LARGEST = 1 << 34
"""Maximum size in bytes of a file whose size is unknown."""


class _FailedError(Exception):
    """A request that failed, but may succeed if it is repeated."""

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        """Store the reason, and the number of seconds that the server asks to wait."""
        super().__init__(f"{reason}, asking to wait {wait:,.0f} seconds" if wait else reason)
        self.wait = wait


class _Source(NamedTuple):
    """The file that a partial download belongs to."""

    url: str
    version: str | None
    """ETag or date of the file; the download continues only if it has not changed."""
    size: int | None
    """Size of the complete file in bytes."""


class Transfer:
    """Downloader for pooch. It writes to a partial file, and continues it after a broken connection."""

    def __init__(self, part: Path, size: int | None, progress: Progress) -> None:
        self.part, self.size, self.progress = part, size, progress
        self.continued = False
        """Whether the file contains bytes of an earlier start."""
        self.restarts = 0
        """Number of times that the download was restarted from the first byte."""
        self.anew = False
        """Whether the next request is for the whole file."""

    @property
    def have(self) -> int:
        """Number of bytes downloaded so far."""
        return self.part.stat().st_size if self.part.is_file() else 0

    def __call__(self, url: str, output_file: str, pooch: Any) -> None:
        """Fetch `url` to `output_file`.

        Raises:
            requests.RequestException: If it cannot be had; the part stays.
            ArchiveError: If it is not the published file or the disk has too little room.
        """
        self.continued = self.have > 0
        name = f"fetching {self.part.stem}"
        bar = self.progress.add_task(name, total=self.size, completed=self.have)
        failures, waited = 0, 0.0
        with requests.Session() as session:
            for _ in range(ATTEMPTS):
                before, wait = self.have, 0.0
                try:
                    self._request(session, url, bar)
                    break
                except _FailedError as error:
                    failed, wait = str(error), error.wait
                except (requests.ConnectionError, requests.Timeout, urllib3.exceptions.HTTPError) as error:
                    failed = _cause(error)
                failures = 0 if self.have >= before + LEAST else failures + 1
                if failures == FAILURES:
                    raise requests.ConnectionError(f"{failed}, {failures} requests in a row")
                wait = max(wait, PAUSE * 2**failures)
                waited += wait
                if waited > PATIENCE:
                    raise requests.ConnectionError(f"{failed}; pgp waits no more than {PATIENCE:.0f} seconds in all")
                if wait >= 1:
                    self.progress.update(bar, description=f"{name}, again in {wait:.0f} s")
                time.sleep(wait)
                self.progress.update(bar, description=name)
            else:
                raise requests.ConnectionError(f"{failed}, and the file is not complete after {ATTEMPTS} requests")
        platforms.replace(self.part, Path(output_file))
        self._note.unlink(missing_ok=True)
        self.progress.remove_task(bar)

    def _request(self, session: requests.Session, url: str, bar: Any) -> None:
        """Make one request for the missing bytes. The file is complete when it returns.

        Raises:
            _FailedError: If some are still missing.
        """
        source = None if self.anew else self._source(url)
        have = self.have if source else 0
        if source and have == source.size:  # complete, but not renamed yet
            return
        headers = {"Accept-Encoding": "identity"}
        if source and have:
            headers["Range"] = f"bytes={have}-"
            headers |= {"If-Range": source.version} if source.version else {}
        with _answer(session, url, headers) as answer:
            if answer.status_code in BUSY:
                raise _FailedError(f"{answer.status_code} {answer.reason}", _retry_after(answer))
            if answer.status_code == 416 or (answer.status_code == 206 and not self._fits(answer, source, have)):
                self.anew = True
                span = answer.headers.get("Content-Range", "no range")
                raise _FailedError(f"asked for all bytes from {have:,} on, it answers {answer.status_code}, {span!r}")
            answer.raise_for_status()
            if answer.status_code not in (200, 206):
                raise requests.HTTPError(f"the server answers {answer.status_code} {answer.reason}")
            if answer.status_code != 206:
                have, source = 0, self._begin(answer, url)
            assert source is not None
            limit = LARGEST if source.size is None else source.size
            self._check_room(0 if source.size is None else limit - have)
            self.progress.update(bar, total=source.size, completed=have)
            with self.part.open("ab" if have else "wb") as sink:
                for chunk in _chunks(answer):
                    have += len(chunk)
                    if have > limit:
                        break
                    self._check_room(len(chunk))
                    sink.write(chunk)
                    self.progress.advance(bar, len(chunk))
            platforms.sync_file(self.part)
        if have > limit:
            self.part.unlink()
            self._refuse(url, f"more than {limit:,}")
        if source.size is not None and have < limit:
            raise _FailedError("the connection closed before the end")

    def _refuse(self, url: str, got: str) -> NoReturn:
        expected = f"{self.size:,} bytes" if self.size else f"at most {LARGEST:,} bytes"
        raise ArchiveError(f"{url} does not give the published file: expected {expected}, got {got}. Get"
                           f" {self.part.stem} elsewhere and put it into {self.part.parent.parent}")  # fmt: skip

    def _begin(self, answer: requests.Response, url: str) -> _Source:
        """Record what a download from the first byte belongs to, beside the partial file."""
        tag = answer.headers.get("ETag", "")
        version = (
            tag if tag.startswith('"') else answer.headers.get("Last-Modified")
        )  # weak tags do not guarantee equal bytes
        length = answer.raw.length_remaining  # None if the server does not say
        if length is not None and (length != self.size if self.size else length > LARGEST):
            self._refuse(url, f"{length:,}")
        self.anew, self.restarts = False, self.restarts + bool(self.have)
        if self.restarts > RESTARTS:
            raise requests.RequestException(f"the server has broken off {self.restarts} times, and cannot continue from"
                                            " where it stopped")  # fmt: skip
        source = _Source(url, version, self.size if length is None else length)
        for stale in (self.part, self._note):
            stale.unlink(missing_ok=True)
        self._note.write_text(json.dumps(source), encoding="utf-8", newline="\n")
        return source

    def _source(self, url: str) -> _Source | None:
        """Return what the partial file belongs to, or None if it cannot be continued."""
        try:
            source = _Source(*json.loads(self._note.read_text(encoding="utf-8")))
            return source if source.url == url and (source.size is None or self.have <= source.size) else None
        except (OSError, ValueError, TypeError, RecursionError):  # missing, or cut off by a crash
            return None

    def _fits(self, answer: requests.Response, source: _Source | None, have: int) -> bool:
        """Return whether a partial response begins where the partial file ends, and belongs to the same file."""
        span, _, total = answer.headers.get("Content-Range", "").partition("/")
        same = source is not None and (total == str(source.size) or total == "*" or source.size is None)
        return same and span.startswith(f"bytes {have}-")

    def _check_room(self, size: int) -> None:
        """Raise if the disk has no room for `size` more bytes."""
        free = shutil.disk_usage(self.part.parent).free
        if free < size + RESERVE:
            raise ArchiveError(f"no room in {self.part.parent.parent} for {self.part.stem}: {size:,} bytes more needed"
                               f" and {free:,} are free, of which {RESERVE:,} are left to others; choose another folder"
                               f" by --dataset.root. What has come so far is kept")  # fmt: skip

    @property
    def _note(self) -> Path:
        return self.part.with_name(f"{self.part.name}.json")


def _answer(session: requests.Session, url: str, headers: dict[str, str]) -> requests.Response:
    """Make a request and return the response before its content is read.

    Raises:
        _FailedError: If its head has not come after `ANSWER` seconds, however steadily its bytes come.
    """
    box: queue.SimpleQueue[requests.Response | Exception] = queue.SimpleQueue()

    def ask() -> None:
        try:
            box.put(session.get(url, headers=headers, stream=True, timeout=TIMEOUT))
        except Exception as error:
            box.put(error)

    threading.Thread(target=ask, daemon=True).start()  # requests has no timeout for the whole response header
    try:
        answer = box.get(timeout=ANSWER)
    except queue.Empty:
        session.close()
        raise _FailedError(f"the server has not answered in {ANSWER:.0f} seconds") from None
    if isinstance(answer, Exception):
        raise answer
    return answer


def _chunks(answer: requests.Response) -> Iterator[bytes]:
    """Yield the content of a response in chunks, as they arrive.

    Raises:
        _FailedError: If it comes too slowly.
    """
    since, count = time.monotonic(), 0
    # raw bytes: some servers declare .tgz as an encoding, and requests would decompress it
    while chunk := answer.raw.read1(CHUNK, decode_content=False):
        yield chunk
        count += len(chunk)
        if (now := time.monotonic()) - since > MINUTE:
            if count < LEAST:
                raise _FailedError(f"the server gives {count:,} bytes in {now - since:.0f} seconds")
            since, count = now, 0


def _retry_after(answer: requests.Response) -> float:
    """Return how many seconds the server asks to wait; 0 if it does not."""
    asked = answer.headers.get("Retry-After", "").strip()
    try:
        wait = float(asked) if asked.isdecimal() else parsedate_to_datetime(asked).timestamp() - time.time()
    except (ValueError, OverflowError):
        return 0.0
    return max(0.0, wait)


def _cause(error: Exception) -> str:
    """Return the original cause of `error`; requests and urllib3 wrap each other's errors."""
    while error.args and isinstance(inner := getattr(error.args[0], "reason", error.args[0]), Exception):
        error = inner
    return next((text for text in error.args if isinstance(text, str)), str(error))
