"""DoRA: each row of a changed weight is brought to a length of its own (Liu et al. 2024, arXiv 2402.09353).

The two kinds of files mean different lengths, and neither program reads the other's:

    PEFT     lora_magnitude_vector   W' = magnitude * (W + change) / |W + change|
    ComfyUI  dora_scale              W' = dora_scale * (W + change) / (|W| + eps)

ComfyUI divides by the length of the weight without the change where there is one number for each output, and by that of
the changed one where there is one for each input, as LyCORIS can write it.

|.| is the norm of each row (of each column, for one number per input). At a strength s the result is W + s (W' - W).
Sources: `DoraLinearLayer` of PEFT 0.21, `weight_decompose` of ComfyUI v0.3.77.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

PEFT, COMFY = "PEFT", "ComfyUI"


@dataclass(frozen=True)
class Magnitude:
    """The lengths of one module: `values` as stored, one for each output, or (1, in) for each input; whose rule.

    For a convolution PEFT stores those of the outputs as (1, out, 1, ...).
    """

    values: Tensor
    rule: str

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether there is one length for each row of a weight (out, in, ...), or, in ComfyUI, for each column."""
        per_column = self.rule == COMFY and self.values.shape[:2] == (1, shape[1])
        if self.rule == PEFT and self.values.ndim > 1 and self.values.shape[:2] != (1, shape[0]):
            return False
        return self.values.numel() == (shape[1] if per_column else shape[0]) and (per_column or self._is_per_row(shape))

    def factor(self, weight: Tensor, change: Tensor) -> Tensor:
        """What `weight + change` is multiplied by, in fp32: (out, 1, ...), or (1, in, 1, ...)."""
        weight, values = weight.float(), self.values.to(weight.device).float().flatten()
        ones = [1] * (weight.ndim - 2)
        eps = torch.finfo(torch.float32).eps
        if not self._is_per_row(tuple(weight.shape)):
            columns = (weight + change).transpose(0, 1).flatten(1)
            return (values / (columns.norm(dim=1) + eps)).reshape(1, -1, *ones)
        norm = (weight + change if self.rule == PEFT else weight).flatten(1).norm(dim=1)
        # PEFT divides by zero for a row of zeros, which has no direction: here it stays one.
        norm = norm.clamp(min=torch.finfo(torch.float32).tiny) if self.rule == PEFT else norm + eps
        return (values / norm).reshape(-1, 1, *ones)

    def _is_per_row(self, shape: tuple[int, ...]) -> bool:
        return self.rule == PEFT or self.values.shape[0] == shape[0]


def decomposed_change(weight: Tensor, change: Tensor, magnitude: Magnitude) -> Tensor:
    """W' - W in fp32, for a weight W (out, in, ...) and the change that its pair or factors make."""
    return magnitude.factor(weight, change) * (weight.float() + change) - weight.float()
