"""Processes that are forked, and programs: either runs as if it had just been started."""

import contextlib
import errno
import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import psutil
import pytest

from tests.media import video
from utils.media import processes
from utils.media.child import READY, inspect, main
from utils.media.inspection import Inspector
from utils.media.processes import PROGRAM, ROOT, Process, describe_end, end, fork, run_program, start

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere no process is forked")


@pytest.fixture
def run():
    """Starts processes that end with the test."""
    with contextlib.ExitStack() as stack:

        def started(process: Process) -> Process:
            for pipe in (process.stdin, process.stdout):
                stack.callback(pipe.close)
            stack.callback(kill, process)
            return process

        yield started


def kill(process: Process) -> None:
    with contextlib.suppress(ProcessLookupError, ChildProcessError):  # it has ended, and was waited for
        process.kill()
        process.wait()


@pytest.mark.parametrize("begin", [partial(fork, main), partial(run_program, PROGRAM)], ids=["fork", "program"])
def test_either_answers(tmp_path, run, begin):
    question = {"path": str(video(tmp_path / "clip.mp4")), "full": True, "mask": False, "threads": 1, "cache": None}
    process = run(begin())
    print(json.dumps(question), file=process.stdin, flush=True)
    assert process.stdout.readline() == READY
    answers = map(json.loads, process.stdout)
    assert next(answer for answer in answers if "position" not in answer)["info"]["frames"] == 9
    process.kill()
    assert process.wait() == -signal.SIGKILL


def test_a_process_is_forked_where_that_is_safe(monkeypatch, run):
    monkeypatch.setattr(processes, "run_program", lambda command: pytest.fail("a program was started"))
    run(start())


def refuse_to_fork() -> int:
    raise OSError(errno.ENOMEM, "Cannot allocate memory")


@pytest.mark.parametrize("how", ["dies", "hangs", "cannot be made"])
def test_where_a_fork_does_not_get_ready_a_program_is_started(tmp_path, monkeypatch, how):
    if how == "cannot be made":
        monkeypatch.setattr(os, "fork", refuse_to_fork)
    monkeypatch.setattr(processes, "FORK_WITHIN", 0.1 if how == "hangs" else 20)
    monkeypatch.setattr("utils.media.child.main", os.abort if how == "dies" else partial(time.sleep, 60))
    before, path = set(psutil.Process().children()), video(tmp_path / "clip.mp4")
    assert Inspector().inspect([path])[path].frames == 9
    assert set(psutil.Process().children()) <= before


def test_a_fork_that_cannot_be_made_leaves_no_file_open(monkeypatch):
    monkeypatch.setattr(os, "fork", refuse_to_fork)
    before = os.listdir("/proc/self/fd")
    with pytest.raises(OSError, match="Cannot allocate memory"):
        fork(main)
    assert os.listdir("/proc/self/fd") == before


def test_a_program_that_does_not_get_ready_is_an_error(monkeypatch):
    monkeypatch.setattr("utils.media.child.main", os.abort)
    monkeypatch.setattr(processes, "PROGRAM", (sys.executable, "-c", "raise SystemExit(3)"))
    with pytest.raises(ChildProcessError, match="exit code 3"):
        start()


def test_a_fork_has_only_its_own_files_open(tmp_path, run):
    with open(tmp_path / "file", "w") as file:
        os.set_inheritable(file.fileno(), True)
        process = run(fork(lambda: print(*map(target, filter(is_open, range(200))))))
        questions, answers, errors = process.stdout.read().split()
    assert questions.startswith("pipe:") and answers.startswith("pipe:") and errors == os.devnull


def is_open(descriptor: int) -> bool:
    return Path(f"/proc/self/fd/{descriptor}").is_symlink()


def target(descriptor: int) -> str:
    return os.readlink(f"/proc/self/fd/{descriptor}")


def test_the_end_of_its_questions_reaches_a_fork_though_another_was_made_since(run):
    first = run(fork(lambda: print(len(sys.stdin.read()))))
    run(fork(lambda: time.sleep(60)))
    first.stdin.write("abc")
    first.stdin.close()
    assert first.stdout.read() == "3\n" and first.wait() == 0


def test_a_fork_has_no_handler_of_its_parent(run):
    handler = signal.signal(signal.SIGTERM, lambda number, frame: print("handled", flush=True))
    try:
        process = run(fork(lambda: (print("ready", flush=True), time.sleep(60))))
        assert process.stdout.readline() == "ready\n"
        os.kill(process.pid, signal.SIGTERM)
        assert process.stdout.read() == "" and process.wait() == -signal.SIGTERM
    finally:
        signal.signal(signal.SIGTERM, handler)


def program(code: str) -> Process:
    return run_program((sys.executable, "-c", f"import os, sys, time\n{code}"))


@pytest.mark.parametrize(
    ("begin", "ended"),
    [
        (partial(program, "sys.exit(7)"), " (exit code 7)"),
        (partial(program, "os.abort()"), " (SIGABRT)"),
        (partial(program, "pass"), ""),
        (partial(program, "time.sleep(60)"), ""),
        (partial(fork, partial(os.kill, os.getpid(), 0)), ""),
        (partial(fork, os.abort), " (SIGABRT)"),
        (partial(fork, partial(int, "x")), " (exit code 1)"),
        (partial(fork, partial(time.sleep, 60)), ""),
    ],
)
def test_how_a_process_has_ended_by_itself_is_said_and_nothing_of_it_is_left(begin, ended):
    process = begin()
    assert describe_end(end(process, grace=0.5 if not ended else 20.0)) == ended
    assert process.poll() is not None and process.stdin.closed and process.stdout.closed
    assert end(process) is not None, "a second time it is known"


def test_an_error_in_a_fork_ends_the_fork_without_a_word(run, capfd):
    def fail() -> None:
        raise OSError("lost")

    process = run(fork(fail))
    assert process.stdout.read() == "" and process.wait() == 1
    assert capfd.readouterr() == ("", "")


class Temporary:
    """Deletes a file when it is collected, which a cycle of references leaves to the garbage collector."""

    def __init__(self, path: Path) -> None:
        path.touch()
        self.path, self.cycle = path, self

    def __del__(self) -> None:
        self.path.unlink(missing_ok=True)


def test_what_the_parent_has_is_not_finalized_in_a_fork(tmp_path, run):
    gc.disable()
    try:
        Temporary(tmp_path / "file")
        assert run(fork(gc.collect)).wait() == 0
        assert (tmp_path / "file").exists()
    finally:
        gc.enable()
    gc.collect()
    assert not (tmp_path / "file").exists()


def test_processes_of_several_threads_do_not_disturb_each_other(run):
    said: list[str] = []

    def fork_one() -> None:
        said.append(run(fork(lambda: print("done"))).stdout.read())

    threads = [threading.Thread(target=fork_one) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert said == ["done\n"] * 16


def test_a_fork_ends_with_its_parent():
    code = "import os; from utils.media.processes import start; print(start().pid, flush=True); os._exit(0)"
    pid = int(subprocess.run((sys.executable, "-c", code), cwd=ROOT, capture_output=True, check=True).stdout)
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.wait_procs([psutil.Process(pid)], timeout=20)
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_a_process_that_has_crashed_is_replaced_beside_others_that_work(tmp_path, monkeypatch):
    clips = [video(tmp_path / f"{number}.mp4") for number in range(6)]
    monkeypatch.setattr("utils.media.inspection.BYTES_PER_CHILD", 1)
    monkeypatch.setattr("utils.media.child.inspect", lambda path, *rest: crash_or_inspect(path, *rest))
    found = Inspector().inspect(clips)
    assert [getattr(found[clip], "frames", None) for clip in clips] == [9, None, 9, None, 9, None]


def crash_or_inspect(path: Path, *rest):
    return os.abort() if path.stem in "135" else inspect(path, *rest)
