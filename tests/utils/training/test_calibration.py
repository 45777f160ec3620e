"""What is foreseen from shallow models without memory is what a deeper one takes with real tensors."""

from dataclasses import replace
from itertools import product
from statistics import median

import pytest
import torch

from benchmarks.models import count_image_tokens, step_flops
from utils.training.calibration import META, Workload, calibrate, image_tokens, lora_size, peak_of, training_step
from utils.training.checkpoint_plan import CheckpointPlan
from utils.training.checkpointing import STRATEGIES
from utils.training.counting import count_step
from utils.training.memory import Memory
from wan.configs import FAMILIES
from wan.modules.model import WanShape, rotary_table

BF16, FP32 = torch.bfloat16, torch.float32
CPU = torch.device("cpu")
DEPTH = 6
SHAPE = WanShape(
    dim=32, ffn_dim=96, num_heads=2, num_layers=DEPTH, in_dim=8, out_dim=4, text_dim=32, text_len=24, freq_dim=32
)
VISION = replace(SHAPE, image_dim=48, image_positions=12)
WORK = Workload(VISION, tokens=96, batch=2, rank=2, targets=("all-linear",))
WIDE = {name: Workload(FAMILIES[name].shape, 10_000) for name in ("wan2.1-t2v-1.3B", "wan2.1-t2v-14B")}


class Mixed(CheckpointPlan):
    """A strategy for each block."""

    def __init__(self, strategies: list[str]) -> None:
        super().__init__("none", len(strategies))
        self.mixed = strategies

    def _choose(self, tokens: int) -> list[str]:
        return self.mixed


def table_bytes(work: Workload) -> int:
    return rotary_table((1, 1, work.tokens), work.shape.dim // work.shape.num_heads, META).nbytes


def foreseen(work: Workload, strategies: list[str], fuse: bool = True, dtype: torch.dtype = BF16) -> float:
    costs = [calibrate(work, dtype, Memory(strategy, fuse=fuse, stream=dtype)) for strategy in strategies]
    return peak_of(costs, 4 * lora_size(work).block).total


def counted(work: Workload, strategies: list[str], fuse: bool = True, dtype: torch.dtype = BF16) -> float:
    """The live bytes of real tensors on the CPU, gradients among them."""
    loss, _ = training_step(work, dtype, Memory(strategies[0], fuse=fuse, stream=dtype), CPU, Mixed(strategies))
    return count_step(loss).peak_bytes + table_bytes(work)


def test_the_peak_of_a_deeper_model_is_foreseen_within_5_percent_under_every_strategy():
    errors = {}
    for strategy, fuse, dtype in product(STRATEGIES, (True, False), (FP32, BF16)):
        if not fuse and strategy == "none" and dtype == FP32:
            work = replace(WORK, shape=SHAPE, batch=1, targets=("attn",))  # and one without vision tokens
        else:
            work = WORK
        strategies = [strategy] * DEPTH
        true = counted(work, strategies, fuse, dtype)
        errors[strategy, fuse, dtype] = foreseen(work, strategies, fuse, dtype) / true - 1
    worst = max(errors, key=lambda key: abs(errors[key]))
    typical = median(map(abs, errors.values()))
    print(f"\npeak foreseen / counted - 1: worst {errors[worst]:+.2%} at {worst}, median {typical:.2%}")
    assert abs(errors[worst]) < 0.05


@pytest.mark.parametrize(
    "strategies",
    [
        ["none"] * 2 + ["selective"] * 4,
        ["none"] * 5 + ["full"],
        ["selective"] * 3 + ["full"] * 3,
        ["full"] * 2 + ["offload"] * 4,
    ],
    ids="-".join,
)
def test_the_peak_of_blocks_with_different_strategies_is_foreseen(strategies):
    assert foreseen(WORK, strategies) == pytest.approx(counted(WORK, strategies), rel=0.05)


def test_where_gradients_are_most_of_it_the_peak_is_at_the_end_of_the_backward_pass():
    work = replace(WORK, tokens=8, batch=1, rank=32)
    strategies = ["full"] * DEPTH
    found = peak_of([calibrate(work, BF16, Memory("full", fuse=True, stream=BF16))] * DEPTH, 4 * lora_size(work).block)
    gradients = 4 * lora_size(work).block
    assert found.gradients == DEPTH * gradients
    # Those of the block that runs are counted twice: as they are made, and as there already.
    assert 0 <= found.total - counted(work, strategies) <= gradients


@pytest.mark.parametrize("strategy", ["none", "full"])
def test_what_a_step_computes_and_moves_is_linear_in_its_depth(strategy):
    memory = Memory(strategy, fuse=True, stream=BF16)
    cost = calibrate(WORK, BF16, memory)
    true = count_step(*training_step(WORK, BF16, memory, META))
    found = cost.block * DEPTH + cost.rest
    for part in ("product_flops", "attention_flops", "elementwise_bytes"):
        assert getattr(found, part) == pytest.approx(getattr(true, part), rel=1e-3), part
    assert found.kept_bytes == pytest.approx(true.kept_bytes, rel=1e-3)
    assert found.peak_bytes - table_bytes(WORK) == pytest.approx(true.peak_bytes, rel=1e-3)


@pytest.mark.parametrize(("strategy", "kept"), [("none", 29.9), ("selective", 6.1), ("full", 2.0), ("offload", 0.0)])
def test_a_block_of_full_width_keeps_what_the_records_say(strategy, kept):
    """benchmarks/RECORDS.md, bytes for each token and unit of width. The rows of the text add up to 0.4."""
    work = WIDE["wan2.1-t2v-1.3B"]
    cost = calibrate(work, BF16, Memory(strategy, fuse=True, stream=BF16))
    assert cost.block.peak_bytes / (work.tokens * work.shape.dim) == pytest.approx(kept, abs=0.4)


def test_the_work_of_a_step_is_that_of_the_formula():
    for work in WIDE.values():
        cost = calibrate(work, BF16, Memory(fuse=True, stream=BF16))
        found = cost.block * work.shape.num_layers + cost.rest
        formula = step_flops(work.shape, work.tokens, work.rank)
        assert found.product_flops + found.attention_flops == pytest.approx(formula, rel=0.01)


def test_the_size_of_a_lora_is_that_of_its_matrices():
    for work in (WORK, replace(WORK, targets=("attn",))):
        _, trained = training_step(work, FP32, Memory(), META)
        assert lora_size(work).at(DEPTH) == sum(parameter.numel() for parameter in trained)


def test_as_many_vision_tokens_are_foreseen_as_are_read():
    for family in FAMILIES.values():
        assert image_tokens(family.shape) == count_image_tokens(family.shape)
