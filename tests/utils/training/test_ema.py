"""The average follows the parameters and never touches them."""

import pytest
import torch
from torch import nn

from utils.training.ema import Ema


def test_the_average_moves_by_its_decay_and_less_cautiously_at_the_start():
    parameter = nn.Parameter(torch.zeros(3))
    ema = Ema({"p": parameter}, decay=0.5)
    expected = torch.zeros(3)
    for step in range(1, 20):
        parameter.data.fill_(float(step))
        ema.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
        assert torch.allclose(ema.values["p"], expected)
        assert torch.equal(parameter, torch.full((3,), float(step)))


@pytest.mark.parametrize("change", [lambda p: p.data.fill_(9.0), lambda p: setattr(p, "data", torch.full((3,), 9.0))])
def test_the_average_is_a_copy(change):
    parameter = nn.Parameter(torch.zeros(3))
    ema = Ema({"p": parameter}, decay=0.5)
    change(parameter)
    assert torch.equal(ema.values["p"], torch.zeros(3))


def test_the_average_of_bf16_parameters_is_kept_in_fp32():
    """In bf16 it would stand still: each update adds less than it can hold."""
    parameter = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    ema = Ema({"p": parameter}, decay=0.999)
    parameter.data.fill_(2.0)
    expected = torch.ones(3)
    for step in range(10_000, 10_020):
        ema.update(step)
        expected = 0.999 * expected + 0.001 * 2
    assert ema.values["p"].dtype == torch.float32 and parameter.dtype == torch.bfloat16
    torch.testing.assert_close(ema.values["p"], expected, rtol=1e-5, atol=0)


def test_an_average_of_fp32_parameters_that_is_moved_in_parts_is_the_same(monkeypatch):
    parameters = {name: nn.Parameter(torch.rand(5)) for name in "abc"}
    whole, parts = (Ema(parameters, decay=0.9) for _ in range(2))
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.add_(1)
    whole.update(5)
    monkeypatch.setattr("utils.training.ema.in_parts", lambda tensors: (slice(n, n + 1) for n in range(len(tensors))))
    parts.update(5)
    assert all(torch.equal(whole.values[name], parts.values[name]) for name in parameters)
