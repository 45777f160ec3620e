"""The trainer as benchmarks start it: what it is given, where it goes on, and what is found after it."""

import subprocess
from pathlib import Path

import pytest

from benchmarks.training import LOG, run_trainer
from nano.demo import MODEL, ROOT
from utils.common.checkpoint_names import LORA, Checkpoint
from utils.common.errors import RunError


class Trainer:
    """In place of the process of the trainer: says something, and writes a LoRA and a state of step 2."""

    def __init__(self, code: int = 0) -> None:
        self.code, self.calls = code, list[list[str]]()

    def __call__(self, command, stdout, check):
        self.calls.append(command)
        stdout.write(f"start {len(self.calls)}\n")
        folder = Path(command[command.index("--output_dir") + 1]) / "run" / "checkpoints"
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("wan-lora-00000002.safetensors", "state-00000002.safetensors"):
            (folder / name).touch()
        return subprocess.CompletedProcess(command, self.code)


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch) -> Trainer:
    trainer = Trainer()
    monkeypatch.setattr(subprocess, "run", trainer)
    return trainer


def test_it_goes_on_from_a_state_and_returns_the_loras_without_the_state(tmp_path, trainer):
    runs, clips = tmp_path / "runs", tmp_path / "clips"
    for start in (1, 2):
        loras = run_trainer(runs, clips, 3, "--learning_rate", 1e-3)
        assert loras == {runs / "run" / "checkpoints" / "wan-lora-00000002.safetensors": Checkpoint(2, LORA)}
        assert (runs / LOG).read_text() == f"start {start}\n"
    first, again = trainer.calls
    assert first[1] == str(ROOT / "train_wan_lora.py") and again == [*first, "--resume_from_checkpoint", "latest"]
    given = dict(zip(first[2::2], first[3::2], strict=True))
    assert given == {
        "--dataset": str(clips),
        "--output_dir": str(runs),
        "--pretrained_model_name_or_path": str(MODEL),
        "--seed": "3",
        "--val_samples": "0",
        "--learning_rate": "0.001",
    }


def test_a_trainer_that_fails_ends_the_command(tmp_path, trainer):
    trainer.code = 2
    with pytest.raises(RunError, match=r"train_wan_lora.py ended with an error, see above and .*log\.txt"):
        run_trainer(tmp_path / "runs", tmp_path / "clips", 0)
