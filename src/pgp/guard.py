"""The one place where errors end a command: each in a line, with an exit status that says what kind it is."""

from __future__ import annotations

import codecs
import contextlib
import io
import os
import sys
import warnings
from collections.abc import Callable

import torch

from pgp import display, escaping
from pgp.run import RunError


def guarded(work: Callable[[], None]) -> None:
    """Do the work of a command; whatever ends it, ends in one line and with the status that `pgp --help` tells."""
    _prepare_streams()
    try:
        with warnings.catch_warnings():
            warnings.showwarning = display.warn
            try:
                work()
            finally:
                if sys.stdout is not None:
                    sys.stdout.flush()  # here, or an error of it would show at the end of the interpreter
    except BrokenPipeError:
        _leave_quietly()
    except KeyboardInterrupt:
        _stop("interrupted; a sweep goes on by the same call, a run with a checkpoint by pgp train --resume RUN", 130)
    except Exception as error:
        if os.environ.get("PGP_DEBUG"):
            raise
        message, code = _explained(error)
        _stop(message, code)


def _prepare_streams() -> None:
    """Let the standard streams replace what they cannot encode, and results leave line by line."""
    codecs.register_error("pgp", escaping.encode_error)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="pgp", line_buffering=True)


def _leave_quietly() -> None:
    """End as a program does whose reader went away, such as head when it has seen enough."""
    with contextlib.suppress(OSError, ValueError):  # what is left in a buffer goes nowhere, so that nothing complains
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (sys.stdout, sys.stderr):
            os.dup2(nowhere, stream.fileno())
    sys.exit(141)


def _explained(error: Exception) -> tuple[str, int]:
    """What to tell a user of an error, and the status to end with."""
    message = str(error) or type(error).__name__
    if isinstance(error, RecursionError):
        return f"expected data of a few levels, got something nested too deeply ({message})", 2
    if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)) or "can't allocate memory" in message:
        return "memory ran out: try a smaller --part, --eval-batch-size or --batch-size", 2
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}", 2
    if isinstance(error, (ValueError, RunError, OSError)):
        return message, 2
    return f"this is a fault of pgp, please report it: {type(error).__name__}: {message}; PGP_DEBUG=1 shows where", 70


def _stop(message: str, code: int = 2) -> None:
    with contextlib.suppress(OSError):  # nobody may be there to hear it
        display.note(message)
    sys.exit(code)
