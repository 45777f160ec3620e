"""Starts the processes that inspect media files.

On Linux this process is forked, which has the modules loaded: starting a program takes longer than decoding a few
clips. Elsewhere it is a program, since a fork is unsafe (macOS) or does not exist (Windows), and where a fork is not
possible, such as where memory is too little for a second process as large as this one.
"""

import contextlib
import gc
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, NoReturn, Protocol

from utils.common.signals import SIGNALS
from utils.media import child

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = (sys.executable, "-m", child.__name__)
FORK_WITHIN = 60.0  # seconds until a fork is ready, which takes milliseconds
GRACE = 1.0  # seconds for a process to end that has closed its output


class Process(Protocol):
    """What is used of a child: it reads lines of questions and writes lines of answers."""

    pid: int
    stdin: IO[str] | None
    stdout: IO[str] | None

    def poll(self) -> int | None:
        """The exit code, which is negative for a signal on POSIX; None while it runs."""
        ...

    def kill(self) -> None: ...

    def wait(self) -> int: ...


def start() -> Process:
    """A process that runs `child.main` and waits for questions. Raises OSError where none can be started."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            return _ready(fork(child.main), FORK_WITHIN)
    return _ready(run_program(PROGRAM), None)


def _ready(process: Process, timeout: float | None) -> Process:
    """The process, which has said that it is ready. Where it has not, it is ended; raises ChildProcessError."""
    said = process.stdout
    if said and (timeout is None or select.select([said], [], [], timeout)[0]) and said.readline() == child.READY:
        return process
    raise ChildProcessError(f"it ended before it was ready{describe_end(end(process, GRACE))}")


def end(process: Process, grace: float = 0.0) -> int | None:
    """Ends a process. The exit code of one that has ended by itself, or does within `grace` seconds; else None."""
    until = time.monotonic() + grace
    while (code := process.poll()) is None and time.monotonic() < until:
        time.sleep(0.01)
    if code is None:
        process.kill()
        process.wait()
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):  # what could not be written to a process that has crashed
            pipe.close() if pipe else None
    return code


def describe_end(code: int | None) -> str:
    """In brackets, how a process has ended by itself; nothing for one that has not, or without an error."""
    if not code:
        return ""
    try:
        return f" ({signal.Signals(-code).name})"
    except ValueError:
        return f" (exit code {code})"


def run_program(command: tuple[str, ...]) -> Process:
    pipe, nowhere = subprocess.PIPE, subprocess.DEVNULL
    return subprocess.Popen(command, cwd=ROOT, encoding="utf-8", stdin=pipe, stdout=pipe, stderr=nowhere)


def fork(function: Callable[[], object]) -> Process:
    """A copy of this process that calls a function and ends. Of the files of this process it has none open."""
    questions, to_child = os.pipe()
    from_child, answers = os.pipe()
    try:
        pid = os.fork()
    except OSError:  # such as too little memory for a copy of this process
        for descriptor in (questions, to_child, from_child, answers):
            os.close(descriptor)
        raise
    if pid == 0:
        _become(function, questions, answers)
    os.close(questions)
    os.close(answers)
    return _Forked(pid, open(to_child, "w", encoding="utf-8"), open(from_child, encoding="utf-8"))


class _Forked:
    def __init__(self, pid: int, stdin: IO[str], stdout: IO[str]) -> None:
        self.pid = pid
        self.stdin: IO[str] | None = stdin
        self.stdout: IO[str] | None = stdout
        self._code: int | None = None

    def poll(self) -> int | None:
        return self._look(os.WNOHANG)

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> int:
        code = self._look(0)
        assert code is not None, "it has been waited for"
        return code

    def _look(self, how: int) -> int | None:
        if self._code is None:
            ended, status = os.waitpid(self.pid, how)
            self._code = os.waitstatus_to_exitcode(status) if ended else None
        return self._code


def _become(function: Callable[[], object], questions: int, answers: int) -> NoReturn:
    """Makes a fork what a program is at its start; never returns to the caller's code."""
    status = 1
    try:
        gc.freeze()  # finalizers of the parent's objects may delete its files
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        os.dup2(questions, 0)
        os.dup2(answers, 1)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        # Pipes of other children among them: these end where nobody can write to them any more.
        os.closerange(3, 1 + max(int(name) for name in os.listdir("/proc/self/fd")))
        sys.stdin, sys.stdout, sys.stderr = os.fdopen(0, encoding="utf-8"), os.fdopen(1, "w"), os.fdopen(2, "w")
        function()
        sys.stdout.flush()
        status = 0
    finally:
        os._exit(status)
