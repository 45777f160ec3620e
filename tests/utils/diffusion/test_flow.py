"""Latents, noise and velocity are one straight line, and noise levels are shifted as Wan shifts them."""

import pytest
import torch

from utils.diffusion.flow import add_noise, latents_to_velocity, sample_sigma, shift_sigma, velocity_to_latents

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
