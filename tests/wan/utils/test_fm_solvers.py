"""Solvers on the official noise grid."""

import numpy as np
import pytest
import torch

from utils.diffusion.few_step import step_sigmas
from wan.configs import FAMILIES
from wan.utils.fm_solvers import LCM, SOLVERS, few_step_grid, listed_grid, make_solver, sigma_grid

CPU = torch.device("cpu")


@pytest.mark.parametrize(("steps", "shift"), [(50, 5.0), (40, 3.0), (50, 16.0), (1, 5.0), (4, 1.0)])
def test_the_grid_has_the_official_values(steps, shift):
    expected = []
    for i in range(steps):
        s = 0.999 * (steps - i) / steps
        expected.append(shift * s / (1 + (shift - 1) * s))
    assert sigma_grid(steps, shift).tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("shift", [1.0, 5.0, 16.0])
def test_a_solver_steps_through_the_grid_shifted_once_and_ends_at_0(name, shift):
    solver = make_solver(name, 20, shift, CPU)
    grid = few_step_grid if name == LCM else sigma_grid
    np.testing.assert_allclose(solver.sigmas.numpy(), [*grid(20, shift), 0.0], atol=1e-6)
    assert len(solver.timesteps) == 20


def test_timesteps_are_truncated_for_unipc_and_exact_for_euler():
    grid = sigma_grid(50, 5.0) * 1000
    assert make_solver("unipc", 50, 5.0, CPU).timesteps.tolist() == [int(t) for t in grid]
    assert make_solver("unipc", 50, 5.0, CPU).timesteps[:2].tolist() == [999, 995]
    np.testing.assert_allclose(make_solver("euler", 50, 5.0, CPU).timesteps.numpy(), grid, rtol=1e-6)


def test_an_unknown_solver_is_refused_by_name():
    with pytest.raises(ValueError, match="unknown solver 'heun'; known: unipc, euler, lcm"):
        make_solver("heun", 20, 5.0, CPU)


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 12.0])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 6, 8])
def test_the_grid_of_few_steps_is_that_of_comfyui(steps, shift):
    """Its scheduler "simple", which takes entries of a table of 1000 noise levels, from the last one down."""
    t = torch.arange(1, 1001).double() / 1000
    table = shift * t / (1 + (shift - 1) * t)
    expected = [float(table[-(1 + int(x * (1000 / steps)))]) for x in range(steps)]
    assert few_step_grid(steps, shift).tolist() == pytest.approx(expected, rel=1e-12)


def test_few_steps_of_released_models():
    assert [round(1000 * sigma) for sigma in few_step_grid(4, 5.0)] == [1000, 938, 833, 625]
    assert [round(1000 * sigma) for sigma in few_step_grid(4, 12.0)] == [1000, 973, 923, 800]


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 12.0, 7.3])
@pytest.mark.parametrize("steps", [(1000,), (1000, 750, 500, 250), (1000, 937.5, 833.3, 625.0), (999, 1)])
def test_listed_steps_are_at_the_levels_that_a_model_was_distilled_at(steps, shift):
    assert listed_grid(steps, shift).tolist() == step_sigmas(steps, shift)
    solver = make_solver(LCM, len(steps), shift, CPU, timesteps=steps)
    assert torch.equal(solver.sigmas, torch.tensor([*step_sigmas(steps, shift), 0.0]))


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 12.0])
@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_even_steps_are_at_the_same_levels_whether_they_are_counted_or_listed(steps, shift):
    listed = [1000 - number * 1000 / steps for number in range(steps)]
    np.testing.assert_allclose(listed_grid(listed, shift), few_step_grid(steps, shift), atol=5e-10)


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.boundaries])
def test_a_listed_step_at_the_boundary_of_two_experts_is_exactly_there(name):
    (boundary,), shift = FAMILIES[name].boundaries, 5.0
    before_shift = 1000 * boundary / (shift - (shift - 1) * boundary)
    assert listed_grid([1000, before_shift], shift).tolist() == [1.0, boundary]


@pytest.mark.parametrize("name", sorted({*SOLVERS} - {LCM}))
def test_only_lcm_takes_a_list_of_steps(name):
    with pytest.raises(ValueError, match=f"{name} has steps of its own: only lcm takes a list of them"):
        make_solver(name, 2, 5.0, CPU, timesteps=(1000, 500))


def test_lcm_takes_what_the_model_sees_and_adds_noise_of_the_next_level():
    """As ComfyUI's sampler "lcm" with the noise of flow models: sigma * noise + (1 - sigma) * latents."""
    solver, generator = make_solver("lcm", 3, 5.0, CPU, seeds=(7,)), torch.Generator().manual_seed(7)
    shape, sigmas = (1, 4, 2, 3, 3), few_step_grid(3, 5.0)
    latents = torch.randn(shape, generator=generator)  # as sampling begins
    for number, timestep in enumerate(solver.timesteps):
        assert timestep.item() == pytest.approx(1000 * sigmas[number])
        seen = torch.full(shape, float(number))
        velocity = (latents - seen) / sigmas[number].astype(np.float32)
        (latents,) = solver.step(velocity, timestep, latents, return_dict=False)
        sigma = float(sigmas[number + 1]) if number < 2 else 0.0
        noise = torch.randn(shape, generator=generator) if number < 2 else 0.0
        torch.testing.assert_close(latents, sigma * noise + (1 - sigma) * seen)


def test_the_noise_of_lcm_depends_on_the_seeds_of_its_samples_alone():
    def run(*seeds: int) -> torch.Tensor:
        torch.randn(3)
        solver, latents = make_solver("lcm", 4, 5.0, CPU, seeds), torch.ones(len(seeds), 2, 1, 2, 2)
        before = torch.get_rng_state()
        for timestep in solver.timesteps[:3]:
            (latents,) = solver.step(latents, timestep, latents, return_dict=False)
        assert torch.equal(torch.get_rng_state(), before)
        return latents

    assert torch.equal(run(1), run(1)) and not torch.equal(run(1), run(2))
    assert torch.equal(run(2, 1), torch.cat([run(2), run(1)])), "whatever else is sampled"
