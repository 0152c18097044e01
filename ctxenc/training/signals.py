"""SIGTERM and SIGINT in a training: it finishes its step, saves, and ends with exit code 128 + signal."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)
Handler = Callable[[int, FrameType | None], Any]


class Stopped(KeyboardInterrupt):
    """A signal has stopped the training, as Ctrl-C does; ``signal`` is its number."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.signal = number


class Noted:
    """The first signal that came, or None."""

    signal: int | None = None


@contextmanager
def raised() -> Iterator[None]:
    """In the body a signal raises Stopped at once."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped(number)

    with _handled(stop):
        yield


@contextmanager
def noted() -> Iterator[Noted]:
    """In the body signals are noted, however many come: launchers send more than one. SIGKILL loses no more than steps."""
    found = Noted()

    def note(number: int, frame: FrameType | None) -> None:
        found.signal = found.signal or number

    with _handled(note):
        yield found


def ignored(worker: int) -> None:
    """Makes a worker of a loader deaf: one sent to the whole group of processes must not take it from under the last step."""
    for each in SIGNALS:
        signal.signal(each, signal.SIG_IGN)


@contextmanager
def _handled(handler: Handler) -> Iterator[None]:
    """``handler`` is in force in the body, but for signals that the process was started to ignore."""
    if threading.current_thread() is not threading.main_thread():  # where Python sets no handlers
        yield
        return
    before = {each: signal.getsignal(each) for each in SIGNALS}
    try:
        for each in SIGNALS:
            if before[each] is not signal.SIG_IGN:
                signal.signal(each, handler)
        yield
    finally:
        for each, old in before.items():
            signal.signal(each, old)
