"""The LoRAs that are sampled with are those of the transformers that they are for; what is not used is said."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import utils.storage.load
from tests.chosen import A14B, HIGH, LOW, make_lora, write_loras
from tests.tiny import write_model
from utils.adapters.beside import Chosen
from utils.adapters.choosing import (
    choose_lora_of,
    choose_loras,
    find_fused_base,
    further_loras,
    leave_out_fused_base,
)
from utils.adapters.lora_writer import write_lora
from utils.adapters.provenance import fused_file, to_metadata
from utils.common.errors import UserError
from wan.checkpoints import ModelFiles, open_model

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def experts(tmp_path_factory) -> ModelFiles:
    """A small model with two experts."""
    return open_model(write_model(tmp_path_factory.mktemp("models") / "Wan2.2-T2V-A14B", A14B))


@pytest.fixture(scope="module")
def single(tmp_path_factory) -> ModelFiles:
    return open_model(write_model(tmp_path_factory.mktemp("models") / "Wan2.1-T2V-1.3B"))


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_loras(tmp_path)


def values(chosen: dict[str, list[Chosen]]) -> dict[str, list[tuple[float, float]]]:
    """What was chosen for each transformer: the value that a LoRA is filled with, and its strength."""
    return {
        name: [(round(next(iter(c.lora.pairs.values())).down[0, 0].item(), 3), c.strength) for c in loras]
        for name, loras in chosen.items()
    }


# ------------------------------------------------------------------------------------------------------- what is chosen


def test_a_pair_goes_to_both_experts_and_a_further_lora_to_each(folder, experts, capsys):
    chosen = choose_loras([folder / "fox.safetensors"], 0.5, [f"{folder}/fast.safetensors:2"], experts)
    assert list(chosen) == [HIGH, LOW]
    assert values(chosen) == {HIGH: [(0.01, 0.5), (0.03, 2.0)], LOW: [(0.02, 0.5), (0.03, 2.0)]}
    assert capsys.readouterr().out == ""


def test_the_lora_of_one_expert_leaves_the_other_as_it_is_and_says_so(folder, experts, capsys):
    chosen = choose_loras([folder / "fox_low_noise.safetensors"], 1.0, [], experts)
    assert values(chosen) == {HIGH: [], LOW: [(0.02, 1.0)]}
    assert capsys.readouterr().out.count("no LoRA for the high_noise expert: it runs as the base") == 1


def test_of_one_expert_alone_nothing_is_said_of_the_other(folder, experts, capsys):
    for name in ("fox.safetensors", "fox_high_noise.safetensors"):
        assert values({HIGH: [choose_lora_of(folder / name, HIGH, experts)]}) == {HIGH: [(0.01, 1.0)]}
    assert choose_lora_of(folder / "fox_low_noise.safetensors", HIGH, experts) is None
    assert capsys.readouterr().out == ""


def test_what_does_not_fit_is_said_once_although_two_experts_are_given_it(folder, experts, capsys):
    wide = make_lora(0.01, "blocks.0.cross_attn.k_img")
    wide.pairs["blocks.0.self_attn.q"] = make_lora(0.01).pairs["blocks.0.self_attn.q"]
    write_lora(folder / "sibling.safetensors", wide)
    chosen = choose_loras([folder / "fox.safetensors"], 1.0, [f"{folder}/sibling.safetensors"], experts)
    assert all(loras[1].lora.pairs.keys() == {"blocks.0.self_attn.q"} for loras in chosen.values())
    assert capsys.readouterr().out.count("not in this model") == 1


def test_a_lora_that_fits_no_transformer_is_refused_before_weights_are_read(folder, experts, monkeypatch):
    monkeypatch.setattr(utils.storage.load.Store, "load", None)
    with pytest.raises(UserError, match=r"blocks\.9\.self_attn\.q"):
        choose_loras([folder / "deep_high_noise.safetensors"], 1.0, [], experts)


def test_a_model_with_one_transformer_takes_the_lora_of_one_expert_and_says_so(folder, single, capsys):
    chosen = choose_loras([folder / "fox_low_noise.safetensors"], 1.0, [], single)
    assert values(chosen) == {"transformer": [(0.02, 1.0)]}
    assert "was trained for the low_noise expert" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["yes", "[1]", '{"name": "x"}', "[" * 100_000])
def test_a_damaged_record_stops_nothing_where_nothing_of_it_is_fused(folder, experts, capsys, text):
    write_lora(folder / "top_low_noise.safetensors", replace(make_lora(0.04), metadata={"fused_lora": text}))
    low = fused_file(folder / "fox_high_noise.safetensors", 2.0)
    write_lora(folder / "top_high_noise.safetensors", replace(make_lora(0.04), metadata=to_metadata([low.record])))
    damaged = "top_low_noise.safetensors: the metadata fused_lora does not say what it was trained on"
    for name in ("top", "top_low_noise"):
        with pytest.raises(UserError, match=rf"{damaged}(.|\n)*\nSample without it: --without_fused\.$"):
            find_fused_base([folder / f"{name}.safetensors"], [], experts)
    both = leave_out_fused_base([folder / "top.safetensors"], experts)
    assert both.describe(False) == ", without what the LoRA was trained on top of: fox_high_noise.safetensors at 2"
    alone = leave_out_fused_base([folder / "top_low_noise.safetensors"], experts)
    assert alone.describe(True) == ", without what the LoRA was trained on top of" and alone.is_left_out
    said = capsys.readouterr().out
    assert said.count("note: ") == said.count(damaged) == 2

    also = [str(folder / "top_low_noise.safetensors")]
    loras = choose_loras([folder / "fox.safetensors"], 1.0, also, experts)
    assert {name: len(each) for name, each in loras.items()} == {HIGH: 1, LOW: 2}
    assert damaged in capsys.readouterr().out


def test_what_is_left_out_is_not_there_for_a_further_lora_either(folder, single, capsys):
    below = fused_file(folder / "fox_low_noise.safetensors", 1.0)
    for name in ("top", "speed"):
        write_lora(folder / f"{name}.safetensors", replace(make_lora(0.1), metadata=to_metadata([below.record])))
    top, note = [folder / "top.safetensors"], "speed.safetensors was trained on top of fox_low_noise.safetensors"
    for base, count in ((find_fused_base(top, [], single), 0), (leave_out_fused_base(top, single), 1)):
        choose_loras(top, 1.0, [f"{folder}/speed.safetensors"], single, base)
        assert capsys.readouterr().out.count(note) == count


def test_a_further_lora_that_is_on_top_of_one_that_is_not_there_is_noted(folder, single, capsys):
    below = fused_file(folder / "fox_low_noise.safetensors", 1.0)
    write_lora(folder / "speed.safetensors", replace(make_lora(0.1), metadata=to_metadata([below.record])))
    further_loras([f"{folder}/speed.safetensors:0.5"], single)
    assert "speed.safetensors was trained on top of fox_low_noise.safetensors (weight 1" in capsys.readouterr().out
    further_loras([f"{folder}/speed.safetensors"], single, {"transformer": to_metadata([below.record])})
    assert capsys.readouterr().out == ""
