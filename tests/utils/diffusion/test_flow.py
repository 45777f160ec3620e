"""Latents, noise and velocity are one straight line, and noise levels are shifted as Wan shifts them."""

import pytest
import torch

from utils.diffusion.flow import (
    add_noise,
    latents_to_velocity,
    sample_noisy,
    sample_sigma,
    shift_sigma,
    unshift_sigma,
    velocity_to_latents,
)
from wan.configs import FAMILIES

SHAPE = (3, 4, 2, 6, 4)


@pytest.fixture
def clean() -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def noise() -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))


def test_each_sample_is_noised_by_its_own_sigma(clean, noise):
    sigma = torch.tensor([0.25, 0.5, 0.875])
    noisy = add_noise(clean, noise, sigma)
    for i, s in enumerate(sigma.tolist()):
        torch.testing.assert_close(noisy.latents[i], (1 - s) * clean[i] + s * noise[i])


def test_sigma_0_is_clean_and_sigma_1_is_noise(clean, noise):
    noisy = add_noise(clean, noise, torch.tensor([0.0, 1.0, 0.0]))
    assert torch.equal(noisy.latents[0], clean[0])
    assert torch.equal(noisy.latents[1], noise[1])


def test_the_velocity_is_the_slope_of_the_line(clean, noise):
    low, high = (add_noise(clean, noise, torch.full((3,), sigma)) for sigma in (0.25, 0.75))
    torch.testing.assert_close((high.latents - low.latents) / 0.5, low.velocity)
    assert torch.equal(low.velocity, noise - clean)


def test_the_timestep_is_a_thousand_times_sigma_and_not_rounded(clean, noise):
    sigma = torch.tensor([0.1234567, 0.5, 1.0])
    assert torch.equal(add_noise(clean, noise, sigma).timestep, sigma * 1000)


def test_velocity_and_latents_are_two_names_of_one_answer(clean, noise):
    sigma = torch.tensor([0.1, 0.5, 1.0])
    noisy = add_noise(clean, noise, sigma)
    torch.testing.assert_close(velocity_to_latents(noisy.latents, noisy.velocity, sigma), clean, rtol=0, atol=2e-6)
    back = latents_to_velocity(noisy.latents, clean, sigma)
    torch.testing.assert_close(back, noisy.velocity, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("sigma", "shift", "expected"),
    [(0.5, 3.0, 0.75), (0.5, 5.0, 5 / 6), (0.25, 1 / 3, 0.1), (0.2, 1.0, 0.2), (0.0, 9.0, 0.0), (1.0, 9.0, 1.0)],
)
def test_a_shifted_sigma_has_its_exact_value(sigma, shift, expected):
    assert shift_sigma(torch.tensor([sigma]), shift).item() == pytest.approx(expected, abs=1e-7)


def test_a_shift_is_undone_by_its_reciprocal():
    sigma = torch.linspace(0, 1, 101)
    torch.testing.assert_close(shift_sigma(shift_sigma(sigma, 4.0), 0.25), sigma)


def test_sampled_sigmas_are_uniform_ones_shifted():
    torch.manual_seed(3)
    sigma = sample_sigma(20_000, 3.0, torch.device("cpu"))
    torch.manual_seed(3)
    assert torch.equal(sigma, shift_sigma(torch.rand(20_000), 3.0))
    assert sigma.dtype == torch.float32 and sigma.min() >= 0 and sigma.max() <= 1
    uniform = shift_sigma(sigma, 1 / 3)
    quantiles = torch.quantile(uniform, torch.tensor([0.25, 0.5, 0.75]))
    torch.testing.assert_close(quantiles, torch.tensor([0.25, 0.5, 0.75]), rtol=0, atol=0.02)


# ------------------------------------------------------------------------------------------------------------- experts

CPU = torch.device("cpu")
BOUNDARIES = sorted({family.boundaries[0] for family in FAMILIES.values() if family.boundaries})


def share_below(sigma: torch.Tensor, shift: float) -> torch.Tensor:
    """The share of training below a noise level: what `u` must be for `shift * u / (1 + (shift - 1) * u)` to be it."""
    return sigma / (shift - (shift - 1) * sigma)


def kolmogorov_smirnov(expected: torch.Tensor) -> float:
    """The largest distance between an empirical distribution and the expected one, from the latter's values."""
    values, count = expected.sort().values, len(expected)
    steps = torch.arange(count + 1) / count
    return max((values - steps[:-1]).max().item(), (steps[1:] - values).max().item())


@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 12.0])
def test_each_expert_sees_its_own_part_of_the_distribution_of_all_noise_levels(shift, boundary):
    torch.manual_seed(0)
    count, division = 20_000, share_below(torch.tensor(boundary), shift)
    for low, high in ((boundary, 1.0), (0.0, boundary)):
        sigma = sample_sigma(count, shift, CPU, (low, high))
        assert sigma.dtype == torch.float32 and sigma.min() >= low - 1e-6 and sigma.max() <= high + 1e-6
        below, above = share_below(torch.tensor([low, high]), shift)
        assert kolmogorov_smirnov((share_below(sigma, shift) - below) / (above - below)) < 1.63 / count**0.5
    everywhere = sample_sigma(count, shift, CPU)
    assert (everywhere < boundary).float().mean().item() == pytest.approx(division.item(), abs=0.01)
    assert kolmogorov_smirnov(share_below(everywhere, shift)) < 1.63 / count**0.5


@pytest.mark.parametrize("shift", [0.3, 1.0, 3.0, 5.0, 12.0])
def test_an_expert_of_all_noise_levels_draws_the_very_numbers_that_are_drawn_without_experts(shift):
    torch.manual_seed(3)
    expected = shift_sigma(torch.rand(1000), shift)
    for interval in ((), ((0.0, 1.0),), ((0, 1),)):
        torch.manual_seed(3)
        assert torch.equal(sample_sigma(1000, shift, CPU, *interval), expected)


@pytest.mark.parametrize("shift", [0.3, 1.0, 5.0, 12.0])
def test_a_noise_level_is_found_again_before_its_shift(shift):
    for sigma in (0.0, 0.2, 0.875, 1.0):
        assert shift_sigma(torch.tensor(unshift_sigma(sigma, shift)), shift).item() == pytest.approx(sigma, abs=1e-6)
    assert (unshift_sigma(0.0, shift), unshift_sigma(1.0, shift)) == (0, 1)


def test_samples_for_an_expert_are_noised_at_its_levels(clean):
    torch.manual_seed(0)
    noisy = sample_noisy(clean, 5.0, (0.9, 1.0))
    assert (noisy.sigma >= 0.9).all() and len(set(noisy.sigma.tolist())) == len(clean)
    assert torch.equal(noisy.latents, add_noise(clean, noisy.noise, noisy.sigma).latents)
    assert (sample_noisy(clean, 5.0, (0.0, 0.1)).sigma <= 0.1).all()
