"""The files of a run are recognised by their names, and no other file is taken for one."""

import pytest

from utils.common.checkpoint_names import EXPERTS, Checkpoint, check_output_name, list_checkpoints, parse_name
from utils.common.errors import UserError
from wan.configs import FAMILIES

NAMES = {
    "wan-lora-00000100.safetensors": Checkpoint(100, "lora"),
    "wan-lora-00000100-ema.safetensors": Checkpoint(100, "lora", average=True),
    "wan-lora_high_noise-00000002.safetensors": Checkpoint(2, "high_noise"),
    "wan-lora_low_noise-00000002-ema.safetensors": Checkpoint(2, "low_noise", average=True),
    "Red.Fox-2_v1-00000003.safetensors": Checkpoint(3, "lora", output_name="Red.Fox-2_v1"),
    "fox_high_noise-00000004-ema.safetensors": Checkpoint(4, "high_noise", average=True, output_name="fox"),
    "fox_noise-00000005.safetensors": Checkpoint(5, "lora", output_name="fox_noise"),
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
        "State-00000100.safetensors",
        "flower-00000100.safetensors",
        "fox_high_noise_low_noise-00000100.safetensors",
        "fox-00000001-00000100.safetensors",
        "-00000100.safetensors",
    ],
)
def test_other_peoples_files_are_not_taken_for_a_runs(name):
    assert parse_name(name) is None


def test_a_folder_lists_its_checkpoints_alone(tmp_path):
    for name in (*NAMES, "notes.txt", "lora.safetensors"):
        (tmp_path / name).touch()
    assert list_checkpoints(tmp_path) == {tmp_path / name: checkpoint for name, checkpoint in NAMES.items()}


@pytest.mark.parametrize("name", ["wan-lora", "a", "2025", "Red_Fox.v1-2", "statement", "console", "x" * 100])
def test_a_name_that_is_accepted_is_found_again_for_each_trainable(name):
    check_output_name(name)
    for trainable in ("lora", *EXPERTS):
        for average in (False, True):
            checkpoint = Checkpoint(7, trainable, average, name)
            assert parse_name(checkpoint.name) == checkpoint


REFUSED = {
    "holds 'high'": ["high", "fox_high_noise", "highway"],
    "holds 'LOW'": ["LOW", "yelLOW", "fLOWer-low"],
    "names files: use letters": [
        "",
        "a/b",
        "a\\b",
        "..",
        ".fox",
        "-fox",
        "a fox",
        "füchse",
        "fox:1",
        "fox*",
        "a\n",
        "_a",
    ],
    "has 101 characters, more than 100": ["x" * 101],
    "is the name of a device on Windows": ["con", "NUL", "aux.v1", "COM1", "lpt9.a.b"],
    "is kept for the states": ["state", "State", "state-of-the-art"],
    "must not end like a file of a run": ["fox-00000100", "fox-ema", "fox-EMA", "fox.safetensors", "fox-00000100-ema"],
}


@pytest.mark.parametrize(("reason", "name"), [(reason, name) for reason, names in REFUSED.items() for name in names])
def test_a_name_whose_files_could_not_be_told_apart_or_moved_is_refused_with_the_reason(reason, name):
    with pytest.raises(UserError, match="--output_name") as caught:
        check_output_name(name)
    assert reason in str(caught.value)


def test_the_trainables_of_experts_are_called_as_the_experts_of_the_released_models():
    pairs = {tuple(expert.name for expert in family.experts) for family in FAMILIES.values() if family.boundaries}
    assert pairs == {EXPERTS}


def test_a_trainable_without_a_name_for_its_files_is_a_mistake_of_the_program():
    with pytest.raises(ValueError, match="'critic'"):
        Checkpoint(1, "critic")
