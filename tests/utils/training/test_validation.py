"""The validation loss is the same ruler for every run."""

import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from utils.encoding.conditioning import Batch, Cond
from utils.training.validation import hold_share, quantiles, validation_loss

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


def test_an_expert_is_measured_at_five_quantiles_of_its_own_interval():
    assert quantiles(0.9, 1.0) == pytest.approx((0.91, 0.93, 0.95, 0.97, 0.99))
    assert quantiles(0.0, 0.9) == pytest.approx((0.09, 0.27, 0.45, 0.63, 0.81))
    assert quantiles(0.0, 1.0) == (0.1, 0.3, 0.5, 0.7, 0.9)  # exactly, as the losses of earlier runs


# ------------------------------------------------------------------------------------------------- given first frames


def held_samples(count: int) -> list[Batch]:
    return [replace(each, cond=replace(each.cond, first=torch.ones(1, 4, 1, 4, 4))) for each in make_samples(count)]


def modes(clips: list[Batch]) -> str:
    return "".join("-x"[int(clip.cond.held.item())] for clip in clips)


@pytest.mark.parametrize(
    ("count", "share", "expected"),
    [
        (4, 0.5, "-x-x"), (5, 0.5, "-x-x-"), (1, 0.5, "-x"), (1, 0.0, "-"), (1, 1.0, "x"),
        (4, 0.0, "----"), (4, 1.0, "xxxx"), (4, 0.25, "---x"),
        (10, 0.3, "---x--x--x"), (3, 0.75, "-xx"), (0, 0.5, ""),
    ],
)  # fmt: skip
def test_a_share_of_the_clips_evenly_spread_is_given_its_first_frame(count, share, expected):
    clips = hold_share(held_samples(count), share)
    assert modes(clips) == expected
    assert all(clip.cond.held.dtype == torch.bool and clip.cond.held.shape == (1,) for clip in clips)


def test_clips_without_a_first_frame_that_could_be_given_stay_as_they_are():
    clips, mixed = make_samples(2), [*held_samples(1), *make_samples(1)]
    assert all(one is other for one, other in zip(hold_share(clips, 1.0), clips, strict=True))
    assert [clip.cond.held is None for clip in hold_share(mixed, 1.0)] == [False, True]


def test_a_given_first_frame_is_not_measured_and_one_that_is_not_given_is():
    (sample,) = held_samples(1)

    def perfect_but_for_the_first(latents: Tensor, timestep: Tensor, cond: Cond) -> Tensor:
        velocity = (latents - sample.latents) / (timestep / 1000).view(-1, 1, 1, 1, 1)
        velocity[:, :, 0] += 2
        return velocity

    given, free = (hold_share([sample], share) for share in (1.0, 0.0))
    assert validation_loss(perfect_but_for_the_first, given, 5, SIGMAS).max() < 1e-6
    losses = validation_loss(perfect_but_for_the_first, free, 5, SIGMAS)
    torch.testing.assert_close(losses, torch.full((5,), 4 / 2), rtol=1e-4, atol=1e-4)  # one of two latent frames
