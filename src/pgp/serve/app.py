"""The web service of a run: routes, and the program that listens."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import socket
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, TypeVar

import python_multipart  # noqa: F401  (FastAPI needs it to read uploaded files)
import uvicorn
from fastapi import Depends, FastAPI, File, Form, Query, Request, Response, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from fastapi.security import HTTPBearer
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from torch import Tensor
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

from pgp import __version__
from pgp.datasets.base import BadImageError
from pgp.datasets.decode import num_pixels
from pgp.datasets.files import read_image
from pgp.predict import Prediction
from pgp.serve.batching import Batcher
from pgp.serve.limits import NOT_STARTED, Guard, Limits, RefusedError, is_loopback
from pgp.serve.measures import Measured, Measures
from pgp.serve.model import Model, Snapshot
from pgp.serve.teaching import Teacher
from pgp.system.paths import StrPath, as_path
from pgp.system.storage import RunError

T = TypeVar("T")

POLL_SECONDS = 1.0
"""Seconds between two looks for a new checkpoint."""
MOST_SCANS = 100
"""Maximum number of scans of a JPEG file; ordinary ones have up to twelve. Each takes time for all pixels, even if it
has few bytes."""
JPEG, START_OF_SCAN = b"\xff\xd8", b"\xff\xda"
PAGE = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
"""Files of the page by path, with their types."""
OPEN_PATHS = (*PAGE, "/health", "/openapi.json")
"""Paths that need no token. They tell nothing of the run."""
SECURITY_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:;"
    " connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


class Service:
    """A run, and everything that its routes share.

    Args:
        folder: The run folder.
        readout: Name of one of the run's readouts. If None, the first.
        device: Name of the device; see `pgp.Predictor`.
        limits: What is accepted.
    """

    def __init__(self, folder: Path, readout: str | None, device: str | None, limits: Limits) -> None:
        self.limits, self.measures = limits, Measures()
        self.model = Model(folder, readout, device)
        self.teacher = Teacher(folder, self.refresh, device)
        self.batcher: Batcher[Tensor, tuple[Prediction, Snapshot]] = Batcher(
            self.model.predict, limits.batch_size, limits.waiting_images, self.measures.batches.observe
        )
        self._decoders: ThreadPoolExecutor | None = None
        self.measures.waiting.set_function(lambda: len(self.batcher))
        self.measures.classes.set_function(lambda: len(self.model.snapshot.predictor.classes))

    def refresh(self) -> None:
        """Use the latest checkpoint of the run."""
        if self.model.refresh():
            self.measures.loads.inc()

    @contextlib.asynccontextmanager
    async def running(self, app: FastAPI) -> AsyncIterator[None]:
        """Decode, compute batches and look for new checkpoints within the block."""
        self._decoders = decoders = ThreadPoolExecutor(self.limits.decoders, "decoding")
        self.teacher.start()
        tasks = [asyncio.create_task(self.batcher.run()), asyncio.create_task(self._watch())]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.to_thread(self.teacher.close)
            self._decoders = None
            decoders.shutdown(wait=False, cancel_futures=True)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(POLL_SECONDS)
            await asyncio.to_thread(self.refresh)

    def read(self, content: bytes, name: str) -> Tensor:
        """Return an uploaded image `(3, H, W)` uint8.

        Raises:
            BadImageError: If it cannot be read, or would take too much memory or time.
        """
        scans = content.count(START_OF_SCAN) if content.startswith(JPEG) else 0
        if scans > MOST_SCANS:
            raise BadImageError(f"cannot read the image {name}: expected at most {MOST_SCANS} scans, got {scans:,}")
        pixels = num_pixels(content)
        if pixels is not None and pixels > self.limits.pixels:
            raise BadImageError(f"cannot read the image {name}: expected at most {self.limits.pixels:,} pixels, got"
                                f" {'far more' if pixels == sys.maxsize else f'{pixels:,}'}")  # fmt: skip
        return read_image(Path(name), content)

    async def decode(self, file: UploadFile, use: Callable[[Tensor], T]) -> T | str:
        """Return `use` of an uploaded image, or what is wrong with the image. Few are decoded at the same time."""

        def work() -> T:
            file.file.seek(0)
            return use(self.read(file.file.read(), file.filename or "image"))

        if self._decoders is None:
            raise RefusedError(503, NOT_STARTED)
        try:
            return await asyncio.get_running_loop().run_in_executor(self._decoders, work)
        except BadImageError as error:
            return str(error)

    async def preprocess(self, file: UploadFile) -> Tensor | str:
        """Return an uploaded image `(3, S, S)` as the encoder takes it, or what is wrong with it."""
        image = await self.decode(file, lambda image: self.model.snapshot.predictor.preprocess([image])[0])
        if isinstance(image, str):
            self.measures.images.labels("unreadable").inc()
        return image

    async def readable(self, files: Sequence[UploadFile]) -> tuple[list[bytes], list[str]]:
        """Return the content of the files that are images, and what is wrong with the others."""
        contents, problems = [], []
        for file in files:
            if problem := await self.decode(file, lambda image: None):
                problems.append(problem)
            else:
                await file.seek(0)
                contents.append(await file.read())
        return contents, problems

    async def classify(self, files: Sequence[UploadFile], top: int) -> list[dict[str, Any]]:
        """Return an answer for each file, as JSON values."""
        if len(self.batcher) + len(files) > self.limits.waiting_images:  # before they are decoded
            raise RefusedError(503, f"{len(self.batcher):,} images wait already: try again in a moment")

        async def work() -> tuple[list[Tensor | str], Iterator[tuple[Prediction, Snapshot]]]:
            images = await asyncio.gather(*map(self.preprocess, files))
            readable = [image for image in images if not isinstance(image, str)]
            return images, iter(await self.batcher.submit(readable))

        images, results = await asyncio.wait_for(work(), self.limits.seconds)
        answers = []
        for file, image in zip(files, images, strict=True):
            answer: dict[str, Any] = {"file": file.filename}
            if isinstance(image, str):
                answer["error"] = image
            else:
                prediction, snapshot = next(results)
                self.measures.images.labels("unknown" if prediction.unknown else "classified").inc()
                best = zip(prediction.names[:top], prediction.probabilities[:top], strict=True)
                answer["checkpoint"] = snapshot.version[0]
                answer["unknown"] = prediction.unknown if snapshot.reject is not None else None
                answer["classes"] = [{"name": name, "probability": probability} for name, probability in best]
            answers.append(answer)
        return answers


def build_app(
    run: StrPath,
    readout: str | None = None,
    device: str | None = None,
    *,
    limits: Limits | None = None,
    token: str | None = None,
    hosts: Sequence[str] = (),
) -> FastAPI:
    """Return the web service of a run as an ASGI application, for a server of your own.

    The server must run its lifespan, which starts the threads that classify. Starlette and FastAPI do not run that of
    an application which is mounted in another one: let the lifespan of the other one enter
    `app.router.lifespan_context(app)`.

    Args:
        run: The run folder.
        readout: Name of one of the run's readouts. If None, the first.
        device: Name of the device; see `pgp.Predictor`.
        limits: What is accepted. If None, the defaults.
        token: Token that requests must carry as `Authorization: Bearer TOKEN`. If None, none.
        hosts: Names that requests may give as their host. If empty, any.

    Raises:
        RunError: If no task of the run is finished.
        ValueError: If the run has no such readout, or the machine no such device.
    """
    if token is not None and not (token.isascii() and token.isprintable() and token and " " not in token):
        raise ValueError("expected a token of visible ASCII characters, without blanks: others cannot be in a header of"
                         " HTTP")  # fmt: skip
    limits = limits or Limits()
    service = Service(as_path(run, "a run folder"), readout, device, limits)
    app = FastAPI(
        title="prompt-gradient-projection",
        version=__version__,
        summary="Classify images with a finished run, and teach it classes.",
        lifespan=service.running,
        responses={"4XX": {"model": Error}, "5XX": {"model": Error}},
        dependencies=[Depends(HTTPBearer(auto_error=False))] if token else [],  # `Guard` checks it; this describes it
        redirect_slashes=False,
        docs_url=None,  # these pages load scripts from elsewhere
        redoc_url=None,
    )
    app.state.service = service
    _add_prediction(app, service)
    _add_knowledge(app, service.model, limits)
    _add_teaching(app, service)
    _add_health(app, service)
    _add_page(app)
    _add_errors(app)
    app.add_middleware(Guard, limits=limits, token=token, hosts=hosts, open_paths=OPEN_PATHS)
    paths = {getattr(route, "path", "") for route in app.routes}
    app.add_middleware(Measured, measures=service.measures, paths=paths, headers=SECURITY_HEADERS)
    return app


def _add_prediction(app: FastAPI, service: Service) -> None:
    @app.post("/predict")
    async def predict(
        files: Annotated[list[UploadFile], File(description="Images.")],
        top: Annotated[int, Query(ge=1, le=1000, description="Number of classes, the most probable first.")] = 5,
    ) -> JSONResponse:
        """Classify images among all classes learned so far.

        The answer has one entry for each file: its classes with probabilities, whether it is unlike all classes, and
        the checkpoint that was used; or an error. If no file can be read, the status is 400.
        """
        if len(files) > service.limits.files:
            raise RefusedError(413, f"expected at most {service.limits.files} images at a time, got {len(files)}")
        answers = await service.classify(files, top)
        status = 400 if all("error" in answer for answer in answers) else 200
        content: dict[str, Any] = {"predictions": answers}
        if status == 400:
            content["error"] = answers[0]["error"]
        return JSONResponse(content, status)


def _add_knowledge(app: FastAPI, model: Model, limits: Limits) -> None:
    @app.get("/classes")
    def classes() -> dict[str, Any]:
        """Return the learned classes, and what they were learned from; the latest first."""
        snapshot = model.snapshot
        return {
            "run": model.folder.absolute().name,
            "checkpoint": snapshot.version[0],
            "readout": snapshot.predictor.readout,
            "detects_unknown": snapshot.reject is not None,
            "can_undo": snapshot.can_undo,
            "most_files": limits.files,
            "problem": model.problem,
            "classes": snapshot.learned_classes(),
            "tasks": snapshot.learned_tasks(),
        }

    @app.get("/accuracy")
    def accuracy() -> dict[str, Any]:
        """Return the accuracy on the test images of each task after each task, by readout; null if not measured.

        Entry `[i][j]` is the accuracy on task `j` after task `i`, in [0, 1], among all classes learned by then; or, if
        `task_given`, among the classes of the image's own task, which `/predict` does not know.
        """
        snapshot = model.snapshot
        n = snapshot.finished
        return {
            "readout": snapshot.predictor.readout,
            "task_given": snapshot.task_given,
            "tasks": [task["name"] for task in reversed(snapshot.learned_tasks())],
            "accuracy": {
                column: [[None if value != value else value for value in row[:n]] for row in matrix[:n].tolist()]
                for column, matrix in snapshot.matrices.items()
            },
        }


def _add_teaching(app: FastAPI, service: Service) -> None:
    teacher, limits = service.teacher, service.limits
    reading = asyncio.Lock()

    @app.post("/teach", status_code=202)
    async def teach(
        name: Annotated[str, Form(description="Name of the class.")],
        files: Annotated[list[UploadFile], File(description="Images of the class.")],
    ) -> dict[str, Any]:
        """Begin to teach a new class; `GET /teach` tells how far it is. Old images are not needed.

        Images that cannot be read are left out, and listed in `skipped`.
        """
        if len(files) > limits.teaching_files:
            raise RefusedError(413, f"expected at most {limits.teaching_files} images of a class, got {len(files)}")
        async with reading:  # photos of one request at a time are in memory
            await asyncio.to_thread(teacher.check, name)  # before they are decoded
            photos, skipped = await asyncio.wait_for(service.readable(files), limits.seconds)
            if not photos:
                raise RefusedError(400, f"expected images of the class, but none can be read: {skipped[0]}")
            lesson = await asyncio.to_thread(teacher.teach, name, photos)
        return {**lesson.to_json(), "skipped": skipped}

    @app.get("/teach")
    def lesson() -> dict[str, Any]:
        """Return how far the class is that is being taught, or how teaching the last one ended."""
        return teacher.lesson.to_json() if teacher.lesson else {"state": "none"}

    @app.post("/undo")
    def undo(
        name: Annotated[str, Form(description="One of the classes that were added last.")],
    ) -> dict[str, list[str]]:
        """Forget the classes that were added last. The run is again as it was before."""
        return {"forgot": teacher.undo(name)}


def _add_health(app: FastAPI, service: Service) -> None:
    @app.head("/health", include_in_schema=False)
    @app.get("/health")
    def health() -> dict[str, str]:
        """Return "ok", or "degraded" if an older checkpoint is used; the entry `problem` of `/classes` says why."""
        return {"status": "degraded" if service.model.problem else "ok"}

    @app.get("/metrics", response_class=PlainTextResponse)
    def metrics() -> Response:
        """Return counts and times in the format of Prometheus."""
        return Response(service.measures.text(), media_type="text/plain; version=0.0.4")


def _add_page(app: FastAPI) -> None:
    folder = resources.files("pgp.serve") / "page"

    def route(content: bytes, kind: str) -> Callable[[], Response]:
        return lambda: Response(content, media_type=kind)

    for path, (file, kind) in PAGE.items():
        app.api_route(path, methods=["GET", "HEAD"], include_in_schema=False)(route((folder / file).read_bytes(), kind))


def _add_errors(app: FastAPI) -> None:
    """Answer every error as JSON with the entry `error`."""

    @app.exception_handler(RefusedError)
    async def refused(request: Request, error: RefusedError) -> JSONResponse:
        return JSONResponse({"error": error.message}, error.status, error.headers)

    @app.exception_handler(RunError)
    async def run_error(request: Request, error: RunError) -> JSONResponse:
        return JSONResponse({"error": str(error)}, 507 if _disk_is_full(error) else 409)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        if isinstance(error.__cause__, RefusedError):  # raised while the body was parsed
            return await refused(request, error.__cause__)
        if _disk_is_full(error):
            return JSONResponse({"error": "the disk for uploaded files is full: make room"}, 507)
        return JSONResponse({"error": str(error.detail)}, error.status_code, error.headers)

    @app.exception_handler(asyncio.TimeoutError)
    async def too_late(request: Request, error: asyncio.TimeoutError) -> JSONResponse:
        return JSONResponse({"error": "the service is too busy: try again in a moment"}, 503, {"Retry-After": "5"})

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> JSONResponse:
        found = [f"{'.'.join(map(str, one['loc'][1:]))}: {one['msg']}" for one in error.errors()]
        return JSONResponse({"error": f"expected a request as /openapi.json describes it, got {'; '.join(found)}"}, 422)


def _disk_is_full(error: BaseException | None) -> bool:
    """Return whether an error has a full disk as its cause."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        error = error.__cause__ or error.__context__
    return False


class Error(BaseModel):
    """The answer to a request that is not carried out."""

    error: str


def serve(
    run: StrPath,
    host: str = "127.0.0.1",
    port: int = 8000,
    readout: str | None = None,
    device: str | None = None,
    *,
    limits: Limits | None = None,
    token: str | None = None,
    announce: Callable[[str], None] = lambda address: None,
) -> None:
    """Serve a run until a signal ends it.

    Args:
        run: The run folder.
        host: Address to listen at.
        port: Port to listen at; 0 takes a free one.
        readout: Name of one of the run's readouts. If None, the first.
        device: Name of the device; see `pgp.Predictor`.
        limits: What is accepted. If None, the defaults.
        token: Token that requests must carry. It is needed if `host` can be reached from other machines.
        announce: Called with the address of the page when the service listens.

    Raises:
        RunError: If no task of the run is finished.
        ValueError: If an argument is wrong, a token is missing, or the port is taken.
    """
    if not is_loopback(host) and not token:
        raise ValueError(f"expected a token, because other machines can reach {host}: set PGP_TOKEN, or listen at"
                         " 127.0.0.1")  # fmt: skip
    limits = limits or Limits()
    hosts = ("localhost", "127.0.0.1", "::1", host) if is_loopback(host) else ()
    app = build_app(run, readout, device, limits=limits, token=token, hosts=hosts)
    listening = _listen(host, port)
    with listening:
        shown = f"[{host}]" if ":" in host else host
        announce(f"http://{shown}:{listening.getsockname()[1]}")
        settings = uvicorn.Config(
            app,
            http=functools.partial(_Protocol, limits.seconds),  # type: ignore[arg-type]
            log_level="warning",
            access_log=False,
            server_header=False,
            ws="none",
            timeout_keep_alive=10,
            timeout_graceful_shutdown=10,
        )
        uvicorn.Server(settings).run(sockets=[listening])


class _Protocol(H11Protocol):
    """HTTP 1.1 that closes connections on which the next request does not begin in time, or the answer is not read.

    The headers of a request are limited to 64 KB.
    """

    def __init__(self, seconds: float, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self._seconds = seconds
        self._unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Begin to wait for a request."""
        super().connection_made(transport)
        self._timer = self.loop.call_later(self._seconds, self._close_if_silent)

    def pause_writing(self) -> None:
        """Begin to wait for the client to read what was sent."""
        super().pause_writing()
        self._unread = self.loop.call_later(self._seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """Go on sending."""
        super().resume_writing()
        if self._unread:
            self._unread.cancel()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop waiting."""
        super().connection_lost(exc)
        self._timer.cancel()
        if self._unread:
            self._unread.cancel()

    def on_response_complete(self) -> None:
        """Begin to wait for the next request."""
        super().on_response_complete()
        self._timer.cancel()
        self._timer = self.loop.call_later(self._seconds, self._close_if_silent)

    def _close_if_silent(self) -> None:
        cycle: RequestResponseCycle | None = self.cycle  # None before the first request, in spite of its type
        if (cycle is None or cycle.response_complete) and not self.transport.is_closing():
            self.transport.close()


def _listen(host: str, port: int) -> socket.socket:
    if not 0 <= port < 2**16:
        raise ValueError(f"expected a port from 0 to 65535, got {port}")
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=256)
    except OSError as error:
        reason = (error.strerror or str(error)).partition(" (while")[0]
        raise ValueError(f"cannot listen at {host} port {port}: {reason}; name another --port, or --port 0 for a free"
                         " one") from error  # fmt: skip
