"""The memory and the time of a training step, computed before anything is loaded, without a GPU.

What a step computes, keeps and moves is counted on the real code (`calibration`); weights, transfers and what kernels
do inside are arithmetic. Times are nominal: counts divided by the rates of a card. They leave out the launching of
kernels, which matters below about 2,000 tokens, and encoders, data and the optimizer.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import nn

from utils.common.formatting import format_table
from utils.storage.streaming import SLOTS
from utils.storage.weights import PLAIN, QUANTISED, Storage, linear_layers
from utils.training.calibration import (
    META,
    Cost,
    Peak,
    Workload,
    calibrate,
    calibrate_pass,
    empty_model,
    lora_size,
    peak_of,
)
from utils.training.cards import Card
from utils.training.counting import BACKWARD_PRODUCTS, FORWARD_PRODUCTS
from utils.training.memory import Memory

BF16, FP32 = torch.bfloat16, torch.float32
CONTEXT = 1.0e9  # bytes of CUDA's context, of cuBLAS, and lost between tensors: an estimate, not measured
AVERAGE, CONVERTED = 4, 2  # bytes for each number of a LoRA: fp32; bf16
# int8 weights are stored rotated: their values in bf16 exist before and after the rotation.
COPIES = {"fp32": 0, "bf16": 0, "fp8": 1, "fp8_scaled": 2, "int8": 2, "nf4": 1}
PASSES = {"none": 2}  # of the weights of a block through the kernels; 3 where the forward pass runs again
RECOMPUTED = 3

SHOWN = 5e6  # bytes: less is not shown
DEVICE_WORDS = {
    "blocks": "weights of blocks",
    "ring": "buffers for swapped blocks",
    "others": "embeddings and head",
    "adapter": "LoRA, gradients, optimizer",
    "kept": "activations kept",
    "working": "activations of one block",
    "context": "CUDA",
}
HOST_WORDS = {"streamed": "swapped blocks", "inputs": "activations", "idle": "the idle expert"}

# Compiled blocks do not run on the meta device. They move so much of what fused ones move, and keep so much of what
# these keep without checkpointing: benchmarks/RECORDS.md, counted for 1.3B.
COMPILED_MOVES = {"none": 215.2 / 424.6, "selective": 253.5 / 539.9, "full": 269.5 / 604.6, "offload": 269.5 / 604.6}
COMPILED_KEEPS = 33.9 / 29.9


@dataclass(frozen=True)
class Setting:
    """How a model is trained."""

    weights: str = "bf16"  # of PLAIN or QUANTISED: how the linear layers of blocks are stored
    streamed: int = 0  # blocks whose frozen weights are in main memory, and stream through SLOTS on the device
    checkpointing: str | tuple[str, ...] = "full"  # the strategy of all blocks, or of each
    compile: bool = False
    idle_on_disk: bool = False  # whether the expert whose turn it is not is read from disk when it is

    def strategies(self, depth: int) -> tuple[str, ...]:
        """That of each block."""
        return (self.checkpointing,) * depth if isinstance(self.checkpointing, str) else self.checkpointing

    @property
    def dtype(self) -> torch.dtype:
        """That of computing."""
        return FP32 if self.weights == "fp32" else BF16

    def describe(self, depth: int) -> str:
        """Such as "bf16 weights, 38 of 40 blocks swapped, checkpointing 12 selective + 28 full"."""
        kept = Counter(self.strategies(depth))
        parts = [f"{self.weights} weights", f"{self.streamed} of {depth} blocks swapped" * bool(self.streamed)]
        how = next(iter(kept)) if len(kept) == 1 else " + ".join(f"{n} {name}" for name, n in kept.items())
        parts.append(f"checkpointing {how}")
        parts += ["compiled"] * self.compile + ["the idle expert on disk"] * self.idle_on_disk
        return ", ".join(part for part in parts if part)


@dataclass(frozen=True)
class DeviceBytes:
    """What is on the GPU at the peak of a step."""

    blocks: float  # weights of blocks that stay
    ring: float  # room for blocks that stream
    others: float  # weights of embeddings and head
    adapter: float  # the LoRA, its gradient as far as it exists, its moments, and its copy in the dtype of computing
    kept: float  # what blocks keep for the backward pass
    working: float
    context: float = CONTEXT

    @property
    def total(self) -> float:
        return float(sum(vars(self).values()))

    @property
    def resident(self) -> float:
        """What stays there between two steps."""
        return self.total - self.kept - self.working


@dataclass(frozen=True)
class HostBytes:
    """What is in main memory."""

    streamed: float  # weights, page-locked
    inputs: float  # of blocks, page-locked
    idle: float  # experts that wait

    @property
    def total(self) -> float:
        return float(sum(vars(self).values()))


@dataclass(frozen=True)
class Seconds:
    """Of one step."""

    matmul: float
    attention: float
    elementwise: float
    transfer: float = 0.0  # that is not hidden behind the others

    def __add__(self, other: "Seconds") -> "Seconds":
        return Seconds(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    def __mul__(self, factor: float) -> "Seconds":
        return Seconds(*(factor * value for value in vars(self).values()))

    @property
    def total(self) -> float:
        return float(sum(vars(self).values()))


@dataclass(frozen=True)
class Forecast:
    """What a setting takes."""

    work: Workload
    setting: Setting
    card: Card
    device: DeviceBytes
    host: HostBytes
    seconds: Seconds

    def describe(self, available: float, encoders: float = 0.0) -> str:
        """A table for people. Of `available` bytes of the GPU `encoders` are taken by others than the step."""
        parts = {"encoders": encoders} | {DEVICE_WORDS[name]: value for name, value in vars(self.device).items()}
        rows = [(f"GPU: {name}", f"{value / 1e9:.2f}", "GB") for name, value in parts.items() if value >= SHOWN]
        rows += [("GPU: all", f"{sum(parts.values()) / 1e9:.2f}", f"of {available / 1e9:.2f} GB")]
        host = ((HOST_WORDS[name], value) for name, value in vars(self.host).items())
        rows += [(f"main memory: {name}", f"{value / 1e9:.2f}", "GB") for name, value in host if value >= SHOWN]
        rows += [(f"time: {name}", f"{value:.3g}", "s") for name, value in vars(self.seconds).items() if value]
        rows += [("time: a step", f"{self.seconds.total:.3g}", "s")]
        title = f"{self.setting.describe(self.work.shape.num_layers)}; {self.work.tokens:,} tokens on {self.card.name}"
        return f"{title}\n{format_table(('forecast, not measured', '', ''), rows)}"


@dataclass(frozen=True)
class Stored:
    """The weights of a model as they are stored, in bytes."""

    block: float
    end: float  # the first or the last block
    others: float
    values: float  # the number of those of a block's linear layers
    linear: float  # bytes of these
    matrix: float  # the largest of them in bf16


@cache
def stored(work: Workload, weights: str) -> Stored:
    """What is stored of a block and of the rest; the rest is never quantised."""
    plain = "fp32" if weights == "fp32" else "bf16"
    model = empty_model(replace(work.shape, num_layers=1), FP32 if weights == "fp32" else BF16, META)
    shapes = [module.weight.shape for module in model.blocks[0].modules() if isinstance(module, nn.Linear)]
    storage = Storage(META, PLAIN.get(weights, BF16), weights if weights in QUANTISED else None)
    sizes = storage.sizes(model)
    linear = sum(sizes[f"{name}.weight"] for name in linear_layers(model))
    block = sum(size for name, size in sizes.items() if name.startswith("blocks."))
    end = stored(work, plain).block if work.keeps_ends and weights != plain else block
    values, largest = sum(shape.numel() for shape in shapes), max(shape.numel() for shape in shapes)
    return Stored(block, end, sum(sizes.values()) - block, values, linear, BF16.itemsize * largest)


def forecast(work: Workload, setting: Setting, card: Card) -> Forecast:
    """What a step takes. The shape's number of layers is the depth."""
    strategies = setting.strategies(work.shape.num_layers)
    assert len(strategies) == work.shape.num_layers, "a strategy for each block"
    known = {strategy: _cost(work, setting, strategy) for strategy in set(strategies)}
    costs = [known[strategy] for strategy in strategies]
    weights = stored(work, setting.weights)
    device, host = _memory(work, setting, costs, weights)
    return Forecast(work, setting, card, device, host, _seconds(setting, costs, host, weights, card, work))


def needed_flops(work: Workload, dtype: torch.dtype) -> float:
    """The operations of a step, in the products and the attention, where nothing is computed twice.

    The backward pass of attention computes its scores again: of its five products four are counted.
    """
    cost = _cost(work, Setting("fp32" if dtype == FP32 else "bf16", checkpointing="none"), "none")
    counts = cost.rest + cost.block * work.shape.num_layers
    products = FORWARD_PRODUCTS + BACKWARD_PRODUCTS
    return counts.product_flops + counts.attention_flops * (products - 1) / products


def _cost(work: Workload, setting: Setting, strategy: str) -> Cost:
    """Of a strategy. Blocks on a GPU are compiled or fused."""
    counted_work = _counted(work)

    def counted(strategy: str) -> Cost:
        return calibrate(counted_work, setting.dtype, Memory(strategy, fuse=True, stream=_stream(work, setting)))

    cost = counted(strategy)
    if not setting.compile:
        return cost
    moved = cost.block.elementwise_bytes * COMPILED_MOVES[strategy]
    more = (COMPILED_KEEPS - 1) * counted("none").block.peak_bytes  # kept, or made again in the backward pass
    if strategy == "none":
        block = replace(cost.block, elementwise_bytes=moved, peak_bytes=cost.block.peak_bytes + more)
        return replace(cost, block=block)
    rest = replace(cost.rest, peak_bytes=cost.rest.peak_bytes + more)
    return Cost(replace(cost.block, elementwise_bytes=moved), rest)


def _memory(work: Workload, setting: Setting, costs: Sequence[Cost], weights: Stored) -> tuple[DeviceBytes, HostBytes]:
    depth, lora, gradient = work.shape.num_layers, lora_size(work), work.adapter_dtype.itemsize
    peak = peak_of(costs, 0 if work.accumulates else gradient * lora.block)
    if work.is_taught:
        kept = sum(cost.block.peak_bytes for cost in costs)
        peak = max(peak, Peak(kept, _pass_peak(work, setting), 0.0), key=lambda each: each.total)
    gradients = gradient * (lora.at(depth) if work.accumulates else lora.rest) + peak.gradients
    adapter = work.experts * work.adapters * _bytes_of_number(work, setting) * lora.at(depth) + gradients
    ends = 2 * (weights.end - weights.block)  # that they take more; the slots of a ring are as large as they
    device = DeviceBytes(
        blocks=(depth - setting.streamed) * weights.block + ends,
        ring=min(SLOTS, setting.streamed) * weights.block,
        others=weights.others,
        adapter=adapter,
        kept=peak.kept,
        working=peak.working + COPIES[setting.weights] * weights.matrix,
    )
    inputs = setting.strategies(depth).count("offload") * _input_bytes(work, setting)
    idle, blocks = work.waiting, depth * weights.block + ends
    waiting = idle * weights.others
    if not setting.streamed:
        return device, HostBytes(0, inputs, waiting + idle * blocks * (not setting.idle_on_disk))
    if idle:  # all blocks of all experts are there, or of one, and none is ever copied back
        return device, HostBytes(blocks if setting.idle_on_disk else (1 + idle) * blocks, inputs, waiting)
    return device, HostBytes(setting.streamed * weights.block + ends, inputs, 0)


def _bytes_of_number(work: Workload, setting: Setting) -> float:
    """What a number of the LoRA takes, without its gradient."""
    # In bf16 a second number holds what the first cannot (`utils.training.kahan`).
    held = torch.float32.itemsize + work.moment_bytes + AVERAGE * work.has_average
    is_converted = setting.dtype == BF16 and not setting.compile and work.adapter_dtype == FP32
    return held + CONVERTED * is_converted


def _stream(work: Workload, setting: Setting) -> torch.dtype:
    """In which the residual stream enters a block."""
    return FP32 if work.fp32_stream else setting.dtype


def _input_bytes(work: Workload, setting: Setting) -> float:
    """Of the stream that enters a block."""
    return float(work.batch * work.tokens * work.shape.dim * _stream(work, setting).itemsize)


def _seconds(
    setting: Setting, costs: Sequence[Cost], host: HostBytes, weights: Stored, card: Card, work: Workload
) -> Seconds:
    counts = sum((cost.block for cost in costs), costs[-1].rest)
    exact = setting.weights == "fp32"
    passes = sum(PASSES.get(strategy, RECOMPUTED) for strategy in setting.strategies(len(costs)))
    moved = counts.elementwise_bytes + passes * _dequantised_bytes(setting.weights, weights)
    products = counts.product_flops / (card.fp32 if exact else card.products)
    attention = counts.attention_flops / (card.fp32 if exact else card.attention)
    seconds = Seconds(products, attention, moved / card.bandwidth) * work.updates + _passes(
        work, setting, weights, card
    )
    # Streamed weights arrive for the forward and again for the backward pass; inputs leave in one and return in the
    # other, and both directions at once. The GPU computes meanwhile.
    arriving = (2 * work.updates + work.passes) * setting.streamed * weights.block + work.updates * host.inputs
    return replace(seconds, transfer=max(0.0, arriving / card.link - seconds.total))


def _passes(work: Workload, setting: Setting, weights: Stored, card: Card) -> Seconds:
    """Of the passes of a step that need no gradients."""
    if not work.passes:
        return Seconds(0.0, 0.0, 0.0)
    _, block, rest = calibrate_pass(_counted(work), setting.dtype, Memory(fuse=True, stream=_stream(work, setting)))
    counts, exact = block * work.shape.num_layers + rest, setting.weights == "fp32"
    moved = counts.elementwise_bytes + work.shape.num_layers * _dequantised_bytes(setting.weights, weights)
    products = counts.product_flops / (card.fp32 if exact else card.products)
    attention = counts.attention_flops / (card.fp32 if exact else card.attention)
    return Seconds(products, attention, moved / card.bandwidth) * work.passes


def _pass_peak(work: Workload, setting: Setting) -> float:
    """What a pass with both texts has alive at once; blocks keep nothing for one without gradients."""
    doubled = replace(_counted(work), batch=2 * work.batch)
    peak, _, _ = calibrate_pass(doubled, setting.dtype, Memory(fuse=True, stream=_stream(work, setting)))
    return peak.at(work.shape.num_layers)


def _counted(work: Workload) -> Workload:
    """What is counted of a workload: the counts are kept for all models of one width."""
    return Workload(replace(work.shape, num_layers=1), work.tokens, work.batch, work.rank, work.targets)


def _dequantised_bytes(weights: str, sizes: Stored) -> float:
    """What a pass of a block moves so that its weights are in bf16: each is read, and written COPIES times."""
    copies = COPIES[weights]
    reads_between = copies - 1 if copies else 0
    return (sizes.linear + (copies + reads_between) * BF16.itemsize * sizes.values) if copies else 0.0
