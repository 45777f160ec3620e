"""What a training step takes, counted instead of measured: the same numbers on every machine, the meta device included.

Operations are counted as torch dispatches them. Views and allocations are free. Every other operation reads its inputs
and writes its outputs once; an element that is broadcast is read once. Memory is alive from the operation that makes a
storage until the storage is freed. What a kernel does inside is not seen, with one exception: see `WORKSPACE`.
"""

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from utils.training.fused_ops import fused_ops

ELEMENTWISE, PRODUCT, ATTENTION = "elementwise", "gemm", "attention"
PRODUCTS = {
    "template",  # of Inductor
    "mm",
    "addmm",
    "addmm_",
    "bmm",
    "baddbmm",
    "baddbmm_",
    "convolution",
    "convolution_backward",
    "_scaled_mm",
}
ALLOCATIONS = ("empty", "new_empty")
OVERWRITES = ("copy_", "fill_", "zero_", "normal_", "uniform_")  # in place, without reading what was there

# Bytes for each element of the queries that the backward pass of FlashAttention takes by itself: it adds up their
# gradient in fp32. From PyTorch's flash_api.cpp (`dq_accum`).
WORKSPACE = 4
# Matrix products of the size of q k^T: two forward; five backward, which computes the scores again.
FORWARD_PRODUCTS, BACKWARD_PRODUCTS = 2, 5


@dataclass(frozen=True)
class Operation:
    """An operation as torch has dispatched it."""

    name: str
    kind: str  # ELEMENTWISE, PRODUCT or ATTENTION
    fresh: list[Tensor]  # the results that are in memory of their own
    is_free: bool  # a view, or an allocation
    moved: int  # bytes read and written

    @staticmethod
    def of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: object) -> "Operation":
        inputs, targets, overwritten = _arguments(func, args, kwargs)
        known = {storage_of(tensor) for tensor in (*inputs, *targets)}
        fresh = [leaf for leaf in tensors_in(result) if storage_of(leaf) not in known]
        name = func._schema.name.split("::")[1]
        is_free = not (fresh or targets) or name.startswith(ALLOCATIONS)
        read = inputs if overwritten else [*inputs, *targets]
        moved = 0 if is_free else sum(map(distinct_bytes, (*read, *targets, *fresh)))
        return Operation(name, kind_of(name), fresh, is_free, moved)


def kind_of(name: str) -> str:
    """What an operation or a kernel of this name does."""
    if name in PRODUCTS:
        return PRODUCT
    return ATTENTION if "attention" in name else ELEMENTWISE


def tensors_in(value: object) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if not isinstance(value, Iterable):
        return []
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def storage_of(tensor: Tensor) -> int:
    """A number that tells the storages apart which are alive."""
    number: int = tensor.untyped_storage()._cdata
    return number


def distinct_bytes(tensor: Tensor) -> int:
    """The bytes of a tensor, each element that is broadcast over a dimension once."""
    count = tensor.element_size()
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride or not size else 1
    return count


def _arguments(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Tensor], list[Tensor], bool]:
    """The tensors that an operation only reads, those that it writes, and whether it writes without reading them."""
    inputs: list[Tensor] = []
    targets: list[Tensor] = []
    out = False
    for index, (name, written, is_out) in enumerate(_declared(func)):
        value = args[index] if index < len(args) else kwargs.get(name)
        (targets if written else inputs).extend(tensors_in(value))
        out = out or is_out
    return inputs, targets, out or func._schema.name.endswith(OVERWRITES)


@cache
def _declared(func: Any) -> list[tuple[str, bool, bool]]:
    """Of each argument of an operation its name, whether it is written, and whether it is an answer's place."""
    arguments = [(each, each.alias_info is not None and each.alias_info.is_write) for each in func._schema.arguments]
    return [(each.name, written, written and each.is_out) for each, written in arguments]


@dataclass(frozen=True)
class Counts:
    """What a step takes, or a part of one. A multiply-add counts as two operations."""

    peak_bytes: float = 0  # alive at once, beyond what was there before the step
    kept_bytes: float = 0  # alive after the forward pass
    product_flops: float = 0
    attention_flops: float = 0
    elementwise_bytes: float = 0

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(*(a + b for a, b in zip(self._values, other._values, strict=True)))

    def __mul__(self, factor: float) -> "Counts":
        return Counts(*(factor * value for value in self._values))

    @property
    def _values(self) -> tuple[float, ...]:
        return tuple(vars(self).values())


def count_step(loss: Callable[[], Tensor], accumulating: Iterable[nn.Parameter] = ()) -> Counts:
    """What the forward and backward pass of `loss()` takes, from the second step on.

    `loss` is called once before, and not counted: that makes what is cached, such as LoRA matrices in the dtype of
    computing. `accumulating` are parameters that have gradients already, to which the step adds.
    """
    counter = _Counter()
    for parameter in accumulating:
        parameter.grad = torch.zeros_like(parameter)
    with fused_ops():
        loss()
        with counter:
            value = loss()
            kept = counter.live - value.nbytes
            value.backward()
    flops, moved = counter.flops, counter.moved
    return Counts(counter.peak, kept, flops.get(PRODUCT, 0), flops.get(ATTENTION, 0), moved)


def count_forward(run: Callable[[], object]) -> Counts:
    """What this takes without gradients."""
    counter = _Counter()
    with torch.no_grad(), counter:
        run()
    return Counts(counter.peak, 0, counter.flops.get(PRODUCT, 0), counter.flops.get(ATTENTION, 0), counter.moved)


def peak_bytes(run: Callable[[], object]) -> int:
    """The bytes that are alive at once while this runs without gradients, beyond what was there before."""
    return int(count_forward(run).peak_bytes)


class _Counter(TorchDispatchMode):
    """Follows the storages that operations make, and adds up what they do."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.moved = 0
        self.flops: dict[str, int] = {}
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        operation = Operation.of(func, args, kwargs or {}, result)
        for tensor in operation.fresh:
            self._follow(tensor.untyped_storage())
        inside = 0
        if operation.kind == ELEMENTWISE:
            self.moved += operation.moved
        else:
            flops, inside = _work(operation.name, [arg for arg in args if isinstance(arg, Tensor)], result)
            self.flops[operation.kind] = self.flops.get(operation.kind, 0) + flops
        self.peak = max(self.peak, self.live + inside)
        return result

    def _follow(self, storage: torch.UntypedStorage) -> None:
        number, size = storage._cdata, storage.nbytes()
        if number in self._alive:
            return

        def end(_: object) -> None:
            self.live -= size
            del self._alive[number]

        self._alive[number] = weakref.ref(storage, end)
        self.live += size


def _work(name: str, tensors: list[Tensor], result: Any) -> tuple[int, int]:
    """The floating-point operations of a product or an attention, and the bytes of its workspace."""
    if kind_of(name) == ATTENTION:
        backward = "backward" in name
        q, k = tensors[1:3] if backward else tensors[:2]  # (B, N, L, K), (B, N, T, K)
        products = BACKWARD_PRODUCTS if backward else FORWARD_PRODUCTS
        return 2 * products * q.numel() * k.shape[-2], WORKSPACE * q.numel() * backward
    if name == "convolution":
        return 2 * result.numel() * tensors[1][0].numel(), 0
    if name == "convolution_backward":
        grad, _, weight = tensors[:3]
        return 2 * grad.numel() * weight[0].numel(), 0
    a, b = tensors[-2:]  # (..., M, K), (..., K, N)
    return 2 * a.numel() * b.shape[-1], 0
