"""Sampling: from noise to latents along the velocity field that a model predicts."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from wan.utils.fm_solvers import Solver, make_solver

Condition = TypeVar("Condition")
VelocityField = Callable[[Tensor, Tensor], Tensor]  # latents (B, C, F, H, W), timestep (B,) -> velocity


@dataclass(frozen=True)
class Sampler:
    """The settings of sampling."""

    solver: str  # of SOLVERS
    steps: int
    guidance: float
    shift: float  # of the noise levels; above 1: more steps at high noise

    @torch.no_grad()
    def denoise(
        self,
        predict: Callable[[Tensor, Tensor, Condition], Tensor],
        noise: Tensor,
        cond: Condition,
        uncond: Condition | None,
        progress: Callable[[Tensor], Iterable[Tensor]] = iter,
    ) -> Tensor:
        """Latents (B, C, F, H, W) from noise of that shape, by `predict(latents, timestep, cond) -> velocity`.

        With `uncond`, and a guidance other than 1, the velocity is guided away from that condition. `progress` may wrap
        the timesteps in a bar.
        """
        velocity = _given(predict, cond)
        if uncond is not None:
            velocity = guided(velocity, _given(predict, uncond), self.guidance)
        return sample(velocity, noise, make_solver(self.solver, self.steps, self.shift, noise.device), progress)


def _given(predict: Callable[[Tensor, Tensor, Condition], Tensor], cond: Condition) -> VelocityField:
    return lambda latents, timestep: predict(latents, timestep, cond)


def guided(cond: VelocityField, uncond: VelocityField, guidance: float) -> VelocityField:
    """Classifier-free guidance: uncond + guidance * (cond - uncond); guidance 1 needs no second forward pass."""
    if guidance == 1.0:
        return cond

    def velocity(latents: Tensor, timestep: Tensor) -> Tensor:
        without = uncond(latents, timestep)
        return without + guidance * (cond(latents, timestep) - without)

    return velocity


def sample(
    velocity: VelocityField, noise: Tensor, solver: Solver, progress: Callable[[Tensor], Iterable[Tensor]] = iter
) -> Tensor:
    """Integrates the field from noise (B, C, F, H, W) fp32 to latents of the same shape.

    `solver` must be new, because it counts its steps; `progress` may wrap its timesteps in a bar.
    """
    latents = noise
    for timestep in progress(solver.timesteps):
        answer = velocity(latents, timestep.expand(len(latents)))
        latents = solver.step(answer, timestep, latents, return_dict=False)[0]
    return latents
