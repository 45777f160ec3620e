"""Main memory that a GPU reads by itself, for weights that wait there."""

import ctypes
import weakref
from contextlib import suppress

import torch
from torch import Tensor

from utils.common.console import say

M_MMAP_THRESHOLD = -3  # of mallopt
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
        with suppress(RuntimeError):  # the next kernel would raise this error as its own
            torch.zeros(1, device="cuda")
        say(f"note: main memory could not be locked ({result}): copies of weights to the GPU are slower")
        return
    weakref.finalize(memory.untyped_storage(), runtime.cudaHostUnregister, memory.data_ptr())


def return_memory_at_once() -> None:
    """Makes glibc give memory of a weight's size back to the system when it is freed, where glibc is used.

    After the first large tensor was freed, it would keep those up to 32 MB: while weights are copied one after another,
    main memory would hold them twice.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 20)
