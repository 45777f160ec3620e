"""Runs that were cut short, by the command line itself: what is left is whole, and going on changes nothing."""

import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.tiny import write_clips, write_model
from utils.common.signals import SIGNALS
from utils.common.tensor_files import read_tensors
from utils.runs.state import read_state

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
ROOT = Path(__file__).resolve().parents[1]
STEPS = 60
LONGEST_LIFE = 0.5  # seconds from the first new state to a kill: several steps, each with a save
FLAGS = (
    "--dataset clips --pretrained_model_name_or_path model --base_res 64 --token_limit 60 --random_frame_length "
    f"--max_train_steps {STEPS} --learning_rate 1e-3 --lr_scheduler cosine --gradient_accumulation 2 --val_samples 0 "
    "--checkpointing_steps 1 --ema_decay 0.9 --num_workers 1"
).split()


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("work")
    write_model(folder / "model")
    write_clips(folder / "clips")
    return folder


def start(work: Path, output_dir: str, *more: str, **how) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "train_wan_lora.py"), *FLAGS, "--output_dir", output_dir, *more]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, cwd=work, env=ENVIRONMENT, text=True, **pipes, **how)


def finish(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    return output


def final(work: Path, output_dir: str) -> dict[str, torch.Tensor]:
    (path,) = (work / output_dir).glob(f"*/checkpoints/state-{STEPS:08d}.safetensors")
    return read_tensors(path)[0]


def states(folder: Path) -> set[Path]:
    return set(folder.glob("*/checkpoints/state-*.safetensors"))


def wait_for_a_state(folder: Path, process: subprocess.Popen, known: set[Path]) -> None:
    while process.poll() is None and states(folder) <= known:
        time.sleep(0.01)


@pytest.fixture(scope="module")
def straight(work) -> dict[str, torch.Tensor]:
    finish(start(work, "straight"))
    return final(work, "straight")


def kill_and_resume(work: Path, output_dir: str, *more: str, kills: int, seed: int) -> dict[str, torch.Tensor]:
    """Kills the run at random moments after it has got further, lets it go on, and returns its last state."""
    rng = random.Random(seed)
    for _ in range(kills):
        known = states(work / output_dir)
        process = start(work, output_dir, *more, *resuming(known))
        wait_for_a_state(work / output_dir, process, known)
        time.sleep(rng.uniform(0, LONGEST_LIFE))
        assert process.poll() is None, "it ended before it was killed: give it more steps"
        process.kill()
        process.communicate()
    finish(start(work, output_dir, *more, *resuming(states(work / output_dir))))
    return final(work, output_dir)


def resuming(known: set[Path]) -> tuple[str, ...]:
    return ("--resume_from_checkpoint", "latest") if known else ()


def test_a_run_that_is_killed_three_times_ends_where_an_unbroken_one_does(work, straight):
    resumed = kill_and_resume(work, "killed", kills=3, seed=0)
    assert resumed.keys() == straight.keys()
    assert all(torch.equal(resumed[name], straight[name]) for name in straight)


@pytest.mark.crash
def test_a_run_that_is_killed_ten_times_ends_where_an_unbroken_one_does(work, straight):
    for seed in (1, 2):
        resumed = kill_and_resume(work, f"killed-{seed}", kills=5, seed=seed)
        assert all(torch.equal(resumed[name], straight[name]) for name in straight)


@pytest.mark.crash
def test_a_run_from_cached_latents_that_is_killed_ten_times_ends_where_an_unbroken_one_does(work):
    cached = "--cache_latents", "2"
    finish(start(work, "cached", *cached))
    unbroken = final(work, "cached")
    for seed in (3, 4):
        resumed = kill_and_resume(work, f"killed-{seed}", *cached, kills=5, seed=seed)
        assert all(torch.equal(resumed[name], unbroken[name]) for name in unbroken)


@pytest.mark.crash
def test_a_run_in_bf16_that_is_killed_five_times_ends_where_an_unbroken_one_does(work):
    bf16 = "--adapter_dtype", "bf16"
    finish(start(work, "bf16", *bf16))
    unbroken, resumed = final(work, "bf16"), kill_and_resume(work, "killed-bf16", *bf16, kills=5, seed=5)
    assert any(name.endswith("/compensation") for name in unbroken) and unbroken.keys() == resumed.keys()
    assert all(torch.equal(resumed[name], unbroken[name]) for name in unbroken)


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="there are no process groups here")
def test_stopping_all_processes_of_a_run_at_once_saves_it_too(work, straight):
    process = start(work, "group", start_new_session=True)
    wait_for_a_state(work / "group", process, set())
    os.killpg(process.pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    # Whether the wish or the death of a loading process arrives first is the system's choice.
    assert process.returncode in (1, 130) and "Traceback" not in output and "unexpected error" not in output
    known = states(work / "group")
    assert f"{max(read_state(path).step for path in known):08d}" in output
    finish(start(work, "group", *resuming(known)))
    resumed = final(work, "group")
    assert all(torch.equal(resumed[name], straight[name]) for name in straight)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_run_that_is_asked_to_stop_finishes_its_step_saves_and_says_how_to_resume(work, straight, number):
    if number.name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN:
        pytest.skip("these tests run under nohup")
    name = f"stopped-{number.name}"
    process = start(work, name)
    wait_for_a_state(work / name, process, set())
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in output
    (command,) = re.findall(r"resume with: python (.*)", output)
    again = [sys.executable, *shlex.split(command)]
    result = subprocess.run(again, cwd=work, env=ENVIRONMENT, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    resumed = final(work, name)
    assert all(torch.equal(resumed[part], straight[part]) for part in straight)
