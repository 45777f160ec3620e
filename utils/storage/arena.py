"""Main memory that a GPU reads by itself, for weights that wait there."""

import weakref

import torch
from torch import Tensor

from utils.common.console import say

ALIGNMENT = 256  # bytes: what kernels and copies expect of a tensor's place


def aligned(size: int) -> int:
    """A number of bytes, rounded up to a place where the next tensor can be."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def lock_pages(memory: Tensor) -> None:
    """Locks the pages of a tensor in main memory for as long as it lives, so that a GPU copies from it meanwhile.

    PyTorch's own page-locked memory is rounded up to powers of two: up to twice the size. Where pages cannot be locked,
    that is said: copies are then slower, and the GPU waits for each.
    """
    runtime = torch.cuda.cudart()
    result = runtime.cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)
    if result != runtime.cudaError.success:
        say(f"note: main memory could not be locked ({result}): copies of weights to the GPU are slower")
        return
    weakref.finalize(memory.untyped_storage(), runtime.cudaHostUnregister, memory.data_ptr())
