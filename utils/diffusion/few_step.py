"""Distillation into a few steps by distribution matching: what the student learns from its teacher and its critic.

The student answers with clean latents x0 at the noise levels of its few steps. Its distribution is moved towards the
teacher's, along the difference of two scores: that of the teacher at x0 with new noise, and that of the critic, which
learns the student's own distribution by flow matching. DMD2, https://arxiv.org/abs/2405.14867, section 3.

Shapes: latents (B, C, F, H, W), sigma (B,); everything fp32.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from utils.diffusion.flow import (
    NUM_TIMESTEPS,
    Condition,
    Noisy,
    Predict,
    add_noise,
    sample_noisy,
    shift_sigma,
    velocity_to_latents,
)
from utils.diffusion.objectives import squared_error

TINY = 1e-8  # keeps a sample whose x0 is exactly the teacher's from dividing by zero


def step_sigmas(timesteps: Sequence[float], shift: float) -> list[float]:
    """The noise levels of a list of steps on the 0..1000 scale before the shift, such as 1000, 750, 500, 250.

    Rounded to nine digits, so that a step at the boundary of two experts is exactly there, and pure noise is 1.
    """
    levels = torch.tensor(timesteps, dtype=torch.float64) / NUM_TIMESTEPS
    return [round(sigma, 9) for sigma in shift_sigma(levels, shift).tolist()]


def own_steps(sigmas: Sequence[float], interval: tuple[float, float]) -> list[float]:
    """The steps of one expert: it answers at its lower boundary, and below its upper one, or up to pure noise."""
    low, high = interval
    return [sigma for sigma in sigmas if low <= sigma and (sigma < high or high == 1)]


def noised_to_steps(clean: Tensor, sigmas: Sequence[float]) -> Noisy:
    """Where the student starts from data: each sample at one of its steps. Drawn from torch's global random state."""
    levels = torch.tensor(sigmas, device=clean.device, dtype=torch.float32)
    chosen = levels[torch.randint(len(sigmas), (len(clean),), device=clean.device)]
    return add_noise(clean, torch.randn_like(clean), chosen)


def pure_noise(noise: Tensor) -> Noisy:
    """Where sampling begins: noise at level 1."""
    return Noisy(noise, torch.zeros_like(noise), noise, torch.ones(len(noise), device=noise.device))


@torch.no_grad()
def roll_out(
    student: Predict[Condition], start: Noisy, cond: Condition, sigmas: Sequence[float], exit_at: int
) -> Noisy:
    """Where the student starts from its own samples: what it has made of `start` before step `exit_at`, from 0.

    `start` is at the first of its steps. Each predicts x0 and adds new noise of the next level:
    https://arxiv.org/abs/2303.01469, algorithm 1. Drawn from torch's global random state.
    """
    noisy = start
    for following in sigmas[1 : exit_at + 1]:
        latents = predict_latents(student, noisy, cond)
        noisy = add_noise(latents, torch.randn_like(latents), torch.full_like(noisy.sigma, following))
    return noisy


def predict_latents(predict: Predict[Condition], noisy: Noisy, cond: Condition) -> Tensor:
    """The clean latents x0 that a model sees in noisy ones."""
    velocity = predict(noisy.latents, noisy.timestep, cond)
    return velocity_to_latents(noisy.latents, velocity.float(), noisy.sigma)


def distance_to_teacher(latents: Tensor, teacher: Tensor, weight: Tensor | None = None) -> Tensor:
    """mean |x0 - teacher| of each sample (B,), by `weight` (B, F, H, W). `teacher` is what it sees in noisy x0."""
    distance = (latents - teacher).abs().mean(dim=1)
    weight = torch.ones_like(distance) if weight is None else weight
    return (distance * weight).sum(dim=(1, 2, 3)) / weight.sum(dim=(1, 2, 3)).clamp(min=TINY)


def matching_gradient(teacher: Tensor, critic: Tensor, distance: Tensor) -> Tensor:
    """The direction (B, C, F, H, W) in which the student's x0 leaves the teacher's distribution.

    (critic - teacher) / mean |x0 - teacher|, with the `distance` (B,) of each sample: equations 7 and 8 of DMD,
    https://arxiv.org/abs/2311.18828, without their alpha, as is usual. `teacher` and `critic` are what these see in x0
    with noise.
    """
    return (critic - teacher) / distance.clamp(min=TINY).view(-1, 1, 1, 1, 1)


def matching_loss(latents: Tensor, gradient: Tensor, weight: Tensor | None = None) -> Tensor:
    """A scalar whose gradient with respect to the latents is `gradient`, divided by the number of their values.

    A `weight` (B, F, H, W) says how much each position counts.
    """
    return 0.5 * squared_error(latents, (latents - gradient).detach(), weight)


class Matched(NamedTuple):
    """A loss, and how far the student's samples are from what the teacher sees in them; scalars."""

    loss: Tensor  # for its gradient: half the mean square of that, which need not fall while the student learns
    distance: Tensor


def student_loss(
    latents: Tensor,
    teacher: Predict[Condition],
    critic: Predict[Condition],
    cond: Condition,
    shift: float,
    interval: tuple[float, float],
    weight: Tensor | None = None,
) -> Matched:
    """Matches the distribution of the student's x0 to the teacher's, at noise levels of `interval`, after the shift.

    The teacher's answers are guided already. Outside of the interval of an expert they would mean nothing. A `weight`
    (B, F, H, W) says how much each position counts.
    """
    with torch.no_grad():
        noisy = sample_noisy(latents.detach(), shift, interval)
        real, fake = (predict_latents(predict, noisy, cond) for predict in (teacher, critic))
        distance = distance_to_teacher(noisy.clean, real, weight)
        gradient = matching_gradient(real, fake, distance)
    return Matched(matching_loss(latents, gradient, weight), distance.mean())
