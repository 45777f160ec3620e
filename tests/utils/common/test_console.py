"""A run continues without its console, and its exit code stays the same. Real processes, pipes and terminals."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from utils.adapters.lora_file import LoraFile, LoraPair
from utils.adapters.lora_writer import write_lora
from utils.common.console import say, unfailing_console

ROOT = Path(__file__).resolve().parents[3]
posix = pytest.mark.skipif(os.name != "posix", reason="needs a POSIX shell")
# Talks in every way that there is, more than a pipe holds, and writes a file when it has come through.
TALKER = f"""
import logging, os, pathlib, sys, time, warnings
sys.path.insert(0, {str(ROOT)!r})
from tqdm import tqdm
from utils.common.console import say
from utils.common.errors import RunError, UserError
from utils.common.options import run_script

logging.getLogger().addHandler(logging.StreamHandler())  # keeps the stderr of the start

def main():
    for number in tqdm(range(500), mininterval=0):
        say(f"line {{number}} " + 300 * "x")
        print("a line on stderr", file=sys.stderr)
        warnings.warn(f"warning {{number}}")
        logging.warning("a log entry")
        if number == 0:
            between()
    print("the last word", end="")
    pathlib.Path("done").touch()
    ending()

def between(): pass
def ending(): pass
"""
FAILS = {
    0: "",
    1: "def ending(): raise RunError('failed')",
    2: "def ending(): raise UserError('bad input')",
    130: "def ending(): raise KeyboardInterrupt",
}


def talker(folder: Path, changes: str = "") -> list[str]:
    """The command of a script that talks, with some of its functions replaced."""
    path = folder / "talker.py"
    path.write_text(f"{TALKER}\n{changes}\ncode = run_script(main)\nprint('after')\nsys.exit(code)\n", encoding="utf-8")
    return [sys.executable, str(path)]


def wait_for(path: Path, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"{path.name} did not appear"
        time.sleep(0.01)


@posix
@pytest.mark.parametrize("code", FAILS)
@pytest.mark.parametrize(
    ("redirected", "piped"),
    [("", "| head -1"), ("2>&1", "| head -1"), (">&-", ""), ("2>&-", "| cat"), (">&- 2>&-", ""), (">/dev/full", "")],
)
def test_a_run_ends_alike_whatever_becomes_of_its_console(tmp_path, redirected, piped, code):
    if "/dev/full" in redirected and not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full here")
    command = " ".join(talker(tmp_path, FAILS[code]))
    shell = f"{{ {command} {redirected}; echo $? >code; }} {piped}"
    result = subprocess.run(["sh", "-c", shell], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert (tmp_path / "done").exists(), result.stderr
    assert (tmp_path / "code").read_text() == f"{code}\n"
    assert "BrokenPipe" not in result.stderr and "Exception ignored" not in result.stderr


@posix
def test_a_pipe_that_is_closed_in_mid_run_costs_nothing_not_even_what_writes_to_the_descriptor(tmp_path):
    changes = "def between():\n    while not os.path.exists('closed'): time.sleep(0.01)"
    command = talker(tmp_path, f"{changes}\ndef ending(): os.write(1, b'x'), os.write(2, b'x')")
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout.readline()
    process.stdout.close()
    (tmp_path / "closed").touch()
    assert process.wait(60) == 0 and (tmp_path / "done").exists()


@posix
def test_a_terminal_that_is_closed_in_mid_run_costs_nothing(tmp_path):
    command = talker(tmp_path, "def between():\n    while not os.path.exists('closed'): time.sleep(0.01)")
    terminal, end = os.openpty()
    process = subprocess.Popen(command, cwd=tmp_path, stdout=end, stderr=end)
    os.close(end)
    assert os.read(terminal, 100)
    os.close(terminal)
    (tmp_path / "closed").touch()
    assert process.wait(60) == 0 and (tmp_path / "done").exists()


@posix
def test_descriptors_that_are_closed_in_mid_run_cost_nothing(tmp_path):
    command = talker(tmp_path, "def between(): os.close(1), os.close(2)")
    assert subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=60, check=False).returncode == 0


@posix
def test_a_file_that_is_opened_without_a_console_does_not_receive_its_output(tmp_path):
    ending = "file = open('weights', 'w'); os.write(1, b'out'); os.write(2, b'err'); file.write('w'); file.close()"
    command = " ".join(talker(tmp_path, f"def ending():\n    {ending}"))
    subprocess.run(["sh", "-c", f"{command} <&- >&- 2>&-"], cwd=tmp_path, timeout=60, check=True)
    assert (tmp_path / "weights").read_text() == "w"


@posix
def test_a_log_file_without_space_for_a_while_loses_lines_and_gets_the_rest(tmp_path):
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (10, resource.RLIM_INFINITY))"
    lifted = (
        "def between(): resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))"
    )
    with (tmp_path / "log").open("w") as log:
        command = talker(tmp_path, f"{limit}\n{lifted}")
        subprocess.run(command, cwd=tmp_path, stdout=log, stderr=log, timeout=60, check=True)
    assert "line 499" in (tmp_path / "log").read_text()


@posix
def test_the_converter_writes_its_file_whoever_reads_its_output(tmp_path):
    pair = LoraPair(torch.ones(2, 8), torch.ones(8, 2), 2.0)
    write_lora(tmp_path / "lora.safetensors", LoraFile({"blocks.0.self_attn.q": pair}))
    files = "--input_lora lora.safetensors --output_lora out.safetensors"
    shell = f"{{ {sys.executable} {ROOT / 'convert_lora_to_comfy.py'} {files}; echo $? >code; }} | true"
    subprocess.run(["sh", "-c", shell], cwd=tmp_path, timeout=120, check=True)
    wait_for(tmp_path / "code")
    assert (tmp_path / "code").read_text() == "0\n" and (tmp_path / "out.safetensors").exists()


def test_output_appears_at_once_though_stdout_is_a_file(tmp_path):
    command = talker(tmp_path, "def between(): assert 'line 0' in pathlib.Path('log').read_text()")
    with (tmp_path / "log").open("w") as log:
        assert subprocess.run(command, cwd=tmp_path, stdout=log, stderr=log, timeout=60, check=False).returncode == 0


def test_characters_that_the_console_cannot_show_are_escaped(tmp_path):
    command = talker(tmp_path, "def ending(): say('\\u9f8d.mp4')")
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, timeout=60, check=False)
    assert result.returncode == 0 and rb"\u9f8d.mp4" in result.stdout


def test_the_streams_are_usable_before_inside_and_after(capsys):
    before = sys.stdout
    say("before")
    with unfailing_console():
        say("inside")
        print("error", file=sys.stderr)
        late = sys.stdout
    say("after")
    print("too late", file=late)
    assert sys.stdout is before and capsys.readouterr() == ("before\ninside\nafter\n", "error\n")
