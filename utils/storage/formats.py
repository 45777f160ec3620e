"""How the weight of a frozen linear layer can be stored: fp8, int8 and nf4, from values to codes and back.

Shape letters: O output width, I input width.
"""

import importlib
import logging

import torch
from torch import Tensor

from utils.common.errors import UserError
from utils.common.imports import hidden
from wan.checkpoints import GROUPS, Quantised, decode, rotate_columns, rotation

E4M3 = torch.float8_e4m3fn
NF4_BLOCK = 64  # values that share a scale
ROTATED = tuple(sorted((group for group in GROUPS if 16 <= group <= 256), reverse=True))
INSTALL = 'pip install "bitsandbytes>=0.49,<0.52"'
TINY = 1e-30  # a row of zeros has a scale, too


def quantise(weight: Tensor, format: str) -> Quantised:
    """weight (O, I) -> its codes, of nf4 two to a byte (O I / 2, 1). Raises UserError for a library that is missing.

    fp8         e4m3, without a scale: the weight itself, rounded
    fp8_scaled  e4m3 with a scale for each row, by its largest value
    int8        rows rotated in groups, as wide as fit of 256, 64 and 16 columns, then rounded to steps of a 127th of
                the largest value of a row: ConvRot, https://arxiv.org/abs/2512.03673, as ComfyUI stores it
    nf4         16 levels at quantiles of a normal distribution, with a scale for each 64 values:
                https://arxiv.org/abs/2305.14314, by bitsandbytes
    """
    weight = weight.float()
    if format == "fp8":
        return Quantised(_to_e4m3(weight), None)
    if format == "fp8_scaled":
        scale = _row_scale(weight, torch.finfo(E4M3).max)
        return Quantised(_to_e4m3(weight / scale), scale)
    if format == "int8":
        group = next((group for group in ROTATED if weight.shape[1] % group == 0), 0)
        # In fp32: rotated in bf16, every tenth code would be another.
        rotated = rotate_columns(weight, rotation(group, weight.device)) if group else weight
        scale = _row_scale(rotated, 127)
        return Quantised((rotated / scale).round().clamp(-128, 127).to(torch.int8), scale, group)
    assert format == "nf4"
    need_bitsandbytes()
    codes, scale = torch.ops.bitsandbytes.quantize_4bit(weight, NF4_BLOCK, "nf4", torch.uint8)
    return Quantised(codes, scale)


def values(codes: Tensor, scale: Tensor | None, mixed_by: Tensor | None, rows: int, dtype: torch.dtype) -> Tensor:
    """The values (O, I) in `dtype`, the one in which the model computes; `rows` is O."""
    if codes.dtype == torch.uint8:
        count = 2 * codes.numel()
        # Given rows whose width is no multiple of a block, the library takes wrong scales on CPUs with AVX-512.
        size = [count // NF4_BLOCK, NF4_BLOCK] if count % NF4_BLOCK == 0 else [count]
        result: Tensor = torch.ops.bitsandbytes.dequantize_4bit(codes, scale, NF4_BLOCK, "nf4", size, dtype)
        return result.view(rows, -1)
    return decode(codes, scale, mixed_by, dtype)


def stored_bytes(rows: int, columns: int, format: str) -> int:
    """What a weight takes, with its scale."""
    count = rows * columns
    if format == "nf4":
        return count // 2 + 4 * -(-count // NF4_BLOCK)
    return count if format == "fp8" else count + 4 * rows


def need_bitsandbytes(what: str = "nf4") -> None:
    """Raises UserError, for `what` needs it, unless bitsandbytes works; makes its operations known to torch.

    On some CPUs it would load code from a hub where a package named kernels is installed, and else advises to install
    it. What that code is for, products of codes, is not used here.
    """
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        with hidden("kernels"):
            importlib.import_module("bitsandbytes")
    except (ImportError, OSError, RuntimeError) as error:  # it loads libraries of its own
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{what} needs bitsandbytes, which cannot be imported: {reason}\n{INSTALL}") from None


def _row_scale(weight: Tensor, largest: float) -> Tensor:
    """(O, 1) fp32: what divides each row so that its largest value becomes `largest`."""
    return (weight.abs().amax(dim=1, keepdim=True) / largest).clamp(min=TINY)


def _to_e4m3(weight: Tensor) -> Tensor:
    largest = torch.finfo(E4M3).max
    return weight.clamp(-largest, largest).to(E4M3)  # beyond it some versions of torch give NaN
