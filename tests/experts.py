"""Two small experts with LoRAs that change their answers, and steps that they take in turns."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import train_wan_lora
from tests.adapted import fill
from tests.tiny import TINY_SHAPE
from utils.adapters.attach import LoraAdapter
from utils.common.options import parse_options
from utils.encoding.conditioning import Cond
from utils.storage.weights import Storage
from utils.training.checkpoint_plan import CheckpointPlan
from utils.training.experts import Experts, load_experts, plan_experts
from utils.training.memory import Memory
from wan.checkpoints import ModelFiles
from wan.configs import FAMILIES
from wan.modules.model import WanModel

A14B = FAMILIES["wan2.2-i2v-A14B"]
HIGH, LOW = "high_noise", "low_noise"
TEXT = torch.randn(1, 5, TINY_SHAPE.text_dim, generator=torch.Generator().manual_seed(1))
COND = Cond(TEXT, torch.ones(1, 20, 2, 4, 6))
ADAPTED = "--lora_rank 4 --lora_target all-linear"


def options(flags: str = "") -> train_wan_lora.Options:
    return parse_options(train_wan_lora.Options, flags.split())


def draw() -> Tensor:
    """Latents, the same each time."""
    return torch.randn(1, 16, 2, 4, 6, generator=torch.Generator().manual_seed(0))


def load_pair(files: ModelFiles, storage: Storage, flags: str = ADAPTED) -> tuple[Experts, dict[str, LoraAdapter]]:
    """Both experts, held so, with LoRAs as they begin."""
    roles = options(flags).roles(A14B)
    memory, plans = Memory("full", fuse=True), plan_experts(roles, files)
    return load_experts(roles, plans, files, memory, CheckpointPlan("full", 2), storage, with_others=False)


def held_pair(files: ModelFiles, storage: Storage, flags: str = ADAPTED) -> tuple[Experts, dict[str, LoraAdapter]]:
    """Both experts, held so, with LoRAs that change their answers."""
    experts, adapters = load_pair(files, storage, flags)
    for seed, adapter in enumerate(adapters.values()):
        fill(list(adapter.parameters.values()), seed)
    return experts, adapters


def take_turns(experts: Experts, adapters: dict[str, LoraAdapter]) -> list[Tensor]:
    """Steps of one expert and the other, with previews in between that need both: answers and gradients."""
    found: list[Any] = []
    for name in (HIGH, LOW, LOW, HIGH, LOW, HIGH):
        timestep = torch.tensor([950.0 if name == HIGH else 100.0])
        with experts.speaking(name, adapters[name].speaking):
            velocity = experts.predict(draw(), timestep, COND)
            found += [velocity, *torch.autograd.grad(velocity.square().sum(), list(adapters[name].parameters.values()))]
        with torch.no_grad():
            found += [experts.predict(draw(), torch.tensor([t]), COND) for t in (999.0, 1.0)]
    return [tensor.detach() for tensor in found]


def in_turns(files: ModelFiles, storage: Storage, flags: str = ADAPTED) -> list[Tensor]:
    """What such steps give with weights that are held so."""
    return take_turns(*held_pair(files, storage, flags))


class Moves(TorchFunctionMode):
    """Records what would be moved where, and leaves it where it is."""

    def __init__(self, models: Mapping[str, WanModel]) -> None:
        super().__init__()
        self.names = {
            tensor.data_ptr(): (model, name)
            for model, module in models.items()
            for name, tensor in (*module.named_parameters(), *module.named_buffers())
        }
        self.seen: list[tuple[str, str, str]] = []

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if func is Tensor.to and args[0].data_ptr() in self.names:
            self.seen.append((*self.names[args[0].data_ptr()], args[1].type))
            return args[0]
        return func(*args, **(kwargs or {}))
