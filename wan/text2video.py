"""Sampling as functions over predict(latents, timestep) -> velocity."""

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

Predict = Callable[[Tensor, Tensor], Tensor]


def guided(cond: Predict, uncond: Predict, guidance: float) -> Predict:
    """Classifier-free guidance: uncond + guidance * (cond - uncond); at guidance 1 the second forward is saved."""
    if guidance == 1.0:
        return cond

    def predict(latents: Tensor, timestep: Tensor) -> Tensor:
        without = uncond(latents, timestep)
        return without + guidance * (cond(latents, timestep) - without)

    return predict


def sample(predict: Predict, noise: Tensor, solver: Any, progress: Callable[[Tensor], Iterable] = iter) -> Tensor:
    """Integrates from noise (B, C, F, H, W) fp32 to latents of the same shape.

    `solver` comes fresh from `wan.utils.fm_solvers.make_solver`; `progress` may wrap its timesteps in a bar.
    """
    latents = noise
    for timestep in progress(solver.timesteps):
        velocity = predict(latents, timestep.expand(len(latents)))
        latents = solver.step(velocity, timestep, latents, return_dict=False)[0]
    return latents
