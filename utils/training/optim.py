"""Parameters, their optimizer and schedule, and the update that ends a step."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

SCHEDULES = ("constant", "linear", "cosine")


@dataclass(frozen=True)
class OptimizerSpec:
    learning_rate: float
    weight_decay: float
    schedule: str
    warmup_steps: int
    total_steps: int


def learning_rate_factor(step: int, spec: OptimizerSpec) -> float:
    """What the base learning rate is multiplied by at `step` (from 0): linear warm-up, then the schedule down to 0.

    constant stays at 1; linear and cosine reach 0 at `total_steps`.
    """
    if step < spec.warmup_steps:
        return (step + 1) / (spec.warmup_steps + 1)
    if spec.schedule == "constant":
        return 1.0
    progress = (step - spec.warmup_steps) / max(1, spec.total_steps - spec.warmup_steps)
    return 1 - progress if spec.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))


class Updater:
    """One fused AdamW over fp32 parameters, with clipping and a schedule; nothing here waits for the device."""

    def __init__(self, parameters: Iterable[nn.Parameter], spec: OptimizerSpec) -> None:
        self.parameters = list(parameters)
        self.optimizer = AdamW(self.parameters, lr=spec.learning_rate, weight_decay=spec.weight_decay, fused=True)
        self.schedule = LambdaLR(self.optimizer, lambda step: learning_rate_factor(step, spec))

    @property
    def learning_rate(self) -> float:
        """The rate of the next update."""
        return self.optimizer.param_groups[0]["lr"]

    def update(self, max_grad_norm: float) -> Tensor:
        """Clips the gradients to `max_grad_norm` (0: not at all), steps, clears them; returns their norm before.

        A gradient that is not finite leaves parameters and moments as they were. The decision is taken on the device
        through the optimizer's `found_inf`, the contract it has with torch's gradient scaler.
        """
        norm = nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        if max_grad_norm > 0:
            nn.utils.clip_grads_with_norm_(self.parameters, max_grad_norm, norm)
        self.optimizer.found_inf = (~torch.isfinite(norm)).to(torch.float32)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.schedule.step()
        return norm

    @property
    def updates(self) -> int:
        """How many there have been."""
        return self.schedule.last_epoch

    def load(self, states: Sequence[Mapping[str, Tensor]], updates: int) -> None:
        """Goes on after so many updates, with what the optimizer remembers of each parameter, in order."""
        saved = self.optimizer.state_dict()
        saved["state"] = {index: dict(state) for index, state in enumerate(states) if state}
        self.optimizer.load_state_dict(saved)
        self.schedule.last_epoch = updates
        for group, base, factor in zip(
            self.optimizer.param_groups, self.schedule.base_lrs, self.schedule.lr_lambdas, strict=True
        ):
            group["lr"] = base * factor(self.schedule.last_epoch)
        self.schedule._last_lr = [group["lr"] for group in self.optimizer.param_groups]
