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
from collections.abc import Callable
from pathlib import Path
from typing import IO, NoReturn, Protocol

from utils.common.signals import SIGNALS
from utils.media import child

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = (sys.executable, "-m", child.__name__)
FORK_WITHIN = 60.0  # seconds until a fork is ready, which takes milliseconds


class Process(Protocol):
    """What is used of a child: it reads lines of questions and writes lines of answers."""

    pid: int
    stdin: IO[str] | None
    stdout: IO[str] | None

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
    raise ChildProcessError(f"it ended before it was ready: {describe_end(end(process))}")


def end(process: Process) -> int:
    """Its exit code; it is killed if it still runs."""
    process.kill()
    code = process.wait()
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):  # what could not be written to a process that has crashed
            pipe.close() if pipe else None
    return code


def describe_end(code: int) -> str:
    """A name for an exit code of a process, which is negative for a signal on POSIX."""
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"exit code {code}"


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

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


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
