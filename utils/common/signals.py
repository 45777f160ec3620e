"""Ctrl-C and SIGTERM as a wish that the loop grants at the end of its step."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stop:
    """`requested` becomes true with the first signal; the second one interrupts at once."""

    def __init__(self) -> None:
        self.requested = False

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True


@contextmanager
def signals_ignored() -> Iterator[None]:
    """No signal interrupts the block: neither a user's, nor torch's own that a loading process has died."""
    quiet = dict.fromkeys(SIGNALS, signal.SIG_IGN)
    if hasattr(signal, "SIGCHLD"):
        quiet[signal.SIGCHLD] = signal.SIG_DFL
    before = {number: signal.signal(number, handler) for number, handler in quiet.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """Listens while the block runs, and puts the handlers back that were there before."""
    stop = Stop()
    before = {number: signal.signal(number, stop._ask) for number in SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
