"""Distribution matching, on Gaussians whose scores are known, and the steps of a student."""

from functools import partial

import pytest
import torch
from torch import Tensor

from utils.diffusion.few_step import (
    distance_to_teacher,
    matching_gradient,
    matching_loss,
    noised_to_steps,
    own_steps,
    predict_latents,
    pure_noise,
    roll_out,
    step_sigmas,
    student_loss,
)
from utils.diffusion.flow import add_noise, latents_to_velocity
from wan.configs import FAMILIES
from wan.text2video import guided, part_at

MEANS = {"cond": torch.tensor([1.5, -0.5]), "uncond": torch.tensor([0.5, 0.5])}
DEVIATION = torch.tensor([0.3, 1.2])
GUIDANCE = 3.0
SHIFT = 3.0
STEPS = 1000


def on_channels(values: Tensor) -> Tensor:
    return values.view(1, -1, 1, 1, 1)


def gaussian(latents: Tensor, timestep: Tensor, cond: Tensor, deviation: Tensor = DEVIATION) -> Tensor:
    """The exact velocity for data of the mean `cond` and a deviation, by channel."""
    sigma = (timestep / 1000).view(-1, 1, 1, 1, 1)
    mean, variance = on_channels(cond), on_channels(deviation**2)
    total = (1 - sigma) ** 2 * variance + sigma**2
    clean = mean + (1 - sigma) * variance / total * (latents - (1 - sigma) * mean)
    return latents_to_velocity(latents, clean, timestep / 1000)


def teacher(latents: Tensor, timestep: Tensor, cond: Tensor, interval: tuple[float, float] = (0, 1)) -> Tensor:
    """Guided as sampling is; outside of its interval an expert's answer has nothing to do with the data."""
    answer = partial(gaussian, latents, timestep)
    inside = ((timestep / 1000 >= interval[0]) & (timestep / 1000 <= interval[1])).view(-1, 1, 1, 1, 1)
    return torch.where(inside, guided(answer, MEANS["cond"], MEANS["uncond"], GUIDANCE), -5.0)


def train(
    start: tuple[float, float], interval=(0.0, 1.0), taught=(0.0, 1.0), sign: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The mean and the deviation of a student x0 = mean + deviation * noise that has learned, its critic exact."""
    torch.manual_seed(0)
    mean = torch.full((2,), start[0], requires_grad=True)
    deviation = torch.full((2,), start[1], requires_grad=True)
    optimizer = torch.optim.Adam([mean, deviation], lr=0.05)
    rates = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, STEPS)
    for _ in range(STEPS):
        latents = on_channels(mean) + on_channels(deviation) * torch.randn(64, 2, 1, 1, 1)
        # The critic's condition is the student's own mean.
        predict = partial(teacher, interval=taught), partial(gaussian, deviation=deviation.detach())
        loss = student_loss(latents, *predict, mean.detach(), SHIFT, interval).loss
        optimizer.zero_grad()
        (sign * loss).backward()
        optimizer.step()
        rates.step()
    return mean.detach(), deviation.detach().abs()


WANTED = MEANS["uncond"] + GUIDANCE * (MEANS["cond"] - MEANS["uncond"])


@pytest.mark.parametrize("start", [(0.0, 1.0), (5.0, 0.1)])
@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.6, 1.0), (0.0, 0.8)])
def test_the_student_becomes_the_guided_distribution(start, interval):
    mean, deviation = train(start, interval, taught=interval)
    assert torch.allclose(mean, WANTED, atol=0.05) and torch.allclose(deviation, DEVIATION, atol=0.05)


def test_with_the_sign_flipped_it_does_not():
    mean, _ = train((0.0, 1.0), sign=-1.0)
    assert (mean - WANTED).abs().min() > 1


def test_with_noise_outside_of_the_teachers_interval_it_does_not():
    mean, deviation = train((0.0, 1.0), interval=(0.0, 1.0), taught=(0.8, 1.0))
    assert not (torch.allclose(mean, WANTED, atol=0.2) and torch.allclose(deviation, DEVIATION, atol=0.2))


# ------------------------------------------------------------------------------------------------- the gradient itself


def test_the_gradient_is_the_difference_of_the_estimates_by_the_distance_of_each_sample():
    latents, seen, other = torch.randn(3, 2, 4, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    distances = distance_to_teacher(latents, seen)
    found = matching_gradient(seen, other, distances)
    for index in range(2):
        distance = (latents[index] - seen[index]).abs().mean()
        torch.testing.assert_close(distances[index], distance)
        torch.testing.assert_close(found[index], (other[index] - seen[index]) / distance)
    assert matching_gradient(latents, latents, distance_to_teacher(latents, latents)).eq(0).all(), "not NaN"


def test_what_counts_nothing_does_not_change_the_gradient_of_the_rest():
    latents, seen, other = torch.randn(3, 2, 4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    weight = torch.ones(2, 3, 2, 2)
    weight[:, 0] = 0
    rough = seen.clone()
    rough[:, :, 0] *= 100

    def gradient(seen: Tensor, weight: Tensor | None) -> Tensor:
        return matching_gradient(seen, other, distance_to_teacher(latents, seen, weight))[:, :, 1:]

    assert torch.equal(gradient(seen, weight), gradient(rough, weight))
    assert not torch.equal(gradient(seen, weight), gradient(rough, None))


def test_the_loss_has_that_gradient():
    latents, gradient = torch.randn(2, 2, 4, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    latents.requires_grad_()
    matching_loss(latents, gradient).backward()
    torch.testing.assert_close(latents.grad, gradient / latents.numel())


def test_no_gradient_reaches_teacher_or_critic():
    weight = torch.nn.Parameter(torch.ones(()))
    latents = torch.randn(2, 2, 1, 1, 1, requires_grad=True)
    student_loss(latents, *[lambda x, t, cond: weight * x] * 2, None, SHIFT, (0.0, 1.0)).loss.backward()
    assert weight.grad is None and latents.grad is not None


@pytest.mark.parametrize("interval", [(0.9, 1.0), (0.0, 0.875)])
def test_teacher_and_critic_are_asked_at_the_same_noise_inside_of_the_interval(interval):
    asked: list[tuple[Tensor, Tensor]] = []

    def predict(latents: Tensor, timestep: Tensor, cond: str) -> Tensor:
        assert cond == "a fox"
        asked.append((latents, timestep))
        return latents * (len(asked) % 2)

    latents = torch.randn(200, 2, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    student_loss(latents, predict, predict, "a fox", SHIFT, interval)
    (first, levels), (second, same) = asked
    assert torch.equal(first, second) and torch.equal(levels, same)
    assert interval[0] * 1000 <= levels.min() and levels.max() <= interval[1] * 1000
    assert levels.max() - levels.min() > 0.9 * 1000 * (interval[1] - interval[0])


# ------------------------------------------------------------------------------------------------------------ the steps


@pytest.mark.parametrize(
    ("family", "high", "low"),
    [("wan2.2-i2v-A14B", [1000, 938], [833, 625]), ("wan2.2-t2v-A14B", [1000, 973, 923], [800])],
)
def test_steps_are_shifted_and_split_at_the_boundary(family, high, low):
    family = FAMILIES[family]
    sigmas = step_sigmas([1000, 750, 500, 250], family.shift)
    found = [own_steps(sigmas, expert.sigmas) for expert in family.experts]
    assert [[round(1000 * sigma) for sigma in own] for own in found] == [high, low] and sigmas[0] == 1
    assert step_sigmas([1000, 500], 1.0) == [1.0, 0.5]


@pytest.mark.parametrize(
    ("steps", "shift", "family"), [([1000, 600], 6.0, "wan2.2-i2v-A14B"), ([1000, 700], 3.0, "wan2.2-t2v-A14B")]
)
def test_a_step_at_the_boundary_is_of_the_expert_that_answers_there(steps, shift, family):
    family = FAMILIES[family]
    sigmas = step_sigmas(steps, shift)
    for number, expert in enumerate(family.experts):
        timesteps = [torch.tensor([sigma]) * 1000 for sigma in own_steps(sigmas, expert.sigmas)]
        assert all(part_at(family.boundaries, timestep) == number for timestep in timesteps)
    assert own_steps(sigmas, family.experts[0].sigmas) == sigmas and sigmas[1] == family.boundaries[0]


@pytest.mark.parametrize("shift", [0.01, 0.11, 0.15, 3.0, 12.0])
def test_the_first_step_is_pure_noise_whatever_the_shift(shift):
    assert step_sigmas([1000], shift) == [1.0]


def test_the_expert_above_answers_at_the_boundary_itself():
    assert own_steps([1.0, 0.9, 0.5], (0.9, 1.0)) == [1.0, 0.9] and own_steps([1.0, 0.9, 0.5], (0.0, 0.9)) == [0.5]


def test_clips_are_noised_to_the_steps_each_to_its_own():
    torch.manual_seed(0)
    clean, sigmas = torch.full((300, 1, 1, 1, 1), 2.0), [0.8, 0.5]
    noisy = noised_to_steps(clean, sigmas)
    assert set(noisy.sigma.tolist()) == set(torch.tensor(sigmas).tolist())
    assert 100 < (noisy.sigma == 0.5).sum() < 200
    expected = add_noise(clean, noisy.noise, noisy.sigma)
    assert torch.equal(noisy.latents, expected.latents) and noisy.noise.std() == pytest.approx(1, abs=0.1)


def test_a_student_rolls_out_to_a_step_by_predicting_and_adding_noise():
    torch.manual_seed(0)
    asked: list[Tensor] = []
    weight = torch.nn.Parameter(torch.ones(()))

    def student(latents: Tensor, timestep: Tensor, cond: str) -> Tensor:
        asked.append(timestep)
        return weight * latents_to_velocity(latents, torch.full_like(latents, float(len(asked))), timestep / 1000)

    noise = torch.randn(2, 1, 1, 1, 1)
    start = pure_noise(noise)
    first = roll_out(student, start, "a fox", [1.0, 0.8, 0.5], exit_at=0)
    assert not asked and torch.equal(first.latents, noise) and first.timestep.tolist() == [1000, 1000]
    last = roll_out(student, start, "a fox", [1.0, 0.8, 0.5], exit_at=2)
    assert [timestep.tolist() for timestep in asked] == [[1000, 1000], pytest.approx([800, 800])]
    torch.testing.assert_close(last.clean, torch.full_like(noise, 2.0))
    torch.testing.assert_close(last.latents, 0.5 * last.clean + 0.5 * last.noise)
    assert not torch.equal(last.noise, noise) and not last.latents.requires_grad
    assert predict_latents(student, last, "a fox").requires_grad
