"""Weights that wait in main memory and flow to the device, block by block, just before they are needed.

A block that is streamed has its weights in one piece of main memory. On the device a ring of slots, each as large as a
block, holds those that are needed next. A block has one slot for good: its layers always refer to the same place, and
only what is there changes. Copies run on a stream of their own, in the direction in which blocks are run: upwards, and
downwards in the backward pass. Nothing is ever copied back. The numbers are those of weights that stay on the device,
bit for bit.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from utils.common.errors import RunError
from utils.storage.arena import aligned, lock_pages
from utils.storage.linear import QuantisedLinear
from wan.modules.model import WanModel

SLOTS = 2  # one for the block that runs, one for the next
MISFIT = (
    "the files of the two experts are quantised in different ways, so their blocks cannot share memory: give both in "
    "one format, or leave out --blocks_to_swap"
)
Ready = torch.cuda.Event | None  # None: nothing to wait for


class Lane(Protocol):
    """How weights get to the device."""

    def copy(self, slot: Tensor, host: Tensor) -> Ready:
        """Starts a copy to a slot, which begins when everything queued so far has run; when it has arrived."""

    def wait(self, ready: Ready) -> None:
        """What is queued from now on runs after the copy."""


class PlainLane:
    """On the CPU: a copy at once."""

    def copy(self, slot: Tensor, host: Tensor) -> Ready:
        slot.copy_(host)
        return None

    def wait(self, ready: Ready) -> None: ...


class CudaLane:
    """A stream beside that of the computation. The host waits for neither."""

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()

    def copy(self, slot: Tensor, host: Tensor) -> Ready:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            slot.copy_(host, non_blocking=True)
            ready = self._stream.record_event()
        slot.record_stream(self._stream)  # should the slot be freed while something is copied to it
        return ready

    def wait(self, ready: Ready) -> None:
        assert ready is not None
        torch.cuda.current_stream().wait_event(ready)


def streamed_blocks(num_blocks: int, count: int) -> list[int]:
    """`count` of the blocks, evenly spread among those that stay on the device."""
    return [(2 * k + 1) * num_blocks // (2 * count) for k in range(count)]


def assign_slots(num_blocks: int, count: int, takes_turns: bool = False) -> dict[int, int]:
    """The slot of each block whose weights wait in main memory: `count` blocks that share SLOTS of them.

    Of models that take turns all blocks wait there, and those that are not streamed have slots of their own.
    """
    slots = {block: number % SLOTS for number, block in enumerate(streamed_blocks(num_blocks, count))}
    if takes_turns:
        free = iter(range(SLOTS, SLOTS + num_blocks))
        slots = {block: slots[block] if block in slots else next(free) for block in range(num_blocks)}
    return slots


@dataclass(frozen=True)
class _Place:
    """Where a tensor of a layer is in the memory of its block."""

    layer: nn.Linear
    role: str  # "weight" or "scale"
    start: int
    shape: torch.Size
    dtype: torch.dtype

    @property
    def end(self) -> int:
        return self.start + self.shape.numel() * self.dtype.itemsize

    def in_memory(self, block: Tensor) -> Tensor:
        return block[self.start : self.end].view(self.dtype).view(self.shape)


def _layout(layers: Sequence[nn.Linear]) -> list[_Place]:
    """Where the weights of a block's layers, and their scales, are in its memory."""
    places, start = [], 0
    for layer in layers:
        if isinstance(layer, QuantisedLinear):
            layer.scale_rows()  # so that the blocks of two files fit the same slots
        for role in ("weight", "scale") if isinstance(layer, QuantisedLinear) else ("weight",):
            tensor = getattr(layer, role)
            if tensor is not None:
                places.append(_Place(layer, role, start, tensor.shape, tensor.dtype))
                start = aligned(places[-1].end)
    return places


class Ring:
    """The slots on a device, and which block each holds. Models that take turns share them."""

    def __init__(self, device: torch.device, lane: Lane | None = None) -> None:
        self.device = device
        self.lane = lane or (CudaLane() if device.type == "cuda" else PlainLane())
        self.slots: dict[int, Tensor] = {}  # uint8
        self._held: dict[int, tuple[Tensor, Ready]] = {}  # what each holds, and what is to be waited for before

    def slot(self, number: int, size: int) -> Tensor:
        """The memory of a slot of `size` bytes. Raises RunError for one that is there, and smaller."""
        if number not in self.slots:
            self.slots[number] = torch.empty(size, dtype=torch.uint8, device=self.device)
        if len(self.slots[number]) < size:
            raise RunError(MISFIT)
        return self.slots[number]

    def fetch(self, number: int, host: Tensor) -> None:
        """Starts the copy of a block's weights to a slot, unless it holds them."""
        if number not in self._held or self._held[number][0] is not host:
            self._held.pop(number, None)  # should the copy be interrupted
            # Selective checkpointing would look for these copies among what a block computes again.
            with _disable_current_modes():
                self._held[number] = host, self.lane.copy(self.slots[number][: len(host)], host)

    def forget(self) -> None:
        """Waits for copies, and lets go of what they were made of. Nothing is in a slot any more."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self._held.clear()

    def wait(self, number: int) -> None:
        """What is queued from now on finds the weights that were fetched to a slot."""
        host, ready = self._held[number]
        if ready is not None:
            with _disable_current_modes():
                self.lane.wait(ready)
            self._held[number] = host, None


class Stream:
    """The blocks of one model whose weights wait in main memory."""

    hosts: dict[int, Tensor]  # the memory of each block, uint8

    def __init__(self, model: WanModel, slots: Mapping[int, int], ring: Ring, sharing: "Stream | None" = None) -> None:
        """Moves the weights of these blocks' linear layers to main memory; `slots` as `assign_slots` returns them.

        `model` has all of its weights, on the device or not. Biases, norms and modulation stay where they are. With
        `sharing`, the stream of another model, there is one memory for both, which holds the weights of one at a time:
        those of this model are moved there later (`settle`).
        """
        self.slots, self._ring, self._blocks = slots, ring, sorted(slots)
        self._layers = {block: _linears(model.blocks[block]) for block in self._blocks}
        if sharing is not None:
            self.hosts = sharing.hosts
            return
        sizes = {block: aligned(_layout(layers)[-1].end) for block, layers in self._layers.items()}
        memory = torch.empty(sum(sizes.values()), dtype=torch.uint8)
        self.hosts = dict(zip(self._blocks, memory.split(list(sizes.values())), strict=True))
        for block in self._blocks:
            shared_by = (other for other in slots if slots[other] == slots[block])
            ring.slot(slots[block], max(sizes[other] for other in shared_by))
            self.settle(block)
        if ring.device.type == "cuda":
            lock_pages(memory)

    def settle(self, block: int) -> None:
        """Moves the weights of a block's layers to its memory, from wherever they are. They refer to its slot then.

        Raises RunError where they do not fit.
        """
        layout, host = _layout(self._layers[block]), self.hosts[block]
        if layout[-1].end > len(host):
            raise RunError(MISFIT)
        self._ring.forget()  # a slot may hold what was in this memory before
        for place in layout:
            place.in_memory(host).copy_(getattr(place.layer, place.role))
            view = place.in_memory(self._ring.slots[self.slots[block]])
            is_weight = place.role == "weight"
            setattr(place.layer, place.role, nn.Parameter(view, requires_grad=False) if is_weight else view)

    @contextmanager
    def followed(self, model: WanModel) -> Iterator[None]:
        """Inside, the blocks of its model say when they are about to run, where nothing else does (`enter`)."""
        for index, block in enumerate(model.blocks):
            block.forward = entering(block.forward, partial(self.enter, index))
        try:
            yield
        finally:
            for block in model.blocks:
                del block.forward
            self._ring.forget()

    @property
    def nbytes(self) -> int:
        """The main memory that it takes."""
        return sum(host.nbytes for host in self.hosts.values())

    @property
    def block_bytes(self) -> int:
        """What a slot takes on the device."""
        return max(host.nbytes for host in self.hosts.values())

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor is in one of the slots."""
        storage = tensor.untyped_storage().data_ptr()
        return any(slot.untyped_storage().data_ptr() == storage for slot in self._ring.slots.values())

    def enter(self, block: int) -> None:
        """To be called whenever a block is about to run, in a slot or not: its weights are there, the next follow.

        In the backward pass blocks run downwards. Without gradients the first follow the last: samplers run the model
        again and again. The last ones of a forward pass with gradients stay, for the backward pass begins with them.
        """
        if torch._C._current_graph_task_id() != -1:
            ahead = [other for other in reversed(self._blocks) if other <= block]
        else:
            ahead = [other for other in self._blocks if other >= block]
            if not torch.is_grad_enabled():
                ahead += [other for other in self._blocks if other < block]
        taken = set[int]()
        for other in ahead:
            if (slot := self.slots[other]) in taken:
                break  # it is needed before
            taken.add(slot)
            self._ring.fetch(slot, self.hosts[other])
        if block in self.slots:
            self._ring.wait(self.slots[block])


def entering(forward: Callable[..., Tensor], enter: Callable[[], None] | None) -> Callable[..., Tensor]:
    """A block's forward pass that says when it is about to run."""
    if enter is None:
        return forward

    def run(x: Tensor, *conditions: Tensor | None) -> Tensor:
        enter()
        return forward(x, *conditions)

    return run


def _linears(block: nn.Module) -> list[nn.Linear]:
    return [module for module in block.modules() if isinstance(module, nn.Linear)]
