"""Few-step distillation that is killed in the middle of a step ends as an unbroken one does, bit for bit."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train_wan_lora
from tests.tiny import write_clips, write_model
from utils.common.tensor_files import read_tensors
from wan.configs import FAMILIES

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
FLAGS = (
    "--few_step --dataset clips --pretrained_model_name_or_path model --base_res 64 --token_limit 60 --num_workers 0 "
    "--random_frame_length --max_train_steps 10 --gen_update_interval 2 --checkpointing_steps 1 --learning_rate 1e-3 "
    "--learning_rate_critic 2e-3 --lr_scheduler cosine --lr_warmup_steps 2 --val_samples 0 --critic_alignment 0.1 "
    "--ema_decay 0.5 --gradient_accumulation 2"
).split()
# Places of kills, one after another: what and when, of which phase, the step, and which time in that step. A student's
# step has two batches of the student, its update and average, the alignment; then two batches of the critic, its
# update; then the state.
ONE_EXPERT = (
    ("student:before", "student", 2, 1),
    ("student:after", "student", 2, 2),
    ("student:backward", "student", 4, 2),
    ("clearing:before", "student", 4, 1),
    ("average:before", "student", 4, 1),
    ("alignment:before", "student", 6, 1),
    ("alignment:after", "student", 6, 1),
    ("critic:before", "critic", 6, 1),
    ("critic:backward", "critic", 7, 2),
    ("critic:after", "critic", 8, 2),
    ("clearing:before", "critic", 8, 2),
    ("update:after", "critic", 8, 2),
    ("state:before", "critic", 9, 1),
    ("student:after", "student", 10, 1),
)
# Turns of three steps: the steps of the high expert's student are 2, 7 and 9, those of the low one's 5, 10 and 12.
TWO_EXPERTS = (
    ("student:before", "student", 2, 2),
    ("critic:after", "critic", 4, 1),
    ("student:after", "student", 5, 2),
    ("student:backward", "student", 5, 2),
    ("alignment:after", "student", 7, 1),
    ("average:before", "student", 10, 1),
    ("critic:backward", "critic", 11, 1),
    ("clearing:before", "student", 12, 1),
    ("critic:before", "critic", 12, 2),
)
KINDS = {
    "one expert on data": ("wan2.1-t2v-1.3B", "", ONE_EXPERT),
    "two experts on samples": (
        "wan2.2-t2v-A14B",
        "--distill_input rollout --expert_phase_steps 3 --max_train_steps 6",
        TWO_EXPERTS,
    ),
    "first frames given or not": (
        "wan2.2-ti2v-5B",
        "--distill_input rollout",
        (("student:after", "student", 4, 2), ("alignment:after", "student", 6, 1), ("critic:after", "critic", 7, 1)),
    ),
}
LAST = {"two experts on samples": 12}  # step


def outcome(output_dir: str, step: int) -> dict[str, tuple[dict[str, torch.Tensor], dict[str, str]]]:
    """The files after a step, the state and the LoRAs, by name: tensors and metadata."""
    (folder,) = Path(output_dir).glob("*/checkpoints")
    return {path.name: read_tensors(path) for path in folder.glob(f"*-{step:08d}*.safetensors")}


def run_here(*flags: str) -> None:
    """In this process, which spares the imports."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the processes
    try:
        train_wan_lora.main([*FLAGS, *flags])
    finally:
        torch.set_num_threads(threads)


def resuming(output_dir: str) -> tuple[str, ...]:
    states = list(Path(output_dir).glob("*/checkpoints/state-*"))
    return ("--resume_from_checkpoint", "latest") if states else ()


@pytest.mark.crash
@pytest.mark.parametrize("kind", KINDS)
def test_a_distillation_that_is_killed_in_its_phases_ends_where_an_unbroken_one_does(tmp_path, monkeypatch, kind):
    family, more, places = KINDS[kind]
    write_model(tmp_path / "model", FAMILIES[family])
    write_clips(tmp_path / "clips")
    monkeypatch.chdir(tmp_path)
    run_here(*more.split(), "--output_dir", "unbroken")
    expected = outcome("unbroken", LAST.get(kind, 10))
    flags = [*FLAGS, *more.split(), "--output_dir", "killed"]
    for place, phase, step, count in places:
        command = [sys.executable, "-m", "tests.killed", place, str(step), str(count), *flags, *resuming("killed")]
        process = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=120, check=False)
        assert f"killed at {place} of the {phase} in step {step}\n" in process.stdout, process.stdout + process.stderr
        assert process.returncode == -signal.SIGKILL
    run_here(*more.split(), "--output_dir", "killed", *resuming("killed"))
    found = outcome("killed", LAST.get(kind, 10))
    # A state, and for each expert a LoRA and its average.
    assert found.keys() == expected.keys() and len(found) == 1 + 2 * len(FAMILIES[family].experts)
    for name, (tensors, facts) in expected.items():
        again, said = found[name]
        assert again.keys() == tensors.keys(), name
        assert all(torch.equal(again[key], tensor) for key, tensor in tensors.items()), name
        assert said == facts, name
