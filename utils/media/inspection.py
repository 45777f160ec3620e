"""Looks at media files in child processes, so that a file which makes a decoder hang or crash costs a timeout.

The children are this module run as a program: a path per line in, a line of JSON out.
"""

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from utils.media.decoding import read_pixels
from utils.media.probing import MediaError, MediaInfo, is_image, probe

ROOT = Path(__file__).resolve().parents[2]
COMMAND = (sys.executable, "-m", "utils.media.inspection")
TIMEOUT = 20.0  # seconds for one file
MAX_CHILDREN = 4
FILES_PER_CHILD = 8  # fewer are not worth another process


def inspect(path: Path) -> MediaInfo:
    """What a file holds, once its last frame has been read as training would read it. Raises MediaError."""
    info = probe(path)
    if not is_image(path):
        read_pixels(path, [info.frames - 1], info)
    return info


def inspect_all(paths: Sequence[Path], timeout: float = TIMEOUT) -> Iterator[MediaInfo | MediaError]:
    """`inspect` of every path, in order; what takes longer than `timeout` seconds, or ends its child, is an error."""
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
    """A process that looks at one file at a time, and is replaced when one was too much for it."""

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self._process: subprocess.Popen[str] | None = None

    def ask(self, path: Path) -> MediaInfo | MediaError:
        if self._process is None:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
            self._process = subprocess.Popen(COMMAND, cwd=ROOT, encoding="utf-8", **pipes)
        process = self._process
        late = threading.Event()
        timer = threading.Timer(self.timeout, lambda: (late.set(), process.kill()))
        timer.start()
        try:
            process.stdin.write(json.dumps(str(path.absolute())) + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        except OSError:
            answer = ""
        finally:
            timer.cancel()
        if not answer:
            self.end()
            reason = f"took longer than {self.timeout:g} seconds" if late.is_set() else "crashed"
            return MediaError(path, f"reading it {reason}: damaged, or no video that can be decoded here")
        fields = json.loads(answer)
        return MediaError(path, fields["reason"]) if "reason" in fields else MediaInfo(**fields)

    def end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


def main() -> None:
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a decoder prints is no answer
    for line in sys.stdin:
        try:
            answer = asdict(inspect(Path(json.loads(line))))
        except MediaError as error:
            answer = {"reason": error.reason}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
