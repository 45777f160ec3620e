"""Inside the scope random numbers follow its seed; the random states outside are unchanged."""

import random

import pytest
import torch

from utils.common.temp_rng import temp_rng


def draw() -> tuple[float, float]:
    return random.random(), torch.rand(()).item()


def seed_all(seed: int) -> None:
    random.seed(seed)
    torch.manual_seed(seed)


def test_the_scope_depends_only_on_its_seed():
    draws = []
    for outer, seed in ((1, 7), (2, 7), (1, 8)):
        seed_all(outer)
        with temp_rng(seed):
            draws.append(draw())
    assert draws[0] == draws[1] != draws[2]


def test_the_states_outside_continue_unchanged():
    seed_all(3)
    expected = [draw(), draw()]
    seed_all(3)
    first = draw()
    with temp_rng(9):
        draw()
    assert [first, draw()] == expected


def test_the_states_are_restored_on_an_exception_too():
    seed_all(3)
    expected = draw()
    seed_all(3)
    with pytest.raises(ZeroDivisionError), temp_rng(9):
        draw()
        raise ZeroDivisionError
    assert draw() == expected


def test_scopes_can_be_nested():
    with temp_rng(1):
        expected = [draw(), draw()]
    with temp_rng(1):
        first = draw()
        with temp_rng(2):
            draw()
        assert [first, draw()] == expected
