"""Ctrl-C and the signals that ask a program to end, such as SIGTERM: at once, or after the training step at hand."""

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
    """A signal asks the program to end; the message says where it stands and how to go on."""

    def __init__(self, number: int, message: str = "", *, agreed: bool = False) -> None:
        super().__init__(number, message)
        self.number, self.message = number, message
        self.agreed = agreed
        """Whether all processes of a run stop together."""

    def __str__(self) -> str:
        return self.message


def describe(number: int) -> str:
    """Return a signal in words.

    >>> describe(signal.SIGINT), describe(signal.SIGTERM)
    ('interrupted', 'stopped by SIGTERM')
    """
    return "interrupted" if number == signal.SIGINT else f"stopped by {signal.Signals(number).name}"


class _Handler:
    """A signal handler of ours, to be told from those of others."""

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
    """Raise `Interrupted`; a handler."""
    raise Interrupted(number)


class StopRequest:
    """A handler that remembers the first signal and ends at once by the second."""

    def __init__(self) -> None:
        self.number: int | None = None
        """The first signal; None if there was none."""

    def __call__(self, number: int) -> None:
        """Take a signal."""
        if self.number is not None:
            raise Interrupted(number)
        self.number = number
        if not distributed.is_child_process() and multiprocessing.parent_process() is None:
            with contextlib.suppress(OSError):
                os.write(2, STOPPING.encode())  # a print could be inside another one
