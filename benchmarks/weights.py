"""Random weights, drawn on the device with a fixed seed, and scaled so that activations keep their size with depth."""

import math
from collections.abc import Mapping

import torch
from torch import nn

from utils.storage.formats import Quantised, quantise
from utils.storage.linear import QuantisedLinear
from utils.storage.weights import format_of, linear_layers
from wan.modules.clip import VisionEncoder, VisionShape
from wan.modules.model import WanModel, WanShape, is_fp32
from wan.modules.vae import WanVAE
from wan.names import is_parameter

SEED = 0


def seeded(device: torch.device) -> torch.Generator | None:
    """A generator with the fixed seed; none on the meta device, where nothing is drawn."""
    return None if device.type == "meta" else torch.Generator(device).manual_seed(SEED)


@torch.no_grad()
def draw(module: nn.Module, device: torch.device) -> None:
    """Draws every parameter: weights scaled by their fan-in, norms around 1, small biases and modulation."""
    generator = seeded(device)
    for name, parameter in module.named_parameters():
        parameter.normal_(generator=generator)
        if "norm" in name or "gamma" in name:
            parameter.mul_(0.1).add_(1)
        elif parameter.ndim > 1 and not is_parameter(name):
            parameter.div_(math.sqrt(parameter[0].numel()))
        else:
            parameter.mul_(0.1)


def random_transformer(shape: WanShape, device: torch.device) -> WanModel:
    """Our transformer with random weights, in fp32, frozen."""
    with torch.device("meta"):
        model = WanModel(shape)
    model.to_empty(device=device).requires_grad_(False)
    draw(model, device)
    return model


def to_bf16(model: WanModel) -> WanModel:
    """Casts the model to bf16 in place, except codes and what stays fp32, as the trainer does on a GPU."""
    for name, parameter in model.named_parameters():
        if parameter.dtype == torch.float32 and not is_fp32(name):
            parameter.data = parameter.data.bfloat16()
    return model


def hold_in_codes(model: WanModel, codes: Mapping[str, Quantised]) -> WanModel:
    """Puts codes in place of the weights of linear layers, by the layers' names, as the trainer does in loading."""
    for name, of_layer in codes.items():
        parent, _, own = name.rpartition(".")
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        setattr(model.get_submodule(parent), own, QuantisedLinear(layer, of_layer))
    return model


def stored_transformer(shape: WanShape, device: torch.device, format: str | None, in_codes: bool = False) -> WanModel:
    """The same weights, those of the blocks' linear layers in a format of `utils.storage` or in bf16, all else in bf16.

    With `in_codes` codes themselves are multiplied.
    """
    model = random_transformer(shape, device)
    if format is not None:
        layers = linear_layers(model).items()
        hold_in_codes(model, {name: quantise(layer.weight.detach(), format_of(name, format)) for name, layer in layers})
    for module in model.modules():
        if isinstance(module, QuantisedLinear):
            module.in_codes = in_codes
    return to_bf16(model)


def random_vae(dim: int, device: torch.device) -> WanVAE:
    """The VAE with random weights, in fp32, frozen."""
    with torch.device(device):
        vae = WanVAE(dim)
    draw(vae, device)
    return vae.to(device).requires_grad_(False)


def random_vision_encoder() -> VisionEncoder:
    """The vision encoder with random weights, in fp32 on the CPU, frozen."""
    encoder = VisionEncoder(VisionShape()).requires_grad_(False).eval()
    draw(encoder, torch.device("cpu"))
    return encoder
