"""Gradient checkpointing of blocks: what of a block is kept for the backward pass, and what is computed again.

none        everything that the backward pass reads is kept
selective   the block's input, and the answers of its attentions: all but the attentions is computed again
full        the block's input
offload     the block's input, in main memory
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from utils.training.kept_attention import KERNELS
from utils.training.offload import Parked, Parking

PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")
STRATEGIES = ("none", "selective", "full", "offload")

Forward = Callable[..., Tensor]  # of a block: the stream first, then its conditions
Contexts = Callable[[], tuple[AbstractContextManager[Any], AbstractContextManager[Any]]]


def keep_kernels(_context: Any, operation: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    """Attention kernels are not run again; nothing else is kept."""
    is_kernel = operation._schema.name.startswith(KERNELS)
    return CheckpointPolicy.MUST_SAVE if is_kernel else CheckpointPolicy.PREFER_RECOMPUTE


def keep_products(_context: Any, operation: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    """Neither attention kernels nor matrix products are run again."""
    is_kept = operation._schema.name.startswith((*KERNELS, *PRODUCTS))
    return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_SAVE


keeping_kernels: Contexts = partial(create_selective_checkpoint_contexts, keep_kernels)
keeping_products: Contexts = partial(create_selective_checkpoint_contexts, keep_products)


def checkpointed(forward: Forward, contexts: Contexts | None = None) -> Forward:
    """The block keeps only its inputs, and with `contexts` what these keep, and computes the rest again.

    Non-reentrant, so that a first block whose input needs no gradient still trains its adapters; nothing in the blocks
    is random, so no random state is stored.
    """
    more = {} if contexts is None else {"context_fn": contexts}
    return partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=False, **more)


def parked(forward: Forward, parking: Parking) -> Forward:
    """As `checkpointed`; the stream waits in main memory."""

    def run(x: Tensor, *conditions: Tensor | None) -> Tensor:
        own, waiting = [x], parking.park(x)

        # The first pass reads x itself and lets go of it, or this function would keep it on the device.
        def again(*conditions: Tensor | None) -> Tensor:
            return forward(own.pop() if own else waiting.take(), *conditions)

        return checkpointed(again)(*conditions)

    return run


def with_saved(forward: Forward, parking: Parking | None, enter: Callable[[], None] | None) -> Forward:
    """What a block saves for the backward pass is taken care of: of a compiled one, or one without checkpointing.

    The stream waits in main memory where there is `parking`. `enter` is called in the backward pass, before anything
    that was saved is used.
    """
    if parking is None and enter is None:
        return forward

    def unpack(kept: Tensor | Parked) -> Tensor:
        if enter is not None:
            enter()
        return kept.take() if isinstance(kept, Parked) else kept

    def run(x: Tensor, *conditions: Tensor | None) -> Tensor:
        place = x.data_ptr()  # what is saved is an alias of x. Autograd keeps `pack`, which must not keep x

        def pack(tensor: Tensor) -> Tensor | Parked:
            # Aliases: what a block returns is saved too, and would keep its own graph alive.
            return parking.park(tensor) if parking and tensor.data_ptr() == place else tensor.detach()

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            return forward(x, *conditions)

    return run
