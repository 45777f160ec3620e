"""Encoding beside training: by a thread, on a CUDA stream of its own, while the GPU still computes the step before.

A thread, since the host cannot ask the device for a whole step ahead: about a thousand requests wait on a stream, and a
step is more. A stream, since on that of training the batch would wait for the step, of which it needs nothing.
"""

from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from typing import TypeVar

import torch
from torch import Tensor

from utils.common.tensors import map_tensors
from utils.encoding.conditioning import Batch

Loaded = TypeVar("Loaded")
Made = tuple[Batch, torch.Event]  # what was asked of the device, and when it is there


class SideStream:
    """A stream beside that of training, and the memory of what is made on it."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)
        self.stream.wait_stream(torch.cuda.current_stream(device))  # which may still be loading the encoders

    def encoded(
        self, loaded: Generator[Loaded, None, None], encode: Callable[[Loaded], Batch]
    ) -> Generator[Batch, None, None]:
        """What `encode` makes of each value, in order; it makes the next one while this one is in use.

        Where taking a value raises, so does this, at most one batch early; where `encode` raises, in its place. Closing
        the generator ends the thread, and then `loaded`.
        """
        with closing(loaded), ThreadPoolExecutor(1, "encoding") as thread:
            coming = deque[Future[Made]]()
            for value in loaded:
                coming.append(thread.submit(self._make, encode, value))
                if len(coming) > 1:
                    yield self._taken(*coming.popleft().result())
            for future in coming:
                yield self._taken(*future.result())

    def _make(self, encode: Callable[[Loaded], Batch], value: Loaded) -> Made:
        with torch.cuda.stream(self.stream):
            return encode(value), self.stream.record_event()

    def _taken(self, batch: Batch, made: torch.Event) -> Batch:
        """The batch, for the current stream, which waits for it."""
        current = torch.cuda.current_stream(self.stream.device)
        current.wait_event(made)

        def used(tensor: Tensor) -> Tensor:
            tensor.record_stream(current)  # its memory is given to no other batch before it has been used
            return tensor

        return map_tensors(batch, used)

    def hold_peak_of(self, make: Callable[[], object]) -> Tensor:
        """As much of this stream's memory as `make` takes at its peak, which is measured."""
        device = self.stream.device
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        with torch.cuda.stream(self.stream):
            make()
            taken = torch.cuda.max_memory_allocated(device) - before
            return torch.empty(taken, dtype=torch.uint8, device=device)
