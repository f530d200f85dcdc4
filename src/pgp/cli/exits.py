"""The one place where errors end a command: each in a line, with an exit status that says what kind it is."""

from __future__ import annotations

import codecs
import contextlib
import io
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable
from typing import NoReturn

import torch

from pgp import distributed
from pgp.cli import show
from pgp.system import escaping, platforms, signals
from pgp.system.storage import RunError

LOST = re.compile("closed by peer|reset by peer|gloo|NCCL")
"""What errors of torch say where another process of a run ended."""


def exit_status(work: Callable[[], None]) -> None:
    """Run a command. Any error ends in one line on standard error, and in the exit status that `pgp --help` states."""
    _prepare_streams()
    try:
        with warnings.catch_warnings(), signals.handled_by(signals.end_at_once):
            warnings.showwarning = show.warn
            warnings.filterwarnings("ignore", module="PIL")  # of metadata; an image that cannot be read is an error
            try:
                work()
            finally:
                if sys.stdout is not None:
                    sys.stdout.flush()  # here, or an error of it would show at the end of the interpreter
    except KeyboardInterrupt as error:
        _end_interrupted(error)
    except Exception as error:
        if platforms.is_broken_pipe(error):
            _leave_quietly()
        if interrupted := _interrupt_before(error):
            _end_interrupted(interrupted)
        if os.environ.get("PGP_DEBUG"):
            raise
        message, code = _explained(error)
        _stop(message, code)


def _end_interrupted(error: KeyboardInterrupt) -> NoReturn:
    """End as a program that a signal ended, one of several processes in silence."""
    number = error.number if isinstance(error, signals.Interrupted) else signal.SIGINT
    if distributed.is_child_process():
        sys.exit(0 if isinstance(error, signals.Interrupted) and error.agreed else 128 + number)
    _stop(str(error) or signals.describe(number), 128 + number)


def _interrupt_before(error: BaseException) -> KeyboardInterrupt | None:
    """Return the interrupt while which an error was raised, such as that a terminal which was closed takes no text."""
    earlier = error.__context__
    if earlier is None or isinstance(earlier, KeyboardInterrupt):
        return earlier
    return _interrupt_before(earlier)


def _prepare_streams() -> None:
    """Let the standard streams replace what they cannot encode, and results leave line by line."""
    codecs.register_error("pgp", escaping.encode_error)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="pgp", line_buffering=True)


def _leave_quietly() -> NoReturn:
    """End as a program does whose reader went away, such as head when it has seen enough."""
    with contextlib.suppress(OSError, ValueError):  # what is left in a buffer goes nowhere, so that nothing complains
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (sys.stdout, sys.stderr):
            os.dup2(nowhere, stream.fileno())
    sys.exit(141)


def _explained(error: Exception) -> tuple[str, int]:
    """Return the message of an error for the user, and the exit status."""
    message = str(error) or type(error).__name__
    if isinstance(error, RuntimeError) and distributed.is_distributed() and LOST.search(message):
        return "another process of this run ended, which this one waited for: what it said stands above", 2
    if isinstance(error, RecursionError):
        return f"expected data of a few levels, got something nested too deeply ({message})", 2
    if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)) or "can't allocate memory" in message:
        return "memory ran out: try a smaller --micro-batch-size, --eval-batch-size or --batch-size", 2
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}", 2
    if isinstance(error, (ValueError, RunError, OSError)):
        return message, 2
    return f"this is a fault of pgp, please report it: {type(error).__name__}: {message}; PGP_DEBUG=1 shows where", 70


def _stop(message: str, code: int) -> NoReturn:
    """Say why the command ends, and end."""
    with contextlib.suppress(OSError):  # nobody may be there to hear it
        show.print_note(message)
    sys.exit(code)
