"""Rectified flow: latents move in a straight line to noise, and the model predicts the velocity.

    noisy = (1 - sigma) * latents + sigma * noise        sigma 0 is clean, 1 is pure noise
    velocity = d noisy / d sigma = noise - latents
    timestep = 1000 * sigma, never rounded

Shapes: latents, noise and velocity (B, C, F, H, W), sigma (B,); everything fp32.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

NUM_TIMESTEPS = 1000
Condition = TypeVar("Condition")
# All that this wing knows of a model: predict(latents, timestep, cond) -> velocity. `cond` is passed on unread.
Predict = Callable[[Tensor, Tensor, Condition], Tensor]


@dataclass(frozen=True)
class Noisy:
    """Noisy latents and what made them."""

    latents: Tensor  # (B, C, F, H, W) noisy
    clean: Tensor  # (B, C, F, H, W)
    noise: Tensor  # (B, C, F, H, W)
    sigma: Tensor  # (B,)

    @property
    def timestep(self) -> Tensor:
        """(B,) on the 0..1000 scale."""
        return self.sigma * NUM_TIMESTEPS

    @property
    def velocity(self) -> Tensor:
        """What the model should predict."""
        return self.noise - self.clean


def add_noise(clean: Tensor, noise: Tensor, sigma: Tensor) -> Noisy:
    """The point at `sigma` (B,) on the line from `clean` to `noise`."""
    return Noisy(torch.lerp(clean, noise, _broadcast(sigma)), clean, noise, sigma)


def shift_sigma(sigma: Tensor, shift: float) -> Tensor:
    """Moves noise levels towards 1 by shift * sigma / (1 + (shift - 1) * sigma), the identity at shift 1."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def unshift_sigma(sigma: float, shift: float) -> float:
    """The noise level that `shift_sigma` moves to this one; 0 and 1 stay where they are, exactly."""
    return sigma if sigma in (0, 1) else sigma / (shift - (shift - 1) * sigma)


def sample_sigma(count: int, shift: float, device: torch.device, interval: tuple[float, float] = (0, 1)) -> Tensor:
    """Noise levels (count,) for training: uniform in 0..1, then shifted. Drawn from torch's global random state.

    Of this distribution only the part in `interval` is drawn: the noise levels, after the shift, of one expert.
    """
    low, high = (unshift_sigma(sigma, shift) for sigma in interval)
    return shift_sigma(low + (high - low) * torch.rand(count, device=device), shift)


def sample_noisy(clean: Tensor, shift: float, interval: tuple[float, float] = (0, 1)) -> Noisy:
    """Latents for training, each sample at its own random noise level. Drawn from torch's global random state."""
    sigma = sample_sigma(len(clean), shift, clean.device, interval)
    return add_noise(clean, torch.randn_like(clean), sigma)


def seeded_noise(shape: Sequence[int], seed: int) -> Tensor:
    """Noise drawn on the CPU, so that a seed gives the same noise whatever the device."""
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed))


def velocity_to_latents(noisy: Tensor, velocity: Tensor, sigma: Tensor) -> Tensor:
    """The clean latents that a velocity at `sigma` points back to."""
    return noisy - _broadcast(sigma) * velocity


def latents_to_velocity(noisy: Tensor, latents: Tensor, sigma: Tensor) -> Tensor:
    """The velocity that points from `noisy` at `sigma` (greater than 0) back to these clean latents."""
    return (noisy - latents) / _broadcast(sigma)


def _broadcast(sigma: Tensor) -> Tensor:
    return sigma.view(-1, 1, 1, 1, 1)
