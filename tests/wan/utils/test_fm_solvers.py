"""Solvers on the official noise grid."""

import numpy as np
import pytest
import torch

from wan.utils.fm_solvers import SOLVERS, make_solver, sigma_grid

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
    np.testing.assert_allclose(solver.sigmas.numpy(), [*sigma_grid(20, shift), 0.0], atol=1e-6)
    assert len(solver.timesteps) == 20


def test_timesteps_are_truncated_for_unipc_and_exact_for_euler():
    grid = sigma_grid(50, 5.0) * 1000
    assert make_solver("unipc", 50, 5.0, CPU).timesteps.tolist() == [int(t) for t in grid]
    assert make_solver("unipc", 50, 5.0, CPU).timesteps[:2].tolist() == [999, 995]
    np.testing.assert_allclose(make_solver("euler", 50, 5.0, CPU).timesteps.numpy(), grid, rtol=1e-6)


def test_an_unknown_solver_is_refused_by_name():
    with pytest.raises(ValueError, match="unknown solver 'heun'; known: unipc, euler"):
        make_solver("heun", 20, 5.0, CPU)
