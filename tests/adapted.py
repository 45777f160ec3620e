"""A small transformer with adapters that change its answer."""

import torch
from torch import Tensor, nn

from tests.tiny import TINY_SHAPE, tiny_transformer
from utils.adapters.lora import add_lora, select_modules
from wan.modules.model import WanModel

RANK, ALPHA = 4, 6.0
LAYERS = [f"{kind}_attn.{x}" for kind in ("self", "cross") for x in "qkvo"] + ["ffn.0", "ffn.2"]


def inputs(batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(batch, 16, 2, 4, 6, generator=generator)
    text = torch.randn(batch, 5, TINY_SHAPE.text_dim, generator=generator)
    return latents, torch.linspace(100, 900, batch), text


def fill(parameters: list[nn.Parameter], seed: int = 1) -> None:
    """Draws matrices, so that the adapter changes the answer."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)


def adapted(targets: tuple[str, ...] = ("all-linear",), seed: int = 1) -> tuple[WanModel, list[nn.Parameter]]:
    model = tiny_transformer()
    parameters = add_lora(model, select_modules(model, targets), RANK, ALPHA)
    fill(parameters, seed)
    return model, parameters
