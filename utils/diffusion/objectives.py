"""An objective is a target (the velocity that the model should predict) and a distance (how far off it was)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.common.options import option
from utils.diffusion.flow import Condition, Noisy, Predict


@dataclass(frozen=True)
class Objective:
    """objective"""

    shift: float = option(3.0, "shift of the noise levels; above 1: more training at high noise", minimum=0.01)
    mask_floor: float = option(0.1, "loss weight of black mask regions (white: 1)", minimum=0, maximum=1)
    distill_cfg: float = option(0.0, "distill classifier-free guidance of scale 1 + N into the LoRA; 0: off", minimum=0)
    distill_negative: Path | None = option(
        None, "negative prompt of --distill_cfg and --few_step, a text or embedding file (default: the model's)"
    )


@dataclass(frozen=True)
class Loss:
    """What is made smaller, and what is watched beside it; all scalars.

    Where there is a `limit`, a running mean of the loss above that of the limit means that training diverges.
    """

    value: Tensor
    limit: Tensor | None = None
    watched: Mapping[str, Tensor] = field(default_factory=dict)  # by the names that they are logged under

    def map(self, function: Callable[[Tensor], Tensor]) -> "Loss":
        """A loss of what `function` makes of each scalar."""
        limit = None if self.limit is None else function(self.limit)
        return Loss(function(self.value), limit, {name: function(value) for name, value in self.watched.items()})

    def __truediv__(self, count: int) -> "Loss":
        return self.map(lambda value: value / count)

    def detach(self) -> "Loss":
        return self.map(Tensor.detach)


def sum_losses(losses: Sequence[Loss]) -> Loss:
    """The sum of the losses of one phase, one by one."""
    total = losses[0]
    for loss in losses[1:]:
        limit = None if total.limit is None or loss.limit is None else total.limit + loss.limit
        watched = {name: value + loss.watched[name] for name, value in total.watched.items()}
        total = Loss(total.value + loss.value, limit, watched)
    return total


@torch.no_grad()
def guided_target(noisy: Noisy, base: Predict[Condition], cond: Condition, uncond: Condition, weight: float) -> Tensor:
    """The true velocity plus what classifier-free guidance 1 + weight adds to the base model's prediction.

    velocity + weight * (base(cond) - base(uncond)): a LoRA trained on it needs no guidance at sampling.
    """
    difference = base(noisy.latents, noisy.timestep, cond) - base(noisy.latents, noisy.timestep, uncond)
    return noisy.velocity + weight * difference


def squared_error(velocity: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean squared error in fp32, a scalar. A `weight` (B, F, H, W) makes it a weighted mean over the positions."""
    if weight is None:
        return F.mse_loss(velocity.float(), target.float())
    error = F.mse_loss(velocity.float(), target.float(), reduction="none").mean(dim=1)
    return (error * weight).sum() / weight.sum()
