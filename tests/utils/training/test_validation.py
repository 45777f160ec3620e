"""The validation loss is the same ruler for every run."""

import random

import pytest
import torch
from torch import Tensor

from utils.encoding.conditioning import Batch, Cond
from utils.training.validation import quantiles, validation_loss

SIGMAS = quantiles(0.0, 1.0)


def make_samples(count: int, seed: int = 0) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    return [
        Batch(torch.randn(1, 4, 2, 4, 4, generator=generator), Cond(torch.randn(1, 3, 8, generator=generator)))
        for _ in range(count)
    ]


def zero(latents: Tensor, timestep: Tensor, cond: Cond) -> Tensor:
    return torch.zeros_like(latents)


def halve(latents: Tensor, timestep: Tensor, cond: Cond) -> Tensor:
    return latents / 2


def noises_of(samples: list[Batch], seed: int) -> list[Tensor]:
    """The noise that each sample is given, recovered from what the model is shown."""
    shown = []

    def spy(latents: Tensor, timestep: Tensor, cond: Cond) -> Tensor:
        shown.append((latents, timestep / 1000))
        return latents

    validation_loss(spy, samples, seed, SIGMAS)
    chosen = shown[len(SIGMAS) - 1 :: len(SIGMAS)]
    return [
        (latents - (1 - sigma) * sample.latents) / sigma
        for (latents, sigma), sample in zip(chosen, samples, strict=True)
    ]


def test_the_same_model_and_seed_give_the_same_loss():
    samples = make_samples(3)
    assert torch.equal(validation_loss(halve, samples, 5, SIGMAS), validation_loss(halve, samples, 5, SIGMAS))
    assert not torch.equal(validation_loss(halve, samples, 5, SIGMAS), validation_loss(halve, samples, 6, SIGMAS))


def test_the_loss_does_not_depend_on_the_random_state_of_the_training():
    losses = []
    for seed in (1, 2):
        torch.manual_seed(seed), random.seed(seed)
        losses.append(validation_loss(halve, make_samples(3), 5, SIGMAS))
    assert torch.equal(*losses)


def test_the_random_state_of_the_training_is_left_as_it_was():
    torch.manual_seed(4), random.seed(4)
    expected = torch.rand(3), random.random()
    torch.manual_seed(4), random.seed(4)
    validation_loss(halve, make_samples(3), 5, SIGMAS)
    assert torch.equal(torch.rand(3), expected[0]) and random.random() == expected[1]


def test_a_model_that_draws_random_numbers_does_not_move_the_noise():
    losses = [validation_loss(zero, make_samples(3), 5, SIGMAS)]

    def restless(latents: Tensor, timestep: Tensor, cond: Cond) -> Tensor:
        return 0 * torch.rand_like(latents)

    assert torch.equal(validation_loss(restless, make_samples(3), 5, SIGMAS), losses[0])


def test_every_sample_is_measured_at_the_same_fixed_sigmas():
    seen = []

    def spy(latents: Tensor, timestep: Tensor, cond: Cond) -> Tensor:
        seen.append(timestep.tolist())
        return latents

    losses = validation_loss(spy, make_samples(2), 5, SIGMAS)
    assert SIGMAS == (0.1, 0.3, 0.5, 0.7, 0.9) and losses.shape == (5,)
    assert seen == [[pytest.approx(1000 * sigma)] for sigma in SIGMAS] * 2


def test_the_noise_of_a_sample_does_not_depend_on_the_others():
    first, second = make_samples(2)
    alone, together = noises_of([first], 5), noises_of([first, second], 5)
    torch.testing.assert_close(alone[0], together[0])
    other = noises_of([make_samples(1, seed=9)[0], second], 5)
    torch.testing.assert_close(other[1], together[1], rtol=0, atol=1e-5)
    assert not torch.allclose(together[0], together[1])


def test_the_loss_is_the_mean_over_samples_of_the_squared_error_at_each_sigma():
    samples = make_samples(3)
    noises = noises_of(samples, 5)
    losses = validation_loss(halve, samples, 5, SIGMAS)
    for i, sigma in enumerate(SIGMAS):
        each = []
        for sample, noise in zip(samples, noises, strict=True):
            noisy = (1 - sigma) * sample.latents + sigma * noise
            each.append((noisy / 2 - (noise - sample.latents)).square().mean())
        assert losses[i].item() == pytest.approx(sum(each).item() / 3, rel=1e-5)


def test_a_model_that_knows_the_answer_has_no_loss():
    (sample,) = make_samples(1)
    noise = noises_of([sample], 5)[0]
    losses = validation_loss(lambda *_: noise - sample.latents, [sample], 5, SIGMAS)
    assert losses.max() < 1e-10


def test_no_gradient_is_kept():
    weight = torch.nn.Parameter(torch.ones(()))
    assert not validation_loss(lambda latents, *_: weight * latents, make_samples(1), 5, SIGMAS).requires_grad
