"""Functions over the tensors of a dataclass, so that a new tensor field needs no further code."""

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import TYPE_CHECKING, TypeVar

from torch import Tensor

if TYPE_CHECKING:
    from _typeshed import DataclassInstance  # known to type checkers only

D = TypeVar("D", bound="DataclassInstance")


def map_tensors(value: D, function: Callable[[Tensor], Tensor]) -> D:
    """A copy of a dataclass with `function` applied to every tensor in its fields, and in dataclasses inside it.

    All other values, None among them, are kept. Raises TypeError for anything but a dataclass instance.
    """
    return replace(value, **{spec.name: _mapped(getattr(value, spec.name), function) for spec in fields(value)})


def _mapped(part: object, function: Callable[[Tensor], Tensor]) -> object:
    if isinstance(part, Tensor):
        return function(part)
    if is_dataclass(part) and not isinstance(part, type):
        return map_tensors(part, function)
    return part
