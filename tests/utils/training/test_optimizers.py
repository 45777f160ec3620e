"""Each optimizer learns, is saved and restored exactly, and skips what is not finite; what each asks of a run."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from utils.common.errors import UserError
from utils.common.imports import hidden
from utils.training.optim import Optimization, Updater
from utils.training.optimizers import EPSILON, KINDS, OptimizerSpec, check_library, groups_of

SHAPES = {
    "blocks.0.self_attn.q.lora_A.default.weight": (32, 160),  # large enough for 8 bits
    "blocks.0.self_attn.q.lora_B.default.weight": (160, 32),
    "patch_embedding.lora_A.default.weight": (4, 8, 1, 2, 2),
    "patch_embedding.lora_B.default.weight": (160, 4, 1, 1, 1),
}
ATTN_UP, PATCH_UP = [name for name in SHAPES if "lora_B" in name]
RATES = dict.fromkeys(KINDS, 1e-2) | {"prodigy": 1.0}
BF16_KINDS = [name for name, kind in KINDS.items() if kind.takes_bf16]


def spec_of(name: str, **changes) -> OptimizerSpec:
    values = {"learning_rate": RATES[name], "weight_decay": 0.01, "schedule": "constant", "warmup_steps": 0}
    return OptimizerSpec(**values | {"total_steps": 100, "name": name} | changes)


def parameters(dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, nn.Parameter]:
    """As LoRAs start: random down matrices, up matrices of zeros."""
    generator = torch.Generator().manual_seed(seed)
    drawn = {name: torch.randn(shape, generator=generator) / 8 for name, shape in SHAPES.items()}
    return {name: nn.Parameter((value * 0 if "lora_B" in name else value).to(dtype)) for name, value in drawn.items()}


def updater_of(name: str, dtype: torch.dtype = torch.float32, **changes) -> Updater:
    spec = spec_of(name, **changes)
    return Updater(groups_of(parameters(dtype), spec), spec)


def step(updater: Updater, seed: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, shape in SHAPES.items():
        parameter = updater.named[name]
        parameter.grad = scale * torch.randn(shape, generator=generator).to(parameter.dtype)
    updater.step(1.0)


def everything(updater: Updater) -> dict[str, object]:
    """Parameters and the optimizer's memory, copied."""
    values = {name: parameter.detach().clone() for name, parameter in updater.named.items()}
    return {"parameters": values, "optimizer": copy.deepcopy(updater.state_dict())}


def same(one: object, other: object) -> bool:
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    return torch.equal(one, other) if isinstance(one, Tensor) and isinstance(other, Tensor) else one == other


def bytes_kept(updater: Updater) -> int:
    """What the optimizer keeps of all parameters, but for single numbers."""
    states = [value for state in updater.optimizer.state.values() for value in state.values()]
    return sum(value.nbytes for value in states if isinstance(value, Tensor) and value.ndim)


def error_of(updater: Updater, target: Tensor) -> Tensor:
    down, up = (updater.named[name] for name in SHAPES if "self_attn" in name)
    return ((up @ down).float() - target).square().mean()


every = pytest.mark.parametrize("name", KINDS)
each_dtype = pytest.mark.parametrize(
    "name, dtype", [(name, torch.float32) for name in KINDS] + [(name, torch.bfloat16) for name in BF16_KINDS]
)


@each_dtype
def test_each_learns(name, dtype):
    updater = updater_of(name, dtype, weight_decay=0.0)
    generator = torch.Generator().manual_seed(1)
    target = torch.randn(160, 2, generator=generator) @ torch.randn(2, 160, generator=generator) / 16
    before = error_of(updater, target)
    for _ in range(60):
        error_of(updater, target).backward()
        updater.step(0.0)
    with updater.using_values():
        assert error_of(updater, target) < before / 2


with_epsilon = [(name, dtype) for name, kind in KINDS.items() if kind.takes_epsilon
                for dtype in (torch.float32, torch.bfloat16) if dtype == torch.float32 or kind.takes_bf16]  # fmt: skip


@pytest.mark.parametrize(("name", "dtype"), with_epsilon)
def test_an_epsilon_as_large_as_the_gradient_halves_the_first_update(name, dtype):
    moved = {}
    for epsilon in (1e-12, EPSILON, 1e-2):
        updater = updater_of(name, dtype, epsilon=epsilon, weight_decay=0.0)
        parameter = updater.named[ATTN_UP]
        for each in updater.parameters:
            each.grad = torch.full_like(each, 1e-2)
        updater.step(0.0)
        moved[epsilon] = float(parameter.detach().abs().mean())
    assert moved[1e-12] == pytest.approx(RATES[name], rel=0.02) == moved[EPSILON]
    assert moved[1e-2] == pytest.approx(RATES[name] / 2, rel=0.02)


@pytest.mark.parametrize("name", KINDS)
def test_an_epsilon_is_refused_where_there_is_none_and_is_not_part_of_a_state(name):
    opts = Optimization(optimizer=name, adam_epsilon=1e-10)
    if not KINDS[name].takes_epsilon:
        with pytest.raises(UserError, match=f"--optimizer {name} has no --adam_epsilon: leave it out, or take adamw"):
            opts.check_optimizer(is_bf16=False)
        return
    opts.check_optimizer(is_bf16=False)
    assert opts.optimizer_spec.epsilon == 1e-10
    before, after = updater_of(name), updater_of(name, epsilon=1e-10)
    step(before, 0)
    after.check_state_dict(before.state_dict())
    after.load_state_dict(before.state_dict())
    assert {group["eps"] for group in after.optimizer.param_groups} == {1e-10}


@each_dtype
def test_each_goes_on_from_its_state_as_if_it_had_never_stopped(name, dtype):
    updater = updater_of(name, dtype, warmup_steps=2)
    for seed in range(3):
        step(updater, seed)
    saved = everything(updater)
    again = updater_of(name, dtype, warmup_steps=2)
    step(again, 9)  # what it has done before leaves no trace
    with torch.no_grad():
        for key, value in saved["parameters"].items():
            again.named[key].copy_(value)
    again.check_state_dict(saved["optimizer"])
    again.load_state_dict(copy.deepcopy(saved["optimizer"]))
    assert same(everything(again), saved)
    for seed in range(3, 6):
        step(updater, seed)
        step(again, seed)
        assert same(everything(again), everything(updater))


@each_dtype
def test_the_state_before_the_first_update_is_restored_after_a_rehearsal(name, dtype):
    updater, fresh = updater_of(name, dtype), updater_of(name, dtype)
    saved = copy.deepcopy(updater.state_dict())
    step(updater, 5)
    with torch.no_grad():
        for parameter, start in zip(updater.named.values(), fresh.named.values(), strict=True):
            parameter.copy_(start)
    updater.load_state_dict(saved)
    for seed in range(3):
        step(updater, seed)
        step(fresh, seed)
    assert same(everything(updater)["parameters"], everything(fresh)["parameters"])


@each_dtype
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_each_skips_an_update_that_is_not_finite(name, dtype, bad):
    updater = updater_of(name, dtype)
    step(updater, 0)
    before = everything(updater)
    step(updater, 1, scale=bad)
    before["optimizer"]["step_count"] += 1
    assert same(everything(updater), before)


@each_dtype
def test_what_the_first_update_keeps_is_known_before_it(name, dtype):
    fresh, trained = updater_of(name, dtype), updater_of(name, dtype)
    for parameter in trained.parameters:
        nn.init.ones_(parameter)
    for updater in (fresh, trained):
        foreseen = updater.bytes_of_first_step()
        step(updater, 0)
        assert foreseen == bytes_kept(updater) + sum(parameter.nbytes for parameter in updater.parameters)


@each_dtype
@pytest.mark.parametrize("width", [1536, 5120])
def test_the_forecast_counts_what_each_keeps(name, dtype, width):
    """Of a pair of matrices as a LoRA starts, after an update; in bf16 a matrix and its compensation are 4 bytes."""
    down = nn.Parameter(torch.ones(16, width, dtype=dtype))
    up = nn.Parameter(torch.zeros(width, 16, dtype=dtype))
    spec = spec_of(name)
    updater = Updater(groups_of({"x.lora_A.w": down, "x.lora_B.w": up}, spec), spec)
    for parameter in updater.parameters:
        parameter.grad = torch.ones_like(parameter)
    updater.step(1.0)
    held = (down.nbytes + up.nbytes + bytes_kept(updater)) / (down.numel() + up.numel())
    assert held == pytest.approx(4 + KINDS[name].state_bytes, abs=0.07)  # tables of codes are part of 8 bits


@each_dtype
def test_a_damaged_state_is_refused(name, dtype):
    updater = updater_of(name, dtype)
    step(updater, 0)
    first = next(iter(SHAPES))
    tensors = [key for key, value in updater.state_dict()["state"][first].items() if isinstance(value, Tensor)]
    for key in tensors:
        for damage in (lambda value: value[None], lambda value: value.double(), None):
            saved = copy.deepcopy(updater.state_dict())
            state = saved["state"][first]
            state.update({key: damage(state[key])}) if damage else state.pop(key)
            with pytest.raises(UserError, match="its optimizer state"):
                updater_of(name, dtype).check_state_dict(saved)
    saved = copy.deepcopy(updater.state_dict())
    saved["groups"][0]["invented"] = 1.0
    with pytest.raises(UserError, match="invented"):
        updater_of(name, dtype).check_state_dict(saved)


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind.settings])
def test_what_groups_remember_is_all_there_and_possible(name):
    updater = updater_of(name)
    step(updater, 0)
    for setting, least in KINDS[name].settings.items():
        for wrong in (None, math.nan, 10**400, "one", *([] if least == -math.inf else [least - 1])):
            saved = copy.deepcopy(updater.state_dict())
            saved["groups"][0].update({setting: wrong}) if wrong is not None else saved["groups"][0].pop(setting)
            with pytest.raises(UserError, match=setting):
                updater_of(name).check_state_dict(saved)
    with pytest.raises(UserError, match="remembers nothing"):
        updater_of(name).check_state_dict(updater.state_dict() | {"groups": []})


@each_dtype
def test_a_run_whose_first_update_was_skipped_goes_on_from_its_state(name, dtype, recwarn):
    updater, again = updater_of(name, dtype), updater_of(name, dtype)
    step(updater, 0, scale=math.nan)
    saved = copy.deepcopy(updater.state_dict())
    again.check_state_dict(saved)
    again.load_state_dict(saved)
    for each in (updater, again):
        step(each, 1)
    assert same(everything(updater), everything(again))
    assert not [warning for warning in recwarn if "lr_scheduler" in str(warning.message)]


# --------------------------------------------------------------------------------------------------- what each does


def test_eight_bits_move_parameters_about_as_adamw_does():
    for dtype in (torch.float32, torch.bfloat16):
        exact, ours = updater_of("adamw", dtype), updater_of("adamw8bit", dtype)
        for seed in range(10):
            step(exact, seed)
            step(ours, seed)
        for one, other, start in zip(exact.parameters, ours.parameters, parameters(dtype).values(), strict=True):
            moved = (one - start).float()
            assert ((one - other).float().norm() / moved.norm()) < 0.1


def test_moments_of_eight_bits_are_a_quarter_as_large():
    bytes_of = {name: updater_of(name, torch.bfloat16).bytes_of_first_step() for name in BF16_KINDS}
    count = sum(parameter.numel() for parameter in parameters().values())
    assert bytes_of["adamw"] == (2 + 4 + 4 + 2) * count and bytes_of["adamw8bit"] < (2 + 1.5 + 1.5 + 2) * count


def test_muon_moves_up_matrices_of_linear_layers_alone_by_equal_singular_values():
    updater, plain = updater_of("muon", weight_decay=0.0), updater_of("adamw", weight_decay=0.0)
    step(updater, 0)
    step(plain, 0)
    values = torch.linalg.svdvals(updater.named[ATTN_UP].detach())
    assert values.max() < 1.8 * values.min()  # from zero; five iterations leave 0.7 to 1.2
    others = SHAPES.keys() - {ATTN_UP}
    for name in others:
        torch.testing.assert_close(updater.named[name], plain.named[name], rtol=1e-4, atol=1e-6)


def test_lora_plus_and_the_scale_of_the_input_multiply():
    updater = updater_of("adamw", up_scale=8.0, input_scale=0.5)
    rates = {}
    for group in updater.optimizer.param_groups:
        for name, parameter in updater.named.items():
            if any(parameter is each for each in group["params"]):
                rates[name] = group["lr"]
    assert [rates[name] for name in SHAPES] == pytest.approx([1e-2, 8e-2, 0.5e-2, 4e-2])
    assert updater.learning_rate == 1e-2


def test_without_them_there_is_one_group():
    assert len(groups_of(parameters(), spec_of("adamw"))) == 1


def test_schedule_free_exports_its_average_and_trains_on():
    from schedulefree import AdamWScheduleFree

    updater = updater_of("schedulefree", warmup_steps=3)
    named = parameters()
    theirs = AdamWScheduleFree(named.values(), lr=1e-2, weight_decay=0.01, warmup_steps=3)
    theirs.train()
    for seed in range(5):
        step(updater, seed)
        generator = torch.Generator().manual_seed(seed)
        for parameter in named.values():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        nn.utils.clip_grad_norm_(named.values(), 1.0)
        theirs.step()
    before = everything(updater)
    theirs.eval()
    with updater.using_values():
        used = {name: parameter.detach().clone() for name, parameter in updater.named.items()}
    assert same(everything(updater), before) and same(used, updater.values())
    assert same(used, {name: parameter.detach() for name, parameter in named.items()})
    assert not same(used, before["parameters"])


def test_the_rate_that_is_reported_is_that_of_schedule_frees_warm_up():
    updater = updater_of("schedulefree", warmup_steps=3)
    for seed in range(5):
        reported = updater.learning_rate
        step(updater, seed)
        assert reported == pytest.approx(updater.optimizer.param_groups[0]["scheduled_lr"])


def test_prodigy_reports_the_rate_that_it_finds():
    updater = updater_of("prodigy")
    rates = []
    for _ in range(20):
        rates.append(updater.learning_rate)
        step(updater, 0)
    assert rates[0] == pytest.approx(1e-6) and rates[-1] > 10 * rates[0]


# ------------------------------------------------------------------------------------------------------------ options


@every
def test_a_library_that_is_missing_is_named(name):
    kind = KINDS[name]
    if not kind.library:
        return check_library(name)
    message = f'(?s)--optimizer {name} needs {kind.library}, which cannot be imported.*pip install "{kind.library}'
    with hidden(kind.library), pytest.raises(UserError, match=message):
        check_library(name)


@pytest.mark.parametrize("name", [name for name in KINDS if name not in BF16_KINDS])
def test_bf16_matrices_need_an_optimizer_for_them(name):
    with pytest.raises(UserError, match="bf16 matrices: take adamw or adamw8bit, or --adapter_dtype fp32"):
        Optimization(optimizer=name).check_optimizer(is_bf16=True)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"optimizer": "schedulefree", "lr_scheduler": "cosine"}, "leave out --lr_scheduler"),
        ({"optimizer": "schedulefree", "ema_decay": 0.9}, "leave out --lr_scheduler and --ema_decay"),
        ({"optimizer": "prodigy", "lora_plus_ratio": 4.0}, "has one rate for all"),
        ({"optimizer": "prodigy", "input_lr_scale": 0.5}, "has one rate for all"),
    ],
)
def test_what_does_not_go_together_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        Optimization(**options).check_optimizer(is_bf16=False)


def test_prodigy_is_not_given_a_rate():
    Optimization(optimizer="prodigy", learning_rate=1.0).check_rate()
    with pytest.raises(UserError, match="give --learning_rate 1"):
        Optimization(optimizer="prodigy").check_rate()
