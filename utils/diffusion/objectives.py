"""An objective is a target (the velocity that the model should predict) and a distance (how far off it was)."""

from dataclasses import dataclass
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
        None,
        "negative prompt of --distill_cfg, a text or embedding file (default: the model's)",
        requires="distill_cfg",
    )


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
