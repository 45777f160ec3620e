"""Random weights, drawn on the device with a fixed seed, and scaled so that activations keep their size with depth."""

import math

import torch
from torch import nn

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
    """Casts the model to bf16 in place, except the parameters that stay fp32, as the trainer does on a GPU."""
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data if is_fp32(name) else parameter.data.bfloat16()
    return model


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
