"""What the files of a run say of it."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.experts import options
from tests.tiny import write_model
from utils.common.decisions import Decisions
from utils.runs.about import run_settings
from utils.runs.run import RunSettings
from wan.checkpoints import ModelFiles, open_model, transformer_fingerprint
from wan.configs import FAMILIES

A14B, SMALL = FAMILIES["wan2.2-i2v-A14B"], FAMILIES["wan2.1-i2v-14B-480P"]
FINGERPRINT = {"clips/a.mp4": "0123"}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> ModelFiles:
    return open_model(write_model(tmp_path_factory.mktemp("models") / "Wan2.2-I2V-A14B", A14B))


def described(files: ModelFiles, flags: str = "", size: tuple[int, int] = (832, 480), control: str = "") -> RunSettings:
    opts = options(flags)
    data = SimpleNamespace(
        train=[SimpleNamespace(control=None), SimpleNamespace(control=control and Path(control))],
        fingerprint=FINGERPRINT,
        clips_by_folder={"foxes": 2},
    )
    inputs = SimpleNamespace(data=data, files=files, roles=opts.roles(files.family), size=size)
    return run_settings(opts, inputs, 30, Decisions("cpu", made={"compile": "off"}))


def test_an_ordinary_run_says_what_it_was_trained_with_and_no_steps(files):
    base = f"--pretrained_model_name_or_path {files.source}"
    found = described(files, f"{base} --shift 7 --name fox --trigger ohwx --output_dir outputs/foxes")
    assert found.about == {"base_model": "Wan2.2-I2V-A14B", "control": "", "shift": "7"}
    assert (found.output_dir, found.total_steps, found.name) == (Path("outputs/foxes"), 30, "fox")
    assert found.card.family is A14B and found.card.size == (832, 480) and found.card.words == ["ohwx"]
    assert found.card.samples == {"foxes": 2} and found.card.base_model == found.about["base_model"]


def test_a_student_says_its_steps_and_their_shift_instead_of_that_of_ordinary_noise_levels(files):
    assert described(files, "--few_step").about["shift"] == "5" != described(files).about["shift"]
    about = described(files, "--few_step --denoising_steps 8 --few_step_shift 6.5").about
    assert (about["denoising_steps"], about["shift"]) == ("1000 875 750 625 500 375 250 125", "6.5")
    listed = described(files, "--few_step --denoising_step_indices_list 1000 937.5 833.25 625").about
    assert listed["denoising_steps"] == "1000 937.5 833.25 625"


@pytest.mark.parametrize(("size", "shift"), [((832, 480), "3"), ((1280, 720), "5")])
def test_the_shift_is_that_of_the_size_of_the_largest_clip(tmp_path, size, shift):
    files = open_model(write_model(tmp_path / "Wan2.1-I2V-14B-480P", SMALL))
    assert described(files, "--few_step", size).about["shift"] == shift


@pytest.mark.parametrize(
    ("flags", "control", "said"),
    [
        ("--expert_range overlap", "", {"control": "", "expert_range": "overlap"}),
        ("--control_lora", "", {"control": "tile"}),
        ("--control_lora", "depth/a.mp4", {"control": "file"}),
        ("--control_lora --control_i2v", "", {"control": "tile", "control_i2v": "true"}),
    ],
)
def test_what_is_not_as_usual_is_said(files, flags, control, said):
    about = described(files, flags, control=control).about
    assert about == {"base_model": about["base_model"], "shift": "3", **said}


def test_all_options_are_in_the_files_only_if_asked_for(files):
    found = described(files, "--few_step --metadata full --caption_prefix kelo")
    assert json.loads(found.about["options"]) == json.loads(found.options_json)
    assert json.loads(found.options_json)["caption_prefix"] == "kelo"
    assert "kelo" not in str(described(files, "--few_step --caption_prefix kelo").about)


def test_a_state_has_what_decides_a_run(files):
    facts = described(files, "--few_step --gen_update_interval 2 --expert low --name fox").facts
    assert facts.options["few_step"] and facts.options["gen_update_interval"] == 2
    assert not {"output_dir", "name"} & facts.options.keys()
    assert facts.data == FINGERPRINT and facts.decided == {"device": "cpu", "compile": "off"}
    assert facts.base == {"the base model's low_noise": transformer_fingerprint(files.transformers["low_noise"])}
