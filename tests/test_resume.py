"""Runs that were cut short, by the command line itself: what is left is whole, and going on changes nothing."""

import contextlib
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

import train_wan_lora
from tests.tiny import write_clips, write_model
from utils.common.signals import SIGNALS
from utils.common.tensor_files import read_tensors
from utils.runs.state import read_state
from utils.training.optimizers import KINDS

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
ROOT = Path(__file__).resolve().parents[1]
OF_EACH = {
    **{name: f"--optimizer {name}" for name in KINDS},
    "adamw": "--lora_plus_ratio 4",  # two groups of parameters; with one there are other tests
    # Only large matrices have moments of 8 bits.
    "adamw8bit": "--optimizer adamw8bit --lora_rank 96",
    "adamw8bit in bf16": "--optimizer adamw8bit --lora_rank 96 --adapter_dtype bf16",
    "prodigy": "--optimizer prodigy --learning_rate 1 --lr_warmup_steps 5",
    "schedulefree": "--optimizer schedulefree --lr_scheduler constant --ema_decay 0 --lr_warmup_steps 5",
}
STEPS = 30
MANY_STEPS = 60  # of runs that are killed often
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


def states(folder: Path) -> set[Path]:
    return set(folder.glob("*/checkpoints/state-*.safetensors"))


def tensors_at(work: Path, output_dir: str, step: int = STEPS) -> dict[str, torch.Tensor]:
    """The state after a step, the last one by default."""
    (path,) = (path for path in states(work / output_dir) if path.stem == f"state-{step:08d}")
    return read_tensors(path)[0]


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def wait_for_a_state(folder: Path, process: subprocess.Popen, known: set[Path]) -> None:
    while process.poll() is None and states(folder) <= known:
        time.sleep(0.01)


def run_unbroken(work: Path, output_dir: str, *more: str) -> None:
    """In this process, which spares the imports."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the processes
    try:
        with contextlib.chdir(work):
            train_wan_lora.main([*FLAGS, "--output_dir", output_dir, *more])
    finally:
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def straight(work) -> str:
    """The folder of an unbroken run, which keeps all its states."""
    run_unbroken(work, "straight", "--keep_checkpoints", str(STEPS))
    return "straight"


def kill_and_resume(work: Path, output_dir: str, *more: str, kills: int, seed: int) -> None:
    """Kills the run at random moments after it has got further, and lets it go on to its end."""
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


def resuming(known: set[Path]) -> tuple[str, ...]:
    return ("--resume_from_checkpoint", "latest") if known else ()


def test_a_run_that_is_killed_ends_where_an_unbroken_one_does(work, straight):
    kill_and_resume(work, "killed", kills=1, seed=0)
    assert same(tensors_at(work, "killed"), tensors_at(work, straight))


@pytest.mark.crash
@pytest.mark.parametrize(
    ("more", "seeds"), [("", (1, 2)), ("--cache_latents 2", (3, 4)), ("--adapter_dtype bf16", (5,))], ids=str
)
def test_a_run_that_is_killed_five_times_ends_where_an_unbroken_one_does(work, more, seeds):
    flags = ["--max_train_steps", str(MANY_STEPS), *more.split()]
    unbroken = f"unbroken {more}"
    finish(start(work, unbroken, *flags))
    expected = tensors_at(work, unbroken, MANY_STEPS)
    assert any(name.endswith("/compensation") for name in expected) == ("bf16" in more)
    for seed in seeds:
        kill_and_resume(work, f"killed {seed}", *flags, kills=5, seed=seed)
        assert same(tensors_at(work, f"killed {seed}", MANY_STEPS), expected)


@pytest.mark.crash
@pytest.mark.parametrize(("seed", "more"), [*enumerate(OF_EACH.values(), 6)], ids=OF_EACH)
def test_a_run_with_each_optimizer_that_is_killed_ends_where_an_unbroken_one_does(work, seed, more):
    run_unbroken(work, f"unbroken {more}", *more.split())
    expected = tensors_at(work, f"unbroken {more}")
    kept = {name: tensor for name, tensor in expected.items() if "/optimizer/" in name}
    assert any(tensor.dtype == torch.uint8 for tensor in kept.values()) == ("adamw8bit" in more)
    assert any(name.endswith("/compensation") for name in kept) == ("bf16" in more)
    kill_and_resume(work, f"killed {seed}", *more.split(), kills=3, seed=seed)
    assert same(tensors_at(work, f"killed {seed}"), expected)


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="there are no process groups here")
def test_stopping_all_processes_of_a_run_at_once_saves_it_too(work, straight):
    process = start(work, "group", start_new_session=True)
    wait_for_a_state(work / "group", process, set())
    os.killpg(process.pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    # Whether the wish or the death of a loading process arrives first is the system's choice.
    assert process.returncode in (1, 130) and "Traceback" not in output and "unexpected error" not in output
    last = max(read_state(path).step for path in states(work / "group"))
    assert f"{last:08d}" in output and last < STEPS
    assert same(tensors_at(work, "group", last), tensors_at(work, straight, last))


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, *(pytest.param(n, marks=pytest.mark.crash) for n in SIGNALS if n != signal.SIGTERM)]
)
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
    assert same(tensors_at(work, name), tensors_at(work, straight))
