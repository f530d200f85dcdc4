"""The service as a process on a real socket."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from http.client import HTTPResponse

import pytest
import requests

pytestmark = pytest.mark.slow


@pytest.fixture
def run(quick_run):
    return quick_run


@pytest.fixture
def start(run):
    processes = []

    def start(*flags):
        command = [sys.executable, "-m", "pgp", "serve", str(run), "--port", "0", *flags]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        processes.append(process)
        return process, re.search(r"http://127\.0\.0\.1:[0-9]+", process.stdout.readline())[0]

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def uploads(paths):
    return [("files", (path.name, path.read_bytes())) for path in paths]


def test_slow_senders_do_not_stop_others(start, red):
    process, address = start("--timeout", "1")
    server = ("127.0.0.1", int(address.rpartition(":")[2]))
    with socket.create_connection(server, 20) as slow_body, socket.create_connection(server, 20) as slow_headers:
        slow_body.sendall(
            b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=x\r\n"
            b"Content-Length: 100000\r\n\r\n--x"
        )
        slow_headers.sendall(b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Le")
        assert requests.post(f"{address}/predict", files=uploads(red), timeout=20).status_code == 200
        with HTTPResponse(slow_body) as answer:  # headers and body may arrive separately
            answer.begin()
            assert answer.status == 408
            assert "expected the whole request within 1 seconds" in answer.read().decode()
        assert requests.get(f"{address}/health", timeout=20).json() == {"status": "ok"}
        assert slow_headers.recv(10) == b""  # the connection is closed
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130
    assert process.stderr.read().strip() == "pgp: interrupted"


def test_a_later_request_that_never_ends_is_dropped(start):
    _, address = start("--timeout", "1")
    with socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2])), 20) as connection:
        for _ in range(2):
            time.sleep(0.7)  # less than the limit for each request, but more for both
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            with HTTPResponse(connection) as answer:
                answer.begin()
                assert answer.read() == b'{"status":"ok"}'
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: loc")
        assert connection.recv(10) == b""  # the connection is closed


def test_a_body_that_is_too_large_is_answered(start):
    _, address = start("--max-megabytes", "1")
    answer = requests.post(f"{address}/predict", files=[("files", ("a.png", bytes(8_000_000)))], timeout=20)
    assert answer.status_code == 413
    assert "expected a request of at most 1,048,576 bytes" in answer.json()["error"]


def test_killed_while_it_is_taught(start, run, red):
    """The run is as it was; the service starts again, and learns the class."""
    process, address = start()
    before = (run / "checkpoints" / "latest").read_bytes()
    assert requests.post(f"{address}/teach", data={"name": "red"}, files=uploads(red), timeout=20).status_code == 202
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert (run / "checkpoints" / "latest").read_bytes() == before
    _, address = start()
    assert requests.post(f"{address}/teach", data={"name": "red"}, files=uploads(red), timeout=20).status_code == 202
    for _ in range(600):
        lesson = requests.get(f"{address}/teach", timeout=20).json()
        if lesson["state"] != "learning":
            break
        time.sleep(0.05)
    assert lesson["state"] == "finished", lesson
    assert len(list((run / "taught").iterdir())) == 1  # what was left of the first attempt is gone


def test_headers_without_end_are_refused(start):
    _, address = start()
    with socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2]))) as connection:
        connection.settimeout(20)
        connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + 200_000 * b"x")
        with HTTPResponse(connection) as answer:
            answer.begin()
            assert answer.status == 400


def is_dropped(connection):
    """Send requests as long as the service takes them; return whether it has closed the connection."""
    try:
        with contextlib.suppress(BlockingIOError):
            connection.send(100 * b"GET /page.js HTTP/1.1\r\nHost: localhost\r\n\r\n")
    except OSError:
        return True
    return False


def test_clients_that_do_not_read_are_dropped(start):
    _, address = start("--timeout", "1")
    server = ("127.0.0.1", int(address.rpartition(":")[2]))
    with contextlib.ExitStack() as stack:
        silent = {stack.enter_context(socket.create_connection(server, 20)) for _ in range(4)}
        for connection in silent:
            connection.setblocking(False)
        deadline = time.monotonic() + 20
        while silent and time.monotonic() < deadline:
            silent = {connection for connection in silent if not is_dropped(connection)}
            time.sleep(0.05)
        assert not silent
    assert requests.get(f"{address}/classes", timeout=20).status_code == 200
