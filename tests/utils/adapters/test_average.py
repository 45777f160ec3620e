from dataclasses import replace
from pathlib import Path

import pytest
import torch

import convert_lora_to_comfy
from utils.adapters.average import average, last_checkpoints
from utils.adapters.lora_file import LoraFile, LoraPair
from utils.adapters.lora_reader import read_lora
from utils.adapters.lora_writer import write_lora
from utils.common.errors import UserError


def lora(value: float, rank: int = 2, alpha: float = 2.0, name: str = "blocks.0.self_attn.q") -> LoraFile:
    pair = LoraPair(torch.full((rank, 8), value), torch.full((8, rank), 2 * value), alpha)
    return LoraFile({name: pair}, metadata={"steps": f"{value:g}"})


@pytest.fixture
def run(tmp_path) -> Path:
    for step in (1, 2, 6, 9):
        write_lora(tmp_path / f"wan-lora-{step:08d}.safetensors", lora(float(step)))
    write_lora(tmp_path / "wan-lora-00000002-ema.safetensors", lora(100.0))
    (tmp_path / "state-00000002.safetensors").touch()
    return tmp_path


def test_the_mean_is_that_of_the_matrices_with_the_metadata_of_the_last():
    mean = average([lora(1.0), lora(2.0), lora(6.0)])
    pair = mean.pairs["blocks.0.self_attn.q"]
    assert torch.equal(pair.down, torch.full((2, 8), 3.0)) and torch.equal(pair.up, torch.full((8, 2), 6.0))
    assert pair.alpha == 2.0 and mean.metadata == {"steps": "6"}


@pytest.mark.parametrize("other", [lora(1.0, rank=4), lora(1.0, alpha=4.0), lora(1.0, name="blocks.0.self_attn.k")])
def test_loras_that_differ_in_modules_rank_or_alpha_have_no_mean(other):
    with pytest.raises(UserError, match="different LoRAs"):
        average([lora(1.0), other])


def test_the_checkpoints_are_those_of_earlier_steps_without_moving_averages(run):
    names = [path.name for path in last_checkpoints(run / "wan-lora-00000006.safetensors", 3)]
    assert names == [f"wan-lora-{step:08d}.safetensors" for step in (1, 2, 6)]
    with pytest.raises(UserError, match="has only 2 checkpoints up to wan-lora-00000002.safetensors"):
        last_checkpoints(run / "wan-lora-00000002.safetensors", 3)
    with pytest.raises(UserError, match="takes a checkpoint of a run"):
        last_checkpoints(run / "wan-lora-00000002-ema.safetensors", 2)


def test_the_converter_writes_the_mean_under_a_name_of_its_own(run, capsys):
    before = {path: path.read_bytes() for path in run.iterdir()}
    convert_lora_to_comfy.main(["--input_lora", str(run / "wan-lora-00000009.safetensors"), "--average", "2"])
    written = run / "wan-lora-00000009_average2_comfy.safetensors"
    assert torch.equal(read_lora(written).pairs["blocks.0.self_attn.q"].down, torch.full((2, 8), 7.5))
    assert all(path.read_bytes() == data for path, data in before.items())
    said = capsys.readouterr().out
    assert "averaging" in said and "wan-lora-00000006" in said and str(written) in said


def test_the_checkpoints_to_average_are_of_one_name_and_one_expert(tmp_path):
    for step in (1, 2, 3):
        for name in ("fox-{}", "fox-{}_high_noise", "fox-{}_low_noise", "fox-{}-ema_high_noise", "wan-lora-{}"):
            write_lora(tmp_path / f"{name.format(f'{step:08d}')}.safetensors", lora(float(step)))
    for expert in ("", "_high_noise", "_low_noise"):
        found = [path.name for path in last_checkpoints(tmp_path / f"fox-00000003{expert}.safetensors", 2)]
        assert found == [f"fox-00000002{expert}.safetensors", f"fox-00000003{expert}.safetensors"]


def test_checkpoints_of_the_earlier_form_of_names_are_averaged_with_later_ones(tmp_path):
    names = ["fox_low_noise-00000001", "fox_low_noise-00000002", "fox-00000003_low_noise", "fox-00000004_low_noise"]
    for name in (*names, "fox_high_noise-00000002", "fox-00000004_high_noise", "fox_low_noise-00000002-ema"):
        write_lora(tmp_path / f"{name}.safetensors", lora(1.0))
    for last in (2, 4):
        found = last_checkpoints(tmp_path / f"{names[last - 1]}.safetensors", last)
        assert [path.stem for path in found] == names[:last]
    write_lora(tmp_path / "fox_low_noise-00000004.safetensors", lora(1.0))
    assert last_checkpoints(tmp_path / f"{names[3]}.safetensors", 1) == [tmp_path / f"{names[3]}.safetensors"]


def test_the_mean_says_so_and_shows_no_picture_of_another():
    shown = {"modelspec.title": "fox, step 6", "modelspec.thumbnail": "data:...", "steps": "6"}
    mean = average([lora(1.0), replace(lora(2.0), metadata=shown)])
    assert mean.metadata == {"modelspec.title": "fox, step 6, mean of 2 checkpoints", "steps": "6"}


def test_the_mean_of_a_pair_is_that_of_each_expert_alone(tmp_path, capsys):
    for step in (1, 2, 6):
        for sign, expert in ((1, "high_noise"), (-1, "low_noise")):
            write_lora(tmp_path / f"wan-lora-{step:08d}_{expert}.safetensors", lora(sign * float(step)))
    write_lora(tmp_path / "wan-lora-00000004.safetensors", lora(100.0))
    (high,) = last_checkpoints(tmp_path / "wan-lora-00000006_high_noise.safetensors", 1)
    assert high.name == "wan-lora-00000006_high_noise.safetensors"
    convert_lora_to_comfy.main(["--input_lora", str(tmp_path / "wan-lora-00000006.safetensors"), "--average", "3"])
    for mean, expert in ((3.0, "high_noise"), (-3.0, "low_noise")):
        written = tmp_path / f"wan-lora-00000006_{expert}_average3_comfy.safetensors"
        assert torch.equal(read_lora(written).pairs["blocks.0.self_attn.q"].down, torch.full((2, 8), mean))
    assert capsys.readouterr().out.count("averaging") == 6
