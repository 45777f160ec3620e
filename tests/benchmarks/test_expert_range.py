"""The command that measures ranges of noise levels: its files, its table, and that it continues where it stopped."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from benchmarks import expert_range
from benchmarks.expert_range import EXPERTS, HIGH_NOISE, KINDS, SEEDS, SHARED, Studio, figures_file, lora_file, train
from nano.demo import MODEL
from utils.adapters.lora_file import LoraFile, LoraPair
from utils.adapters.lora_writer import write_lora
from utils.common.errors import RunError
from wan.checkpoints import open_model

CPU = torch.device("cpu")


def trainer(calls: list[list[str]], code: int = 0):
    """Stands for the trainer: writes the LoRAs of the last step, and of an earlier one."""

    def run(command, stdout, check):
        calls.append(command)
        folder = Path(command[command.index("--output_dir") + 1]) / "run" / "checkpoints"
        folder.mkdir(parents=True)
        ends = [f"_{expert}" for expert in EXPERTS] if "--expert_range" in command else [""]
        for step in (expert_range.STEPS, 2 * expert_range.STEPS):
            for end in ends:
                (folder / f"wan-lora-{step:08d}{end}.safetensors").write_text(f"{step}{end}")
        return subprocess.CompletedProcess(command, code)

    return run


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_trained_once_for_as_many_steps_in_all(tmp_path, monkeypatch, kind):
    calls: list[list[str]] = []
    monkeypatch.setattr(expert_range, "write_clips", lambda clips, seed: clips.mkdir(parents=True, exist_ok=True))
    monkeypatch.setattr(subprocess, "run", trainer(calls))
    loras = train(tmp_path, 1, kind)
    assert train(tmp_path, 1, kind) == loras and len(calls) == 1
    (command,) = calls
    steps = int(command[len(command) - command[::-1].index("--max_train_steps")])
    assert steps == 2 * expert_range.STEPS if kind == SHARED else steps == expert_range.STEPS
    ends = {expert: "" if kind == SHARED else f"_{expert}" for expert in EXPERTS}
    assert {expert: path.read_text() for expert, path in loras.items()} == {
        expert: f"{2 * expert_range.STEPS}{end}" for expert, end in ends.items()
    }
    assert command[command.index("--seed") + 1] == "1"
    if kind != SHARED:
        given = {flag: command[command.index(flag) + 1] for flag in ("--expert_range", "--high_noise", "--low_noise")}
        assert given == {"--expert_range": kind, "--high_noise": str(HIGH_NOISE), "--low_noise": str(MODEL)}


def test_a_training_that_fails_ends_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr(expert_range, "write_clips", lambda clips, seed: clips.mkdir(parents=True))
    monkeypatch.setattr(subprocess, "run", trainer([], code=1))
    with pytest.raises(RunError, match=r"ended with an error, see above and .*log\.txt"):
        train(tmp_path, 0, "own")
    assert not lora_file(tmp_path, 0, "own", "high_noise").exists()


def test_loras_that_are_missing_end_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr(expert_range, "write_clips", lambda clips, seed: clips.mkdir(parents=True))
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 0))
    with pytest.raises(RunError, match="has not written the LoRAs of step 300"):
        train(tmp_path, 0, "own")


def test_the_table_has_means_and_deviations_over_the_seeds(tmp_path, capsys):
    for number, kind in enumerate(KINDS):
        for seed in SEEDS:
            path = figures_file(tmp_path, seed, kind)
            path.parent.mkdir(exist_ok=True)
            figures = {"high_noise": 0.1 + number, "low_noise": 0.2 + seed, "style": 0.5 + 0.1 * seed, "all": 0.25}
            path.write_text(json.dumps(figures))
    (tmp_path / "run.json").write_text('{"commit": "x"}')
    expert_range.report(tmp_path)
    said = capsys.readouterr().out.splitlines()
    assert said[2] == "| own | 0.1000 ± 0.0000 | 1.2000 ± 1.0000 | 60.0 ± 10.0% | 25.0 ± 0.0% |" and len(said) == 6
    assert json.loads((tmp_path / "expert_range.json").read_text())["rows"].keys() == set(KINDS)


def test_each_expert_is_measured_with_its_own_lora(tmp_path, monkeypatch):
    """A copy of Wan-Nano stands for the other expert."""
    shutil.copytree(MODEL, tmp_path / "high", ignore=shutil.ignore_patterns("*.pth", "google"))
    monkeypatch.setattr(expert_range, "CLIPS", 1)
    monkeypatch.setattr(expert_range, "PROMPTS", 1)
    monkeypatch.setattr(expert_range, "generate", lambda models, *_, **__: [torch.zeros(17, 3, 64, 64).byte()])
    studio = Studio(open_model(MODEL, high_noise=tmp_path / "high", low_noise=MODEL), CPU)
    loras = {}
    for expert, value in zip(EXPERTS, (0.0, 0.1), strict=True):
        pair = LoraPair(torch.full((1, 192), value), torch.full((192, 1), value), 1.0)
        write_lora(tmp_path / f"{expert}.safetensors", LoraFile({"blocks.0.self_attn.v": pair}))
        loras[expert] = tmp_path / f"{expert}.safetensors"
    levels: list[list[float]] = []
    measure = expert_range.validation_loss

    def validation_loss(predict, clips, seed, sigmas):
        levels.append(sigmas)
        return measure(predict, clips, seed, sigmas)

    monkeypatch.setattr(expert_range, "validation_loss", validation_loss)
    plain = studio.measure(dict.fromkeys(EXPERTS, loras["high_noise"]))
    assert len(levels) == 2 and min(levels[0]) > 0.875 > max(levels[1]) and min(levels[1]) < 0.2
    found = studio.measure(loras)
    assert found["high_noise"] == plain["high_noise"] and found["low_noise"] != plain["low_noise"]
    assert 0.05 < found["high_noise"] < 2 and found["style"] == found["all"] == 0
