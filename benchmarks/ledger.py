"""What a training step moves and keeps, counted instead of timed: the same numbers on every machine.

Operations are counted as torch dispatches them, on any device. Views and allocations are free. Every other operation
reads its inputs and writes its outputs once; an element that is broadcast is read once. F.rms_norm counts as the one
operation that it is on CUDA, on the CPU too.

    kept          bytes in storages that the forward pass made and that are alive after it, without the loss: what
                  autograd, a checkpoint or a custom Function keeps for the backward pass
    elementwise   bytes read and written by operations that are none of the two below
    gemm          the same of matrix products and convolutions
    attention     the same of attention kernels
    ops           the number of operations of all three kinds

What a kernel does inside, such as a copy to another layout, is not seen. What torch.library.custom_op makes is one
operation, whatever its implementation does; a kernel that is launched without one is not seen at all.

Of compiled code the operations are the kernels that Inductor has scheduled, with its own read and write sets, and kept
is what the compiled graphs hand on; its lines are marked. A checkpoint inside a compiled graph recomputes inside its
backward graph, where it counts as backward.
"""

import gc
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.compiled import Graph, watched
from benchmarks.measure import Sizes, count_tokens
from benchmarks.models import Trainee, random_inputs
from utils.common.errors import RunError
from utils.common.formatting import format_table
from utils.training.counting import ELEMENTWISE, Operation, kind_of, storage_of, tensors_in
from utils.training.counting import PRODUCT as GEMM
from utils.training.fused_ops import fused_ops
from wan.modules.model import WanShape

KEPT, OPS = "kept", "ops"
FORWARD, RECOMPUTE, BACKWARD = "forward", "recompute", "backward"
ROOTS = (Path(torch.__file__).resolve().parents[1], Path(__file__).resolve().parents[1])
PACKAGES = ("wan", "utils", "diffusers", "peft")  # whose lines are listed
STAND_INS = Path("utils/training/fused_ops.py")  # for operations of torch: no line that calls them is there
DEPTHS, GRIDS = (1, 3), ((1, 16, 16), (2, 16, 16))  # what `per_block` subtracts: blocks, latents F, H, W
COMPILED_GRIDS = ((1, 64, 64), (2, 64, 64))  # what a compiler keeps depends on size: that of real clips
ELSEWHERE = "elsewhere"
COMPILED = ", compiled"


class Entry(NamedTuple):
    """What a number of the ledger counts."""

    what: str  # bytes kept, elementwise, gemm or attention; or the number of ops
    phase: str  # forward, backward, or recompute: in the backward pass, below a function `forward` of PACKAGES
    line: str  # file:line of the innermost frame in one of PACKAGES; of a gradient that of its forward operation


Ledger = dict[Entry, float]


def record(forward: Callable[[], Tensor], leaves: Sequence[Tensor], compiled: bool = False) -> Ledger:
    """The ledger of one forward and backward pass. `forward` returns the loss; `leaves` get gradients, then lose them.

    A pass that is not recorded comes first: it makes what is cached, such as the rotary table. With `compiled`, parts
    of the model are compiled by torch, and the first pass compiles them. Raises RunError if none is.
    """
    [ledger] = record_all([(forward, leaves)], compiled)
    return ledger


def record_all(passes: Sequence[tuple[Callable[[], Tensor], Sequence[Tensor]]], compiled: bool = False) -> list[Ledger]:
    """The ledgers of passes, each as `record` has it.

    What one compiles runs in those after it, with the bytes of the sizes that it was compiled for.
    """
    recorder = _Recorder()
    ledgers = []
    with ExitStack() as stack:
        stack.enter_context(fused_ops())
        if compiled:
            stack.enter_context(watched(recorder.run_graph))
        for forward, leaves in passes:
            recorder.begin()
            forward().backward()
            _drop_gradients(leaves)
            recorder.begin()
            _record(recorder, forward)
            _drop_gradients(leaves)
            if compiled and not recorder.graphs:
                raise RunError("nothing was compiled: torch ran the whole model without compiling it")
            ledgers.append(recorder.ledger)
    return ledgers


def _record(recorder: "_Recorder", forward: Callable[[], Tensor]) -> None:
    gc.freeze()  # so that only what the forward pass makes is searched, which is much faster
    with recorder:
        loss = forward()
        gc.collect()  # what only a circle of references holds would be counted as kept
        gc.unfreeze()
        recorder.close_forward(loss)
        loss.backward()


def _drop_gradients(leaves: Sequence[Tensor]) -> None:
    for leaf in leaves:
        leaf.grad = None  # else the next pass would add to it


def per_block(
    build: Callable[[WanShape], Trainee],
    shape: WanShape,
    device: torch.device,
    compiled: bool = False,
    grids: Sequence[tuple[int, int, int]] = (),
) -> Ledger:
    """The ledger of one block: bytes per token and unit of width, and ops.

    Bytes are the difference between two depths (3 and 1 blocks) of the difference between two token counts (128 and
    64, or 2048 and 1024 of compiled blocks): embeddings and head cancel, and so does what does not grow with the
    video, such as weights and the rows of the text. They grow linearly with tokens, so the numbers hold for any
    length. Ops are the difference between the two depths alone, so those on weights and text are in. `build` is given
    the shape with the depth. With one grid in `grids`, which takes half the time, what does not grow is in, too.
    """
    grids = grids or (COMPILED_GRIDS if compiled else GRIDS)
    deeper = []
    for grid in grids:
        passes = []
        for layers in DEPTHS:
            trainee = build(replace(shape, num_layers=layers))
            inputs = random_inputs(Sizes(shape=shape), grid, device)
            passes.append((partial(trainee.loss, inputs), trainee.parameters))
        one, three = record_all(passes, compiled)
        deeper.append(subtract(three, one))
    unit = (count_tokens(grids[-1]) - sum(map(count_tokens, grids[:-1]))) * shape.dim
    growing = subtract(deeper[1], deeper[0]) if len(grids) > 1 else deeper[0]
    moved = {e: value / unit for e, value in growing.items() if e.what != OPS}
    ops = {e: value for e, value in deeper[-1].items() if e.what == OPS}
    return {e: value / (DEPTHS[1] - DEPTHS[0]) for e, value in (moved | ops).items()}


def subtract(ledger: Ledger, other: Ledger) -> Ledger:
    """The difference of two ledgers, without what cancels."""
    entries = dict.fromkeys([*ledger, *other])
    difference = {entry: ledger.get(entry, 0) - other.get(entry, 0) for entry in entries}
    return {entry: value for entry, value in difference.items() if value}


def total(ledger: Ledger, what: str, phase: str) -> float:
    """The sum over all lines."""
    return sum(value for entry, value in ledger.items() if entry[:2] == (what, phase))


COLUMNS = (
    (KEPT, FORWARD),
    (ELEMENTWISE, FORWARD),
    (ELEMENTWISE, RECOMPUTE),
    (ELEMENTWISE, BACKWARD),
    (GEMM, FORWARD),
    (GEMM, RECOMPUTE),
    (GEMM, BACKWARD),
    (OPS, FORWARD),
    (OPS, RECOMPUTE),
    (OPS, BACKWARD),
)


def format_totals(ledgers: Mapping[str, Ledger]) -> str:
    """A table with a row for each of several ledgers of `per_block`."""
    return _table("", [(name, [total(ledger, *column) for column in COLUMNS]) for name, ledger in ledgers.items()])


def format_lines(ledger: Ledger) -> str:
    """A table with a row for each source line of a ledger of `per_block`."""
    lines = sorted({entry.line for entry in ledger}, key=lambda line: (line.split(":")[0], len(line), line))
    return _table("line", [(line, [ledger.get(Entry(*column, line), 0) for column in COLUMNS]) for line in lines])


def _table(first: str, rows: list[tuple[str, list[float]]]) -> str:
    shown = {KEPT: "kept", ELEMENTWISE: "elem", GEMM: "gemm", OPS: "ops"}
    header = [first, *(f"{shown[what]} {phase[:3]}" for what, phase in COLUMNS)]
    return format_table(header, [(name, *(round(value, 1) for value in values)) for name, values in rows])


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.begin()

    def begin(self) -> None:
        """Starts the ledger of a pass."""
        self.ledger: Ledger = {}
        self.forward = True
        self.made: dict[StorageWeakRef, tuple[int, str]] = {}  # bytes and line of storages of the forward pass
        self.lines: dict[int, str] = {}  # of autograd nodes, by sequence number
        self.line = ELSEWHERE
        self.in_graph = False
        self.graphs = 0  # how many compiled graphs have run

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True  # otherwise torch would not run compiled code inside

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.in_graph:
            return result
        phase = self._locate()
        operation = Operation.of(func, args, kwargs or {}, result)
        if phase == FORWARD:
            self._follow(operation.fresh)
        if not operation.is_free:
            self._add(operation.kind, phase, operation.moved)
            self._add(OPS, phase, 1)
        return result

    def run_graph(self, graph: Graph, inputs: Sequence[Any], run: Callable[[], Any]) -> Any:
        """Runs a compiled graph and counts its kernels."""
        self.graphs += 1
        phase = FORWARD if self.forward else BACKWARD if graph.is_backward else RECOMPUTE
        self._locate()
        self.line += COMPILED
        known = {storage_of(tensor) for tensor in tensors_in(inputs)}
        caller, self.in_graph = self.line, True
        try:
            result = run()
        finally:
            self.in_graph = False
        if phase == FORWARD:
            self._follow([leaf for leaf in tensors_in(result) if storage_of(leaf) not in known])
        for kernel in graph.kernels:
            own = [f"{path}:{number}" for file, number in kernel.files if (path := _own_path(file)) is not None]
            self.line = own[-1] + COMPILED if own else caller
            self._add(kind_of(kernel.name), phase, kernel.bytes)
            self._add(OPS, phase, 1)
        return result

    def _follow(self, tensors: list[Tensor]) -> None:
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self.made.setdefault(StorageWeakRef(storage), (storage.nbytes(), self.line))

    def _add(self, what: str, phase: str, value: float) -> None:
        entry = Entry(what, phase, self.line)
        self.ledger[entry] = self.ledger.get(entry, 0) + value

    def _locate(self) -> str:
        """Sets the line of the current operation and returns its phase."""
        line, again = None, False
        for path, number, function in _frames():
            line = line or f"{path}:{number}"
            again = again or function == "forward"
        # While the engine adds up gradients, this is the node that has made the last one.
        node = None if self.forward else torch._C._current_autograd_node()
        if line is None and node is not None:
            line = self.lines.get(node._sequence_nr())
        self.line = line or ELSEWHERE
        if self.forward or again:
            # torch numbers the node of an operation before it dispatches the operation.
            self.lines.setdefault(torch.autograd._get_sequence_nr() - 1, self.line)
        return FORWARD if self.forward else RECOMPUTE if again else BACKWARD

    def close_forward(self, loss: Tensor) -> None:
        """Counts the storages that are alive, without that of the loss."""
        self.forward = False
        own = storage_of(loss)
        for storage, (size, line) in self.made.items():
            if not storage.expired() and storage.cdata != own:
                self.line = line
                self._add(KEPT, FORWARD, size)


def _frames() -> Iterator[tuple[str, int, str]]:
    """Path, line and function of the frames in PACKAGES, from the innermost to that of `_record`."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not _record.__code__:
        if (path := _own_path(frame.f_code.co_filename)) is not None:
            yield path, frame.f_lineno, frame.f_code.co_name
        frame = frame.f_back


@cache
def _own_path(filename: str) -> str | None:
    """The path from a package of PACKAGES on; None for a file of any other."""
    for root in ROOTS:
        if Path(filename).is_relative_to(root):
            path = Path(filename).relative_to(root)
            return path.as_posix() if path.parts[0] in PACKAGES and path != STAND_INS else None
    return None
