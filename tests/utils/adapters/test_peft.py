"""PEFT does without bitsandbytes, and its start is silent."""

import subprocess
import sys

from tests.checkout import ENVIRONMENT, ROOT

LOUD = """
import logging
logging.getLogger(__name__).warning("bitsandbytes is imported")
"""
SCRIPT = """
from torch import nn
import train_wan_lora
from utils.adapters.peft import inject_lora
model = nn.Sequential(nn.Linear(4, 4))
inject_lora(model, ["0"], "style", rank=2, alpha=2)
assert model[0].lora_A["style"].weight.shape == (2, 4)
train_wan_lora.main(["--help"])
"""


def test_the_trainer_starts_without_a_word_on_stderr_and_without_bitsandbytes(tmp_path):
    (tmp_path / "bitsandbytes.py").write_text(LOUD)
    environment = ENVIRONMENT | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", SCRIPT]
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (0, "") and "--dataset" in ran.stdout
