"""A LoRA that was distilled into few steps says so, and is sampled so unless it is asked otherwise."""

from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

import convert_lora_to_comfy
from tests.chosen import make_lora
from utils.adapters.average import average
from utils.adapters.beside import Chosen
from utils.adapters.lora_file import LoraError
from utils.adapters.lora_reader import read_lora
from utils.adapters.lora_writer import LAYOUTS, write_lora
from utils.adapters.stated_steps import Asked, StatedSteps, choose_sampler, read_statement, statements, to_text
from utils.common.errors import UserError
from wan.text2video import Sampler

FACTS = {"denoising_steps": "1000 750 500 250", "shift": "5"}
FOUR = StatedSteps((1000, 750, 500, 250), 5.0, "fast.safetensors")
USUAL = Sampler("unipc", 40, (4.0, 3.0), 12.0, (0.875,), (7,))
FEW = replace(USUAL, solver="lcm", steps=4, guidance=(1.0,), shift=5.0, timesteps=FOUR.timesteps)


def test_a_statement_is_the_steps_and_the_shift():
    assert read_statement(FACTS, "fast.safetensors") == FOUR
    assert str(FOUR) == "fast.safetensors was distilled into 4 steps (1000 750 500 250) at shift 5"
    one = read_statement({"denoising_steps": "1e3", "shift": "0.5", "steps": "2000"}, "one.safetensors")
    assert str(one) == "one.safetensors was distilled into 1 step (1000) at shift 0.5"
    steps = (1000.0, 937.5, 1000 / 3)
    written = read_statement({"denoising_steps": to_text(steps), "shift": "3"}, "x")
    assert written is not None and written.timesteps == pytest.approx(steps, rel=1e-8)


def test_a_shift_alone_states_nothing():
    assert read_statement({"shift": "5"}, "plain.safetensors") is None
    assert read_statement({}, "plain.safetensors") is None


@pytest.mark.parametrize(
    ("steps", "shift", "message"),
    [
        ("", "5", "denoising_steps is '', not a list of steps from 1000 down"),
        ("1000 750 750", "5", "is '1000 750 750', not a list"),
        ("250 500", "5", "not a list"),
        ("1000 0", "5", "not a list"),
        ("1001 500", "5", "not a list"),
        ("1000, 500", "5", "not a list"),
        ("1000 nan", "5", "not a list"),
        ("[1000]\n", "5", r"is '\[1000\]\\n', not a list"),
        ("1000 500", None, r"distilled into the steps 1000 500, but the metadata shift.* is missing"),
        ("1000 500", "five", "shift, a positive number, is 'five'"),
        ("1000 500", "0", "is '0'"),
        ("1000 500", "inf", "is 'inf'"),
        ("1000 500", "nan", "is 'nan'"),
    ],
)
def test_a_damaged_statement_is_refused_with_the_name_of_its_file(steps, shift, message):
    metadata = {"denoising_steps": steps} | ({} if shift is None else {"shift": shift})
    with pytest.raises(LoraError, match=rf"^fast\.safetensors: .*{message}"):
        read_statement(metadata, "fast.safetensors")


def test_all_loras_of_all_transformers_are_asked_once():
    plain, fast = make_lora(0.1), replace(make_lora(0.1), metadata=FACTS)
    path = Path("fast.safetensors")
    loras = {"high_noise": [Chosen(plain, 1.0), Chosen(fast, 0.5, path)], "low_noise": [Chosen(fast, 0.5, path)]}
    assert statements(loras) == [FOUR]
    assert statements({"transformer": [Chosen(plain, 1.0)]}) == []
    damaged = replace(plain, metadata={"denoising_steps": "4"} | {"shift": "-1"})
    with pytest.raises(LoraError, match="fast.safetensors"):
        statements({"transformer": [Chosen(damaged, 1.0, path)]})


def test_the_usual_settings_hold_where_nothing_is_stated():
    assert choose_sampler(USUAL, Asked()) == USUAL
    asked = Asked(steps=9, solver="euler", guidance=(0.0,), shift=3.0)
    assert choose_sampler(USUAL, asked) == replace(USUAL, steps=9, solver="euler", guidance=(0.0,), shift=3.0)
    assert choose_sampler(USUAL, Asked(steps=4, solver="lcm")).timesteps == ()


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (Asked(), FEW),
        (Asked(steps=4), FEW),
        (Asked(solver="lcm"), FEW),
        (Asked(steps=8), replace(FEW, steps=8, timesteps=())),
        (Asked(guidance=(2.0, 1.0)), replace(FEW, guidance=(2.0, 1.0))),
        (Asked(shift=8.0), replace(FEW, shift=8.0)),
        (Asked(solver="euler"), replace(FEW, solver="euler", timesteps=())),
        (Asked(solver="unipc", steps=20), replace(FEW, solver="unipc", steps=20, timesteps=())),
    ],
)
def test_what_is_stated_holds_where_nothing_else_is_asked(asked, expected):
    assert choose_sampler(USUAL, asked, [FOUR]) == expected
    assert choose_sampler(USUAL, asked, [FOUR, replace(FOUR, source="other.safetensors")]) == expected


@pytest.mark.parametrize(
    ("other", "flags", "enough"),
    [
        (replace(FOUR, timesteps=(1000, 500)), "--steps", Asked(steps=4)),
        (replace(FOUR, shift=8.0), "--shift", Asked(shift=6.0)),
        (StatedSteps((1000,), 8.0, ""), "--steps and --shift", Asked(steps=4, shift=6.0)),
    ],
)
def test_two_that_disagree_are_refused_unless_what_they_disagree_on_is_asked(other, flags, enough):
    other = replace(other, source="other.safetensors")
    with pytest.raises(UserError) as caught:
        choose_sampler(USUAL, Asked(solver="lcm", guidance=(1.0,)), [FOUR, other])
    assert str(caught.value) == (
        f"{FOUR}, and {other}: nothing can be sampled both ways.\nLeave out one of them, or say how to sample with "
        f"{flags}."
    )
    found = choose_sampler(USUAL, enough, [FOUR, other])
    steps = FOUR.timesteps if other.timesteps == FOUR.timesteps else ()
    assert (found.steps, found.timesteps, found.shift) == (4, steps, enough.shift or 5.0)


def test_another_number_of_guidances_than_experts_is_refused_by_the_name_of_its_flag():
    with pytest.raises(UserError, match="--sample_guidance has 3 values, but the model 2 experts"):
        choose_sampler(USUAL, Asked(guidance=(1.0, 2.0, 3.0), prefix="--sample_"))
    with pytest.raises(UserError, match="--guidance has 2 values, but the model 1 expert"):
        choose_sampler(replace(USUAL, boundaries=()), Asked(guidance=(1.0, 2.0)), [FOUR])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_keeps_the_statement_there_and_back(tmp_path, layout):
    source, back = tmp_path / "lora.safetensors", tmp_path / "back.safetensors"
    write_lora(source, replace(make_lora(0.1), metadata=FACTS))
    output = tmp_path / ("folder" if layout == "peft" else "output.safetensors")
    convert_lora_to_comfy.main(["--input_lora", str(source), "--to", layout, "--output_lora", str(output)])
    convert_lora_to_comfy.main(["--input_lora", str(output), "--output_lora", str(back)])
    for path in (output, back):
        assert read_statement(read_lora(path).metadata, "fast.safetensors") == FOUR


def test_a_mean_of_checkpoints_and_another_dtype_keep_the_statement(tmp_path):
    lora = replace(make_lora(0.1), metadata=FACTS)
    assert read_statement(average([lora, lora]).metadata, "fast.safetensors") == FOUR
    source, output = tmp_path / "lora.safetensors", tmp_path / "lora_comfy.safetensors"
    write_lora(source, lora)
    convert_lora_to_comfy.main(["--input_lora", str(source), "--dtype", "bf16", "--metadata", "full"])
    assert read_statement(read_lora(output).metadata, "fast.safetensors") == FOUR
    assert len(load_file(output)) == len(load_file(source))
