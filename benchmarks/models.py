"""The two trainers that are compared, with the same random weights, adapters and inputs; the FLOPs of a step."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

import torch
from torch import Tensor, nn

from benchmarks.measure import Sizes
from benchmarks.weights import random_transformer, seeded, to_bf16
from utils.adapters.lora import add_lora, select_modules
from utils.diffusion.flow import Noisy, add_noise
from utils.diffusion.objectives import squared_error
from utils.storage.streaming import Stream
from utils.training.memory import Memory, TrainingPass, prepare
from wan.modules.model import WanModel, WanShape
from wan.names import diffusers_name, is_parameter

if TYPE_CHECKING:
    from diffusers import WanTransformer3DModel

Model = TypeVar("Model", bound=nn.Module, covariant=True)

SIGMA = 0.6
IMAGE_TOKENS = 257  # of one picture
TARGETS = ("attn",)
# Large enough that the adapter changes the output by about a tenth, so that both of its matrices have gradients.
ADAPTER_STD = 0.05
CHECKPOINTING = Memory("full")


def fused(checkpointing: str) -> Memory:
    """As the trainer runs on a GPU without a compiler."""
    return Memory(checkpointing, fuse=True, stream=torch.bfloat16)


def compiled(checkpointing: str) -> Memory:
    """As the trainer runs with a compiler."""
    return Memory(checkpointing, compile=True, stream=torch.bfloat16)


@dataclass(frozen=True)
class Inputs:
    """What a training step is given."""

    noisy: Noisy  # latents (1, out_dim, F, H, W) fp32
    text: Tensor  # (1, text_len, E) fp32, zero rows after the caption
    channels: Tensor  # (1, in_dim - out_dim, F, H, W) fp32: those of given frames
    image: Tensor | None = None  # (1, I, image_dim) fp32 vision tokens, for a model that reads them

    @property
    def latents(self) -> Tensor:
        """What the model reads: (1, in_dim, F, H, W) fp32."""
        return torch.cat([self.noisy.latents, self.channels], dim=1)


@dataclass(frozen=True)
class Trainee(Generic[Model]):
    """A frozen transformer with an adapter to train."""

    model: Model
    parameters: list[nn.Parameter]  # A, B, A, B, ... fp32, in the order of our modules
    velocity: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]  # latents, timestep, text, image
    # Seconds for which the device has waited for transfers since the last call; None where nothing reports them.
    transfer_wait: Callable[[], float] | None = None

    def loss(self, inputs: Inputs) -> Tensor:
        """The squared error of the velocity: a scalar, fp32."""
        noisy = inputs.noisy
        return squared_error(self.velocity(inputs.latents, noisy.timestep, inputs.text, inputs.image), noisy.velocity)


def random_inputs(sizes: Sizes, grid: tuple[int, int, int], device: torch.device) -> Inputs:
    """Noisy latents of `grid` (F, H, W), the rows of one caption, and what a model is given beside them."""
    shape = sizes.shape
    generator = seeded(device)
    clean, noise = (torch.randn(1, shape.out_dim, *grid, device=device, generator=generator) for _ in range(2))
    text = torch.randn(1, shape.text_len, shape.text_dim, device=device, generator=generator)
    text[:, sizes.text_tokens :] = 0
    channels = torch.randn(1, shape.in_dim - shape.out_dim, *grid, device=device, generator=generator)
    image = None
    if shape.image_dim:
        image = torch.randn(1, count_image_tokens(shape), shape.image_dim, device=device, generator=generator)
    return Inputs(add_noise(clean, noise, torch.full((1,), SIGMA, device=device)), text, channels, image)


def count_image_tokens(shape: WanShape) -> int:
    """The vision tokens that a model of this shape reads: of one picture, or as many as it has positions."""
    return (shape.image_positions or IMAGE_TOKENS) if shape.image_dim else 0


def random_diffusers(shape: WanShape, device: torch.device, dtype: torch.dtype) -> "WanTransformer3DModel":
    """The diffusers transformer with the weights of `random_transformer`, frozen, in `dtype`.

    As with `from_pretrained`, the modules that the class lists stay fp32. Raises ModuleNotFoundError without diffusers.
    """
    from diffusers import WanTransformer3DModel

    with torch.device(device):
        theirs = WanTransformer3DModel(
            num_attention_heads=shape.num_heads,
            attention_head_dim=shape.dim // shape.num_heads,
            in_channels=shape.in_dim,
            out_channels=shape.out_dim,
            text_dim=shape.text_dim,
            freq_dim=shape.freq_dim,
            ffn_dim=shape.ffn_dim,
            num_layers=shape.num_layers,
            eps=shape.eps,
            image_dim=shape.image_dim or None,
            added_kv_proj_dim=shape.dim if shape.image_dim else None,
            pos_embed_seq_len=shape.image_positions or None,
        ).requires_grad_(False)
    islands = set(theirs._keep_in_fp32_modules)
    for name, parameter in theirs.named_parameters():
        parameter.data = parameter.data if islands & set(name.split(".")) else parameter.data.to(dtype)
    ours = random_transformer(shape, device)
    theirs.load_state_dict({_diffusers_parameter(name): tensor for name, tensor in ours.state_dict().items()})
    return theirs


def _diffusers_parameter(name: str) -> str:
    if is_parameter(name):
        return diffusers_name(name)
    module, _, role = name.rpartition(".")
    return f"{diffusers_name(module)}.{role}"


def our_trainee(
    shape: WanShape,
    sizes: Sizes,
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
    memory: Memory = CHECKPOINTING,
) -> Trainee[WanModel]:
    """Our transformer with our adapter, prepared by the code of the trainer."""
    model = random_transformer(shape, device)
    return with_adapter(to_bf16(model) if dtype == torch.bfloat16 else model, sizes, memory)


def with_adapter(
    model: WanModel,
    sizes: Sizes,
    memory: Memory = CHECKPOINTING,
    targets: Sequence[str] = TARGETS,
    stream: Stream | None = None,
) -> Trainee[WanModel]:
    """A transformer of ours, however its weights are held, with our adapter, prepared by the code of the trainer."""
    names = select_modules(model, targets)
    parameters = prepare(model, memory, lambda base: add_lora(base, names, sizes.rank, sizes.rank), stream=stream)
    _draw_adapter(parameters)
    first = model.blocks[0].forward
    waited = None
    if memory.checkpointing == "offload" and isinstance(first, TrainingPass):
        waited = first.parking.waited
    return Trainee(model, parameters, model, waited)


def diffusers_trainee(
    shape: WanShape,
    sizes: Sizes,
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
    checkpointing: bool = True,
    autocast: bool = True,
) -> Trainee[nn.Module]:
    """The diffusers transformer with a PEFT adapter in fp32.

    Under autocast is the usual way to train with diffusers in bf16. Without it, PEFT's fp32 matrices are multiplied in
    fp32. In fp32 there is none. Raises ModuleNotFoundError without diffusers or PEFT.
    """
    from peft import LoraConfig

    model = random_diffusers(shape, device, dtype)
    with torch.device("meta"):
        names = [diffusers_name(name) for name in select_modules(WanModel(shape), TARGETS)]
    model.add_adapter(LoraConfig(r=sizes.rank, lora_alpha=sizes.rank, target_modules=names))
    layers = [model.get_submodule(name) for name in names]
    parameters = [matrix["default"].weight for layer in layers for matrix in (layer.lora_A, layer.lora_B)]
    for parameter in parameters:
        parameter.data = parameter.data.float()
    _draw_adapter(parameters)
    if checkpointing:
        model.enable_gradient_checkpointing()
    autocast = autocast and dtype == torch.bfloat16

    def velocity(latents: Tensor, timestep: Tensor, text: Tensor, image: Tensor | None) -> Tensor:
        # diffusers takes the tokens of a second picture as a second sample.
        given = None if image is None else image.to(dtype).view(2 if shape.image_positions else 1, -1, shape.image_dim)
        with torch.autocast(latents.device.type, torch.bfloat16) if autocast else nullcontext():
            return model(latents.to(dtype), timestep, text.to(dtype), given, return_dict=False)[0]

    return Trainee(model, parameters, velocity)


@torch.no_grad()
def _draw_adapter(parameters: list[nn.Parameter]) -> None:
    generator = seeded(parameters[0].device)
    for down, up in zip(parameters[::2], parameters[1::2], strict=True):
        down.normal_(std=down.shape[1] ** -0.5, generator=generator)
        up.normal_(std=ADAPTER_STD, generator=generator)


def step_flops(shape: WanShape, tokens: int, rank: int) -> float:
    """The floating-point operations of one training step with LoRA on attention, without recomputation.

    A multiply-add counts as two. The forward pass of a block, with T tokens, S rows of text and picture, width d,
    feed-forward width f and rank r: linear layers 12 T d^2 + 4 T d f for the video and 4 S d^2 for the text; attention
    4 T^2 d and 4 T S d; LoRA 24 T d r and 8 S d r. The backward pass adds the linear layers of the video once (frozen
    weights and the text need no gradient), attention 2.5 times and LoRA twice. Embeddings and head, below 1 percent,
    are left out.
    """
    d, text = shape.dim, shape.text_len + count_image_tokens(shape)
    linears = 12 * tokens * d**2 + 4 * tokens * d * shape.ffn_dim
    lora = 24 * tokens * d * rank + 8 * text * d * rank
    return shape.num_layers * (2 * linears + 4 * text * d**2 + 3 * lora) + attention_flops(shape, tokens)


def attention_flops(shape: WanShape, tokens: int) -> float:
    """Of `step_flops` the part that attention has."""
    return shape.num_layers * 3.5 * 4 * tokens * shape.dim * (tokens + shape.text_len + count_image_tokens(shape))
