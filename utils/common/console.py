"""Output for people. A console that goes away never ends a run.

The reader of a pipe may leave (`| head`), a terminal may close, a descriptor may have been closed before the start:
from then on every write fails. `unfailing_console` drops such output instead of raising.
"""

import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

from tqdm import tqdm

# The console is gone for good: a closed pipe, a closed terminal, a closed descriptor.
GONE = (errno.EPIPE, errno.EIO, errno.EBADF)


def say(text: str) -> None:
    """Prints lines to stdout, above the progress bars where there are any."""
    tqdm.write(text)


@contextmanager
def unfailing_console() -> Iterator[None]:
    """Inside the block writing to stdout and stderr raises no error, nor does Python's flush at exit after it.

    Each line is written at once, and characters that the console cannot show are escaped. A stream that is None, as
    Python makes of a descriptor that is closed at the start, takes text and drops it.
    """
    for descriptor in (1, 2):
        _occupy(descriptor)
    before = sys.stdout, sys.stderr
    inside = [_unfailing(stream) for stream in before]
    sys.stdout, sys.stderr = inside
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        for stream in inside:
            if isinstance(stream, _Console):
                stream.leave()


class _Console(io.TextIOWrapper):
    """A second text layer over a stream's buffer; the stream itself stays usable afterwards."""

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except (OSError, ValueError) as error:  # ValueError: somebody has closed it
            self._forget(error)
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except (OSError, ValueError) as error:
            self._forget(error)

    def leave(self) -> None:
        """Writes out what is buffered, or drops it where that fails, and gives the buffer back."""
        with suppress(OSError, ValueError):
            try:
                super().flush()
            except OSError:
                self._discard()
            self.detach()

    def _forget(self, error: Exception) -> None:
        # Other errors may pass, such as a full disk below a log file: they cost this text only.
        if isinstance(error, OSError) and error.errno in GONE:
            self._discard()

    def _discard(self) -> None:
        with suppress(OSError, ValueError):
            _point_at_null(self.fileno())
            self.buffer.flush()  # what could not be written


def _unfailing(stream: TextIO | None) -> TextIO:
    if stream is None:
        return _Console(open(os.devnull, "wb"), encoding="utf-8")
    if not isinstance(stream, io.TextIOWrapper):  # a notebook's, a test's
        return stream
    with suppress(OSError, ValueError):
        stream.flush()
    return _Console(stream.buffer, encoding=stream.encoding, errors="backslashreplace", line_buffering=True)


def _occupy(descriptor: int) -> None:
    """Opens a closed descriptor on the null device: the next file to be opened would take it, and get the output."""
    try:
        os.fstat(descriptor)
    except OSError:
        _point_at_null(descriptor)


def _point_at_null(descriptor: int) -> None:
    null = os.open(os.devnull, os.O_WRONLY)
    if null == descriptor:
        os.set_inheritable(null, True)
        return
    os.dup2(null, descriptor)
    os.close(null)
