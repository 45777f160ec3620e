"""Runs without a model: a learner of one small LoRA, and the numbers of steps that nobody has computed."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

from utils.adapters.lora_file import LoraFile, LoraPair
from utils.adapters.lora_writer import write_lora
from utils.adapters.model_card import ModelCard
from utils.common.checkpoint_names import EXPERTS
from utils.diffusion.objectives import Loss
from utils.runs.run import Run, RunSettings, open_run
from utils.runs.state import Facts, State
from utils.training.learner import Learner, Trainable, Update
from utils.training.optimizers import OptimizerSpec
from wan.configs import FAMILIES

SPEC = OptimizerSpec(learning_rate=0.01, weight_decay=0.0, schedule="constant", warmup_steps=0, total_steps=10)
EXPERT_SPECS = replace(SPEC, schedule="linear", warmup_steps=2, total_steps=12), replace(SPEC, schedule="cosine")
FACTS = Facts({"learning_rate": 0.01, "max_train_steps": 10}, {"clips/a.mp4": "0123"})
CARD = ModelCard(FAMILIES["wan2.2-t2v-A14B"], "model", (832, 480), {"foxes": 3}, "ohwx fox")


class SmallLora:
    """As much of an adapter as there is without a model: one pair of matrices."""

    def __init__(self, value: float = 1.0) -> None:
        self.parameters = {"down": nn.Parameter(torch.full((2, 4), value)), "up": nn.Parameter(torch.ones(6, 2))}

    def export(self, path: Path, values: Mapping[str, Tensor], facts: Mapping[str, str]) -> None:
        pair = LoraPair(values["down"].detach(), values["up"].detach(), 2.0)
        write_lora(path, LoraFile({"blocks.0.self_attn.q": pair}, metadata=dict(facts)))

    def describe(self) -> str:
        return "a small LoRA"


def small_learner(names: tuple[str, ...] = ("lora",), ema_decay: float = 0.0) -> Learner:
    return Learner([Trainable(name, SmallLora(), SPEC, ema_decay) for name in names])


def take_step(learner: Learner, seed: int = 0) -> None:
    """One step of training: every trainable gets gradients and is updated."""
    generator = torch.Generator().manual_seed(seed)
    learner.begin_step(len(learner.trainables))
    for name, trainable in learner.trainables.items():
        for parameter in trainable.adapter.parameters.values():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        learner.update(name, max_grad_norm=1.0)


def two_experts() -> Learner:
    """Two LoRAs with schedules of their own."""
    return Learner([Trainable(name, SmallLora(), spec, 0.9) for name, spec in zip(EXPERTS, EXPERT_SPECS, strict=True)])


def take_turn(learner: Learner) -> None:
    """A step of one of two experts, which take turns of 7 steps."""
    name = EXPERTS[learner.step // 7 % 2]
    learner.begin_step()
    for parameter in learner.trainables[name].adapter.parameters.values():
        parameter.grad = torch.randn(parameter.shape)
    learner.update(name, max_grad_norm=1.0)


def settings(output_dir: Path, max_grad_norm: float = 0.0, name: str = "wan-lora") -> RunSettings:
    options = json.dumps({"seed": 42} | ({"name": name} if name != "wan-lora" else {}))
    return RunSettings(output_dir, 10, max_grad_norm, options, FACTS, {"base_model": "model"}, CARD, name)


def open_a_run(output_dir: Path, state: State | None = None, max_grad_norm: float = 0.0) -> Run:
    return open_run(settings(output_dir, max_grad_norm), small_learner(), state)


def log(run: Run, loss: float, grad_norm: float = 1.0, phase: str = "train") -> None:
    """A whole step with these numbers."""
    run.learner.step += 1
    run.metrics.log(phase, Loss(torch.tensor(loss)), Update(torch.tensor(grad_norm), 0.5))
    run.metrics.end_step(tokens=100)


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    """Every scalar TensorBoard would show: tag -> step -> value."""
    events = EventAccumulator(str(folder)).Reload()
    return {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]}
