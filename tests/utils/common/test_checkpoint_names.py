"""The files of a run are recognised by their names, and no other file is taken for one."""

import pytest

from utils.common.checkpoint_names import (
    EXPERTS,
    Checkpoint,
    check_name,
    check_name_of_pairs,
    list_checkpoints,
    parse_name,
)
from utils.common.errors import UserError
from wan.configs import FAMILIES

NAMES = {
    "wan-lora-00000100.safetensors": Checkpoint(100, "lora"),
    "wan-lora-00000100-ema.safetensors": Checkpoint(100, "lora", average=True),
    "wan-lora-00000002_high_noise.safetensors": Checkpoint(2, "high_noise"),
    "wan-lora-00000002-ema_low_noise.safetensors": Checkpoint(2, "low_noise", average=True),
    "Red.Fox-2_v1-00000003.safetensors": Checkpoint(3, "lora", run_name="Red.Fox-2_v1"),
    "fox-00000004-ema_high_noise.safetensors": Checkpoint(4, "high_noise", average=True, run_name="fox"),
    "fox_noise-00000005.safetensors": Checkpoint(5, "lora", run_name="fox_noise"),
    "flower-00000100.safetensors": Checkpoint(100, "lora", run_name="flower"),
    "state-00000100.safetensors": Checkpoint(100),
}
FORMER = {
    "wan-lora_high_noise-00000002.safetensors": Checkpoint(2, "high_noise"),
    "wan-lora_low_noise-00000002-ema.safetensors": Checkpoint(2, "low_noise", average=True),
    "fox_high_noise-00000004-ema.safetensors": Checkpoint(4, "high_noise", average=True, run_name="fox"),
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
        "flower-00000100_low_noise.safetensors",
        "fox-00000100_mid_noise.safetensors",
        "fox-00000100_high_noise_comfy.safetensors",
        "state-00000100_high_noise.safetensors",
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


@pytest.mark.parametrize(("name", "checkpoint"), FORMER.items())
def test_the_earlier_form_of_a_pair_is_read_and_found_where_there_is_no_file_of_the_present_one(
    tmp_path, name, checkpoint
):
    assert parse_name(name) == checkpoint == parse_name(checkpoint.name)
    assert checkpoint.find(tmp_path) is None
    (tmp_path / name).touch()
    assert checkpoint.find(tmp_path) == tmp_path / name
    (tmp_path / checkpoint.name).touch()
    assert checkpoint.find(tmp_path) == tmp_path / checkpoint.name


def test_a_run_that_is_called_like_an_expert_has_files_of_its_own(tmp_path):
    name, own = "fox_high_noise-00000004.safetensors", Checkpoint(4, "lora", run_name="fox_high_noise")
    assert own.name == name and parse_name(name, ["fox_high_noise"]) == own
    assert parse_name(name, ["fox"]) == Checkpoint(4, "high_noise", run_name="fox")
    (tmp_path / name).touch()
    assert list_checkpoints(tmp_path, {"fox_high_noise"}) == {tmp_path / name: own}


@pytest.mark.parametrize("name", ["wan-lora", "a", "2025", "Red_Fox.v1-2", "statement", "console", "x" * 100])
def test_a_name_that_is_accepted_is_found_again_for_each_trainable(name):
    check_name(name)
    check_name_of_pairs(name)
    for trainable in ("lora", *EXPERTS):
        for average in (False, True):
            checkpoint = Checkpoint(7, trainable, average, name)
            assert parse_name(checkpoint.name) == checkpoint


REFUSED = {
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
    with pytest.raises(UserError, match="--name") as caught:
        check_name(name)
    assert reason in str(caught.value)


PROPOSALS = {
    "high": "wan-lora",
    "fox_high_noise": "fox",
    "my-LOW.v2": "my.v2",
    "low_poly_high": "poly",
    "highway": "h1ghway",
    "yelLOW": "yelL0W",
    "fLOWer-lownoise": "fL0Wer",
    "state_low": "wan-lora",
}


@pytest.mark.parametrize(("name", "proposal"), PROPOSALS.items())
def test_a_name_that_would_hide_the_expert_is_refused_with_a_proposal_that_is_accepted(name, proposal):
    with pytest.raises(UserError, match=r"'(?i:high|low)'") as caught:
        check_name_of_pairs(name)
    assert str(caught.value).endswith(f" --name {proposal}")
    check_name(proposal)
    check_name_of_pairs(proposal)


def test_the_trainables_of_experts_are_called_as_the_experts_of_the_released_models():
    pairs = {tuple(expert.name for expert in family.experts) for family in FAMILIES.values() if family.boundaries}
    assert pairs == {EXPERTS}


def test_a_trainable_without_a_name_for_its_files_is_a_mistake_of_the_program():
    with pytest.raises(ValueError, match="'critic'"):
        Checkpoint(1, "critic")
