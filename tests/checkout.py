"""The program as a user has it, and its scripts as a user types them."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def write_checkout(folder: Path) -> Path:
    """The scripts, and all that they need but a model."""
    for script in ROOT.glob("*_lora*.py"):
        shutil.copy(script, folder)
    for room in ("utils", "wan"):
        shutil.copytree(ROOT / room, folder / room, ignore=shutil.ignore_patterns("__pycache__"))
    copy_prompts(folder / "embeddings")
    return folder


def copy_prompts(folder: Path) -> Path:
    """The prompts that ship with the project, without the embeddings that runs in this checkout have cached."""
    folder.mkdir(parents=True)
    for prompt in (ROOT / "embeddings").glob("*.txt"):
        shutil.copy(prompt, folder)
    return folder


def start(script: str, *arguments: object, cwd: Path) -> subprocess.Popen:
    """A script that runs in a process of its own; what it prints is thrown away."""
    command = [sys.executable, script, *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=cwd, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, text=True
    )


def run(script: str, *arguments: object, cwd: Path, code: int = 0) -> subprocess.CompletedProcess:
    """What a script printed, which has to end with this exit code."""
    command = [sys.executable, script, *map(str, arguments)]
    result = subprocess.run(command, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == code, result.stdout + result.stderr
    return result
