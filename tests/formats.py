"""Linear layers in every format, for tests."""

import torch
from torch import Tensor, nn

from utils.storage.formats import quantise, values
from utils.storage.linear import QuantisedLinear
from utils.storage.weights import linear_layers
from wan.checkpoints import Quantised, rotation
from wan.modules.model import WanModel

FORMATS = ("fp8", "fp8_scaled", "int8", "nf4")


def values_in(codes: Quantised, rows: int, dtype: torch.dtype) -> Tensor:
    """The values (rows, columns) of codes."""
    mixed_by = rotation(codes.group, codes.codes.device) if codes.group else None
    return values(codes.codes, codes.scale, mixed_by, rows, dtype)


def in_format(layer: nn.Linear, format: str, in_codes: bool = False) -> QuantisedLinear:
    """A layer with its weight in codes."""
    return QuantisedLinear(layer, quantise(layer.weight.detach(), format), in_codes)


def quantise_blocks(model: WanModel, format: str) -> None:
    """Puts the weights of a model's blocks into codes."""
    for name, layer in linear_layers(model).items():
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, in_format(layer, format))
