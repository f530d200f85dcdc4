"""A stand-in for the Hugging Face hub: the requests that its client makes to push and to pull a model."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from huggingface_hub import constants

TOKEN = "hf_stand_in"
INLINE = 10_000
"""Size in bytes from which files are uploaded as the hub's large files (LFS)."""


class Repository:
    """The commits of a repository: the files of each, by its hash."""

    def __init__(self, *, private: bool) -> None:
        self.private = private
        self.commits: dict[str, dict[str, bytes]] = {}
        self.tags: dict[str, str] = {}
        self.commit({".gitattributes": b"*.safetensors filter=lfs\n"})

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[self.head]

    def commit(self, files: dict[str, bytes], deleted: tuple[str, ...] = ()) -> str:
        old = dict(self.commits[self.head]) if self.commits else {}
        self.head = hashlib.sha1(f"{len(self.commits)} {sorted(files)}".encode()).hexdigest()
        self.commits[self.head] = {name: data for name, data in {**old, **files}.items() if name not in deleted}
        return self.head

    def resolve(self, revision: str) -> str | None:
        revision = self.head if revision == "main" else self.tags.get(revision, revision)
        return revision if revision in self.commits else None


class Hub:
    """The state of the hub, and how it misbehaves."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.sent = bytearray()
        """The bodies of all requests that wrote something."""
        self.metadata: dict[str, Any] = {}
        """The metadata of the latest card, which the hub checks before a commit."""
        self.status: dict[str, int] = {}
        """Status with which requests are refused, by a part of their path."""
        self.cut: str | None = None
        """Part of the path of requests whose answer ends in the middle."""
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": self}))
        self.address = f"http://127.0.0.1:{self.server.server_port}"

    def paths(self) -> list[str]:
        return [line.split("?")[0] for line in self.requests]


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # one packet for an answer: the client would wait 40 ms for a second
    disable_nagle_algorithm = True

    def log_message(self, *_: object) -> None:
        pass

    def reply(self, value: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        cut = self.hub.cut is not None and self.hub.cut in self.path and self.command == "GET"
        self.send_response(status)
        for name, text in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if cut else data)
        if cut:
            self.close_connection = True

    def refuse(self, status: int, code: str = "", message: str = "refused") -> None:
        self.reply({"error": message}, status, {"X-Error-Code": code, "X-Error-Message": message})

    def handle_request(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {self.path}")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b"".join(self.chunks())
        self.hub.sent += body
        for part, status in self.hub.status.items():
            if part in path:
                return self.refuse(status)
        for method, pattern, answer in ROUTES:
            if method in (self.command, "GET" if self.command == "HEAD" else "") and (
                found := re.fullmatch(pattern, path)
            ):
                return answer(self, body, *found.groups())
        return self.refuse(404, "", f"the stand-in knows no {self.command} {path}")

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_request  # noqa: N815

    def chunks(self) -> Iterator[bytes]:
        while size := int(self.rfile.readline(), 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    @property
    def authorized(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def visible(self, name: str) -> Repository | None:
        """The repository, unless it is missing or may not be seen: then the request is refused."""
        found = self.hub.repositories.get(name)
        if found is None or (found.private and not self.authorized):
            self.refuse(404 if self.authorized else 401, "RepoNotFound", "Repository not found")
            return None
        return found

    def create(self, body: bytes) -> None:
        if not self.authorized:
            return self.refuse(401, "", "Invalid username or password.")
        wanted = json.loads(body)
        name = f"{wanted['organization']}/{wanted['name']}" if wanted.get("organization") else wanted["name"]
        if name in self.hub.repositories:
            return self.reply(
                {"error": "You already created this model repo", "url": f"{self.hub.address}/{name}"}, 409
            )
        private = bool(wanted.get("private")) or wanted.get("visibility") == "private"
        self.hub.repositories[name] = Repository(private=private)
        return self.reply({"url": f"{self.hub.address}/{name}", "name": name, "id": name})

    def describe(self, _: bytes, name: str, revision: str = "main") -> None:
        if (repository := self.visible(name)) is None:
            return None
        if (commit := repository.resolve(revision)) is None:
            return self.refuse(404, "RevisionNotFound", "Invalid rev id")
        siblings = [{"rfilename": path, "size": len(data)} for path, data in repository.commits[commit].items()]
        return self.reply({"id": name, "modelId": name, "sha": commit, "private": repository.private,
                           "siblings": siblings, "tags": [], "downloads": 0, "likes": 0})  # fmt: skip

    def download(self, _: bytes, name: str, revision: str, path: str) -> None:
        if (repository := self.visible(name)) is None:
            return None
        commit = repository.resolve(revision)
        data = repository.commits[commit].get(path) if commit else None
        if commit is None or data is None:
            return self.refuse(404, "EntryNotFound" if commit else "RevisionNotFound", "not found")
        tag = hashlib.sha256(data).hexdigest()
        return self.reply(data, headers={"ETag": f'"{tag}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"})

    def validate(self, body: bytes) -> None:
        _, block, _ = json.loads(body)["content"].split("---\n", 2)
        self.hub.metadata = yaml.safe_load(block)
        return self.reply({"errors": [], "warnings": []})

    def preupload(self, body: bytes, name: str, _: str) -> None:
        if self.visible(name) is None:
            return None
        files = [
            {"path": file["path"], "uploadMode": "lfs" if file["size"] > INLINE else "regular", "shouldIgnore": False}
            for file in json.loads(body)["files"]
        ]
        return self.reply({"files": files})

    def large_files(self, body: bytes, name: str) -> None:
        objects = []
        for file in json.loads(body)["objects"]:
            action = {"upload": {"href": f"{self.hub.address}/store/{file['oid']}", "header": {}}}
            objects.append(file if file["oid"] in self.hub.large else {**file, "actions": action})
        return self.reply({"transfer": "basic", "objects": objects})

    def store(self, body: bytes, digest: str) -> None:
        assert hashlib.sha256(body).hexdigest() == digest
        self.hub.large[digest] = body
        return self.reply(b"")

    def commit(self, body: bytes, name: str, _: str) -> None:
        if (repository := self.visible(name)) is None:
            return None
        files, deleted, parent = {}, [], repository.head
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                parent = value.get("parentCommit") or parent
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
                self.hub.sent += files[value["path"]]
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
            elif entry["key"] == "deletedFile":
                deleted.append(value["path"])
        if parent != repository.head:
            return self.refuse(412, "", "A commit has happened since")
        commit = repository.commit(files, tuple(deleted))
        return self.reply(
            {"success": True, "commitOid": commit, "commitUrl": f"{self.hub.address}/{name}/commit/{commit}"}
        )


NAME = r"([^/]+/[^/]+)"
ROUTES = (
    ("POST", "/api/repos/create", Handler.create),
    ("POST", "/api/validate-yaml", Handler.validate),
    ("GET", f"/api/models/{NAME}", Handler.describe),
    ("GET", rf"/api/models/{NAME}/revision/(.+)", Handler.describe),
    ("GET", rf"/{NAME}/resolve/([^/]+)/(.+)", Handler.download),
    ("POST", rf"/api/models/{NAME}/preupload/(.+)", Handler.preupload),
    ("POST", rf"/{NAME}\.git/info/lfs/objects/batch", Handler.large_files),
    ("PUT", "/store/([0-9a-f]+)", Handler.store),
    ("POST", rf"/api/models/{NAME}/commit/(.+)", Handler.commit),
)


@contextmanager
def running() -> Iterator[Hub]:
    hub = Hub()
    thread = threading.Thread(target=hub.server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        hub.server.shutdown()
        thread.join()
        hub.server.server_close()


@contextmanager
def connected(cache: Path) -> Iterator[Hub]:
    """A hub to which the client of this process talks, with a cache of its own and without waiting between tries."""
    with running() as hub, pytest.MonkeyPatch.context() as patch:
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, hub.address)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        patch.setattr(constants, "ENDPOINT", hub.address)
        patch.setattr(constants, "HF_HOME", str(cache))
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True, raising=False)
        patch.setenv("HF_TOKEN", TOKEN)
        patch.setattr("time.sleep", lambda seconds: None)
        yield hub


if __name__ == "__main__":
    with running() as hub:
        print(f"HF_ENDPOINT={hub.address} HF_TOKEN={TOKEN} HF_HUB_DISABLE_XET=1", flush=True)  # noqa: T201
        threading.Event().wait()
