"""Small models in training: of several families, with adapters that change the answer, and one step of each."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tests.adapted import ALPHA, RANK, fill
from tests.tiny import TINY_SHAPE, tiny_shape, tiny_transformer
from utils.adapters.lora import add_lora, select_modules, widen_patch_embedding
from utils.training.checkpoint_plan import CheckpointPlan
from utils.training.memory import Memory, prepare
from wan.configs import FAMILIES
from wan.modules.model import WanModel, is_fp32


@dataclass(frozen=True)
class Situation:
    """What is trained, and with what."""

    family: str = "wan2.1-t2v-1.3B"
    targets: tuple[str, ...] = ("all-linear",)
    batch: int = 2
    held: bool = False  # two timesteps per sample: that of a clean first frame, and that of the others
    control: bool = False  # the patch embedding is trained too, so that the first block's input needs a gradient


SITUATIONS = {
    "text": Situation(batch=3),
    "images": Situation("wan2.1-flf2v-14B-720P", batch=1),
    "held frame": Situation("wan2.2-ti2v-5B", ("attn",), batch=3, held=True),
    "images and held frame": Situation("wan2.1-i2v-14B-480P", ("all-linear",), held=True),
    "one layer": Situation(targets=("blocks.1.cross_attn.k",), batch=1),
    "control": Situation("wan2.1-i2v-14B-480P", ("attn",), held=True, control=True),
}


def trainee(situation: Situation = SITUATIONS["text"], dtype: torch.dtype = torch.float32) -> tuple[WanModel, list]:
    """A model that computes in this dtype, and the matrices of its LoRA, none of them zero."""
    model = tiny_transformer(tiny_shape(FAMILIES[situation.family]))
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data if is_fp32(name) else parameter.data.to(dtype)
    if situation.control:
        widen_patch_embedding(model, model.shape.in_dim + 16)
    names = select_modules(model, situation.targets) + ["patch_embedding"] * situation.control
    parameters = add_lora(model, names, RANK, ALPHA)
    fill(parameters)
    return model, parameters


def prepare_again(model: WanModel, memory: Memory, plan: CheckpointPlan | None = None) -> None:
    """Other strategies for a model, in place of those that it has."""
    for block in model.blocks:
        vars(block).pop("forward", None)
    prepare(model, memory, lambda _: None, plan)


def prepared(
    memory: Memory,
    situation: Situation = SITUATIONS["text"],
    dtype: torch.dtype = torch.float32,
    plan: CheckpointPlan | None = None,
) -> tuple[WanModel, list[nn.Parameter]]:
    """As `trainee`, with strategies."""
    model, parameters = trainee(situation, dtype)
    prepare(model, memory, lambda _: None, plan)
    return model, parameters


def inputs_of(model: WanModel, situation: Situation = SITUATIONS["text"], seed: int = 0) -> list[Tensor]:
    """Latents, timesteps, text, and image tokens where the model reads them."""
    generator = torch.Generator().manual_seed(seed)
    channels = model.patch_embedding.weight.shape[1]
    latents = torch.randn(situation.batch, channels, 3, 4, 6, generator=generator)
    timestep = torch.linspace(100, 900, situation.batch)
    if situation.held:
        timestep = torch.stack([torch.zeros_like(timestep), timestep], dim=1)
    text = torch.randn(situation.batch, 5, TINY_SHAPE.text_dim, generator=generator)
    image = [torch.randn(situation.batch, 6, model.shape.image_dim, generator=generator)] * bool(model.shape.image_dim)
    return [latents, timestep, text, *image]


def loss_of(velocity: Tensor) -> Tensor:
    """A loss whose gradient is different everywhere."""
    return (velocity * torch.linspace(-1, 1, velocity.numel()).view_as(velocity)).sum() + velocity.square().mean()


def answers(model: WanModel, parameters: Sequence[nn.Parameter], inputs: Sequence[Tensor]) -> list[Tensor]:
    """The velocity, and the gradients of the parameters."""
    velocity = model(*inputs)
    return [velocity.detach(), *torch.autograd.grad(loss_of(velocity), parameters)]


def equal(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    """Whether all tensors are the same, bit for bit."""
    return len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def relative_error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest error of a tensor, as a share of its norm."""
    pairs = zip(found, expected, strict=True)
    return max(float((a.double() - b.double()).norm() / b.double().norm()) for a, b in pairs)
