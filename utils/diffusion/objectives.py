"""An objective is a target (the velocity that the model should predict) and a distance (how far off it was)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.diffusion.flow import Condition, Noisy, Predict


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
