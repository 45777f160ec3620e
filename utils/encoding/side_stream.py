"""Encoding beside training: on a CUDA stream of its own, while the GPU still computes the step before."""

from collections.abc import Callable

import torch
from torch import Tensor

from utils.common.tensors import map_tensors
from utils.encoding.conditioning import Batch


class SideStream:
    """A stream that waits for nothing of what is asked of the device later.

    The host asks for a step and goes on to the next batch at once, long before the device has computed the step. On a
    stream of its own the batch does not wait for that: what the batch is made of was there before.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)
        self.stream.wait_stream(torch.cuda.current_stream(device))  # which may still be loading the encoders

    def encode(self, make: Callable[[], Batch]) -> Batch:
        """The batch that `make` asks the device for. What is asked of it afterwards waits for the batch."""
        with torch.cuda.stream(self.stream):
            batch = make()
        current = torch.cuda.current_stream(self.stream.device)
        current.wait_stream(self.stream)

        def used(tensor: Tensor) -> Tensor:
            tensor.record_stream(current)  # its memory is not given away before that
            return tensor

        return map_tensors(batch, used)

    def peak_of(self, make: Callable[[], Batch]) -> int:
        """The bytes of GPU memory that making a batch takes at its peak."""
        torch.cuda.synchronize(self.stream.device)
        torch.cuda.reset_peak_memory_stats(self.stream.device)
        before = torch.cuda.memory_allocated(self.stream.device)
        self.encode(make)
        return torch.cuda.max_memory_allocated(self.stream.device) - before

    def hold(self, size: int) -> Tensor:
        """So many bytes of the memory that batches are made in."""
        with torch.cuda.stream(self.stream):
            return torch.empty(size, dtype=torch.uint8, device=self.stream.device)
