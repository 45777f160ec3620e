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
