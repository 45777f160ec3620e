"""Sampling: the way from noise to latents, its guidance, and the settings of both."""

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from torch import Tensor

from wan.text2video import Sampler, guided, part_at, sample
from wan.utils.fm_solvers import LCM, SOLVERS, make_solver, sigma_grid

CPU = torch.device("cpu")
SHAPE = (2, 4, 3, 4, 6)
EXACT = [name for name in SOLVERS if name != LCM]  # solvers that follow the flow, and add no noise


def draw(seed: int) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def curved(latents: Tensor, timestep: Tensor) -> Tensor:
    """A velocity that depends on place and time, smooth like a model's."""
    return torch.tanh(latents.roll(1, dims=1)) + latents * (timestep / 1000).view(-1, 1, 1, 1, 1)


# ------------------------------------------------------------------------------------------------------ the trajectory


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize(("steps", "shift"), [(1, 5.0), (2, 5.0), (20, 3.0), (50, 16.0), (100, 16.0)])
def test_on_a_straight_flow_a_solver_lands_on_the_clean_latents(name, steps, shift):
    clean, noise = draw(0), draw(1)
    solver = make_solver(name, steps, shift, CPU)
    sigma = solver.sigmas[0]
    start = (1 - sigma) * clean + sigma * noise
    result = sample(lambda latents, timestep: noise - clean, start, solver)
    assert (result - clean).abs().max() <= 1e-4


@pytest.mark.parametrize("name", EXACT)
def test_more_steps_come_closer_to_the_true_end_of_a_curved_flow(name):
    true = sample(curved, draw(1), make_solver("euler", 2000, 5.0, CPU))
    errors = [(sample(curved, draw(1), make_solver(name, steps, 5.0, CPU)) - true).abs().max() for steps in (10, 40)]
    assert errors[1] < errors[0] / 2


def test_unipc_is_of_higher_order_than_euler():
    true = sample(curved, draw(1), make_solver("euler", 2000, 5.0, CPU))
    unipc, euler = (sample(curved, draw(1), make_solver(name, 20, 5.0, CPU)) - true for name in EXACT)
    assert unipc.abs().max() < euler.abs().max() / 2


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("steps", [50, 100])
def test_at_shift_16_every_step_has_its_own_sigma_even_where_timesteps_repeat(name, steps):
    solver, sigmas = make_solver(name, steps, 16.0, CPU), []
    repeats = len(solver.timesteps) - len(set(solver.timesteps.tolist()))
    assert (repeats > 0) == (name == "unipc" and steps == 100)

    def spy(latents: Tensor, timestep: Tensor) -> Tensor:
        sigmas.append(solver.sigmas[solver.step_index or 0].item())
        return curved(latents, timestep)

    assert sample(spy, draw(1), solver).isfinite().all()
    np.testing.assert_allclose(sigmas, sigma_grid(steps, 16.0), atol=1e-6)


@pytest.mark.parametrize("name", EXACT)
def test_sampling_equals_the_loop_that_diffusers_runs(name):
    if name == "unipc":
        theirs = UniPCMultistepScheduler(
            solver_order=2, solver_type="bh2", predict_x0=True, prediction_type="flow_prediction",
            use_flow_sigmas=True, flow_shift=1.0, final_sigmas_type="zero", lower_order_final=True,
        )  # fmt: skip
    else:
        theirs = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.0)
    theirs.set_timesteps(sigmas=sigma_grid(12, 3.0))
    latents = draw(1)
    for t in theirs.timesteps:
        latents = theirs.step(curved(latents, t.expand(len(latents))), t, latents).prev_sample
    assert torch.equal(sample(curved, draw(1), make_solver(name, 12, 3.0, CPU)), latents)


def test_the_model_sees_the_solvers_timestep_for_each_sample():
    solver, seen = make_solver("unipc", 5, 5.0, CPU), []
    sample(lambda latents, timestep: seen.append(timestep) or latents, draw(1), solver)
    assert all(timestep.shape == (2,) for timestep in seen)
    assert [timestep[0].item() for timestep in seen] == [timestep[1].item() for timestep in seen]
    assert [timestep[0].item() for timestep in seen] == solver.timesteps.tolist()


def test_sampling_keeps_the_noise_and_lets_progress_watch_every_step():
    noise, before, watched = draw(1), draw(1), []

    def progress(timesteps: Tensor):
        for timestep in timesteps:
            watched.append(timestep)
            yield timestep

    result = sample(curved, noise, make_solver("unipc", 7, 5.0, CPU), progress)
    assert torch.equal(noise, before) and len(watched) == 7
    assert result.shape == SHAPE and result.dtype == torch.float32


# ---------------------------------------------------------------------------------------------------------- guidance


def test_guidance_moves_away_from_the_unconditional_answer():
    cond, uncond = draw(2), draw(3)
    answer = {"yes": cond, "no": uncond}.__getitem__
    torch.testing.assert_close(guided(answer, "yes", "no", 5.0), 5.0 * cond - 4.0 * uncond, rtol=1e-5, atol=1e-5)
    assert torch.equal(guided(answer, "yes", "no", 0.0), uncond)


@pytest.mark.parametrize(("guidance", "asked"), [(1.0, ["yes"]), (5.0, ["no", "yes"])])
def test_guidance_1_asks_once_and_any_other_twice(guidance, asked):
    questions = []
    guided(lambda cond: questions.append(cond) or draw(1), "yes", "no", guidance)
    assert questions == asked


def test_each_expert_has_its_own_guidance_and_answers_at_its_boundary():
    sampler = Sampler("unipc", 40, (4.0, 3.0), 12.0, boundaries=(0.875,))
    steps = make_solver("unipc", 40, 12.0, CPU).timesteps
    assert [sampler.guidance_at(step[None]) for step in steps] == [4.0] * 26 + [3.0] * 14
    assert [part_at((0.875,), torch.tensor([t])) for t in (1000, 875.0, 874.99, 0)] == [0, 0, 1, 1]
    assert sum(part_at((0.9,), step[None]) == 0 for step in make_solver("unipc", 40, 5.0, CPU).timesteps) == 15


def test_one_guidance_may_serve_all_experts():
    sampler = Sampler("unipc", 40, (2.0,), 12.0, boundaries=(0.875,))
    assert {sampler.guidance_at(torch.tensor([t])) for t in (1000, 0)} == {2.0} and sampler.is_guided
    assert not Sampler("unipc", 40, (1.0, 1.0), 12.0, boundaries=(0.875,)).is_guided


# ---------------------------------------------------------------------------------------------------------- settings


class Model:
    """Predicts a velocity that depends on the condition, a word, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[float, float]] = []
        self.with_gradient = False

    def __call__(self, latents: Tensor, timestep: Tensor, word: float) -> Tensor:
        self.asked.append((timestep[0].item(), word))
        self.with_gradient |= torch.is_grad_enabled()
        return word * torch.ones_like(latents) + latents


def test_guidance_asks_twice_a_step_and_leads_away_from_the_unconditional_condition():
    plain, guided = Model(), Model()
    once = Sampler("euler", 3, (1.0,), 5.0).denoise(plain, draw(1), 1.0, None)
    away = Sampler("euler", 3, (4.0,), 5.0).denoise(guided, draw(1), 1.0, 0.5)
    assert [word for _, word in plain.asked] == [1.0] * 3
    assert [word for _, word in guided.asked] == [0.5, 1.0] * 3
    # The answer moves with the word, so guidance 4 answers as to the word 0.5 + 4 * (1 - 0.5).
    other = Sampler("euler", 3, (1.0,), 5.0).denoise(Model(), draw(1), 0.5 + 4 * 0.5, None)
    assert torch.allclose(away, other, atol=1e-4) and not torch.allclose(away, once, atol=1e-2)


def test_without_an_unconditional_condition_or_at_guidance_1_a_step_asks_once():
    for guidance, uncond in ((4.0, None), (1.0, 0.5)):
        model = Model()
        Sampler("unipc", 3, (guidance,), 5.0).denoise(model, draw(1), 1.0, uncond)
        assert [word for _, word in model.asked] == [1.0] * 3 and not model.with_gradient


def test_the_shift_moves_the_steps_towards_noise():
    low, high = Model(), Model()
    for model, shift in ((low, 1.0), (high, 8.0)):
        Sampler("unipc", 4, (1.0,), shift).denoise(model, draw(1), 1.0, None)
    assert len(low.asked) == len(high.asked) == 4
    assert all(more > less for (more, _), (less, _) in list(zip(high.asked, low.asked, strict=True))[1:])


def test_the_seed_is_that_of_the_noise_between_steps():
    first, again, other = (
        Sampler("lcm", 4, (1.0,), 5.0, seeds=(seed, 9)).denoise(Model(), draw(1), 1.0, None) for seed in (3, 3, 4)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_listed_steps_are_those_that_the_model_is_asked_at():
    model = Model()
    Sampler("lcm", 3, (1.0,), 5.0, timesteps=(1000, 600, 100)).denoise(model, draw(1), 1.0, None)
    assert [timestep for timestep, _ in model.asked] == pytest.approx([1000, 1000 * 3 / 3.4, 1000 * 0.5 / 1.4])


def test_a_list_has_as_many_entries_as_there_are_steps():
    with pytest.raises(ValueError, match="4 steps cannot be at 2 timesteps"):
        Sampler("lcm", 4, (1.0,), 5.0, timesteps=(1000, 500))


def test_settings_say_what_they_are():
    assert str(Sampler("lcm", 4, (1.0,), 5.0)) == "4 steps of lcm, guidance 1, shift 5"
    assert str(Sampler("unipc", 1, (4.0, 3.5), 12.0)) == "1 step of unipc, guidance 4 and 3.5, shift 12"
