"""--benchmark: what is timed, what is counted, and the table that is pasted."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

import train_wan_lora
from tests.tiny import write_clips, write_model
from utils.runs import benchmark
from utils.runs.benchmark import STEPS, WARM_UP, Steps, benchmark_table, covered
from utils.training.calibration import Workload
from utils.training.cards import CARDS
from utils.training.forecast import Setting, needed_flops
from wan.configs import FAMILIES

SHAPE = FAMILIES["wan2.1-t2v-1.3B"].shape
WORK = Workload(SHAPE, 4096, 2)
SETTING = Setting("int8", 20, ("selective",) * 10 + ("full",) * 20)


@pytest.mark.parametrize(
    ("spans", "length"),
    [([], 0), ([(1, 3)], 2), ([(1, 3), (2, 5), (7, 8)], 5), ([(0, 10), (2, 3), (4, 11)], 11), ([(5, 6), (1, 2)], 2)],
)
def test_kernels_that_overlap_count_once(spans, length):
    assert covered(spans) == length


def test_the_operations_are_those_of_the_model_whatever_is_computed_twice():
    """Forward and backward products of frozen layers, and attention forward and twice that backward."""
    dim, ffn, tokens, text, batch, layers = SHAPE.dim, SHAPE.ffn_dim, 4096, SHAPE.text_len, 2, SHAPE.num_layers
    on_tokens = 6 * dim**2 + 2 * dim * ffn  # q, k, v, o; cross q, o; ffn
    products = 2 * 2 * batch * layers * (tokens * on_tokens + text * 2 * dim**2)
    attention = 3 * 4 * batch * layers * dim * tokens * (tokens + text)
    assert needed_flops(WORK, torch.bfloat16) == pytest.approx(products + attention, rel=0.05)


def test_the_table_has_what_others_need_to_compare(monkeypatch):
    monkeypatch.setattr(benchmark, "describe", lambda _: "NVIDIA L40S")
    steps = Steps([2.0, 2.1, 2.2], 12_340_000_000, 0.973)
    table = benchmark_table("wan2.1-t2v-1.3B", "832x480, 81 frames", WORK, SETTING, torch.device("cuda"), steps)
    lines = table.splitlines()
    assert lines[1].startswith("|---") and all(line.startswith("| ") and line.endswith(" |") for line in lines[2:])
    cells = {name.strip(): value.strip() for name, value in (line.strip("|").split("|") for line in lines)}
    utilisation = needed_flops(WORK, torch.bfloat16) / 2.1 / 362e12
    assert cells["batch"] == "2 clips of 832x480, 81 frames: 8,192 tokens"
    assert cells["setting"] == (
        "int8 weights, 20 of 30 blocks swapped, checkpointing 10 selective + 20 full; LoRA of rank 16 on attn"
    )
    assert cells["s/step"] == "2.1 (2 to 2.2, 3 steps)" and cells["tokens/s"] == f"{8192 / 2.1:,.0f}"
    assert cells["utilisation"] == f"{utilisation:.1%} of 362 TFLOP/s" and cells["busy"] == "97%"
    assert cells["GPU memory"] == "12.34 GB at the peak" and cells["main memory"].endswith(" GB after the last step")
    assert cells["model"] == "wan2.1-t2v-1.3B: 30 blocks, width 1536"
    assert CARDS["l40s"].peak == 362e12


@pytest.mark.parametrize(("name", "device"), [("the CPU", "cpu"), ("NVIDIA GeForce RTX 4090 Laptop GPU", "cuda")])
def test_where_the_peak_of_a_device_is_not_known_what_is_reached_is_said(monkeypatch, name, device):
    monkeypatch.setattr(benchmark, "describe", lambda _: name)
    table = benchmark_table("m", "s", WORK, SETTING, torch.device(device), Steps([4.0], None, 0.5))
    assert f"{needed_flops(WORK, torch.bfloat16) / 4e12:.3g} TFLOP/s |" in table and "% of" not in table


def test_the_command_prints_the_table_of_the_largest_batch_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_model(Path("model"))
    write_clips(Path("clips"))
    losses = []
    loss = train_wan_lora.training_loss

    def watched(batch, **others):
        losses.append(tuple(batch.latents.shape))
        return loss(batch, **others)

    monkeypatch.setattr(train_wan_lora, "training_loss", watched)
    monkeypatch.setattr(train_wan_lora, "train", None)
    command = "--dataset clips --pretrained_model_name_or_path model --base_res 64 --token_limit 100 --batch_size 2"
    train_wan_lora.main(f"{command} --benchmark --weight_dtype int8 --blocks_to_swap 1".split())
    said = capsys.readouterr().out
    assert "2 clips of 80x48, 21 frames: 180 tokens" in said
    assert "int8 weights, 1 of 2 blocks swapped, checkpointing none; LoRA of rank 16 on attn" in said
    assert len(losses) == 3 + WARM_UP + STEPS and len(set(losses)) == 1  # three of them are the rehearsal
    assert not list(Path().glob("outputs/*"))


def test_the_median_is_said(monkeypatch):
    steps = Steps([9.0, 1.0, 2.0], None, 1.0)
    table = partial(benchmark_table, "m", "s", replace(WORK, tokens=64), SETTING, torch.device("cpu"))
    assert "| 2 (1 to 9, 3 steps) |" in table(steps)
