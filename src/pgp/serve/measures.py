"""What a service counts and times, in the format of Prometheus."""

from __future__ import annotations

import time
from collections.abc import Collection

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pgp.serve.limits import path_of


class Measures:
    """Counters of one service."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        self.requests = Counter("pgp_requests", "Requests that were answered.", ("path", "status"), registry=registry)
        self.seconds = Histogram("pgp_request_seconds", "Seconds from request to answer.", ("path",), registry=registry)
        self.images = Counter(
            "pgp_images", "Images: classified, unknown or unreadable.", ("result",), registry=registry
        )
        self.batches = Histogram(
            "pgp_batch_images",
            "Images that the encoder took at a time.",
            registry=registry,
            buckets=(1, 2, 4, 8, 16, 32, 64, 128),
        )
        self.waiting = Gauge("pgp_waiting_images", "Images that wait to be classified.", registry=registry)
        self.classes = Gauge("pgp_classes", "Classes that are learned.", registry=registry)
        self.loads = Counter("pgp_checkpoint_loads", "Checkpoints that replaced an older one.", registry=registry)

    def text(self) -> bytes:
        """Return all values as Prometheus reads them."""
        return generate_latest(self._registry)


class Measured:
    """Middleware that counts and times answers, and adds headers to them.

    Args:
        app: The application that answers what is passed on.
        measures: Where to count.
        paths: Paths that are counted by name; all others are counted as `other`.
        headers: Headers of every answer.
    """

    def __init__(self, app: ASGIApp, measures: Measures, paths: Collection[str], headers: dict[str, str]) -> None:
        self.app, self.measures, self.paths = app, measures, frozenset(paths)
        self.headers = [(name.lower().encode(), value.encode()) for name, value in headers.items()]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and measure its answer."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.perf_counter(), "500"

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
                message["headers"] = [*message.get("headers", ()), *self.headers]
            await send(message)

        try:
            await self.app(scope, receive, sending)
        finally:
            path = path_of(scope) if path_of(scope) in self.paths else "other"
            self.measures.requests.labels(path, status).inc()
            self.measures.seconds.labels(path).observe(time.perf_counter() - started)
