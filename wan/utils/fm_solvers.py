"""Flow-matching solvers on Wan's official noise grids, built on diffusers' schedulers."""

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

SOLVERS = ("unipc", "euler")


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
    s = np.linspace(0.999, 0.0, num_steps + 1)[:-1]
    return shift * s / (1 + (shift - 1) * s)


def make_solver(name: str, num_steps: int, shift: float, device: torch.device) -> Solver:
    """A fresh solver on the official grid: "unipc" or "euler".

    UniPC is the official default (order 2, bh2). Its timesteps are truncated to integers, as the official ones are.
    """
    sigmas = sigma_grid(num_steps, shift)
    # Importing diffusers takes most of a second, which a run without previews need not wait for.
    # The grid is shifted already: the schedulers' own shift must stay 1, else it would be shifted twice.
    if name == "unipc":
        from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler

        solver = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=1.0)
        solver.set_timesteps(sigmas=sigmas, device=device)
    elif name == "euler":
        from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

        solver = FlowMatchEulerDiscreteScheduler(shift=1.0)
        solver.set_timesteps(sigmas=sigmas, device=device)
    else:
        raise ValueError(f"unknown solver {name!r}; known: {', '.join(SOLVERS)}")
    # Truncated timesteps can repeat; counted from the beginning, a repeated one is not mistaken for the other.
    solver.set_begin_index(0)
    return solver
