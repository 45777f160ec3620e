"""Operations that are one kernel on CUDA, and that torch splits into several elsewhere.

Inside `fused_ops`, F.rms_norm is one operation on every device. On the meta device, which has no fused attention,
F.scaled_dot_product_attention is one too. Both keep what their CUDA kernels keep.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

_rms_norm_of_torch, _attention = torch.rms_norm, F.scaled_dot_product_attention


@contextmanager
def fused_ops() -> Iterator[None]:
    """Replaces the two functions by one operation each, but not in compiled code, which fuses by itself."""
    # A function mode would not do: torch leaves it during Tensor.backward, in which checkpointed blocks run again.
    with patch.object(torch, "rms_norm", _rms_norm), patch.object(F, "scaled_dot_product_attention", _attend):
        yield


def _rms_norm(
    input: Tensor, normalized_shape: tuple[int, ...], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    if torch.compiler.is_compiling():
        return _rms_norm_of_torch(input, normalized_shape, weight, eps)
    return _forward(input, weight, torch.finfo(input.dtype).eps if eps is None else eps)[0]


def _attend(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if query.is_meta:
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)[0]
    return _attention(query, key, value, *args, **kwargs)


@torch.library.custom_op("wan_lora::rms_norm", mutates_args=())
def _forward(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """x (..., D), weight (D,) -> the normalised x of the same dtype, and 1 / rms (..., 1) fp32."""
    scale = (x.float().square().mean(-1, keepdim=True) + eps).rsqrt()
    normalised = x.float() * scale
    return (normalised if weight is None else normalised * weight).to(x.dtype), scale


@torch.library.custom_op("wan_lora::rms_norm_backward", mutates_args=())
def _backward(grad: Tensor, x: Tensor, weight: Tensor | None, scale: Tensor) -> Tensor:
    """The gradient of x."""
    normalised, upstream = x.float() * scale, grad.float() if weight is None else grad.float() * weight
    return (scale * (upstream - normalised * (upstream * normalised).mean(-1, keepdim=True))).to(x.dtype)


@_forward.register_fake
def _(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


@_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor | None, scale: Tensor) -> Tensor:
    return torch.empty_like(x)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor | None, float], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)  # the second output has none
    ctx.save_for_backward(inputs[0], inputs[1], output[1])


def _differentiate(ctx: Any, grad: Tensor, _scale_grad: Tensor) -> tuple[Tensor, None, None]:
    x, weight, scale = ctx.saved_tensors
    return _backward(grad, x, weight, scale), None, None


_forward.register_autograd(_differentiate, setup_context=_save)
