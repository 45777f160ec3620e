"""From noise to latents, as one setting says."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from utils.diffusion.objectives import Predict
from utils.encoding.conditioning import Cond, replace_text
from wan.text2video import guided, sample
from wan.utils.fm_solvers import make_solver


@dataclass(frozen=True)
class Sampler:
    """How the way from noise to latents is taken."""

    solver: str
    steps: int
    guidance: float
    shift: float

    @torch.no_grad()
    def denoise(
        self,
        predict: Predict,
        noise: Tensor,
        cond: Cond,
        negative: Tensor | None,
        progress: Callable[[Tensor], Iterable] = iter,
    ) -> Tensor:
        """Latents (B, C, F, H, W) from noise of that shape.

        Guidance leads away from the `negative` text (T, E), where there is one; `progress` may wrap the timesteps.
        """
        velocity = partial(predict, cond=cond)
        if negative is not None:
            velocity = guided(velocity, partial(predict, cond=replace_text(cond, negative)), self.guidance)
        return sample(velocity, noise, make_solver(self.solver, self.steps, self.shift, noise.device), progress)
