"""Ctrl-C and the signals that ask a program to end, such as SIGTERM: at once, or after the current training step."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator

from pgp import distributed
from pgp.system import platforms

STOPPING = "\npgp: stopping after this step, or after the evaluation of this task; a second signal ends at once\n"


class Interrupted(KeyboardInterrupt):
    """A signal asked the program to end. The message says what was done and how to resume."""

    def __init__(self, number: int, message: str = "", *, agreed: bool = False) -> None:
        super().__init__(number, message)
        self.number, self.message = number, message
        self.agreed = agreed
        """Whether all processes of the run agreed to stop at the same step."""

    def __str__(self) -> str:
        return self.message


def describe(number: int) -> str:
    """Return a description of a signal.

    >>> describe(signal.SIGINT), describe(signal.SIGTERM)
    ('interrupted', 'stopped by SIGTERM')
    """
    return "interrupted" if number == signal.SIGINT else f"stopped by {signal.Signals(number).name}"


class _Handler:
    """A signal handler of pgp, which can be distinguished from those of other libraries."""

    def __init__(self, act: Callable[[int], None]) -> None:
        self.act = act

    def __call__(self, number: int, frame: object) -> None:
        self.act(number)


@contextlib.contextmanager
def handled_by(act: Callable[[int], None]) -> Iterator[None]:
    """Call `act` with the signal number if a signal asks the program to end inside the `with` block.

    Signals that are ignored (`nohup`), or that somebody else handles, are left alone. So are all of them in another
    thread than the main one, which alone can handle signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [signal.SIGINT, *platforms.ending_signals()]
    before = {number: signal.getsignal(number) for number in numbers}
    ours = (signal.SIG_DFL, signal.default_int_handler)
    taken = {number: old for number, old in before.items() if old in ours or isinstance(old, _Handler)}
    try:
        for number in taken:
            signal.signal(number, _Handler(act))
        yield
    finally:
        for number, old in taken.items():
            signal.signal(number, old)


def end_at_once(number: int) -> None:
    """Raise `Interrupted`. This is a signal handler."""
    raise Interrupted(number)


class StopRequest:
    """A signal handler that records the first signal, and ends the program at the second."""

    def __init__(self) -> None:
        self.number: int | None = None
        """The first signal, or None if there was none."""

    def __call__(self, number: int) -> None:
        """Handle a signal."""
        if self.number is not None:
            raise Interrupted(number)
        self.number = number
        if not distributed.is_child_process() and multiprocessing.parent_process() is None:
            with contextlib.suppress(OSError):
                os.write(2, STOPPING.encode())  # print is not safe in a signal handler
