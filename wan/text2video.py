"""Sampling: from noise to latents along the velocity field that a model predicts."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from wan.utils.fm_solvers import NUM_TIMESTEPS, Solver, make_solver

Condition = TypeVar("Condition")
VelocityField = Callable[[Tensor, Tensor], Tensor]  # latents (B, C, F, H, W), timestep (B,) -> velocity


@dataclass(frozen=True)
class Sampler:
    """The settings of sampling. A model with several experts has a guidance for each."""

    solver: str  # of SOLVERS
    steps: int
    guidance: tuple[float, ...]  # from high noise to low
    shift: float  # of the noise levels; above 1: more steps at high noise
    boundaries: tuple[float, ...] = ()  # noise levels at and above which a guidance holds, for all but the last
    seeds: tuple[int, ...] = (0,)  # one for each sample, of the noise that a solver adds between its steps
    timesteps: tuple[float, ...] = ()  # of each step, 0..1000 before the shift; by default the solver chooses them

    def __post_init__(self) -> None:
        """Raises ValueError for a list of another length than there are steps."""
        if self.timesteps and len(self.timesteps) != self.steps:
            raise ValueError(f"{self.steps} steps cannot be at {len(self.timesteps)} timesteps")

    def __str__(self) -> str:
        """For people: "4 steps of lcm, guidance 1, shift 5"."""
        steps, guidance = f"{self.steps} step{'s' * (self.steps != 1)}", " and ".join(f"{g:g}" for g in self.guidance)
        return f"{steps} of {self.solver}, guidance {guidance}, shift {self.shift:g}"

    @property
    def is_guided(self) -> bool:
        """Whether any step asks for the unconditional answer too."""
        return any(guidance != 1 for guidance in self.guidance)

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

        def velocity(latents: Tensor, timestep: Tensor) -> Tensor:
            answer = partial(predict, latents, timestep)
            return answer(cond) if uncond is None else guided(answer, cond, uncond, self.guidance_at(timestep))

        solver = make_solver(self.solver, self.steps, self.shift, noise.device, self.seeds, self.timesteps)
        return sample(velocity, noise, solver, progress)

    def guidance_at(self, timestep: Tensor) -> float:
        """The guidance at a timestep (B,), which all samples share."""
        return self.guidance[part_at(self.boundaries, timestep) if len(self.guidance) > 1 else 0]


def part_at(boundaries: Sequence[float], timestep: Tensor) -> int:
    """The number of the expert, counted from high noise, that answers at a timestep (B,), which all samples share.

    `boundaries` are the lowest noise levels of all experts but the last, descending. As in the official code, an expert
    answers at its boundary itself.
    """
    return sum(timestep[0].item() < boundary * NUM_TIMESTEPS for boundary in boundaries)


def guided(answer: Callable[[Condition], Tensor], cond: Condition, uncond: Condition, guidance: float) -> Tensor:
    """Classifier-free guidance: uncond + guidance * (cond - uncond); guidance 1 needs no second forward pass."""
    if guidance == 1.0:
        return answer(cond)
    without = answer(uncond)
    return without + guidance * (answer(cond) - without)


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
