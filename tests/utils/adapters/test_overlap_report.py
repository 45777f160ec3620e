"""The table of what two LoRAs have in common has a row for each block, and says what it comes to."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.loras import make_loha
from utils.adapters.beside import Chosen
from utils.adapters.dora import PEFT, Magnitude
from utils.adapters.lora_file import LoraFile, LoraPair
from utils.adapters.overlap_report import report, reports
from utils.common.errors import UserError

Q, K, HEAD = "blocks.0.self_attn.q", "blocks.10.self_attn.k", "head.head"


def pair(outputs: int, inputs: int, value: float = 1.0) -> LoraPair:
    """A change of one entry (8, 8) of a weight, of this size."""
    down, up = torch.zeros(1, 8), torch.zeros(8, 1)
    down[0, inputs], up[outputs, 0] = 1, value
    return LoraPair(down, up, None)


def lora(strength: float = 1.0, name: str = "fox", **pairs: LoraPair) -> Chosen:
    names = {"q": Q, "k": K, "two": "blocks.2.ffn.0", "head": HEAD}
    return Chosen(LoraFile({names[key]: each for key, each in pairs.items()}), strength, Path(f"{name}.safetensors"))


FOX = lora(2.0, q=pair(0, 0, 3.0), k=pair(1, 1), two=pair(2, 2, 2.0))
FAST = lora(0.5, "fast", q=pair(0, 1), k=pair(1, 1, 4.0), head=pair(0, 0))


def rows(text: str) -> dict[str, list[str]]:
    """The rows of a table by their first column."""
    lines = [re.split(r"\s{2,}", line.strip()) for line in text.splitlines()]
    return {first: rest for first, *rest in lines if len(rest) == 11 and not first.startswith("-")}


def test_each_block_has_a_row_in_order_and_so_do_the_other_layers_and_all():
    found = rows(report(FOX, FAST))
    assert [*found] == ["weights of", "block 0", "block 2", "block 10", "other layers", "all"]
    alike, apart = ["1.000", "1.000", "100.00", "100.00", "100.00", "100.00"], ["-"] * 6
    assert found["block 0"] == ["1", "0", "0", "6.0", "0.5", "0.000", "0.000", "0.00", "0.00", "0.00", "100.00"]
    assert found["block 2"] == ["0", "1", "0", "4.0", "0.0", *apart]
    assert found["block 10"] == ["1", "0", "0", "2.0", "2.0", *alike]
    assert found["other layers"] == ["0", "0", "1", "0.0", "0.5", *apart]
    assert found["all"] == ["2", "1", "1", "7.48", "2.12", "0.500", "1.000", "50.00", "100.00", "50.00", "100.00"]


def test_sentences_say_what_it_comes_to():
    said = report(FOX, FAST)
    assert "fox.safetensors changes the weights 3.5 times as much as fast.safetensors, with a cosine of 0.25" in said
    # Of 36, 4 and 16 the 4 are inside; a rank of 1 in 8 by 8 has a chance of 1/64, where both change a weight.
    assert "7.14% of its squared change is inside the directions of the other, where chance would give 1.12%" in said
    assert said.splitlines()[-2].endswith("; most in block 10 (100%)")


def test_loras_without_a_common_weight_are_said_to_touch_nothing_of_each_other():
    said = report(FOX, lora(1.0, "fast", head=pair(0, 0)))
    assert said.endswith(
        "fox.safetensors and fast.safetensors change no weight in common: neither touches what the other changes"
    )
    assert rows(said)["all"][:3] == ["0", "3", "1"]


def test_what_is_left_out_is_said():
    loha = Chosen(LoraFile({}, lycoris={Q: make_loha((8, 8))}), 1.0, Path("loha.safetensors"))
    said = report(FOX, loha)
    assert "note: 1 change of loha.safetensors are no product of two matrices and have all directions" in said
    assert rows(said)["block 0"][7:] == ["-"] * 4 and rows(said)["block 0"][5] != "-"
    assert "note" not in report(loha, FOX)
    dora = replace(FOX, lora=replace(FOX.lora, magnitudes={Q: Magnitude(torch.ones(8, 1), PEFT)}))
    assert "note: fox.safetensors is a DoRA" in report(dora, FAST)


def test_each_expert_has_a_report():
    asked = []

    def progress(found):
        asked.append(1)
        return found

    own, others = {"high_noise": [FOX], "low_noise": [FOX]}, {"high_noise": [FAST], "low_noise": []}
    high, low = reports(own, others, progress)
    assert high.startswith("the high_noise expert\nweights of") and asked == [1]
    assert low == "the low_noise expert: not both LoRAs are for it, so there is nothing to compare"
    (single,) = reports({"transformer": [FOX]}, {"transformer": [FAST]})
    assert single == f"the transformer\n{report(FOX, FAST)}"


def test_more_than_one_other_lora_is_refused():
    with pytest.raises(UserError, match=r"compares with one LoRA of --also_lora, not with fast.safetensors and fox"):
        reports({"transformer": [FOX]}, {"transformer": [FAST, FOX]})
