"""What an optimizer keeps is checked before it is restored."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from utils.common.errors import UserError
from utils.training.optimizer_state import check_kept, layout_of, numbers_of
from utils.training.optimizers import OptimizerSpec, groups_of, make_optimizer

NAMES = ("blocks.0.ffn.0.lora_A.default.weight", "blocks.0.ffn.0.lora_B.default.weight")


def spec_of(name: str) -> OptimizerSpec:
    return OptimizerSpec(1.0, 0.0, "constant", 0, 10, name)


def kept(optimizer: str, name: str, start: Tensor) -> dict[str, object]:
    """What an optimizer keeps of a parameter after an update."""
    parameter, spec = nn.Parameter(start.clone()), spec_of(optimizer)
    parameter.grad = torch.full_like(parameter, 0.1)
    made = make_optimizer(groups_of({name: parameter}, spec), spec)
    made.step()
    return dict(made.state[parameter])


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "prodigy", "schedulefree", "adafactor"])
@pytest.mark.parametrize("name", NAMES)
def test_the_layout_is_that_of_an_update(optimizer, name):
    start = torch.rand(8, 4)
    state, layout = kept(optimizer, name, start), layout_of(name, start, spec_of(optimizer))
    check_kept(name, state, layout.state)
    assert layout.nbytes == sum(value.nbytes for value in state.values() if isinstance(value, Tensor) and value.ndim)


def test_prodigy_keeps_a_single_zero_of_zeros():
    state, layout = (
        kept("prodigy", NAMES[1], torch.zeros(8, 4)),
        layout_of(NAMES[1], torch.ones(8, 4), spec_of("prodigy")),
    )
    of_zeros = layout_of(NAMES[1], torch.ones(8, 4), spec_of("prodigy"), start=0.0)
    assert state["p0"].shape == of_zeros.state["p0"].shape == () and layout.nbytes - of_zeros.nbytes == 4 * 8 * 4
    check_kept(NAMES[1], state, layout.state)
    for damaged in ({"s": torch.zeros(())}, {"p0": torch.tensor(5.0)}):
        with pytest.raises(UserError, match="another shape"):
            check_kept(NAMES[1], state | damaged, layout.state)


DAMAGE: dict[str, Callable[[Tensor], object]] = {
    "not finite": lambda value: value * math.nan,
    "negative": lambda value: -value - 1,
    "a number": float,
    "of another shape": lambda value: value[:1],
    "of another dtype": lambda value: value.half(),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_damaged_is_refused(damage):
    name, start = NAMES[0], torch.ones(8, 4)
    state, layout = kept("adamw", name, start), layout_of(name, start, spec_of("adamw"))
    changed = 1.0 if damage == "a number" else DAMAGE[damage](state["exp_avg_sq"])
    with pytest.raises(UserError, match=f"exp_avg_sq of {name} (has another shape or dtype|is not finite or negative)"):
        check_kept(name, state | {"exp_avg_sq": changed}, layout.state)


@pytest.mark.parametrize("step", [-1, math.nan, torch.ones(()), "three"])
def test_a_counter_is_a_number_of_at_least_0(step):
    name, start = NAMES[0], torch.ones(8, 4)
    state, layout = kept("adafactor", name, start), layout_of(name, start, spec_of("adafactor"))
    with pytest.raises(UserError, match="step of"):
        check_kept(name, state | {"step": step}, layout.state)


def test_groups_remember_numbers_that_do_not_follow_from_options():
    group = {"params": [], "lr": 1.0, "initial_lr": 1.0, "weight_decay": 0.1, "d": 0.5, "k": 3, "betas": (0.9, 0.99)}
    assert numbers_of(group | {"growth_rate": math.inf, "train_mode": True}) == {"d": 0.5, "k": 3, "train_mode": True}
