"""Small models whose blocks wait in main memory, and a way for weights to arrive that forgives nothing."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache

import torch
from torch import Tensor

from tests.adapted import ALPHA, RANK, fill
from tests.formats import in_format
from tests.tiny import tiny_shape, tiny_transformer
from tests.trainees import Situation, answers, inputs_of, loss_of
from utils.adapters.lora import add_lora, select_modules
from utils.storage.streaming import Ready, Ring, Stream, assign_slots
from utils.storage.weights import linear_layers
from utils.training.memory import Memory, prepare
from wan.configs import FAMILIES
from wan.modules.model import WanModel, is_fp32

CPU = torch.device("cpu")


@dataclass
class LateLane:
    """A slot is poisoned when a copy to it is issued; the weights are there no sooner than they are waited for."""

    copies: list[int] = field(default_factory=list)  # the addresses of what was copied

    def copy(self, slot: Tensor, host: Tensor) -> Ready:
        slot.fill_(255)  # no number in any float
        self.copies.append(host.data_ptr())
        return slot, host  # type: ignore[return-value]

    def wait(self, ready: Ready) -> None:
        slot, host = ready  # type: ignore[misc]
        slot.copy_(host)


@dataclass(frozen=True)
class Case:
    """A model, how its weights are held, and what is done to its blocks."""

    memory: Memory = field(default_factory=Memory)
    format: str | None = None
    dtype: torch.dtype = torch.float32
    situation: Situation = field(default_factory=lambda: Situation(batch=1))
    blocks: int = 5
    keeps_ends: bool = False

    def model(self, seed: int = 0) -> WanModel:
        """A model whose weights are on the device."""
        shape = replace(tiny_shape(FAMILIES[self.situation.family]), num_layers=self.blocks)
        model = tiny_transformer(shape, seed)
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data if is_fp32(name) else parameter.data.to(self.dtype)
        if self.format is not None:
            for name, layer in linear_layers(model, self.keeps_ends).items():
                parent, _, own = name.rpartition(".")
                setattr(model.get_submodule(parent), own, in_format(layer, self.format))
        return model

    def trained(self, model: WanModel, stream: Stream | None) -> list[torch.nn.Parameter]:
        """The matrices of its LoRA, with every strategy applied."""
        names = select_modules(model, self.situation.targets)
        parameters = prepare(model, self.memory, lambda each: add_lora(each, names, RANK, ALPHA), None, stream)
        fill(parameters)
        return parameters

    def run(self, count: int = 0, of: Callable[..., Stream] = Stream, before: Callable[[Stream], None] | None = None):
        """What a few steps give with so many streamed blocks, and how their weights came."""
        model, lane, stream = self.model(), LateLane(), None
        if count:
            stream = of(model, assign_slots(self.blocks, count), Ring(CPU, lane))
            if before is not None:
                before(stream)
        return steps_of(model, self.trained(model, stream), self.situation), lane


@cache
def resident(case: Case) -> list[Tensor]:
    """What the same steps give with all weights on the device."""
    return case.run()[0]


def steps_of(model: WanModel, parameters: Sequence[torch.nn.Parameter], situation: Situation) -> list[Tensor]:
    """Steps with validation in between, one that is given up, and one of two batches."""
    first, second = (inputs_of(model, situation, seed) for seed in range(2))
    found = answers(model, parameters, first)
    with torch.no_grad():
        found += [model(*first), model(*second)]
    model(*second)  # a forward pass without a backward pass
    with torch.inference_mode():
        found.append(model(*first).clone())
    loss = loss_of(model(*first)) + loss_of(model(*second))
    return [*found, loss.detach(), *torch.autograd.grad(loss, parameters)]
