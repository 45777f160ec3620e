"""Graceful shutdown: signals set a flag that the training loop checks between steps."""

import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

# Ctrl-C, the request to end of `kill` and of schedulers, and the closed terminal or dropped ssh (POSIX only).
SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
# That a child process has ended; POSIX only.
DEATHS_IGNORED: dict[signal.Signals, Any] = {signal.SIGCHLD: signal.SIG_DFL} if hasattr(signal, "SIGCHLD") else {}


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
    with _handled(dict.fromkeys(SIGNALS, signal.SIG_IGN) | DEATHS_IGNORED):
        yield


@contextmanager
def deaths_ignored() -> Iterator[None]:
    """In the main thread torch, which is told by a signal, does not raise inside that a loading process has died."""
    in_main = threading.current_thread() is threading.main_thread()  # no handler can be set elsewhere, and none runs
    with _handled(DEATHS_IGNORED if in_main else {}):
        yield


@contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """Handles SIGNALS while the block runs, then restores the previous handlers.

    SIGHUP stays ignored where it was ignored before, as `nohup` arranges it for the process that it starts.
    """
    stop = Stop()
    with _handled({number: stop._handle for number in SIGNALS if not _is_ignored_hangup(number)}):
        yield stop


@contextmanager
def _handled(handlers: Mapping[signal.Signals, Any]) -> Iterator[None]:
    """Inside, these signals have these handlers."""
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _is_ignored_hangup(number: signal.Signals) -> bool:
    return number.name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN
