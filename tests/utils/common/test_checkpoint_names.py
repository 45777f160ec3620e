"""The files of a run are recognised by their names, and no other file is taken for one."""

import pytest

from utils.common.checkpoint_names import Checkpoint, list_checkpoints, parse_name

NAMES = {
    "wan-lora-00000100.safetensors": Checkpoint(100, "lora"),
    "wan-lora-00000100-ema.safetensors": Checkpoint(100, "lora", average=True),
    "wan-lora_high_noise-00000002.safetensors": Checkpoint(2, "lora_high_noise"),
    "wan-expert2-00000003.safetensors": Checkpoint(3, "expert2"),
    "state-00000100.safetensors": Checkpoint(100),
}


@pytest.mark.parametrize(("name", "checkpoint"), NAMES.items())
def test_a_name_and_what_it_says_go_both_ways(name, checkpoint):
    assert checkpoint.name == name and parse_name(name) == checkpoint


@pytest.mark.parametrize(
    "name",
    [
        "wan-lora-best.safetensors",
        "wan-lora-00000100_comfy.safetensors",
        "wan-lora-100.safetensors",
        "wan-lora-000000100.safetensors",
        "state-00000100-ema.safetensors",
        "state-old.safetensors",
        ".wan-lora-00000003.77.partial.safetensors",
        "wan-lora-00000100.safetensors.bak",
    ],
)
def test_other_peoples_files_are_not_taken_for_a_runs(name):
    assert parse_name(name) is None


def test_a_folder_lists_its_checkpoints_alone(tmp_path):
    for name in (*NAMES, "notes.txt", "lora.safetensors"):
        (tmp_path / name).touch()
    assert list_checkpoints(tmp_path) == {tmp_path / name: checkpoint for name, checkpoint in NAMES.items()}
