"""The schedules have their exact values, and an update is AdamW's, or nothing."""

import copy
import math
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from utils.common.errors import UserError
from utils.common.options import option, parse_options
from utils.training.optim import (
    SCHEDULES,
    Optimization,
    OptimizerSpec,
    ParameterGroup,
    Updater,
    learning_rate_factor,
    with_epochs,
)


def make_spec(**changes) -> OptimizerSpec:
    values = {"learning_rate": 0.01, "weight_decay": 0.1, "schedule": "constant", "warmup_steps": 0, "total_steps": 10}
    return OptimizerSpec(**values | changes)


def make_parameters(seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((4, 3), (5,), (2, 2, 2))]


def make_updater(**changes) -> Updater:
    parameters = {f"p{index}": parameter for index, parameter in enumerate(make_parameters())}
    return Updater([ParameterGroup(parameters)], make_spec(**changes))


def give_gradients(parameters: list[nn.Parameter], seed: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.grad = scale * torch.randn(parameter.shape, generator=generator)


def state_of(updater: Updater) -> list[torch.Tensor]:
    """Parameters, moments and step counts."""
    tensors = [parameter.detach().clone() for parameter in updater.parameters]
    for parameter in updater.parameters:
        state = updater.optimizer.state[parameter]
        tensors += [state[name].clone() for name in ("exp_avg", "exp_avg_sq", "step")]
    return tensors


@dataclass(frozen=True)
class RunOptions(Optimization):
    seed: int = option(42, "seed")


def test_epochs_become_steps_of_the_same_options():
    opts = parse_options(RunOptions, ["--epochs", "3", "--seed", "7", "--lr_warmup_steps", "11"])
    assert with_epochs(opts, steps_per_epoch=4) == RunOptions(max_train_steps=12, seed=7, lr_warmup_steps=11)
    assert with_epochs(opts, 4).optimizer_spec.total_steps == 12
    plain = RunOptions(max_train_steps=5)
    assert with_epochs(plain, 4) is plain


def test_a_run_has_one_length():
    with pytest.raises(UserError, match="--epochs and --max_train_steps both"):
        parse_options(RunOptions, ["--epochs", "3", "--max_train_steps", "12"]).check_length()


def test_a_warm_up_ends_before_the_run_whether_steps_or_epochs_are_given():
    with pytest.raises(UserError, match="--lr_warmup_steps 12 must be below the 12 steps"):
        RunOptions(max_train_steps=12, lr_warmup_steps=12).check_warmup()
    long = RunOptions(epochs=600, lr_warmup_steps=1500)
    long.check_warmup()  # how many steps they are is not known yet
    assert with_epochs(long, 3).max_train_steps == 1800
    with pytest.raises(UserError, match="--lr_warmup_steps 1500 must be below the 1200 steps"):
        with_epochs(long, 2).check_warmup()


def test_the_warm_up_rises_linearly_and_ends_at_the_full_rate():
    spec = make_spec(warmup_steps=3)
    assert [learning_rate_factor(step, spec) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [1.0, 0.75, 0.5, 0.25, 0.0]),
        ("cosine", [1.0, 0.5 + 0.25 * math.sqrt(2), 0.5, 0.5 - 0.25 * math.sqrt(2), 0.0]),
    ],
)
def test_a_schedule_has_its_exact_values_after_the_warm_up(schedule, expected):
    spec = make_spec(schedule=schedule, warmup_steps=2, total_steps=10)
    assert [learning_rate_factor(step, spec) for step in (2, 4, 6, 8, 10)] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("warmup", [0, 1, 9, 10, 20])
def test_every_step_of_a_run_has_a_rate_between_0_and_1(schedule, warmup):
    spec = make_spec(schedule=schedule, warmup_steps=warmup)
    assert all(0 < learning_rate_factor(step, spec) <= 1 for step in range(spec.total_steps))


def test_the_learning_rate_is_the_one_of_the_next_update():
    updater = make_updater(schedule="linear", warmup_steps=1, total_steps=5)
    rates = []
    for _ in range(5):
        rates.append(updater.learning_rate)
        give_gradients(updater.parameters, seed=0)
        updater.step(0.0)
    assert rates == pytest.approx([0.005, 0.01, 0.0075, 0.005, 0.0025])


def test_updates_equal_those_of_plain_adamw():
    updater, reference = make_updater(), make_parameters()
    plain = torch.optim.AdamW(reference, lr=0.01, weight_decay=0.1, foreach=False, fused=False)
    for step in range(5):
        give_gradients(updater.parameters, seed=step)
        give_gradients(reference, seed=step)
        updater.step(0.0)
        plain.step()
    for ours, theirs in zip(updater.parameters, reference, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_clipping_equals_that_of_torch(max_norm):
    updater, reference = make_updater(), make_parameters()
    plain = torch.optim.AdamW(reference, lr=0.01, weight_decay=0.1, fused=True)
    for step, scale in enumerate((1.0, 100.0, 0.01)):
        give_gradients(updater.parameters, step, scale)
        give_gradients(reference, step, scale)
        norm = updater.step(max_norm)
        assert torch.equal(norm, nn.utils.clip_grad_norm_(reference, max_norm))
        plain.step()
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(updater.parameters, reference, strict=True))


def test_a_maximum_of_0_does_not_clip():
    clipped, free = make_updater(), make_updater()
    for step, scale in enumerate((1.0, 100.0)):
        give_gradients(clipped.parameters, step, scale)
        give_gradients(free.parameters, step, scale)
        assert torch.equal(free.step(0.0), clipped.step(1.0))
    assert not torch.equal(free.optimizer.state[free.parameters[0]]["exp_avg"],
                           clipped.optimizer.state[clipped.parameters[0]]["exp_avg"])  # fmt: skip


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("max_norm", [0.0, 1.0])
def test_a_gradient_that_is_not_finite_leaves_parameters_and_moments_untouched(bad, max_norm):
    updater = make_updater()
    give_gradients(updater.parameters, seed=0)
    updater.step(max_norm)
    before = state_of(updater)
    give_gradients(updater.parameters, seed=1)
    updater.parameters[1].grad[2] = bad
    assert not updater.step(max_norm).isfinite()
    assert all(torch.equal(old, new) for old, new in zip(before, state_of(updater), strict=True))
    assert all(parameter.grad is None for parameter in updater.parameters)


def test_after_a_skipped_update_training_continues_as_if_it_had_not_been():
    updater = make_updater()
    give_gradients(updater.parameters, seed=0)
    updater.step(1.0)
    twin = copy.deepcopy(updater.parameters), copy.deepcopy(updater.optimizer.state_dict())
    give_gradients(updater.parameters, seed=1, scale=math.nan)
    updater.step(1.0)
    give_gradients(updater.parameters, seed=2)
    updater.step(0.0)

    parameters, state = twin
    reference = torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1, fused=True)
    reference.load_state_dict(state)
    give_gradients(parameters, seed=2)
    reference.step()
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(updater.parameters, parameters, strict=True))


def test_a_first_step_that_is_not_finite_is_survived():
    updater = make_updater()
    give_gradients(updater.parameters, seed=0, scale=math.nan)
    updater.step(1.0)
    assert all(torch.equal(ours, fresh) for ours, fresh in zip(updater.parameters, make_parameters(), strict=True))


def test_a_parameter_without_a_gradient_stays_and_gradients_are_cleared():
    updater = make_updater()
    give_gradients(updater.parameters, seed=0)
    updater.parameters[2].grad = None
    updater.step(1.0)
    assert torch.equal(updater.parameters[2], make_parameters()[2])
    assert not torch.equal(updater.parameters[0], make_parameters()[0])
    assert all(parameter.grad is None for parameter in updater.parameters)


def test_a_group_learns_at_its_share_of_the_base_rate_also_after_a_restore():
    first, second = make_parameters()[:2]
    groups = [ParameterGroup({"a": first}), ParameterGroup({"b": second}, lr_scale=0.1)]
    updater = Updater(groups, make_spec(warmup_steps=1))
    assert [group["lr"] for group in updater.optimizer.param_groups] == pytest.approx([0.005, 0.0005])
    give_gradients(updater.parameters, seed=0)
    updater.step(0.0)
    again = Updater(groups, make_spec(warmup_steps=1))
    again.load_state_dict(updater.state_dict())
    assert [group["lr"] for group in again.optimizer.param_groups] == pytest.approx([0.01, 0.001])
    assert again.schedule.get_last_lr() == pytest.approx([0.01, 0.001])


def test_every_update_counts_as_a_change_of_the_parameters_also_a_skipped_one():
    """By their versions, copies of parameters in another dtype are known to be old."""
    updater = make_updater()
    for scale in (1.0, math.inf, 1.0):
        versions = [parameter._version for parameter in updater.parameters]
        give_gradients(updater.parameters, 0, scale)
        updater.step(max_grad_norm=1.0)
        assert all(p._version > version for p, version in zip(updater.parameters, versions, strict=True))
