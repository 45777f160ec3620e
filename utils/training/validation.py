"""A validation loss that can be compared between runs: fixed clips, fixed noise, fixed noise levels."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from utils.common.options import option
from utils.common.temp_rng import MAX_SEED, temp_rng
from utils.diffusion.flow import Predict, add_noise
from utils.diffusion.objectives import squared_error
from utils.encoding.conditioning import Batch, Cond, loss_weight

# No option moves these: a run with another training shift is measured by the same ruler.
QUANTILES = (0.1, 0.3, 0.5, 0.7, 0.9)


@dataclass(frozen=True)
class Validation:
    """validation"""

    val_steps: int = option(
        100, "validate before the first step, every N steps and at the end", minimum=1, affects_training=False
    )
    val_samples: int = option(4, "most clips to validate on; 0: no validation", minimum=0, affects_training=False)
    val_seed: int | None = option(
        None, "seed of the validation noise (default: --seed)", minimum=0, maximum=MAX_SEED, affects_training=False
    )


class Losses(NamedTuple):
    """Validation losses and the noise levels at which they were measured, (S,) both."""

    values: Tensor
    sigmas: Sequence[float]


def quantiles(low: float, high: float) -> tuple[float, ...]:
    """The noise levels to measure at of those between `low` and `high`: the QUANTILES themselves for 0 to 1."""
    return tuple(low + (high - low) * quantile for quantile in QUANTILES)


def hold_share(clips: Sequence[Batch], share: float) -> list[Batch]:
    """The clips with this share of them, evenly spread, given their first latent frame; unchanged without such frames.

    The mode of each clip is the same in every validation, and in every run with as many clips. A single clip is shown
    in both modes where samples have both.
    """
    if len(clips) == 1 and 0 < share < 1 and clips[0].cond.first is not None:
        clips = [*clips] * 2
    modes = [int((index + 1) * share) > int(index * share) for index in range(len(clips))]
    return [
        clip if clip.cond.first is None else replace(clip, cond=replace(clip.cond, held=torch.tensor([mode])))
        for clip, mode in zip(clips, modes, strict=True)
    ]


@torch.no_grad()
def validation_loss(predict: Predict[Cond], samples: Iterable[Batch], seed: int, sigmas: Sequence[float]) -> Tensor:
    """The mean squared error at each of these noise levels, averaged over the samples: (S,), on their device.

    A sample's noise depends on the seed and its place alone; the training's random state is left as it was.
    """
    losses = []
    for index, batch in enumerate(samples):
        with temp_rng(seed + index):
            noise = torch.randn(batch.latents.shape).to(batch.latents)  # drawn on the CPU: alike on every device
        weight = loss_weight(replace(batch, mask=None), batch.cond)
        for sigma in sigmas:
            noisy = add_noise(batch.latents, noise, torch.full((len(noise),), sigma, device=noise.device))
            losses.append(squared_error(predict(noisy.latents, noisy.timestep, batch.cond), noisy.velocity, weight))
    return torch.stack(losses).view(-1, len(sigmas)).mean(0)
