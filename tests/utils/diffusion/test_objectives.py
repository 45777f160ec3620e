"""What the model should have answered, and how far off it was."""

import pytest
import torch

from utils.diffusion.flow import Noisy, add_noise
from utils.diffusion.objectives import guided_target, squared_error


def make_noisy() -> Noisy:
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, 2, 4, 2, 4, 4, generator=generator)
    return add_noise(clean, noise, torch.tensor([0.3, 0.8]))


def test_the_guided_target_is_the_velocity_moved_by_the_guidance():
    noisy, seen = make_noisy(), []

    def base(latents, timestep, cond):
        seen.append((latents, timestep, cond))
        return latents * cond

    target = guided_target(noisy, base, 3.0, 1.0, weight=0.5)
    torch.testing.assert_close(target, noisy.velocity + 0.5 * (3.0 - 1.0) * noisy.latents)
    assert [cond for _, _, cond in seen] == [3.0, 1.0]
    for latents, timestep, _ in seen:
        assert torch.equal(latents, noisy.latents) and torch.equal(timestep, noisy.sigma * 1000)


def test_for_a_perfect_base_the_guided_target_is_classifier_free_guidance():
    noisy = make_noisy()
    negative = torch.randn(noisy.clean.shape, generator=torch.Generator().manual_seed(1))
    answers = {"cond": noisy.velocity, "negative": negative}
    target = guided_target(noisy, lambda latents, timestep, cond: answers[cond], "cond", "negative", weight=4.0)
    torch.testing.assert_close(target, negative + 5.0 * (noisy.velocity - negative), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("same", [True, False])
def test_no_weight_or_no_difference_leaves_the_velocity(same):
    noisy = make_noisy()
    conds, weight = ((2.0, 2.0), 4.0) if same else ((2.0, 1.0), 0.0)
    target = guided_target(noisy, lambda latents, timestep, cond: latents * cond, *conds, weight)
    assert torch.equal(target, noisy.velocity)


def test_no_gradient_reaches_the_teacher():
    weight = torch.nn.Parameter(torch.ones(()))
    target = guided_target(make_noisy(), lambda latents, timestep, cond: latents * weight * cond, 2.0, 1.0, 1.0)
    assert not target.requires_grad


def test_the_squared_error_is_a_mean_in_fp32():
    velocity, target = torch.tensor([1.0, 2.0, 4.0, 0.0]), torch.tensor([0.0, 2.0, 1.0, 2.0])
    loss = squared_error(velocity, target)
    assert loss.shape == () and loss.item() == (1 + 0 + 9 + 4) / 4
    half = squared_error(torch.full((4096,), 1.0, dtype=torch.bfloat16), torch.full((4096,), 1.0078125))
    assert half.dtype == torch.float32 and half.item() == pytest.approx(0.0078125**2)
