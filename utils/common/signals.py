"""Graceful shutdown: signals set a flag that the training loop checks between steps."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# Ctrl-C, the request to end of `kill` and of schedulers, and the closed terminal or dropped ssh (POSIX only).
SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class Stop:
    """`requested` becomes true with the first signal; the second one raises KeyboardInterrupt at once."""

    def __init__(self) -> None:
        self.requested = False
        self._is_held = False
        self._interrupted = False

    @contextmanager
    def held(self) -> Iterator[None]:
        """For what must not be left half done: a second signal inside raises KeyboardInterrupt as the block ends.

        An error of the block itself comes first. Blocks can be nested; the outermost counts.
        """
        outer, self._is_held = self._is_held, True
        try:
            yield
        finally:
            self._is_held = outer
        if self._interrupted and not self._is_held:
            self._interrupted = False
            raise KeyboardInterrupt

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self.requested:
            self.requested = True
        elif self._is_held:
            self._interrupted = True
        else:
            raise KeyboardInterrupt


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
    """Handles SIGNALS while the block runs, then restores the previous handlers.

    SIGHUP stays ignored where it was ignored before, as `nohup` arranges it for the process that it starts.
    """
    stop = Stop()
    numbers = [number for number in SIGNALS if not _is_ignored_hangup(number)]
    before = {number: signal.signal(number, stop._handle) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _is_ignored_hangup(number: signal.Signals) -> bool:
    return number.name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN
