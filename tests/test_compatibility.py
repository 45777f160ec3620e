"""What version 0.1 wrote is found again: caches, LoRA files, and a run that was half done.

tests/data/v0_1 was written by commit ef8bd86 with

    python train_wan_lora.py --dataset clips --pretrained_model_name_or_path model --cache_dir cache --cache_latents
        --base_res 64 --token_limit 60 --max_train_steps 4 --checkpointing_steps 2 --learning_rate 1e-3 --lora_rank 2
        --ema_decay 0.9 --lr_warmup_steps 1 --caption_dropout 0.3 --val_samples 1 --num_workers 0 --output_dir runs

less the state of step 4, TensorBoard's events and the index of digests, which names absolute paths.
"""

import shutil
from pathlib import Path

import pytest
import torch

import train_wan_lora
from tests.tiny import DATA
from utils.adapters.lora_file import LoraFile
from utils.adapters.lora_reader import read_lora

FLAGS = (
    "--dataset clips --pretrained_model_name_or_path model --cache_dir cache --cache_latents --base_res 64 "
    "--token_limit 60 --max_train_steps 4 --checkpointing_steps 2 --learning_rate 1e-3 --lora_rank 2 --ema_decay 0.9 "
    "--lr_warmup_steps 1 --caption_dropout 0.3 --val_samples 1 --num_workers 0 --output_dir runs"
).split()


@pytest.fixture
def work(tmp_path, monkeypatch) -> Path:
    folder = Path(shutil.copytree(DATA / "v0_1", tmp_path / "work"))
    monkeypatch.chdir(folder)
    return folder


def matrices(lora: LoraFile) -> dict[str, torch.Tensor]:
    downs = {f"{name}.down": pair.down for name, pair in lora.pairs.items()}
    return downs | {f"{name}.up": pair.up for name, pair in lora.pairs.items()}


def test_a_run_of_version_0_1_is_resumed_from_its_caches_and_ends_where_it_did(work, capsys):
    (checkpoints,) = work.glob("runs/*/checkpoints")
    last = [checkpoints / f"wan-lora-00000004{kind}.safetensors" for kind in ("", "-ema")]
    expected = [read_lora(path) for path in last]
    cached = sorted((work / "cache").rglob("*.safetensors"))
    train_wan_lora.main([*FLAGS, "--resume_from_checkpoint", "latest"])
    said = capsys.readouterr().out
    assert said.count("written by version 0.1, without a checksum") == 1
    assert "text: 0 to encode, 5 cached" in said and "latents: 0 to encode, 4 cached" in said
    assert sorted((work / "cache").rglob("*.safetensors")) == cached
    for path, lora in zip(last, expected, strict=True):
        found, wanted = matrices(read_lora(path)), matrices(lora)
        assert found.keys() == wanted.keys()
        for name, tensor in found.items():  # equal to the bit on one machine; kernels differ between processors
            torch.testing.assert_close(tensor, wanted[name], rtol=1e-3, atol=1e-6)
    assert (checkpoints / "state-00000004.safetensors").exists()


def test_a_run_of_version_0_1_with_other_options_is_still_refused(work):
    from utils.common.errors import UserError

    with pytest.raises(UserError, match="--learning_rate was 0.001, is 0.002"):
        train_wan_lora.main([*FLAGS, "--learning_rate", "2e-3", "--resume_from_checkpoint", "latest"])


def test_lora_files_of_version_0_1_say_what_they_said(work):
    (path,) = work.glob("runs/*/checkpoints/wan-lora-00000002.safetensors")
    lora = read_lora(path)
    assert {(pair.rank, pair.alpha) for pair in lora.pairs.values()} == {(2, 2.0)} and len(lora.pairs) == 8
    assert lora.metadata["base_model"] == "model" and lora.metadata["steps"] == "2"
