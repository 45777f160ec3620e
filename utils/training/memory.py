"""Strategies that trade memory for time. They act on a model's blocks from outside and change no number."""

from collections.abc import Iterable
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint


def checkpoint_blocks(blocks: Iterable[nn.Module]) -> None:
    """Each block keeps only its inputs for the backward pass and computes the rest again there.

    `block.forward` is replaced, so parameter names stay. Non-reentrant, so that a first block whose input needs no
    gradient still trains its adapters; nothing in the blocks is random, so no random state is stored.
    """
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
