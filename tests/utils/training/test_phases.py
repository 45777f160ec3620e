"""A phase trains what it names, and nothing else."""

from functools import partial

import pytest
import torch
from torch import Tensor

from tests.tiny import TINY_SHAPE, tiny_transformer
from utils.adapters.attach import AdapterOptions, LoraAdapter
from utils.adapters.lora import add_lora, select_modules
from utils.encoding.conditioning import Batch, Cond, make_predict
from utils.training.learner import Learner, Trainable
from utils.training.memory import Memory, prepare
from utils.training.optim import OptimizerSpec
from utils.training.phases import Phase

SPEC = OptimizerSpec(learning_rate=1e-2, weight_decay=0.0, schedule="constant", warmup_steps=0, total_steps=10)
NAMES = ("student", "critic")


def make_batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 16, 2, 4, 6, generator=generator)
    return Batch(latents, Cond(torch.randn(1, 5, TINY_SHAPE.text_dim, generator=generator)))


def two_adapters(checkpointing: str) -> dict[str, LoraAdapter]:
    torch.manual_seed(0)

    def attach(model) -> dict[str, LoraAdapter]:
        for name in NAMES:
            add_lora(model, select_modules(model, ["attn"]), rank=2, alpha=2, adapter=name)
        return {name: LoraAdapter(model, AdapterOptions(), name) for name in NAMES}

    return prepare(tiny_transformer(), Memory(checkpointing), attach)


def values(adapter: LoraAdapter) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in adapter.parameters.values()]


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_each_of_two_phases_changes_its_own_adapter_alone(checkpointing):
    adapters = two_adapters(checkpointing)
    learner = Learner([Trainable(name, adapter, SPEC) for name, adapter in adapters.items()])
    predict, timestep = make_predict(adapters["student"].model), torch.tensor([500.0])

    def loss(batch: Batch) -> Tensor:
        return predict(batch.latents, timestep, batch.cond).square().mean()

    phases = [
        Phase(name, adapter.speaking, predict, loss, partial(learner.update, name, 1.0), ())
        for name, adapter in adapters.items()
    ]
    learner.begin_step(len(phases))
    for phase in phases:
        before = {name: values(adapter) for name, adapter in adapters.items()}
        with phase.speaking():
            phase.loss(make_batch()).backward()
        phase.step()
        changed = {name for name, adapter in adapters.items() if not same(before[name], values(adapter))}
        assert changed == {phase.name}
    assert learner.step == 1 and learner.is_whole
