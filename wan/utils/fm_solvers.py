"""Flow-matching solvers: diffusers' on Wan's official noise grid, and that of models distilled into few steps."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

NUM_TIMESTEPS = 1000
UNIPC, EULER, LCM = SOLVERS = ("unipc", "euler", "lcm")


class Solver(Protocol):
    """What sampling needs of a diffusers scheduler."""

    timesteps: Tensor  # (steps,) descending, 0..1000

    def step(self, model_output: Tensor, timestep: Tensor, sample: Tensor, *, return_dict: bool) -> tuple[Tensor]:
        """The latents after one step, alone in a tuple without `return_dict`."""
        ...


def sigma_grid(num_steps: int, shift: float) -> np.ndarray:
    """The official noise levels: num_steps values from just below 1 downward, shifted; the final 0 is not included.

    sigma = shift * s / (1 + (shift - 1) * s) over s = linspace(0.999, 0, num_steps + 1)[:-1].
    """
    return _shifted(np.linspace(0.999, 0.0, num_steps + 1)[:-1], shift)


def few_step_grid(num_steps: int, shift: float) -> np.ndarray:
    """The noise levels of ComfyUI's scheduler "simple": every (1000 / num_steps)-th of its 1000, from 1 down, shifted.

    Four steps are at 1000, 750, 500 and 250 before the shift.
    """
    s = (NUM_TIMESTEPS - np.floor(np.arange(num_steps) * (NUM_TIMESTEPS / num_steps))) / NUM_TIMESTEPS
    return _shifted(s, shift)


def listed_grid(timesteps: Sequence[float], shift: float) -> np.ndarray:
    """The noise levels of steps that are listed on the 0..1000 scale before the shift, such as 1000, 750, 500, 250.

    Rounded to nine digits, like the levels that a model is distilled at: a step at the boundary of two
    experts is exactly there.
    """
    levels = _shifted(np.asarray(timesteps, dtype=np.float64) / NUM_TIMESTEPS, shift)
    return np.array([round(level, 9) for level in levels.tolist()])


def _shifted(s: np.ndarray, shift: float) -> np.ndarray:
    return shift * s / (1 + (shift - 1) * s)


class LcmSolver:
    """Steps of a model that was distilled into few: what it sees in noisy latents, with new noise of the next level.

    https://arxiv.org/abs/2303.01469, algorithm 1; ComfyUI's sampler "lcm". Each sample has noise of its own seed, after
    the noise that sampling begins with in the seed's sequence.
    """

    def __init__(self, sigmas: np.ndarray, seeds: Sequence[int], device: torch.device) -> None:
        self.sigmas = torch.tensor([*sigmas, 0.0], dtype=torch.float32, device=device)
        self.timesteps = self.sigmas[:-1] * NUM_TIMESTEPS
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._index = 0

    def step(self, model_output: Tensor, timestep: Tensor, sample: Tensor, *, return_dict: bool) -> tuple[Tensor]:
        sigma, following = self.sigmas[self._index : self._index + 2]
        clean = sample - sigma * model_output
        self._index += 1
        if self._index == len(self.timesteps):
            return (clean,)
        if self._index == 1:
            self._draw(sample)
        return (torch.lerp(clean, self._draw(sample), following),)

    def _draw(self, like: Tensor) -> Tensor:
        """Noise drawn on the CPU, so that a seed gives the same noise whatever the device."""
        drawn = [torch.randn(like[:1].shape, generator=generator) for generator in self._generators]
        return torch.cat(drawn).to(like.device)


def make_solver(
    name: str,
    num_steps: int,
    shift: float,
    device: torch.device,
    seeds: Sequence[int] = (0,),
    timesteps: Sequence[float] = (),
) -> Solver:
    """A fresh solver: "unipc" or "euler" on the official grid, or "lcm" on that of few steps, or of listed ones.

    UniPC is the official default (order 2, bh2). Its timesteps are truncated to integers, as the official ones are. The
    `seeds`, one for each sample, are those of the noise which "lcm" adds. Only "lcm" takes a list of `timesteps`, on
    the 0..1000 scale before the shift; ValueError for another.
    """
    if name == LCM:
        sigmas = listed_grid(timesteps, shift) if timesteps else few_step_grid(num_steps, shift)
        return LcmSolver(sigmas, seeds, device)
    if timesteps:
        raise ValueError(f"{name} has steps of its own: only {LCM} takes a list of them")
    sigmas = sigma_grid(num_steps, shift)
    if name == UNIPC:
        return unipc(sigmas, device)
    if name != EULER:
        raise ValueError(f"unknown solver {name!r}; known: {', '.join(SOLVERS)}")
    # Importing diffusers takes most of a second, which a run without previews need not wait for.
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

    # The grid is shifted already: the schedulers' own shift must stay 1, else it would be shifted twice.
    solver = FlowMatchEulerDiscreteScheduler(shift=1.0)
    solver.set_timesteps(sigmas=sigmas, device=device)
    solver.set_begin_index(0)
    return solver


def unipc(sigmas: np.ndarray, device: torch.device) -> Solver:
    """UniPC over these noise levels, descending; the last step is to 0."""
    from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler

    solver = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=1.0)
    solver.set_timesteps(sigmas=sigmas, device=device)
    # Truncated timesteps can repeat; counted from the beginning, a repeated one is not mistaken for the other.
    solver.set_begin_index(0)
    return solver
