"""AdamW with compensation is AdamW in fp32 to 16 bits, where plain bf16 stands still."""

import copy
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from utils.common.errors import UserError
from utils.training import kahan
from utils.training.kahan import KahanAdamW
from utils.training.optim import Updater
from utils.training.optimizers import OptimizerSpec, ParameterGroup

FP32, BF16 = torch.float32, torch.bfloat16
SHAPES = ((4, 3), (5,), (2, 2, 2))
SPEC = OptimizerSpec(1e-3, 0.1, "linear", 2, 400)
SETTINGS = {"lr": 1e-3, "weight_decay": 0.1}


def drawn(seed: int, dtype: torch.dtype = BF16, shapes: tuple[tuple[int, ...], ...] = SHAPES) -> list[Tensor]:
    """The same values for every dtype: those that bf16 can hold."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(BF16).to(dtype) for shape in shapes]


def parameters_of(dtype: torch.dtype = BF16) -> list[nn.Parameter]:
    return [nn.Parameter(value) for value in drawn(0, dtype)]


def updater_of(spec: OptimizerSpec = SPEC, dtype: torch.dtype = BF16) -> Updater:
    named = {f"p{index}": parameter for index, parameter in enumerate(parameters_of(dtype))}
    return Updater([ParameterGroup(named)], spec)


def give_gradients(parameters: list[nn.Parameter], seed: int) -> None:
    for parameter, gradient in zip(parameters, drawn(seed, parameters[0].dtype), strict=True):
        parameter.grad = gradient


def take_steps(updater: Updater, seeds: range) -> None:
    for seed in seeds:
        give_gradients(updater.parameters, seed)
        updater.step(1.0)


def numbers_of(updater: Updater) -> list[Tensor]:
    """Copies of the parameters and all that is kept beside them."""
    states = [updater.optimizer.state[p][name] for p in updater.parameters for name in updater.optimizer.state[p]]
    return [tensor.detach().clone() for tensor in (*updater.parameters, *states)]


def bits(tensors: list[Tensor]) -> list[tuple[torch.dtype, list[int]]]:
    """The bytes: also of -0, which equals 0."""
    return [(tensor.dtype, tensor.reshape(-1).view(torch.uint8).tolist()) for tensor in tensors]


def values_of(optimizer: Optimizer, parameters: list[nn.Parameter]) -> Tensor:
    """What the parameters stand for, with what they cannot hold."""
    rests = [optimizer.state[p].get("compensation", torch.zeros(())) for p in parameters]
    return torch.cat([(p.detach().double() + rest).flatten() for p, rest in zip(parameters, rests, strict=True)])


# --------------------------------------------------------------------------------------------------------- the numbers


def test_a_value_of_1_moves_by_small_updates_with_compensation_and_not_without():
    moved = []
    for optimizer in (KahanAdamW, lambda p, **how: AdamW(p, fused=True, **how)):
        parameter = nn.Parameter(torch.ones(3, dtype=BF16))
        adamw = optimizer([parameter], lr=1e-4, weight_decay=0.0)
        for _ in range(100):
            parameter.grad = torch.ones_like(parameter)
            adamw.step()
        moved.append(values_of(adamw, [parameter]))
    assert torch.allclose(moved[0], torch.full((3,), 1 - 0.01, dtype=torch.float64), atol=2e-4)
    assert torch.equal(moved[1], torch.ones(3, dtype=torch.float64))


def on_a_quadratic(parameter: nn.Parameter, target: Tensor, _step: int) -> Tensor:
    return (parameter.detach() - target).to(parameter.dtype)


def at_random(parameter: nn.Parameter, target: Tensor, step: int) -> Tensor:
    noise = torch.randn(target.shape, generator=torch.Generator().manual_seed(step))
    return (target + 3 * noise).to(BF16).to(parameter.dtype)


def trained(dtype: torch.dtype, gradient: Callable, make: Callable[..., Optimizer]) -> Tensor:
    parameters = [nn.Parameter(value) for value in drawn(0, dtype, ((40, 30),))]
    (target,) = drawn(1, FP32, ((40, 30),))
    optimizer = make(parameters, **SETTINGS)
    for step in range(200):
        for parameter in parameters:
            parameter.grad = gradient(parameter, target, step)
        optimizer.step()
    return values_of(optimizer, parameters)


def fused(parameters: list[nn.Parameter], **settings: float) -> AdamW:
    return AdamW(parameters, fused=True, **settings)


@pytest.mark.parametrize(("gradient", "bound"), [(at_random, 1e-3), (on_a_quadratic, 2e-3)])
def test_after_200_steps_it_is_where_fp32_is_and_plain_bf16_is_not(gradient, bound):
    """Distances are shares of the way that fp32 went. A gradient at a rounded value is another one, by its rounding."""
    start, exact = drawn(0, FP32, ((40, 30),))[0].double().flatten(), trained(FP32, gradient, fused)
    way = (exact - start).norm()
    ours = float((trained(BF16, gradient, KahanAdamW) - exact).norm() / way)
    plain = float((trained(BF16, gradient, fused) - exact).norm() / way)
    assert ours < bound and plain > 100 * ours


def test_one_step_is_exact_to_the_last_bit_of_the_compensation():
    """Half a unit of a compensation is 2 ** -17 of the value, or less."""
    ours, exact = updater_of(), updater_of(dtype=FP32)
    for updater in (ours, exact):
        take_steps(updater, range(1, 2))
    found, expected = (values_of(updater.optimizer, updater.parameters) for updater in (ours, exact))
    assert not torch.equal(found, torch.cat([value.double().flatten() for value in drawn(0)]))
    assert bool(((found - expected).abs() <= 1.01 * 2**-17 * expected.abs()).all())
    for own, other in zip(ours.parameters, exact.parameters, strict=True):
        assert torch.equal(own, other.to(BF16))  # what the model computes with is the value, rounded
        for name in ("exp_avg", "exp_avg_sq"):
            kept = ours.optimizer.state[own][name]
            assert kept.dtype == FP32
            torch.testing.assert_close(kept, exact.optimizer.state[other][name], rtol=1e-2, atol=0)


@pytest.mark.parametrize("beta", [0.9, 0.999])
@pytest.mark.parametrize("step", [1, 2, 1000, 100_000])
def test_the_bias_of_a_mean_is_right_to_the_last_digits(beta, step):
    (found,) = kahan._bias(beta, [torch.tensor(float(step))])
    assert found.item() == pytest.approx(1 - beta**step, rel=1e-6)


def test_norm_and_clipping_are_those_of_fp32():
    ours, exact = updater_of(), updater_of(dtype=FP32)
    norms = []
    for updater in (ours, exact):
        give_gradients(updater.parameters, 3)
        norms.append(updater.step(0.5))
    assert norms[0].dtype == FP32 and torch.equal(*norms)
    for own, other in zip(ours.parameters, exact.parameters, strict=True):
        means = ours.optimizer.state[own]["exp_avg"], exact.optimizer.state[other]["exp_avg"]
        torch.testing.assert_close(*means, rtol=2**-8, atol=0)


def test_parameters_learn_at_the_rate_of_the_schedule_and_of_their_group():
    first, second = parameters_of()[:2]
    updater = Updater([ParameterGroup({"a": first}), ParameterGroup({"b": second}, lr_scale=0.1)], SPEC)
    before = [parameter.detach().double() for parameter in (first, second)]
    for parameter in (first, second):
        parameter.grad = torch.ones_like(parameter)
    updater.step(0.0)
    # The first update of AdamW is the rate times the sign, and the decay.
    for parameter, start, rate in zip((first, second), before, (1e-3 / 3, 1e-4 / 3), strict=True):
        value = values_of(updater.optimizer, [parameter]).view_as(start)
        torch.testing.assert_close(value, start * (1 - 0.1 * rate) - rate, rtol=2**-17, atol=1e-8)


def test_large_sets_are_updated_in_parts_which_changes_nothing(monkeypatch):
    whole, parts = updater_of(), updater_of()
    take_steps(whole, range(3))
    seen: list[int] = []
    update = KahanAdamW._update
    monkeypatch.setattr(KahanAdamW, "_update", lambda self, *args: seen.append(len(args[0])) or update(self, *args))
    monkeypatch.setattr(kahan, "in_parts", lambda tensors: (slice(n, n + 1) for n in range(len(tensors))))
    take_steps(parts, range(3))
    assert seen == [1] * 9 and bits(numbers_of(parts)) == bits(numbers_of(whole))


# -------------------------------------------------------------------------------------------------------- the contract


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("before", [0, 7])
def test_a_gradient_that_is_not_finite_leaves_everything_as_it_was_bit_for_bit(bad, before):
    updater = updater_of()
    give_gradients(updater.parameters, 0)
    updater.parameters[0].grad.fill_(math.nan)
    updater.step(1.0)  # makes the state
    take_steps(updater, range(before))
    with torch.no_grad():
        updater.parameters[1][0] = -0.0
    kept = bits(numbers_of(updater))
    give_gradients(updater.parameters, 8)
    updater.parameters[1].grad[2] = bad
    assert not updater.step(1.0).isfinite()
    assert bits(numbers_of(updater)) == kept and len(kept) == 15
    assert updater.optimizer.state[updater.parameters[0]]["step"] == before
    take_steps(updater, range(8, 9))
    assert bits(numbers_of(updater)) != kept and all(tensor.isfinite().all() for tensor in numbers_of(updater))


def test_without_found_inf_it_updates_as_with_a_0():
    ours, other = (KahanAdamW(parameters_of(), **SETTINGS) for _ in range(2))
    other.found_inf = torch.zeros(())
    for optimizer in (ours, other):
        give_gradients(optimizer.param_groups[0]["params"], 2)
        optimizer.step()
    first, second = (values_of(o, o.param_groups[0]["params"]) for o in (ours, other))
    assert torch.equal(first, second) and not torch.equal(first, values_of(ours, parameters_of()))


def test_a_step_reads_no_number_on_the_host():
    """There are none on this device: to read one raises."""
    parameters = [nn.Parameter(torch.empty(shape, dtype=BF16, device="meta")) for shape in SHAPES]
    optimizer = KahanAdamW(parameters, **SETTINGS)
    optimizer.found_inf = torch.empty((), device="meta")
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    assert optimizer.state[parameters[0]]["step"].is_meta
    with pytest.raises((RuntimeError, NotImplementedError)):
        optimizer.found_inf.item()


def test_a_parameter_without_a_gradient_stays():
    updater = updater_of()
    give_gradients(updater.parameters, 1)
    updater.parameters[2].grad = None
    updater.step(1.0)
    assert torch.equal(updater.parameters[2], drawn(0)[2]) and not updater.optimizer.state[updater.parameters[2]]
    starts = torch.cat([start.double().flatten() for start in drawn(0)[:2]])
    assert bool((values_of(updater.optimizer, updater.parameters[:2]) != starts).all())


def test_every_update_counts_as_a_change_of_the_parameters_also_a_skipped_one():
    updater = updater_of()
    for value in (1.0, math.inf):
        versions = [parameter._version for parameter in updater.parameters]
        for parameter in updater.parameters:
            parameter.grad = torch.full_like(parameter, value)
        updater.step(1.0)
        assert all(p._version > version for p, version in zip(updater.parameters, versions, strict=True))


def test_it_takes_bf16_alone():
    with pytest.raises(TypeError, match="not torch.float32"):
        KahanAdamW(parameters_of(FP32))
    mixed = {"a": parameters_of()[0], "b": parameters_of(FP32)[1]}
    with pytest.raises(TypeError, match="one dtype, not"):
        Updater([ParameterGroup(mixed)], SPEC)


def test_the_first_step_makes_so_many_bytes_as_are_kept_free_for_it():
    for dtype, each in ((BF16, 2 + 4 + 4 + 2), (FP32, 4 + 4 + 4)):
        updater = updater_of(dtype=dtype)
        count = sum(parameter.numel() for parameter in updater.parameters)
        take_steps(updater, range(1))
        kept = [tensor for state in updater.optimizer.state.values() for tensor in state.values() if tensor.ndim]
        gradients = sum(parameter.nbytes for parameter in updater.parameters)
        assert gradients + sum(tensor.nbytes for tensor in kept) == each * count
        assert updater.bytes_of_first_step() == each * count


# ----------------------------------------------------------------------------------------------------------- resuming


def test_interrupted_and_restored_equals_uninterrupted_bit_for_bit():
    straight = updater_of()
    take_steps(straight, range(20))
    first = updater_of()
    take_steps(first, range(9))
    saved, values = copy.deepcopy(first.state_dict()), [p.detach().clone() for p in first.parameters]
    second = updater_of()
    with torch.no_grad():
        for parameter, value in zip(second.parameters, values, strict=True):
            parameter.copy_(value)
    second.check_state_dict(saved)
    second.load_state_dict(saved)
    assert bits(numbers_of(second)) == bits(numbers_of(first))
    take_steps(second, range(9, 20))
    assert bits(numbers_of(second)) == bits(numbers_of(straight))
    assert second.learning_rate == straight.learning_rate


def test_what_is_restored_is_a_copy():
    first, second = updater_of(), updater_of()
    take_steps(first, range(2))
    saved = first.state_dict()
    kept = bits(numbers_of(first))
    second.load_state_dict(saved)
    take_steps(second, range(2))
    assert bits(numbers_of(first)) == kept


def test_a_state_of_before_the_first_update_is_restored():
    saved = updater_of().state_dict()
    second = updater_of()
    second.check_state_dict(saved)
    second.load_state_dict(saved)
    assert not any(second.optimizer.state.values())


UNFIT = {
    "no compensation": lambda state: state.pop("compensation"),
    "a compensation of another shape": lambda state: state.update(compensation=torch.zeros(3, 4, dtype=BF16)),
    "a compensation in fp32": lambda state: state.update(compensation=torch.zeros(4, 3)),
    "a compensation that is not finite": lambda state: state["compensation"].fill_(math.nan),
    "moments in bf16": lambda state: state.update(exp_avg=torch.zeros(4, 3, dtype=BF16)),
    "a negative second moment": lambda state: state["exp_avg_sq"].fill_(-1.0),
    "a negative counter": lambda state: state["step"].fill_(-1.0),
}


@pytest.mark.parametrize("change", UNFIT.values(), ids=UNFIT)
def test_a_state_that_does_not_fit_is_refused(change):
    updater = updater_of()
    take_steps(updater, range(3))
    assert any(bool((updater.optimizer.state[p]["compensation"] < 0).any()) for p in updater.parameters)
    saved = copy.deepcopy(updater.state_dict())
    updater.check_state_dict(saved)
    change(saved["state"]["p0"])
    with pytest.raises(UserError, match="its optimizer state"):
        updater.check_state_dict(saved)


def test_a_compensation_does_not_belong_to_a_parameter_in_fp32():
    updater, bf16 = updater_of(dtype=FP32), updater_of()
    take_steps(bf16, range(1))
    with pytest.raises(UserError, match="has compensation, exp_avg, exp_avg_sq, step"):
        updater.check_state_dict(bf16.state_dict())


def test_the_rate_of_a_restored_state_is_that_of_this_runs_options():
    first, second = updater_of(), updater_of(replace(SPEC, learning_rate=0.5))
    take_steps(first, range(3))
    second.load_state_dict(first.state_dict())
    assert second.learning_rate == pytest.approx(500 * first.learning_rate)
