"""Dataclasses of tensors, treated field by field; many tensors, treated a part at a time."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")

PART = 1 << 24  # values


def map_tensors(value: T, function: Callable[[Tensor], Tensor]) -> T:
    """A copy of a dataclass with `function` applied to each of its tensors, nested ones too; the rest is unchanged.

    Raises TypeError for anything but a dataclass instance, and for a field that a copy could not be given.
    """
    return replace(value, **{spec.name: _mapped(getattr(value, spec.name), function) for spec in fields(value)})


def _mapped(part: object, function: Callable[[Tensor], Tensor]) -> object:
    if isinstance(part, Tensor):
        return function(part)
    return map_tensors(part, function) if is_dataclass(part) and not isinstance(part, type) else part


def stack_tensors(values: Sequence[T]) -> T:
    """One value of the same class: each of its tensors is stacked from those of all values, along a new first axis.

    What is no tensor is that of the first value. Raises ValueError where only some of the values have a tensor.
    """
    changes: dict[str, object] = {}
    for spec in fields(values[0]):
        parts = [getattr(value, spec.name) for value in values]
        if len({part is None for part in parts}) > 1:
            raise ValueError(f"only some of the values have {spec.name}")
        if isinstance(parts[0], Tensor):
            changes[spec.name] = torch.stack(parts)
        elif is_dataclass(parts[0]):
            changes[spec.name] = stack_tensors(parts)
    return replace(values[0], **changes)


def in_parts(tensors: Sequence[Tensor], most: int = PART) -> Iterator[slice]:
    """Slices of the sequence, in order, each of so many values at most, or of one tensor that has more.

    What is computed of many tensors at once takes as much memory as they do; of a part, no more than the part does.
    """
    start = count = 0
    for index, tensor in enumerate(tensors):
        if count and count + tensor.numel() > most:
            yield slice(start, index)
            start, count = index, 0
        count += tensor.numel()
    if start < len(tensors):
        yield slice(start, len(tensors))
