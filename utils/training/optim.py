"""Parameters, their optimizer and schedule, and the update that ends a step."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from utils.common.errors import UserError
from utils.common.options import option
from utils.training.kahan import KahanAdamW

SCHEDULES = ("constant", "linear", "cosine")
T = TypeVar("T", bound="Optimization")

# Entries of a parameter group that follow from the options of this run, never from a saved state.
_FROM_OPTIONS = ("params", "lr", "initial_lr", "weight_decay")


@dataclass(frozen=True)
class Optimization:
    """optimization"""

    max_train_steps: int = option(1000, "optimizer steps; with two experts, of each", minimum=1)
    epochs: int = option(0, "train N epochs instead of --max_train_steps; with two experts, each; 0: off", minimum=0)
    learning_rate: float = option(1e-5, "base learning rate", minimum=0)
    lr_scheduler: str = option("constant", "learning rate schedule after the warm-up", choices=SCHEDULES)
    lr_warmup_steps: int = option(0, "steps over which the learning rate rises linearly to its base value", minimum=0)
    weight_decay: float = option(0.01, "weight decay of AdamW", minimum=0)
    gradient_accumulation: int = option(1, "batches per optimizer step", minimum=1)
    max_grad_norm: float = option(1.0, "clip the gradient to this norm; 0: no clipping", minimum=0)
    ema_decay: float = option(
        0.0, "keep a moving average of the LoRA and write it too; try 0.99", minimum=0, maximum=0.99999
    )

    def check_length(self) -> None:
        """Raises UserError for two lengths of the run."""
        if self.epochs and self.max_train_steps != Optimization.max_train_steps:
            raise UserError("--epochs and --max_train_steps both say how long to train: give one of them")

    def check_warmup(self) -> None:
        """Raises UserError for a warm-up that is as long as the run. Epochs are not known to be so many steps yet."""
        if not self.epochs and self.lr_warmup_steps >= self.max_train_steps:
            raise UserError(f"--lr_warmup_steps {self.lr_warmup_steps} must be below the {self.max_train_steps} steps")

    @property
    def optimizer(self) -> "OptimizerSpec":
        return OptimizerSpec(
            self.learning_rate, self.weight_decay, self.lr_scheduler, self.lr_warmup_steps, self.max_train_steps
        )


@dataclass(frozen=True)
class OptimizerSpec:
    """The values that decide an update; `schedule` is one of SCHEDULES."""

    learning_rate: float
    weight_decay: float
    schedule: str
    warmup_steps: int
    total_steps: int


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters by name that share a learning rate: `lr_scale` times the base one."""

    parameters: Mapping[str, nn.Parameter]
    lr_scale: float = 1.0


def with_epochs(opts: T, steps_per_epoch: int) -> T:
    """The options with --epochs as the --max_train_steps of that many epochs; unchanged without --epochs.

    What is saved of a run is its number of steps, in whichever way it was given: either way resumes the other.
    """
    return replace(opts, epochs=0, max_train_steps=opts.epochs * steps_per_epoch) if opts.epochs else opts


def learning_rate_factor(step: int, spec: OptimizerSpec) -> float:
    """The factor on the base learning rate at `step` (from 0): linear warm-up, then the schedule.

    constant stays at 1; linear and cosine reach 0 at `total_steps`.
    """
    if step < spec.warmup_steps:
        return (step + 1) / (spec.warmup_steps + 1)
    if spec.schedule == "constant":
        return 1.0
    progress = min((step - spec.warmup_steps) / max(1, spec.total_steps - spec.warmup_steps), 1.0)
    return 1 - progress if spec.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))


def make_optimizer(groups: Sequence[ParameterGroup], spec: OptimizerSpec) -> Optimizer:
    """Fused AdamW over fp32 parameters, or AdamW with compensation over bf16 ones. Raises TypeError for a mixture."""
    settings = [
        {"params": list(group.parameters.values()), "lr": spec.learning_rate * group.lr_scale} for group in groups
    ]
    if any(is_bf16(parameter) for group in groups for parameter in group.parameters.values()):
        return KahanAdamW(settings, lr=spec.learning_rate, weight_decay=spec.weight_decay)
    return AdamW(settings, lr=spec.learning_rate, weight_decay=spec.weight_decay, fused=True)


def is_bf16(parameter: Tensor) -> bool:
    return parameter.dtype == torch.bfloat16


def bytes_of_first_step(parameters: Sequence[nn.Parameter]) -> int:
    """What the first update makes and keeps: gradients, two fp32 moments, and for bf16 parameters a compensation."""
    moments = 2 * torch.float32.itemsize
    return sum(p.nbytes + moments * p.numel() + (p.nbytes if is_bf16(p) else 0) for p in parameters)


class Updater:
    """An optimizer with clipping and a schedule. No method waits for the device."""

    def __init__(self, groups: Sequence[ParameterGroup], spec: OptimizerSpec) -> None:
        self.named = {name: parameter for group in groups for name, parameter in group.parameters.items()}
        self.parameters = list(self.named.values())
        self.optimizer = make_optimizer(groups, spec)
        self.schedule = LambdaLR(self.optimizer, lambda step: learning_rate_factor(step, spec))

    @property
    def learning_rate(self) -> float:
        """The base rate of the next update."""
        return float(self.optimizer.param_groups[0]["lr"])

    @property
    def step_count(self) -> int:
        """The number of updates so far; skipped ones count."""
        return self.schedule.last_epoch

    def step(self, max_grad_norm: float) -> Tensor:
        """Clips the gradients to `max_grad_norm` (0: no clipping), updates, clears them; returns the unclipped norm.

        A gradient that is not finite leaves parameters and moments unchanged. That is decided on the device through the
        optimizer's `found_inf`, its contract with torch's gradient scaler.
        """
        norm = _total_norm([p.grad for p in self.parameters if p.grad is not None])
        if max_grad_norm > 0:
            nn.utils.clip_grads_with_norm_(self.parameters, max_grad_norm, norm)
        # The optimizer's contract with torch's gradient scaler is no part of its declared type.
        self.optimizer.found_inf = (~torch.isfinite(norm)).to(torch.float32)  # type: ignore[attr-defined]
        self.optimizer.step()
        # The fused kernel does not count as a change in place, by which copies in another dtype are known to be old.
        torch.autograd.graph.increment_version(self.parameters)
        self.optimizer.zero_grad(set_to_none=True)
        self.schedule.step()
        return norm

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's memory of each parameter by name, what its groups remember, and the number of updates."""
        state = {name: dict(self.optimizer.state.get(parameter, {})) for name, parameter in self.named.items()}
        groups = [
            {key: value for key, value in group.items() if key not in _FROM_OPTIONS and _is_number(value)}
            for group in self.optimizer.param_groups
        ]
        return {"step_count": self.step_count, "state": state, "groups": groups}

    def check_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Raises UserError where `load_state_dict` could not restore this; changes nothing."""
        state, groups, count = saved["state"], saved["groups"], saved["step_count"]
        if not isinstance(count, int) or count < 0:
            raise UserError(f"its number of updates is {count!r}")
        if state.keys() != self.named.keys():
            raise UserError("its optimizer state is of other parameters")
        for name, parameter in self.named.items():
            _check_moments(name, parameter, state[name], count)
        if groups and len(groups) != len(self.optimizer.param_groups):
            raise UserError(f"it has {len(groups)} parameter groups, this run {len(self.optimizer.param_groups)}")
        for values, group in zip(groups, self.optimizer.param_groups, strict=False):
            for key, value in values.items():
                if key in _FROM_OPTIONS or key not in group or not _is_number(group[key]) or not _is_number(value):
                    raise UserError(f"its optimizer has a setting {key!r} that this optimizer does not have")

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned. Learning rate and weight decay stay those of this run's options."""
        whole = self.optimizer.state_dict()
        states = enumerate(saved["state"][name] for name in self.named)
        whole["state"] = {index: dict(state) for index, state in states if state}
        self.optimizer.load_state_dict(whole)
        for values, group in zip(saved["groups"], self.optimizer.param_groups, strict=False):
            group |= values
        self.schedule.last_epoch = saved["step_count"]
        for group, base, factor in zip(
            self.optimizer.param_groups, self.schedule.base_lrs, self.schedule.lr_lambdas, strict=True
        ):
            group["lr"] = base * factor(self.schedule.last_epoch)
        self.schedule._last_lr = [group["lr"] for group in self.optimizer.param_groups]


def _check_moments(name: str, parameter: nn.Parameter, state: Mapping[str, Any], step_count: int) -> None:
    """AdamW's: two moments of the parameter's shape and a counter; of bf16 parameters a compensation; all or none.

    None is right before the first update alone.

    Moments of another size would not raise: the fused kernel reads past their end.
    """
    fp32 = torch.float32
    expected = {"exp_avg": (parameter.shape, fp32), "exp_avg_sq": (parameter.shape, fp32), "step": (torch.Size(), fp32)}
    if is_bf16(parameter):
        expected["compensation"] = parameter.shape, torch.bfloat16
    if not state and step_count == 0:
        return
    if state.keys() != expected.keys():
        raise UserError(f"its optimizer state of {name} has {', '.join(sorted(state)) or 'nothing'}")
    for key, (shape, dtype) in expected.items():
        value = state[key]
        if not isinstance(value, Tensor) or value.shape != shape or value.dtype != dtype:
            raise UserError(f"its optimizer state {key} of {name} has another shape or dtype than the parameter")
        if not value.isfinite().all() or (key in ("exp_avg_sq", "step") and value.min() < 0):
            raise UserError(f"its optimizer state {key} of {name} is not finite or negative: the file is damaged")


def _total_norm(gradients: Sequence[Tensor]) -> Tensor:
    """The norm of all gradients. Of those in bf16 it is fp32: their squares are added up that way anyway."""
    if gradients and all(is_bf16(gradient) for gradient in gradients):
        norms = torch._foreach_norm(list(gradients), 2.0, dtype=torch.float32)
        return torch.linalg.vector_norm(torch.stack(norms))
    return nn.utils.get_total_norm(gradients)


def _is_number(value: object) -> bool:
    return isinstance(value, bool | int | float) and math.isfinite(value)
