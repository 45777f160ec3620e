"""Runs with each optimizer, by the command line: resumed exactly, and what they export."""

import shutil
from pathlib import Path

import pytest
import torch

import train_wan_lora
from tests.tiny import write_clips, write_model
from utils.adapters.lora_reader import read_lora
from utils.common.tensor_files import read_tensors
from utils.training.optimizers import KINDS

FLAGS = (
    "--dataset clips --pretrained_model_name_or_path model --base_res 64 --token_limit 60 --control_lora "
    "--max_train_steps 4 --lr_warmup_steps 1 --val_samples 1 --val_steps 2 --num_workers 0 --checkpointing_steps 2 "
    "--output_dir runs"
)
OF_EACH = {
    **{name: f"--optimizer {name} --learning_rate 1e-3 --lora_plus_ratio 4 --input_lr_scale 0.5" for name in KINDS},
    "prodigy": "--optimizer prodigy --learning_rate 1",
    # Only large matrices have moments of 8 bits.
    "adamw8bit": "--optimizer adamw8bit --learning_rate 1e-3 --lora_rank 96",
    "adamw8bit in bf16": "--optimizer adamw8bit --learning_rate 1e-3 --adapter_dtype bf16 --lora_rank 96",
}


@pytest.fixture
def work(tmp_path, monkeypatch) -> Path:
    write_model(tmp_path / "model")
    write_clips(tmp_path / "clips")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("more", OF_EACH.values(), ids=OF_EACH)
def test_each_is_resumed_and_ends_where_an_unbroken_run_does_bit_for_bit(work, more):
    flags = [*FLAGS.split(), *more.split()]
    train_wan_lora.main(flags)
    (folder,) = Path("runs").glob("*/checkpoints")
    straight = {path.name: shutil.move(path, work / path.name) for path in folder.glob("*-00000004*")}
    assert len(straight) == 2
    train_wan_lora.main([*flags, "--resume_from_checkpoint", "latest"])
    for name, path in straight.items():
        first, second = (read_tensors(each)[0] for each in (Path(path), folder / name))
        assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
        if name.startswith("state"):
            assert any(tensor.dtype == torch.uint8 and "/optimizer/" in key for key, tensor in first.items()) == (
                "adamw8bit" in more
            )


def test_what_schedule_free_exports_is_its_average(work):
    train_wan_lora.main([*FLAGS.split(), *"--optimizer schedulefree --learning_rate 1e-2".split()])
    (folder,) = Path("runs").glob("*/checkpoints")
    state = read_tensors(folder / "state-00000004.safetensors")[0]
    for name, pair in read_lora(folder / "wan-lora-00000004.safetensors").pairs.items():
        trained, last = (
            state[f"trainables/lora/{kind.format(f'{name}.lora_B.default.weight')}"]
            for kind in ("parameters/{}", "optimizer/state/{}/z")
        )
        torch.testing.assert_close(pair.up.flatten(), trained.lerp(last, 1 - 1 / 0.9).flatten())
        assert not torch.equal(pair.up.flatten(), trained.flatten())


def test_another_optimizer_is_not_resumed_with(work, capsys):
    train_wan_lora.main([*FLAGS.split(), "--optimizer", "lion"])
    again = [*FLAGS.split(), "--optimizer", "adamw", "--resume_from_checkpoint", "latest", "--max_train_steps", "6"]
    with pytest.raises(Exception, match="optimizer"):
        train_wan_lora.main(again)
    with pytest.raises(Exception, match="its optimizer state of .* has state1, step"):
        train_wan_lora.main([*again, "--allow_changes"])
