"""A frozen linear layer whose weight is stored in codes. Its values exist only while it computes.

Shape letters: O output width, I input width, M rows.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from utils.storage import products
from utils.storage.formats import values
from wan.checkpoints import Quantised, rotation


class QuantisedLinear(nn.Linear):
    """As the layer it stands for; `weight` holds codes. What else decides the values is no part of the state dict."""

    scale: Tensor | None
    mixed_by: Tensor | None  # the rotation that the weight was multiplied by; one for all layers, on the device
    in_codes: bool  # whether `product` multiplies the codes themselves, where these allow it

    def __init__(self, layer: nn.Linear, quantised: Quantised, in_codes: bool = False) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.bias, self.in_codes = layer.bias, in_codes
        self.register_buffer("scale", None, persistent=False)
        self.hold(quantised, quantised.codes.device)

    def hold(self, quantised: Quantised, device: torch.device, is_as_read: bool = False) -> None:
        """Takes a weight in place of the one before. Wherever it is, it computes on `device`."""
        self.weight = nn.Parameter(quantised.codes, requires_grad=False)
        self.scale = quantised.scale
        self.mixed_by = rotation(quantised.group, device) if quantised.group else None
        self.is_as_read = is_as_read

    @property
    def compute_dtype(self) -> torch.dtype:
        """Not that of the codes. PEFT makes adapters in it."""
        return torch.float32 if self.bias is None else self.bias.dtype

    def scale_rows(self) -> None:
        """Gives each row a scale, where all share one or there is none. The values stay the same, bit for bit."""
        if self.weight.dtype != torch.uint8 and (self.scale is None or self.scale.numel() == 1):
            ones = torch.ones(self.out_features, 1, device=self.weight.device)
            self.scale = ones if self.scale is None else ones * self.scale.float().reshape(())

    @property
    def nbytes(self) -> int:
        """What the weight takes, with its scale."""
        return self.weight.nbytes + (0 if self.scale is None else self.scale.nbytes)

    def values(self, dtype: torch.dtype) -> Tensor:
        """The weight (O, I) in `dtype`."""
        return values(self.weight, self.scale, self.mixed_by, self.out_features, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., I) -> (..., O). What is kept for the backward pass are the codes."""
        result: Tensor = _Product.apply(x.reshape(-1, x.shape[-1]), self, self.weight, self.scale)
        return result.view(*x.shape[:-1], result.shape[-1])


def product(layer: nn.Linear, x: Tensor) -> Tensor:
    """What a frozen layer makes of x (M, I) -> (M, O), without a graph."""
    if not isinstance(layer, QuantisedLinear):
        return F.linear(x, layer.weight, layer.bias)
    if layer.in_codes and products.fits(layer.weight, layer.scale, len(x)):
        result = products.multiply(x, layer.weight, layer.scale, layer.mixed_by)
        return result if layer.bias is None else result.add_(layer.bias)
    return F.linear(x, layer.values(x.dtype), layer.bias)


def product_backward(layer: nn.Linear, grad: Tensor, into: Tensor | None = None) -> Tensor:
    """grad (M, O) of `product` -> that of x (M, I), added to `into` where that is given."""
    weight: Tensor = layer.values(grad.dtype) if isinstance(layer, QuantisedLinear) else layer.weight
    return grad @ weight if into is None else into.addmm_(grad, weight)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantisedLinear, codes: Tensor, scale: Tensor | None) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(codes, scale)
        return product(layer, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # Asking for what was saved tells a stream that the block is needed again: then its slot holds these codes.
        _ = ctx.saved_tensors
        return product_backward(ctx.layer, grad), None, None, None
