"""Products with the codes of a frozen layer themselves: what is multiplied is rounded to 8 bits too, row by row.

A GPU multiplies fp8 and int8 up to twice as fast as bf16, and no values of the weight are made. The price is the
rounding of inputs: of fp8 to 3 bits after the leading one, of int8 to a 127th of a row's largest value. Gradients are
not rounded so: the directions of a LoRA's gradients would be further off than is allowed (benchmarks/RECORDS.md).

Shape letters: M rows, O output width, I input width.
"""

import torch
from torch import Tensor

from utils.storage.formats import E4M3, TINY
from wan.checkpoints import rotate_columns

PRODUCTS = ("fp8", "fp8_scaled", "int8")  # formats that a device multiplies
FEWEST_ROWS, STEP = 17, 16  # what the kernels of a GPU take: more than 16 rows, widths in steps of 16


def fits(codes: Tensor, scale: Tensor | None, rows: int) -> bool:
    """Whether `rows` rows can be multiplied with codes (O, I): fp8 or int8 with one scale, or one for each row."""
    if codes.dtype not in (E4M3, torch.int8) or (scale is not None and scale.ndim == 3):
        return False
    return rows >= FEWEST_ROWS and all(size % STEP == 0 for size in codes.shape)


def multiply(x: Tensor, codes: Tensor, scale: Tensor | None, mixed_by: Tensor | None) -> Tensor:
    """x (M, I) times the weight of codes (O, I) -> (M, O) in the dtype of x"""
    rotated = x if mixed_by is None else rotate_columns(x, mixed_by)
    return _multiply(rotated, codes.t(), _per_column(scale, codes))


def _per_column(scale: Tensor | None, codes: Tensor) -> Tensor | None:
    """The scale of each output (1, O) fp32."""
    return None if scale is None else scale.float().reshape(-1).expand(len(codes)).unsqueeze(0).contiguous()


def _multiply(x: Tensor, codes: Tensor, scale: Tensor | None) -> Tensor:
    """x (M, K) @ codes (K, N) * scale (1, N), the rows of x in the format of the codes."""
    is_int = codes.dtype == torch.int8
    largest = 127.0 if is_int else torch.finfo(E4M3).max
    steps = (x.abs().amax(dim=1, keepdim=True).float() / largest).clamp(min=TINY)  # (M, 1)
    scaled = x.float() / steps
    if is_int:
        total = torch._int_mm(scaled.round().to(torch.int8), codes)
        product = total.float() * steps
        return (product if scale is None else product * scale).to(x.dtype)
    columns = torch.ones(1, codes.shape[1], device=x.device) if scale is None else scale
    result: Tensor = torch._scaled_mm(scaled.to(E4M3), codes, steps, columns, out_dtype=x.dtype)
    return result
