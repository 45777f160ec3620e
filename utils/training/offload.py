"""Tensors that wait in main memory between the forward and the backward pass, copied while the device computes."""

import weakref

import torch
from torch import Tensor

from utils.common.errors import RunError
from utils.common.formatting import readable_size

CHUNK = 1 << 30  # bytes. The allocator of page-locked memory rounds up to powers of two


class Parking:
    """Main memory for tensors that are wanted back in the opposite order of their coming.

    Copies run on streams of their own, out and in at the same time, and the host never waits. Whenever a tensor is
    taken, the one parked before it is fetched ahead. On the CPU these are plain copies.
    """

    def __init__(self, chunk: int = CHUNK) -> None:
        self._chunks: list[Tensor] = []  # uint8; page-locked for a GPU
        self._chunk_size = chunk
        self._place = (0, 0)  # chunk and byte where free memory begins
        self._parked: list[weakref.ref[Parked]] = []
        self._streams: tuple[torch.cuda.Stream, torch.cuda.Stream] | None = None  # out, in
        self._waits: list[tuple[torch.cuda.Event, torch.cuda.Event]] | None = None

    def park(self, tensor: Tensor) -> "Parked":
        """Starts the copy of a tensor to main memory."""
        self._parked = [ref for ref in self._parked if (parked := ref()) is not None and not parked.is_taken]
        last = self._parked[-1]() if self._parked else None
        self._place = (0, 0) if last is None else last.end
        host = self._room(tensor)
        copied = None
        if tensor.is_cuda:
            out, back = self._streams = self._streams or (torch.cuda.Stream(), torch.cuda.Stream())
            out.wait_stream(torch.cuda.current_stream())
            out.wait_stream(back)  # it may still read what this memory held before
            with torch.cuda.stream(out):
                host.copy_(tensor.detach(), non_blocking=True)
                copied = out.record_event()
            tensor.record_stream(out)
        else:
            host.copy_(tensor.detach())
        parked = Parked(self, tensor, host, copied, self._place)
        self._parked.append(weakref.ref(parked))
        return parked

    def _room(self, tensor: Tensor) -> Tensor:
        """Free main memory of the shape and dtype of a tensor."""
        index, start = self._place
        if index < len(self._chunks) and start + tensor.nbytes > len(self._chunks[index]):
            index, start = index + 1, 0
        if index < len(self._chunks) and tensor.nbytes > len(self._chunks[index]):
            del self._chunks[index:]  # from a time of smaller tensors
        if index == len(self._chunks):
            size = max(self._chunk_size, tensor.nbytes)
            self._chunks.append(_page_locked(size) if tensor.is_cuda else torch.empty(size, dtype=torch.uint8))
        end = start + tensor.nbytes
        self._place = index, -(-end // 64) * 64
        return self._chunks[index][start:end].view(tensor.dtype).view(tensor.shape)

    def back(self, host: Tensor, copied: torch.cuda.Event | None, device: torch.device) -> tuple[Tensor, "Ready"]:
        """Starts the copy from main memory; the event after which it is complete."""
        if copied is None:
            return host.clone(), None
        assert self._streams is not None
        _, back = self._streams
        # The memory comes from that of the computing stream, which may still use it.
        tensor = torch.empty(host.shape, dtype=host.dtype, device=device)
        back.wait_stream(torch.cuda.current_stream())
        back.wait_event(copied)
        with torch.cuda.stream(back):
            tensor.copy_(host, non_blocking=True)
            ready = back.record_event()
        tensor.record_stream(back)
        return tensor, ready

    def wait(self, ready: "Ready") -> None:
        """Lets the computing stream, not the host, wait for a copy."""
        if ready is None:
            return
        stream = torch.cuda.current_stream()
        if self._waits is None:
            stream.wait_event(ready)
            return
        before = stream.record_event(torch.cuda.Event(enable_timing=True))
        stream.wait_event(ready)
        self._waits.append((before, stream.record_event(torch.cuda.Event(enable_timing=True))))

    def release(self) -> None:
        """Gives the memory back; nothing must wait in it."""
        self._chunks.clear()

    def waited(self) -> float:
        """The seconds that the device has waited for copies since the last call. The first call starts to measure."""
        waits, self._waits = self._waits or [], []
        if waits:
            torch.cuda.synchronize()
        return sum(before.elapsed_time(after) for before, after in waits) / 1e3

    def fetch_before(self, parked: "Parked") -> None:
        """Starts the copy of the tensor that was parked before another one and has not been taken."""
        alive = [found for ref in self._parked if (found := ref()) is not None]
        before = [other for other in alive[: alive.index(parked)] if not other.is_taken]
        if before:
            before[-1].fetch()


def _page_locked(size: int) -> Tensor:
    """Main memory that a GPU copies from and to by itself. Raises RunError where there is too little."""
    try:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)
    except RuntimeError as error:
        raise RunError(
            f"no {readable_size(size)} of main memory could be locked for what blocks keep ({error})\n"
            "--gradient_checkpointing full keeps it on the GPU"
        ) from None


Ready = torch.cuda.Event | None  # None: nothing to wait for


class Parked:
    """A tensor in main memory. It lives as long as this object is referred to."""

    def __init__(self, parking: Parking, tensor: Tensor, host: Tensor, copied: Ready, end: tuple[int, int]) -> None:
        self._parking, self._host, self._copied = parking, host, copied
        self.end = end  # where free memory begins after it
        self._device, self._needs_grad = tensor.device, tensor.requires_grad
        self._fetched: tuple[Tensor, Ready] | None = None
        self.is_taken = False

    def fetch(self) -> None:
        """Starts the copy back to the device, unless it has begun."""
        if self._fetched is None:
            self._fetched = self._parking.back(self._host, self._copied, self._device)

    def take(self) -> Tensor:
        """The tensor on the device again, without a graph; once."""
        self.fetch()
        assert self._fetched is not None
        (tensor, ready), self._fetched = self._fetched, None
        self._parking.wait(ready)
        self._parking.fetch_before(self)
        self.is_taken = True
        return tensor.detach().requires_grad_(self._needs_grad)
