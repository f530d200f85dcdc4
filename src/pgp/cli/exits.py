"""Exit status and error message of a command. Every error ends a command here, with one line on standard error."""

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

from pgp import distributed
from pgp.cli import show
from pgp.system import escaping, platforms, signals
from pgp.system.storage import RunError

LOST = re.compile("closed by peer|reset by peer|gloo|NCCL")
"""Pattern for errors of torch that mean that another process of the run ended."""

NO_MEMORY = re.compile("can't allocate memory|out of memory|CUBLAS_STATUS_ALLOC_FAILED")
"""Pattern for errors of torch that mean that the memory of the machine, or of a CUDA or Apple GPU, ran out."""


def exit_status(work: Callable[[], None]) -> None:
    """Run a command. Any error ends in one line on standard error, and in the exit status that `pgp --help` states."""
    _prepare_streams()
    try:
        with warnings.catch_warnings(), signals.handled_by(signals.end_at_once):
            warnings.showwarning = show.warn
            warnings.filterwarnings("ignore", module="PIL")  # warnings about metadata; an unreadable image is an error
            try:
                work()
            finally:
                if sys.stdout is not None:
                    sys.stdout.flush()  # flush here, because an error at the interpreter's exit cannot be handled
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
    """End with the exit status of a signal. Child processes print nothing."""
    number = error.number if isinstance(error, signals.Interrupted) else signal.SIGINT
    if distributed.is_child_process():
        sys.exit(0 if isinstance(error, signals.Interrupted) and error.agreed else 128 + number)
    _stop(str(error) or signals.describe(number), 128 + number)


def _interrupt_before(error: BaseException) -> KeyboardInterrupt | None:
    """Return the interrupt during which an error was raised, such as an error in writing to a closed terminal."""
    earlier = error.__context__
    if earlier is None or isinstance(earlier, KeyboardInterrupt):
        return earlier
    return _interrupt_before(earlier)


def _prepare_streams() -> None:
    """Make the standard streams replace characters that they cannot encode, and buffer only single lines."""
    codecs.register_error("pgp", escaping.encode_error)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="pgp", line_buffering=True)


def _leave_quietly() -> NoReturn:
    """End silently after the reader of the output has closed it, as `head` does."""
    with contextlib.suppress(OSError, ValueError):  # discard buffered output, so that flushing raises no error
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (sys.stdout, sys.stderr):
            os.dup2(nowhere, stream.fileno())
    sys.exit(141)


def _explained(error: Exception) -> tuple[str, int]:
    """Return the message of an error for the user, and the exit status."""
    message = str(error) or type(error).__name__
    if isinstance(error, RuntimeError) and distributed.is_distributed() and LOST.search(message):
        return "another process of this run ended while this one waited for it; its message is above", 2
    if isinstance(error, RecursionError):
        return f"expected data of a few levels, got something nested too deeply ({message})", 2
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and NO_MEMORY.search(message)):
        return "memory ran out: try a smaller --micro-batch-size, --eval-batch-size or --batch-size", 2
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}", 2
    if isinstance(error, (ValueError, RunError, OSError)):
        return message, 2
    return f"this is a fault of pgp, please report it: {type(error).__name__}: {message}; PGP_DEBUG=1 shows where", 70


def _stop(message: str, code: int) -> NoReturn:
    """Print a message and end the command."""
    with contextlib.suppress(OSError):  # standard error may be closed
        show.print_note(message)
    sys.exit(code)
