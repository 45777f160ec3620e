"""A frozen linear layer whose weight is stored in codes. Its values exist only while it computes.

Shape letters: O output width, I input width, M rows.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from utils.storage.formats import Codes, values
from wan.checkpoints import rotation


class QuantisedLinear(nn.Linear):
    """As the layer it stands for; `weight` holds codes. What else decides the values is no part of the state dict."""

    scale: Tensor | None
    mixed_by: Tensor | None  # the rotation that the weight was multiplied by

    def __init__(self, layer: nn.Linear, codes: Codes) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.bias = layer.bias
        self.register_buffer("scale", None, persistent=False)
        self.register_buffer("mixed_by", None, persistent=False)
        self.hold(codes)

    def hold(self, codes: Codes) -> None:
        """Takes a weight in codes in place of the one before."""
        self.weight = nn.Parameter(codes.codes, requires_grad=False)
        self.scale = codes.scale
        self.mixed_by = rotation(codes.group, codes.codes.device) if codes.group else None

    def values(self, dtype: torch.dtype) -> Tensor:
        """The weight (O, I) in `dtype`."""
        return values(self.weight, self.scale, self.mixed_by, self.out_features, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., I) -> (..., O). What is kept for the backward pass are the codes."""
        result: Tensor = _Product.apply(x, self.weight, self.scale, self.mixed_by, self.bias, self.out_features)
        return result


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        codes: Tensor,
        scale: Tensor | None,
        mixed_by: Tensor | None,
        bias: Tensor | None,
        rows: int,
    ) -> Tensor:
        ctx.save_for_backward(codes, scale, mixed_by)
        ctx.rows = rows
        return F.linear(x, values(codes, scale, mixed_by, rows, x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        codes, scale, mixed_by = ctx.saved_tensors
        return grad @ values(codes, scale, mixed_by, ctx.rows, grad.dtype), None, None, None, None, None
