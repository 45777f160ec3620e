"""Weights as they are stored: plain tensors, or fp8 and int8 codes with what turns them into values."""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
# A rotation mixes groups of so many columns: powers of 4 (https://arxiv.org/abs/2512.03673).
GROUPS = (4, 16, 64, 256, 1024)


@dataclass(frozen=True)
class Quantised:
    """A weight (rows, columns) in codes. A weight that was rotated before it was quantised is rotated back."""

    codes: Tensor  # fp8 or int8; a float that has a scale counts too
    scale: Tensor | None = None  # one value, or one for each row (rows, 1), or for each block (rows, blocks, 1)
    group: int = 0  # columns that the rotation mixes, of GROUPS; 0: none

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    def to(self, device: torch.device | str) -> "Quantised":
        scale = None if self.scale is None else self.scale.to(device)
        return Quantised(self.codes.to(device), scale, self.group)

    def values(self, dtype: torch.dtype) -> Tensor:
        """The values in `dtype`, the one in which the model computes."""
        mixed_by = rotation(self.group, self.codes.device) if self.group else None
        return decode(self.codes, self.scale, mixed_by, dtype)


Stored = Tensor | Quantised


def values_of(stored: Stored, dtype: torch.dtype) -> Tensor:
    """The values of what is quantised in `dtype`; a plain tensor as it is."""
    return stored.values(dtype) if isinstance(stored, Quantised) else stored


def decode(codes: Tensor, scale: Tensor | None, mixed_by: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The values of codes in `dtype`: rotated back where they are `mixed_by` a rotation, then scaled.

    The scale is rounded to `dtype` first, as ComfyUI does it.
    """
    weight = codes.to(dtype, copy=True)
    if mixed_by is not None:
        weight = rotate_columns(weight, mixed_by)
    if scale is None:
        return weight
    scale = scale.to(weight.device, dtype)
    if scale.numel() == 1:
        return weight.mul_(scale.reshape(()))
    blocks = weight.view(*scale.shape[:2], -1) if scale.ndim == 3 else weight
    blocks.mul_(scale)
    return weight


def rotate_columns(x: Tensor, mixed_by: Tensor) -> Tensor:
    """x (..., columns), every group of columns multiplied by a `rotation`, which undoes itself."""
    return (x.unflatten(-1, (-1, len(mixed_by))) @ mixed_by.to(x.dtype)).flatten(-2)


@lru_cache(maxsize=16)
def rotation(group: int, device: torch.device) -> Tensor:
    """The regular Hadamard matrix of a size of GROUPS, divided by its root: symmetric, orthogonal, rows sum to 1.

    R4 x R4 x ... (Kronecker), R4 with -1 on its counter-diagonal: https://arxiv.org/abs/2512.03673. Its entries are
    powers of two: exact in bf16, in which it is returned, and in every wider dtype.
    """
    with torch.inference_mode(False):
        four = 1 - 2 * torch.eye(4).flip(0)
        matrix = torch.ones(1, 1)
        while len(matrix) < group:
            matrix = torch.kron(matrix, four)
        return (matrix / group**0.5).to(device, torch.bfloat16)
