"""What the model should have answered, and how far off it was."""

import pytest
import torch

from utils.diffusion.flow import Noisy, add_noise
from utils.diffusion.objectives import Loss, guided_target, squared_error, sum_losses


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


def test_a_weight_makes_it_a_weighted_mean_over_positions():
    velocity = torch.stack([torch.full((1, 2, 2), 3.0), torch.full((1, 2, 2), 1.0)])[None]  # two channels
    weight = torch.tensor([1.0, 0.0, 0.0, 3.0]).view(1, 1, 2, 2)
    velocity[..., 1, 1] = 0.0
    assert squared_error(velocity, torch.zeros_like(velocity), weight).item() == (1 * (9 + 1) / 2 + 3 * 0) / 4


# ------------------------------------------------------------------------------------------------------------- losses


def numbers(loss: Loss) -> tuple[float, float | None, dict[str, float]]:
    limit = None if loss.limit is None else loss.limit.item()
    return loss.value.item(), limit, {name: value.item() for name, value in loss.watched.items()}


def scalar_loss(value: float, limit: float | None, **watched: float) -> Loss:
    tensors = {name: torch.tensor(each) for name, each in watched.items()}
    return Loss(torch.tensor(value), None if limit is None else torch.tensor(limit), tensors)


def test_the_parts_of_a_loss_are_divided_and_summed_together():
    """The mean over accumulated batches: of the loss, of its limit, and of what is watched."""
    parts = [scalar_loss(4.0, 8.0, distance=1.0), scalar_loss(2.0, 6.0, distance=3.0)]
    assert numbers(sum_losses([part / 2 for part in parts])) == (3.0, 7.0, {"distance": 2.0})
    assert numbers(sum_losses(parts[:1])) == (4.0, 8.0, {"distance": 1.0})
    assert numbers(parts[0] / 4) == (1.0, 2.0, {"distance": 0.25})


def test_a_loss_without_a_limit_stays_without_one():
    assert numbers(sum_losses([scalar_loss(1.0, None)] * 3)) == (3.0, None, {})
    assert numbers(scalar_loss(1.0, None) / 2) == (0.5, None, {})


def test_a_detached_loss_holds_on_to_no_graph_in_any_part():
    weight = torch.nn.Parameter(torch.tensor(2.0))
    loss = Loss(weight * 2, weight * 3, {"distance": weight * 4})
    found = (loss / 2).detach()
    parts = [found.value, found.limit, *found.watched.values()]
    assert numbers(found) == (2.0, 3.0, {"distance": 4.0}) and not any(part.requires_grad for part in parts)
    loss.value.backward()
    assert weight.grad == 2
