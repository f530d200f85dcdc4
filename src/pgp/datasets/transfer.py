"""One file over HTTP, in as many attempts as it takes; what has come stays for the next start."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any, NamedTuple

import requests
import urllib3
from requests.adapters import HTTPAdapter
from rich.progress import Progress

from pgp.datasets.archives import ArchiveError

CHUNK = 1 << 16
TIMEOUT = (15, 60)
"""Seconds to wait for a connection, and for the next bytes."""
RETRIES = urllib3.Retry(4, backoff_factor=0.5, status_forcelist=(429, 500, 502, 503, 504), allowed_methods={"GET"})
"""How a request is made again that got no answer, or was told to come back."""
BREAKS = 5
"""Connections that may break in a row with no byte gained."""
PAUSE = 1.0
"""Seconds to wait after the first of them; after each further one twice as long."""


class _Source(NamedTuple):
    """What the part that lies here is a part of."""

    url: str
    version: str | None
    """ETag or date that the server gave it; only while that holds, it goes on with the part."""
    size: int | None
    """Bytes of the whole."""


class Transfer:
    """Downloads to a part of its own, which it goes on with when a connection broke; pooch calls it."""

    def __init__(self, part: Path, size: int | None, progress: Progress) -> None:
        self.part, self.size, self.progress = part, size, progress
        self.continued = False
        """Whether bytes of an earlier start went into the file."""

    @property
    def have(self) -> int:
        """Bytes that have come."""
        return self.part.stat().st_size if self.part.is_file() else 0

    def __call__(self, url: str, output_file: str, pooch: Any) -> None:
        """Nothing; `output_file` is now what `url` gives.

        Raises:
            requests.RequestException: if it cannot be had; the part stays.
        """
        self.continued = self.have > 0
        bar = self.progress.add_task(f"fetching {self.part.stem}", total=self.size, completed=self.have)
        with requests.Session() as session:
            for scheme in ("http://", "https://"):
                session.mount(scheme, HTTPAdapter(max_retries=RETRIES))
            breaks = 0
            while True:
                before = self.have
                try:
                    if self._come(session, url, bar):
                        break
                    error: Exception = requests.ConnectionError("the connection closed before the end")
                except urllib3.exceptions.HTTPError as broken:  # while bytes were coming
                    error = broken
                breaks = 0 if self.have > before else breaks + 1
                if breaks >= BREAKS:
                    raise requests.ConnectionError(str(error)) from error
                time.sleep(PAUSE * 2**breaks)
        self.part.replace(output_file)
        self._note.unlink(missing_ok=True)
        self.progress.remove_task(bar)

    def _come(self, session: requests.Session, url: str, bar: Any) -> bool:
        """Whether all bytes are here, after one more request for those that are missing."""
        source = self._source(url)
        have = self.have if source else 0
        if source and have == source.size:  # only the renaming is missing
            return True
        headers = {"Accept-Encoding": "identity"}
        if source and have:
            headers["Range"] = f"bytes={have}-"
            headers |= {"If-Range": source.version} if source.version else {}
        with session.get(url, headers=headers, stream=True, timeout=TIMEOUT) as answer:
            if answer.status_code == 416 or (answer.status_code == 206 and not self._fits(answer, source, have)):
                self.part.unlink(missing_ok=True)  # it is a part of something else
                return False
            answer.raise_for_status()
            if answer.status_code != 206:
                have, source = 0, self._begin(answer, url)
            assert source is not None
            self._room(source.size, have)
            self.progress.update(bar, total=source.size or self.size, completed=have)
            with self.part.open("ab" if have else "wb") as sink:
                # as it lies there: some servers call a .tgz an encoding, and requests would undo it
                for chunk in answer.raw.stream(CHUNK, decode_content=False):
                    sink.write(chunk)
                    self.progress.advance(bar, len(chunk))
                sink.flush()
                os.fsync(sink.fileno())
        return source.size is None or self.have >= source.size

    def _begin(self, answer: requests.Response, url: str) -> _Source:
        """What a download from the first byte is of, noted beside the part."""
        tag = answer.headers.get("ETag", "")
        version = tag if tag.startswith('"') else answer.headers.get("Last-Modified")  # weak tags promise too little
        length = answer.headers.get("Content-Length", "")
        source = _Source(url, version, int(length) if length.isdigit() else self.size)
        self.part.unlink(missing_ok=True)
        self._note.write_text(json.dumps(source), encoding="utf-8")
        return source

    def _source(self, url: str) -> _Source | None:
        """What the part is of; None if there is nothing to go on with."""
        try:
            source = _Source(*json.loads(self._note.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):  # none, or cut short by a crash
            return None
        return source if source.url == url and (source.size is None or self.have <= source.size) else None

    def _fits(self, answer: requests.Response, source: _Source | None, have: int) -> bool:
        """Whether a partial answer begins where the part ends, and is of the same whole."""
        span, _, total = answer.headers.get("Content-Range", "").partition("/")
        same = source is not None and (total == str(source.size) or total == "*" or source.size is None)
        return same and span.startswith(f"bytes {have}-")

    def _room(self, size: int | None, have: int) -> None:
        free = shutil.disk_usage(self.part.parent).free
        if size is not None and free < size - have:
            raise ArchiveError(f"no room in {self.part.parent.parent} for {self.part.stem}: {size - have:,} bytes more"
                               f" needed and {free:,} are free; choose another folder by --dataset.root")  # fmt: skip

    @property
    def _note(self) -> Path:
        return self.part.with_name(f"{self.part.name}.json")
