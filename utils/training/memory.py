"""Strategies that trade memory for time. They act on a model's blocks from outside and change no number."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from torch import nn
from torch.utils.checkpoint import checkpoint

from utils.common.options import option
from wan.modules.model import WanModel

T = TypeVar("T")


@dataclass(frozen=True)
class Memory:
    """What is done to a model so that it fits and runs fast. `checkpointing` is none or full."""

    checkpointing: str = "none"
    compile: bool = False


@dataclass(frozen=True)
class MemoryOptions:
    """memory"""

    gradient_checkpointing: str = option(
        "none", "recompute blocks in the backward pass to save memory", choices=("none", "full"), const="full"
    )

    @property
    def memory(self) -> Memory:
        return Memory(self.gradient_checkpointing)


def prepare(model: WanModel, memory: Memory, attach: Callable[[WanModel], T]) -> T:
    """Applies every strategy to a loaded model and returns what `attach` returns: the adapter that it has put on.

    The order is the one in which they do not undo each other: store, adapters, stream, checkpoint, compile.
    Weights are stored while they are loaded (the `place` of `wan.checkpoints.load_weights`), so that they never exist
    twice. Adapters go onto stored weights; a stream moves blocks with their adapters; a checkpointed block runs again
    through everything below it; what is compiled is all of that.
    """
    attached = attach(model)
    if memory.checkpointing == "full":
        checkpoint_blocks(model.blocks)
    if memory.compile:
        compile_blocks(model.blocks)
    return attached


def checkpoint_blocks(blocks: Iterable[nn.Module]) -> None:
    """Each block keeps only its inputs for the backward pass and computes the rest again there.

    `block.forward` is replaced, so parameter names stay. Non-reentrant, so that a first block whose input needs no
    gradient still trains its adapters; nothing in the blocks is random, so no random state is stored.
    """
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)


def compile_blocks(blocks: Iterable[nn.Module]) -> None:
    """Compiles each block for the shapes it meets; names and parameters stay."""
    for block in blocks:
        block.compile(dynamic=False)
