"""Signals are requests until the step has ended, and a closed terminal is one of them."""

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from utils.common.signals import SIGNALS, Stop, signals_ignored, stop_on_signals

ROOT = Path(__file__).resolve().parents[3]
needs_hangup = pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="there is no SIGHUP here")
# Takes steps of 10 ms for at most 30 s, until it is asked to stop, which it notes, or until the file `enough` appears.
LOOP = f"""
import pathlib, sys, time
sys.path.insert(0, {str(ROOT)!r})
from utils.common.console import say
from utils.common.options import run_script
from utils.common.signals import stop_on_signals

def main():
    with stop_on_signals() as stop:
        for _ in range(3000):
            if pathlib.Path("enough").exists():
                break
            pathlib.Path("started").touch()
            say("a step")
            time.sleep(0.01)
            if stop.requested:
                pathlib.Path("saved").touch()
                raise KeyboardInterrupt
        pathlib.Path("finished").touch()

sys.exit(run_script(main))
"""

# A terminal with a shell, in which the line `sys.argv[1]` is typed; it closes once the loop has started.
TERMINAL = """
import os, pathlib, pty, sys, time
child, terminal = pty.fork()
if child == 0:
    os.execvp("bash", ["bash", "--norc", "--noprofile", "-i"])
os.write(terminal, sys.argv[1].encode() + b"\\n")
while not pathlib.Path("started").exists():
    time.sleep(0.01)
os.close(terminal)
os.waitpid(child, 0)
"""


@pytest.fixture(autouse=True)
def hangup_as_in_a_terminal() -> Iterator[None]:
    """Also where the tests themselves run under nohup."""
    if not hasattr(signal, "SIGHUP"):
        yield
        return
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture
def loop(tmp_path) -> str:
    (tmp_path / "loop.py").write_text(LOOP, encoding="utf-8")
    return f"{sys.executable} loop.py"


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline, f"{path.name} did not appear"
        time.sleep(0.01)


def start(command: str, folder: Path) -> subprocess.Popen:
    process = subprocess.Popen(command.split(), cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(folder / "started")
    return process


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_is_a_request_and_the_second_interrupts(number):
    with stop_on_signals() as stop:
        assert not stop.requested
        signal.raise_signal(number)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)


def test_the_previous_handlers_are_restored():
    before = [signal.getsignal(number) for number in SIGNALS]
    with pytest.raises(ZeroDivisionError), stop_on_signals():
        assert before != [signal.getsignal(number) for number in SIGNALS]
        raise ZeroDivisionError
    with signals_ignored():
        assert {signal.getsignal(number) for number in SIGNALS} == {signal.SIG_IGN}
    assert before == [signal.getsignal(number) for number in SIGNALS]


def test_what_is_ignored_in_background_jobs_of_a_shell_can_still_stop_a_run():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stop_on_signals() as stop:
            signal.raise_signal(signal.SIGINT)
            assert stop.requested
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_second_signal_in_a_held_block_interrupts_where_the_block_ends():
    done = []
    with stop_on_signals() as stop:
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt), stop.held():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            done.append("update")
        with stop.held():
            done.append("the next")
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert done == ["update", "the next"]


def test_a_first_signal_in_a_held_block_is_only_a_request():
    with stop_on_signals() as stop:
        with stop.held():
            signal.raise_signal(signal.SIGINT)
        assert stop.requested


def test_held_blocks_can_be_nested_and_the_outermost_counts():
    done = []
    with stop_on_signals() as stop:
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt), stop.held():
            with stop.held():
                signal.raise_signal(signal.SIGINT)
            done.append("outer")
    assert done == ["outer"]


def test_an_error_in_a_held_block_comes_before_the_interrupt():
    with stop_on_signals() as stop:
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(ZeroDivisionError), stop.held():
            signal.raise_signal(signal.SIGINT)
            raise ZeroDivisionError
        with pytest.raises(KeyboardInterrupt), stop.held():
            pass


def test_a_signal_while_signals_are_ignored_is_lost():
    with stop_on_signals() as stop:
        with signals_ignored():
            for number in SIGNALS:
                signal.raise_signal(number)
        assert not stop.requested


def test_a_stop_without_signals_holds_nothing_back():
    with Stop().held():
        pass


@needs_hangup
def test_a_hangup_is_a_request_to_stop(tmp_path, loop):
    process = start(loop, tmp_path)
    process.send_signal(signal.SIGHUP)
    assert process.wait(30) == 130 and (tmp_path / "saved").exists()


@needs_hangup
@pytest.mark.parametrize("launcher", ["nohup", "sh"])
def test_a_hangup_stays_ignored_where_it_was_at_the_start(tmp_path, loop, launcher):
    if launcher == "sh":
        (tmp_path / "ignoring.sh").write_text("trap '' HUP\nexec \"$@\"\n", encoding="utf-8")
        launcher = "sh ignoring.sh"
    elif not shutil.which("nohup"):
        pytest.skip("there is no nohup here")
    process = start(f"{launcher} {loop}", tmp_path)
    process.send_signal(signal.SIGHUP)
    time.sleep(0.3)
    assert process.poll() is None and not (tmp_path / "saved").exists()
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 130 and (tmp_path / "saved").exists()


@needs_hangup
@pytest.mark.skipif(not shutil.which("bash"), reason="there is no bash here")
@pytest.mark.parametrize(("disowned", "outcome"), [("", "saved"), ("disown; ", "finished")])
def test_a_job_in_a_terminal_that_closes_saves_and_a_disowned_one_runs_to_its_end(tmp_path, loop, disowned, outcome):
    typed = f"{loop} & {disowned}echo"
    subprocess.run([sys.executable, "-c", TERMINAL, typed], cwd=tmp_path, timeout=30, check=True)
    time.sleep(0.3)
    (tmp_path / "enough").touch()
    wait_for(tmp_path / outcome)
    assert not (tmp_path / ("saved" if outcome == "finished" else "finished")).exists()
