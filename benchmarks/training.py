"""The trainer as benchmarks start it: what it is given, how it is resumed, and what it has written."""

import subprocess
import sys
from pathlib import Path

from nano.demo import MODEL, ROOT
from utils.common.checkpoint_names import CHECKPOINTS, STATES, Checkpoint, list_checkpoints
from utils.common.errors import RunError

LOG = "log.txt"  # what the trainer has said, in the folder of its runs


def run_trainer(runs: Path, clips: Path, seed: int, *given: object) -> dict[Path, Checkpoint]:
    """Trains without validation, from the last state in the folder if there is one, and returns the LoRAs in it.

    Raises RunError where the trainer fails.
    """
    runs.mkdir(exist_ok=True)
    fixed = ("--dataset", clips, "--output_dir", runs, "--pretrained_model_name_or_path", MODEL)
    resume = ("--resume_from_checkpoint", "latest") if any(runs.glob(f"*/{CHECKPOINTS}/{STATES}")) else ()
    command = [sys.executable, ROOT / "train_wan_lora.py", *fixed, "--seed", seed, "--val_samples", 0, *given, *resume]
    with (runs / LOG).open("w", encoding="utf-8") as output:
        code = subprocess.run([str(each) for each in command], stdout=output, check=False).returncode
    if code:
        raise RunError(f"train_wan_lora.py ended with an error, see above and {runs / LOG}")
    return {
        path: checkpoint
        for folder in runs.glob(f"*/{CHECKPOINTS}")
        for path, checkpoint in list_checkpoints(folder).items()
        if checkpoint.trainable is not None
    }
