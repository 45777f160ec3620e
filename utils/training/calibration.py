"""What each block of a training step adds to memory and work, counted on shallow models without memory or device.

A step of the real model is linear in the number of its blocks: two depths say what a block adds, and what the rest is.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate

import torch
from torch import Tensor, nn

from utils.adapters.lora import add_lora, select_modules
from utils.diffusion.objectives import squared_error
from utils.training.checkpoint_plan import CheckpointPlan
from utils.training.counting import Counts, count_forward, count_step
from utils.training.fused_ops import fused_ops
from utils.training.memory import Memory, prepare
from wan.modules.clip import VisionShape
from wan.modules.model import WanModel, WanShape, is_fp32, rotary_table

DEPTHS = 2, 3  # blocks of the models that are counted: a last one that is not the first, and one more
META = torch.device("meta")


@dataclass(frozen=True)
class Workload:
    """What is trained, and on what."""

    shape: WanShape
    tokens: int  # of each sample
    batch: int = 1
    rank: int = 16
    targets: tuple[str, ...] = ("attn",)  # of the LoRA, as `select_modules` reads them
    experts: int = 1  # transformers that are trained in turns
    adapter_dtype: torch.dtype = torch.float32
    moment_bytes: float = 8.0  # that the optimizer keeps of each number of the LoRA
    loaded: int = 1  # transformers that are loaded; some may not be trained
    has_average: bool = False  # a moving average of the LoRA
    accumulates: bool = False  # gradients of several batches: all of them exist while a batch runs
    fp32_stream: bool = False
    keeps_ends: bool = False  # whether the first and the last block are not quantised
    adapters: int = 1  # of each transformer that are trained: a student has a critic
    updates: float = 1.0  # forward and backward passes in a step, on average
    passes: float = 0.0  # further passes in a step, without gradients, on average
    is_taught: bool = False  # whether a pass with both texts runs beside what blocks keep

    @property
    def waiting(self) -> int:
        """The transformers that wait while one runs."""
        return max(self.experts, self.loaded) - 1


@dataclass(frozen=True)
class Line:
    """Bytes or numbers of a model by its depth."""

    block: float
    rest: float

    @staticmethod
    def through(few: float, many: float) -> "Line":
        """The line through the values for the two DEPTHS."""
        block = (many - few) / (DEPTHS[1] - DEPTHS[0])
        return Line(block, few - DEPTHS[0] * block)

    def at(self, depth: int) -> float:
        return depth * self.block + self.rest


@dataclass(frozen=True)
class Cost:
    """What a step takes under one strategy of checkpointing: each block, and all that is not blocks.

    Of the peak, `block` is what each keeps, `rest` what is alive beside that while the last block runs backward.
    Gradients of the LoRA are not in it.
    """

    block: Counts
    rest: Counts


def image_tokens(shape: WanShape) -> int:
    """The vision tokens that a model of this shape reads: of one picture, or as many as it has positions."""
    vision = VisionShape()
    return (shape.image_positions or (vision.image_size // vision.patch_size) ** 2 + 1) if shape.image_dim else 0


def empty_model(shape: WanShape, dtype: torch.dtype, device: torch.device) -> WanModel:
    """A frozen transformer whose linear layers compute in `dtype`, with any weights."""
    with torch.device(device):
        model = WanModel(shape).requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data if is_fp32(name) else parameter.data.to(dtype)
    return model


Step = tuple[Callable[[], Tensor], list[nn.Parameter]]  # the loss, and what is trained


def training_step(
    work: Workload, dtype: torch.dtype, memory: Memory, device: torch.device, plan: CheckpointPlan | None = None
) -> Step:
    """A step of a model as deep as the shape says, prepared by the code of the trainer."""
    shape, batch = work.shape, work.batch
    model = empty_model(shape, dtype, device)
    names = select_modules(model, work.targets)
    parameters = prepare(model, memory, lambda base: add_lora(base, names, work.rank, work.rank), plan)
    for parameter in parameters:
        parameter.data = parameter.data.to(device)
    # How tokens are arranged in frames, rows and columns changes nothing that is counted.
    _, height, width = shape.patch_size
    size = shape.patch_size[0], height, width * work.tokens

    def loss() -> Tensor:
        with torch.device(device):
            latents, velocity = (torch.zeros(batch, dim, *size) for dim in (shape.in_dim, shape.out_dim))
            text = torch.zeros(batch, shape.text_len, shape.text_dim)
            image = torch.zeros(batch, image_tokens(shape), shape.image_dim) if shape.image_dim else None
            return squared_error(model(latents, torch.full((batch,), 500.0), text, image), velocity)

    return loss, parameters


@cache
def calibrate(work: Workload, dtype: torch.dtype, memory: Memory) -> Cost:
    """The cost of a step under a strategy for all blocks, whatever the depth of the shape. Takes about a second."""
    few, many = (_count(replace(work, shape=replace(work.shape, num_layers=n)), dtype, memory) for n in DEPTHS)
    block = (many + few * -1) * (1 / (DEPTHS[1] - DEPTHS[0]))
    return Cost(block, few + block * -DEPTHS[0] + Counts(peak_bytes=_rotary_bytes(work)))


@cache
def calibrate_pass(work: Workload, dtype: torch.dtype, memory: Memory) -> tuple[Line, Counts, Counts]:
    """What a pass without gradients takes: its peak by depth, and what a block and the rest compute and move."""
    few, many = (_count_pass(replace(work, shape=replace(work.shape, num_layers=n)), dtype, memory) for n in DEPTHS)
    block = (many + few * -1) * (1 / (DEPTHS[1] - DEPTHS[0]))
    return Line.through(few.peak_bytes, many.peak_bytes), block, few + block * -DEPTHS[0]


def _count_pass(work: Workload, dtype: torch.dtype, memory: Memory) -> Counts:
    with torch.device(META):
        loss, _ = training_step(work, dtype, memory, META)
        with fused_ops():
            return count_forward(loss)


def _count(work: Workload, dtype: torch.dtype, memory: Memory) -> Counts:
    # The default device is that of the main memory in which inputs of blocks may wait, too.
    with torch.device(META):
        loss, trained = training_step(work, dtype, memory, META)
        return count_step(loss, trained)


def _rotary_bytes(work: Workload) -> int:
    """Of the table of the rotation, which is made once for all steps."""
    return rotary_table((1, 1, work.tokens), work.shape.dim // work.shape.num_heads, META).nbytes


@cache
def lora_size(work: Workload) -> Line:
    """The number of parameters of the LoRA."""

    def count(depth: int) -> int:
        model = empty_model(replace(work.shape, num_layers=depth), torch.float32, META)
        weights = (model.get_parameter(f"{name}.weight") for name in select_modules(model, work.targets))
        return sum(work.rank * sum(weight.shape) for weight in weights)

    return Line.through(*map(count, DEPTHS))


@dataclass(frozen=True)
class Peak:
    """What is alive at the peak of a step, in bytes."""

    kept: float  # by blocks
    working: float
    gradients: float  # of the LoRA

    @property
    def total(self) -> float:
        return self.kept + self.working + self.gradients


def peak_of(costs: Sequence[Cost], gradients: float) -> Peak:
    """The peak of a step whose blocks have these costs, in their order, each with so many bytes of gradients.

    Blocks run backward from the last: when one does, those before it keep what they kept, and those from it on have
    their gradients.
    """
    kept = accumulate(cost.block.peak_bytes for cost in costs)
    peaks = (
        Peak(before, cost.rest.peak_bytes, (len(costs) - index) * gradients)
        for index, (before, cost) in enumerate(zip(kept, costs, strict=True))
    )
    return max(peaks, key=lambda peak: peak.total)
