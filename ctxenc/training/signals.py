"""Handle SIGTERM and SIGINT in training: finish the step, save, and exit with code 128 + signal."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)
Handler = Callable[[int, FrameType | None], Any]


class Stopped(KeyboardInterrupt):
    """Report that a signal has stopped the training, like Ctrl-C; `signal` is its number."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.signal = number


class SignalRecord:
    """Hold the number of the first signal that came, or None."""

    signal: int | None = None


@contextmanager
def stop_on_signals() -> Iterator[None]:
    """Raise Stopped at once if a signal comes in the body."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped(number)

    with _handle_signals(stop):
        yield


@contextmanager
def record_signals() -> Iterator[SignalRecord]:
    """Record signals in the body, however many come: launchers send more than one. SIGKILL loses only steps."""
    record = SignalRecord()

    def store(number: int, frame: FrameType | None) -> None:
        record.signal = record.signal or number

    with _handle_signals(store):
        yield record


def ignore_signals(worker: int) -> None:
    """Make a loader's worker ignore signals, so that a signal to the whole group does not kill it during the last step."""
    for each in SIGNALS:
        signal.signal(each, signal.SIG_IGN)


@contextmanager
def _handle_signals(handler: Handler) -> Iterator[None]:
    """Install `handler` in the body; signals ignored at the start of the process stay ignored."""
    if threading.current_thread() is not threading.main_thread():  # Python sets handlers only there
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
