"""What a service accepts: sizes, counts and times of requests, and where they come from."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import ipaddress
import json
import logging
from collections.abc import Collection
from dataclasses import dataclass, fields
from urllib.parse import urlsplit

from python_multipart.multipart import parse_options_header
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOGGER = logging.getLogger("uvicorn.error")
MOST_FILES = 1000
"""Files that Starlette reads from one form."""
LONGEST_CONTENT_TYPE = 1000
"""Characters of a content type: to parse one takes Python quadratic time."""
DRAIN_SECONDS = 2.0
"""Seconds for which the rest of a refused request is read."""


@dataclass(frozen=True)
class Limits:
    """Limits of a service. A request beyond them is refused with a message, before it can use more."""

    request_bytes: int = 256 * 2**20
    """Bytes of one request."""
    files: int = 64
    """Images of one request to `/predict`."""
    teaching_files: int = 500
    """Images of one request to `/teach`."""
    pixels: int = 50_000_000
    """Pixels of one image."""
    seconds: float = 60.0
    """Seconds for a request to arrive, again for its images to be decoded and, by `/predict`, classified, and again for
    a client to read a part of the answer."""
    requests: int = 64
    """Requests that are answered at the same time."""
    decoders: int = 2
    """Images that are decoded at the same time; a large one may take a gigabyte of memory."""
    waiting_images: int = 1024
    """Images that wait to be classified. With more, requests are refused until there is room."""
    batch_size: int = 32
    """Images that the encoder takes at a time."""

    def __post_init__(self) -> None:
        for one in fields(self):
            value = getattr(self, one.name)
            if not value > 0:
                raise ValueError(f"expected {one.name} above 0, got {value}")
        for name in ("files", "teaching_files"):
            if (value := getattr(self, name)) > MOST_FILES:
                raise ValueError(
                    f"expected {name} of at most {MOST_FILES:,}, as many as a form may hold, got {value:,}"
                )
        if self.waiting_images < self.files:
            raise ValueError(f"expected waiting_images of at least files={self.files:,}, so that one request may wait,"
                             f" got {self.waiting_images:,}")  # fmt: skip


NOT_STARTED = "the service has not started: a server must run the lifespan of this application, also if it is mounted"
"""Message of a request that comes before."""


class RefusedError(Exception):
    """A request that is not carried out, with the status and the message of its answer."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message

    @property
    def headers(self) -> dict[str, str]:
        """Headers of the answer that tell the client what to do."""
        return {401: {"WWW-Authenticate": "Bearer"}, 503: {"Retry-After": "1"}}.get(self.status, {})


def is_loopback(host: str) -> bool:
    """Return whether a service that listens at `host` is reached from this machine only.

    >>> is_loopback("127.0.0.1"), is_loopback("localhost"), is_loopback("::1"), is_loopback("0.0.0.0")
    (True, True, True, False)
    """
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Guard:
    """Middleware that refuses requests from elsewhere, without the token, too large or too slow.

    On loopback, a web site that is open in a browser of this machine must not reach the service: requests must name
    this machine as their host, and those that change anything must not come from another origin.

    Args:
        app: The application that answers what is passed on.
        limits: Sizes and times.
        token: Token that requests must carry as `Authorization: Bearer TOKEN`. If None, none.
        hosts: Names that a request may have in `Host`, without ports. If empty, any.
        open_paths: Paths that need no token.
    """

    def __init__(
        self, app: ASGIApp, limits: Limits, token: str | None, hosts: Collection[str], open_paths: Collection[str]
    ) -> None:
        self.app, self.limits, self.hosts, self.open_paths = app, limits, frozenset(hosts), frozenset(open_paths)
        self._expected = None if token is None else f"Bearer {token}".encode()
        self._in_progress = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or pass it on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        answered, path = False, path_of(scope)
        counted = path not in self.open_paths

        async def sending(message: Message) -> None:
            nonlocal answered
            answered = True
            await send(message)

        self._in_progress += counted
        try:
            self._check(path, scope["method"], Headers(scope=scope))
            await self.app(scope, self._limited(receive), sending)
        except RefusedError as refusal:
            if answered:
                raise
            await _drain(receive)
            await _answer(send, refusal)
        except Exception:
            LOGGER.exception("an error while answering %s %s", scope["method"], scope["path"])
            if not answered:
                await _answer(send, RefusedError(500, "this is a fault of pgp, please report it with its log"))
        finally:
            self._in_progress -= counted

    def _check(self, path: str, method: str, headers: Headers) -> None:
        """Raise `RefusedError` unless the request may be carried out as far as its headers tell."""
        named = headers.getlist("host")
        host = named[0] if named else ""
        if self.hosts and (len(named) != 1 or _host_name(host) not in self.hosts):
            raise RefusedError(
                421, f"expected a request to one of {', '.join(sorted(self.hosts))}, got host {host!r:.80}"
            )
        origin = headers.get("origin")
        if origin is not None and method not in ("GET", "HEAD") and _netloc(origin) != host:
            raise RefusedError(403, f"expected a request from the page of this service, got one from {origin!r:.80}")
        if self._expected is not None and path not in self.open_paths:
            given = headers.get("authorization", "").encode("latin-1")
            if not hmac.compare_digest(given, self._expected):
                raise RefusedError(401, "expected the token of this service, as Authorization: Bearer TOKEN")
        if self._in_progress > self.limits.requests and path not in self.open_paths:
            raise RefusedError(503, f"{self.limits.requests} requests are being answered: try again in a moment")
        content_type = headers.get("content-type", "")
        if len(content_type) > LONGEST_CONTENT_TYPE:
            raise RefusedError(415, f"expected a content type of at most {LONGEST_CONTENT_TYPE:,} characters, got"
                               f" {len(content_type):,}")  # fmt: skip
        charset = _charset(content_type)
        if charset not in ("", "utf-8"):  # some of Python's decoders take quadratic time
            raise RefusedError(415, f"expected a form in UTF-8, got {charset!r:.80}")
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > self.limits.request_bytes:
            raise self._too_large()

    def _too_large(self) -> RefusedError:
        largest = f"{self.limits.request_bytes:,} bytes"
        return RefusedError(413, f"expected a request of at most {largest}: send fewer or smaller images at a time")

    def _limited(self, receive: Receive) -> Receive:
        """Return `receive` with a limit to the bytes of the body, and to the time that it takes."""
        loop, seconds = asyncio.get_running_loop(), self.limits.seconds
        deadline, size, complete = loop.time() + seconds, 0, False

        async def limited() -> Message:
            nonlocal size, complete
            if complete:  # what comes now is only the news that the client went away
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), max(0.0, deadline - loop.time()))
            except asyncio.TimeoutError:
                raise RefusedError(408, f"expected the whole request within {seconds:g} seconds") from None
            size += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if size > self.limits.request_bytes:
                raise self._too_large()
            return message

        return limited


async def _drain(receive: Receive) -> None:
    """Read on for a moment: a client that is still sending when the connection closes loses the answer."""

    async def read() -> None:
        while (message := await receive())["type"] == "http.request" and message.get("more_body"):
            pass

    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(read(), DRAIN_SECONDS)


async def _answer(send: Send, refusal: RefusedError) -> None:
    """Send a refusal as JSON, and close the connection, since the rest of the body is not read."""
    body = json.dumps({"error": refusal.message}).encode()
    headers = Headers(
        {
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
            "Connection": "close",
            **refusal.headers,
        }
    )
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers.raw})
    await send({"type": "http.response.body", "body": body})


def path_of(scope: Scope) -> str:
    """Return the path of a request within the application, which may be mounted in another one.

    >>> path_of({"path": "/pgp/health", "root_path": "/pgp"}), path_of({"path": "/health"})
    ('/health', '/health')
    """
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


def _host_name(host: str) -> str:
    """Return the name in a `Host` header, without the port.

    >>> _host_name("localhost:8000"), _host_name("[::1]:8000"), _host_name("")
    ('localhost', '::1', '')
    """
    with contextlib.suppress(ValueError):
        parts = urlsplit(f"//{host}")
        return (parts.hostname or "") if parts.username is None else ""
    return ""


def _netloc(origin: str) -> str:
    """Return host and port of an origin; "" if there are none."""
    with contextlib.suppress(ValueError):
        return urlsplit(origin).netloc
    return ""


def _charset(content_type: str) -> str:
    """Return the encoding in which Starlette reads a form of a content type, in lower case; "" if it names none.

    >>> _charset('multipart/form-data; boundary=x; charset="UTF-8"'), _charset("text/plain")
    ('utf-8', '')
    """
    _, parameters = parse_options_header(content_type)  # Starlette's parser: others find other parameters
    return parameters.get(b"charset", b"").decode("latin-1").lower()
