"""What an optimizer keeps, as the state of a run must hold it."""

import sys
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from utils.common.errors import UserError
from utils.training.optimizers import UP, OptimizerSpec, groups_of, make_optimizer
from wan.names import PATCH

# Entries of a parameter group that follow from the options of this run, never from a saved state.
_FROM_OPTIONS = ("params", "lr", "initial_lr", "weight_decay", "warmup_steps")
_AT_LEAST_0 = (
    "exp_avg_sq",
    "exp_avg_sq_row",
    "exp_avg_sq_col",
    "exp_avg_scale",
    "exp_avg_sq_scale",
    "absmax1",
    "absmax2",
    "RMS",
    "step",
)


@dataclass(frozen=True)
class Layout:
    """What an optimizer keeps of a parameter after an update, and which numbers its groups remember then."""

    state: Mapping[str, Any]
    settings: Set[str]

    @property
    def nbytes(self) -> int:
        """Of its tensors, but for single numbers."""
        return sum(value.nbytes for value in self.state.values() if isinstance(value, Tensor) and value.ndim)


def layout_of(name: str, parameter: Tensor, spec: OptimizerSpec, start: float = 1.0) -> Layout:
    """That of a parameter of this name and shape, from an update of another one on the CPU.

    All of its numbers are `start`: of a parameter of zeros Prodigy keeps less.
    """
    role = "".join(part for part in (PATCH, UP) if part in name)  # all that a name decides
    return _layout(role, parameter.shape, parameter.dtype, spec, start)


@lru_cache(maxsize=64)
def _layout(name: str, shape: torch.Size, dtype: torch.dtype, spec: OptimizerSpec, start: float) -> Layout:
    parameter = nn.Parameter(torch.full(shape, start, dtype=dtype))
    parameter.grad = torch.ones_like(parameter)
    optimizer = make_optimizer(groups_of({name: parameter}, spec), spec)
    optimizer.step()
    return Layout(optimizer.state[parameter], numbers_of(optimizer.param_groups[0]).keys())


def check_kept(name: str, state: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Raises UserError where a saved state of a parameter is not of the expected names, shapes and dtypes, or damaged.

    Moments of another size would not raise: a fused kernel reads past their end.
    """
    if state.keys() != expected.keys():
        found = ", ".join(sorted(state)) or "nothing"
        raise UserError(f"its optimizer state of {name} has {found}: is --optimizer that of the saved run?")
    for key, like in expected.items():
        value = state[key]
        fits = isinstance(value, Tensor) and value.shape == like.shape if isinstance(like, Tensor) else is_number(value)
        # Prodigy keeps of a parameter that starts at zero, as up matrices do, a single zero.
        fits = fits or (key == "p0" and isinstance(value, Tensor) and value.shape == () and not value.item())
        if not fits or (isinstance(value, Tensor) and value.dtype != like.dtype):
            raise UserError(f"its optimizer state {key} of {name} has another shape or dtype than the parameter")
        numbers = value if isinstance(value, Tensor) else torch.tensor(value)
        if not numbers.isfinite().all() or (key in _AT_LEAST_0 and numbers.min() < 0):
            raise UserError(f"its optimizer state {key} of {name} is not finite or negative: the file is damaged")


def check_settings(groups: Sequence[Mapping[str, Any]], least: Mapping[str, float]) -> None:
    """Raises UserError where saved groups do not remember exactly these numbers, each of at least so much."""
    for group in groups or [{}]:
        if group.keys() != least.keys():
            raise UserError(f"its optimizer remembers {', '.join(sorted(group)) or 'nothing'}, not {', '.join(least)}")
        for name, minimum in least.items():
            if not is_number(group[name]) or group[name] < minimum:
                raise UserError(f"its optimizer has {name} {group[name]!r}: the file is damaged")


def numbers_of(group: Mapping[str, Any]) -> dict[str, Any]:
    """What a parameter group remembers."""
    return {key: value for key, value in group.items() if key not in _FROM_OPTIONS and is_number(value)}


def is_number(value: object) -> bool:
    return isinstance(value, bool | int | float) and abs(value) <= sys.float_info.max
