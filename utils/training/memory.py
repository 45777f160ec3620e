"""Strategies that trade memory for time. They act on a model's blocks from outside; parameter names stay."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from utils.common.decisions import Decisions
from utils.common.options import option
from utils.storage.streaming import Stream, entering
from utils.storage.weights import Storage
from utils.training.checkpoint_plan import AUTO, CheckpointPlan
from utils.training.checkpointing import (
    STRATEGIES,
    Forward,
    checkpointed,
    keeping_kernels,
    keeping_products,
    parked,
    with_saved,
)
from utils.training.compilation import compiled, decide, saved_seconds
from utils.training.fused import FusedBlock
from wan.modules.attention import SDPA
from wan.modules.model import Block, WanModel, WanShape

T = TypeVar("T")
Enter = Callable[[], None]


@dataclass(frozen=True)
class Memory:
    """What is done to a model so that it fits and runs fast."""

    checkpointing: str = "none"  # of STRATEGIES, or AUTO
    compile: bool = False
    fuse: bool = False  # without a compiler: blocks as few autograd Functions that keep less
    stream: torch.dtype = torch.float32  # what the residual stream is rounded to after each block
    attention: str = SDPA  # of TRAINING_KERNELS


@dataclass(frozen=True)
class MemoryOptions:
    """memory"""

    gradient_checkpointing: str = option(
        AUTO,
        "what blocks keep for the backward pass; auto: as much as there is room for",
        choices=(AUTO, *STRATEGIES),
        const="full",
        affects_training=False,
    )
    fp32_stream: bool = option(
        False, "do not round the residual stream to bf16 after each block; inputs of blocks then take twice the memory"
    )
    compile: str = option(
        "auto",
        "compile the blocks; auto: where a compiler works and the run is long enough to gain",
        choices=("auto", "on", "off"),
        const="on",
        affects_training=False,
    )

    def compiles(self, device: torch.device, shape: WanShape, tokens: float, decisions: Decisions) -> bool:
        """Whether blocks are compiled in a run that trains a model of this shape on so many tokens in all.

        Says what `decide` says, and raises what it raises.
        """
        saved, mode = saved_seconds(device, shape.dim, shape.num_layers, tokens), self.compile
        if mode == "auto":
            mode = decisions.take("compile", lambda: "on" if decide("auto", device, saved) else "off")
        if mode == "on" and (self.compile == "on" or "compile" in decisions.saved):
            decide("on", device, saved)  # says so where there is no compiler, or none any more
        return mode == "on"

    def memory(self, storage: Storage, compiled: bool, attention: str = SDPA) -> Memory:
        """What is done to a model that is held so."""
        stream = torch.float32 if self.fp32_stream else storage.dtype
        # On the CPU the blocks' own operations are as fast in fp32 (benchmarks/RECORDS.md), and they are the reference.
        fuse = storage.device.type == "cuda" and not compiled
        return Memory(self.gradient_checkpointing, compiled, fuse, stream, attention)


def prepare(
    model: WanModel,
    memory: Memory,
    attach: Callable[[WanModel], T],
    plan: CheckpointPlan | None = None,
    stream: Stream | None = None,
) -> T:
    """Applies every strategy to a loaded model and returns what `attach` returns: the adapter that it has put on.

    The order is the one in which they do not undo each other: store, stream, adapters, checkpoint, compile. Weights are
    stored, and moved to where they wait, while they are loaded (`utils.storage`). Adapters go onto stored weights, and
    stay on the device; a checkpointed block runs again through everything below it, and lets the `stream` fetch its
    weights again; what is compiled is all of that. Models that take turns may share a `plan`.
    """
    model.use_attention(memory.attention)
    attached = attach(model)
    if memory != Memory() or stream is not None:
        plan = plan or CheckpointPlan(memory.checkpointing, len(model.blocks))
        for index, block in enumerate(model.blocks):
            enter = None if stream is None else partial(stream.enter, index)
            block.forward = TrainingPass(block, index, memory, plan, enter)
    return attached


def in_fp32(forward: Forward) -> Forward:
    """A block that computes on an fp32 stream, as one that takes a stream in any dtype and returns that dtype."""
    return lambda x, *conditions: forward(x.float(), *conditions).to(x.dtype)


class TrainingPass:
    """The forward pass of a block; called as `Block.forward` is, which it remains where no gradients are asked for."""

    def __init__(
        self, block: nn.Module, index: int, memory: Memory, plan: CheckpointPlan, enter: Enter | None = None
    ) -> None:
        """`enter` is called whenever the block is about to run, forward or backward."""
        assert isinstance(block, Block)
        self.block, self.enter = block, enter
        self.plain = entering(block.forward, enter)
        self.index, self.memory, self.plan, self.parking = index, memory, plan, plan.parking
        own = in_fp32(block.forward)
        self.fused = FusedBlock(block, own) if memory.fuse else None
        self.own = entering(own, enter)
        self.eager = self.own if self.fused is None else entering(self.fused, enter)  # without strategies
        self._uncompiled: Forward = self.fused or own
        self.trains = any(parameter.requires_grad for parameter in block.parameters())
        self.is_last = index == plan.num_blocks - 1
        self._passes: dict[str, Forward] = {}

    def __call__(self, x: Tensor, *conditions: Tensor | None) -> Tensor:
        if not torch.is_grad_enabled():
            return self.plain(x, *conditions)
        x = x.to(self.memory.stream)  # before the block: its first pass and its recomputation read the same numbers
        if self.trains or any(tensor is not None and tensor.requires_grad for tensor in (x, *conditions)):
            x = self._under_strategy(x.shape[0] * x.shape[1])(x, *conditions)
        else:  # autograd keeps nothing of blocks before the first that is trained
            x = self.own(x, *conditions)
        return x.float() if self.is_last else x

    def _under_strategy(self, tokens: int) -> Forward:
        """The block's pass under the strategy that it has for so many tokens."""
        strategy = self.plan.strategies(tokens)[self.index]
        if strategy not in self._passes:
            self._passes[strategy] = self._build(strategy)
        return self._passes[strategy]

    def _build(self, strategy: str) -> Forward:
        """The block's pass under a strategy."""
        if self.memory.compile:
            contexts = {"none": keeping_products, "selective": keeping_kernels}.get(strategy)
            run = compiled(checkpointed(self._uncompiled, contexts))
            parking = self.parking if strategy == "offload" else None
            return entering(with_saved(run, parking, self.enter), self.enter)
        if strategy == "selective":
            return checkpointed(self.eager, self.fused.keeping_answers if self.fused else keeping_kernels)
        if strategy == "offload":
            return parked(self.eager, self.parking)
        return with_saved(self.eager, None, self.enter) if strategy == "none" else checkpointed(self.eager)
