"""A frozen linear layer whose weight is stored in codes. Its values exist only while it computes.

Shape letters: O output width, I input width, M rows.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from utils.storage import products
from utils.storage.formats import Codes, values
from wan.checkpoints import rotation


class QuantisedLinear(nn.Linear):
    """As the layer it stands for; `weight` holds codes. What else decides the values is no part of the state dict."""

    scale: Tensor | None
    mixed_by: Tensor | None  # the rotation that the weight was multiplied by; one for all layers, on the device
    in_codes: bool  # whether products are made of the codes themselves, where these allow it

    def __init__(self, layer: nn.Linear, codes: Codes, in_codes: bool = False) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.bias, self.in_codes = layer.bias, in_codes
        self.register_buffer("scale", None, persistent=False)
        self.hold(codes, codes.codes.device)

    def hold(self, codes: Codes, device: torch.device) -> None:
        """Takes a weight in codes in place of the one before; it may wait elsewhere, but computes on `device`."""
        self.weight = nn.Parameter(codes.codes, requires_grad=False)
        self.scale = codes.scale
        self.mixed_by = rotation(codes.group, device) if codes.group else None

    def values(self, dtype: torch.dtype) -> Tensor:
        """The weight (O, I) in `dtype`."""
        return values(self.weight, self.scale, self.mixed_by, self.out_features, dtype)

    def product(self, x: Tensor) -> Tensor:
        """x (M, I) -> (M, O), without a graph."""
        if self.in_codes and products.fits(self.weight, self.scale, len(x)):
            product = products.forward(x, self.weight, self.scale, self.mixed_by)
            return product if self.bias is None else product.add_(self.bias)
        return F.linear(x, self.values(x.dtype), self.bias)

    def product_backward(self, grad: Tensor, into: Tensor | None = None) -> Tensor:
        """grad (M, O) -> that of x (M, I), added to `into` where that is given."""
        if self.in_codes and products.fits(self.weight, self.scale, len(grad)):
            product = products.backward(grad, self.weight, self.scale, self.mixed_by)
            return product if into is None else into.add_(product)
        weight = self.values(grad.dtype)
        return grad @ weight if into is None else into.addmm_(grad, weight)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., I) -> (..., O). What is kept for the backward pass are the codes."""
        result: Tensor = _Product.apply(x.reshape(-1, x.shape[-1]), self, self.weight, self.scale)
        return result.view(*x.shape[:-1], result.shape[-1])


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantisedLinear, codes: Tensor, scale: Tensor | None) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(codes, scale)  # so that a block that is streamed learns when they are needed again
        return layer.product(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _ = ctx.saved_tensors
        return ctx.layer.product_backward(grad), None, None, None
