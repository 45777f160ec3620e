"""Inspects media files in child processes, so that a file which hangs or crashes a decoder costs only a timeout.

The children run this module as a program. For each line of input, the JSON of a path, they write a line of JSON.
"""

import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from utils.media.decoding import read_pixels
from utils.media.probing import MediaError, MediaInfo, is_image, probe

ROOT = Path(__file__).resolve().parents[2]
COMMAND = (sys.executable, "-m", "utils.media.inspection")
TIMEOUT = 20.0  # seconds per file
MAX_CHILDREN = 4
FILES_PER_CHILD = 8  # fewer do not justify another process


def inspect(path: Path) -> MediaInfo:
    """The result of `probe`, after reading the last frame in the way that training does. Raises `MediaError`."""
    info = probe(path)
    if not is_image(path):
        read_pixels(path, [info.frames - 1], info)
    return info


def inspect_all(paths: Sequence[Path], timeout: float = TIMEOUT) -> Iterator[MediaInfo | MediaError]:
    """`inspect` every path, in order. A file that takes longer than `timeout` seconds or crashes is an error."""
    children = [Child(timeout) for _ in range(min(MAX_CHILDREN, -(-len(paths) // FILES_PER_CHILD)))]
    idle: queue.SimpleQueue[Child] = queue.SimpleQueue()
    for child in children:
        idle.put(child)

    def ask(path: Path) -> MediaInfo | MediaError:
        child = idle.get()
        try:
            return child.ask(path)
        finally:
            idle.put(child)

    try:
        with ThreadPoolExecutor(max(1, len(children))) as pool:
            yield from pool.map(ask, paths)
    finally:
        for child in children:
            child.end()


class Child:
    """A process that inspects one file at a time. After a file that it did not survive, a new one is started."""

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self._process: subprocess.Popen[str] | None = None

    def ask(self, path: Path) -> MediaInfo | MediaError:
        process = self._process = self._process or _start()
        begun = time.monotonic()
        timer = threading.Timer(self.timeout, process.kill)  # a pipe has no timeout of its own
        timer.start()
        try:
            print(json.dumps(str(path.absolute())), file=process.stdin, flush=True)
            answer = process.stdout.readline() if process.stdout else ""
        except OSError:
            answer = ""
        finally:
            timer.cancel()
        if not answer:
            late = time.monotonic() - begun >= self.timeout
            self.end()
            reason = f"took longer than {self.timeout:g} seconds" if late else "crashed"
            return MediaError(path, f"reading it {reason}: damaged, or not a video that can be decoded")
        fields = json.loads(answer)
        return MediaError(path, fields["reason"]) if "reason" in fields else MediaInfo(**fields)

    def end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


def _start() -> subprocess.Popen[str]:
    pipe, nowhere = subprocess.PIPE, subprocess.DEVNULL
    return subprocess.Popen(COMMAND, cwd=ROOT, encoding="utf-8", stdin=pipe, stdout=pipe, stderr=nowhere)


def main() -> None:
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # decoders may print, but not among the answers
    for line in sys.stdin:
        try:
            answer = asdict(inspect(Path(json.loads(line))))
        except MediaError as error:
            answer = {"reason": error.reason}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
