"""Parameters, their optimizer and schedule, and the update that ends a step."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from utils.common.errors import UserError
from utils.common.options import option
from utils.training.optimizer_state import Layout, check_kept, check_settings, is_number, layout_of, numbers_of
from utils.training.optimizers import (
    ADAMW,
    EPSILON,
    KINDS,
    OptimizerSpec,
    ParameterGroup,
    check_library,
    make_optimizer,
)

SCHEDULES = ("constant", "linear", "cosine")
T = TypeVar("T", bound="Optimization")
MIN_FACTOR = 0.01  # on a rate that the optimizer finds; less is a rate


@dataclass(frozen=True)
class Optimization:
    """optimization"""

    max_train_steps: int = option(1000, "optimizer steps; with two experts, of each", minimum=1)
    epochs: int = option(
        0,
        "train N epochs instead of --max_train_steps; with two experts, each; 0: off",
        minimum=0,
        aliases=("num_train_epochs",),
    )
    optimizer: str = option(ADAMW, "what updates the LoRA", choices=tuple(KINDS))
    learning_rate: float = option(1e-5, "base learning rate", minimum=0)
    lora_plus_ratio: float = option(
        1.0, "LoRA+: up matrices learn at N times the learning rate; try 4 to 16", minimum=0.001
    )
    input_lr_scale: float = option(
        1.0,
        "factor on the learning rate of the patch embedding, which control LoRAs train",
        minimum=0.001,
        requires="control_lora",
    )
    lr_scheduler: str = option("constant", "learning rate schedule after the warm-up", choices=SCHEDULES)
    lr_warmup_steps: int = option(0, "steps over which the learning rate rises linearly to its base value", minimum=0)
    weight_decay: float = option(0.01, "weight decay", minimum=0, aliases=("adam_weight_decay",))
    adam_epsilon: float = option(
        EPSILON, "what AdamW adds to the root of the second moment: larger, smaller updates", minimum=1e-30
    )
    gradient_accumulation: int = option(
        1, "batches per optimizer step", minimum=1, aliases=("gradient_accumulation_steps",)
    )
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

    def check_optimizer(self, is_bf16: bool) -> None:
        """Raises UserError where the optimizer lacks a library, or does not go with other options or bf16 matrices."""
        check_library(self.optimizer)
        kind, given = KINDS[self.optimizer], f"--optimizer {self.optimizer}"
        if is_bf16 and not kind.takes_bf16:
            takes = " or ".join(name for name, kind in KINDS.items() if kind.takes_bf16)
            raise UserError(f"{given} would lose small updates of bf16 matrices: take {takes}, or --adapter_dtype fp32")
        if not kind.takes_epsilon and self.adam_epsilon != EPSILON:
            takes = " or ".join(name for name, kind in KINDS.items() if kind.takes_epsilon)
            raise UserError(f"{given} has no --adam_epsilon: leave it out, or take {takes}")
        if kind.averages and (self.lr_scheduler != "constant" or self.ema_decay):
            raise UserError(f"{given} averages, and needs no schedule: leave out --lr_scheduler and --ema_decay")
        if kind.finds_rate and (self.lora_plus_ratio, self.input_lr_scale) != (1, 1):
            raise UserError(f"{given} has one rate for all: leave out --lora_plus_ratio and --input_lr_scale")

    def check_rate(self) -> None:
        """Raises UserError for a learning rate that is meant for another optimizer."""
        if KINDS[self.optimizer].finds_rate and self.learning_rate < MIN_FACTOR:
            given = f"--optimizer {self.optimizer} --learning_rate {self.learning_rate:g}"
            raise UserError(f"{given}: it finds the rate itself, and multiplies it with this: give --learning_rate 1")

    @property
    def optimizer_spec(self) -> "OptimizerSpec":
        return OptimizerSpec(
            self.learning_rate,
            self.weight_decay,
            self.lr_scheduler,
            self.lr_warmup_steps,
            self.max_train_steps,
            self.optimizer,
            self.lora_plus_ratio,
            self.input_lr_scale,
            self.adam_epsilon,
        )


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


class Updater:
    """An optimizer with clipping and a schedule. With AdamW no method of a step waits for the device."""

    def __init__(self, groups: Sequence[ParameterGroup], spec: OptimizerSpec) -> None:
        self.spec, self.kind = spec, KINDS[spec.name]
        self.named = {name: parameter for group in groups for name, parameter in group.parameters.items()}
        self.parameters = list(self.named.values())
        self.optimizer = make_optimizer(groups, spec)
        self.schedule = LambdaLR(self.optimizer, self._factor)

    def _factor(self, step: int) -> float:
        """On the base learning rate; an optimizer that averages knows the warm-up itself."""
        return 1.0 if self.kind.averages else learning_rate_factor(step, self.spec)

    @property
    def learning_rate(self) -> float:
        """The base rate of the next update, times what the optimizer finds."""
        group, base = self.optimizer.param_groups[0], self.spec.learning_rate * self._factor(self.step_count)
        if self.kind.finds_rate:
            return base * float(group["d"])
        if self.kind.averages and group["k"] < self.spec.warmup_steps:
            return base * (group["k"] + 1) / self.spec.warmup_steps
        return base

    @property
    def skips_on_device(self) -> bool:
        """Whether the optimizer itself leaves out an update that is not finite, by `found_inf`."""
        return bool(getattr(self.optimizer, "_step_supports_amp_scaling", False))

    @property
    def step_count(self) -> int:
        """The number of updates so far; skipped ones count."""
        return self.schedule.last_epoch

    def step(self, max_grad_norm: float) -> Tensor:
        """Clips the gradients to `max_grad_norm` (0: no clipping), updates, clears them; returns the unclipped norm.

        A gradient that is not finite leaves parameters and moments unchanged. AdamW decides that on the device through
        its `found_inf`, its contract with torch's gradient scaler. For others the host reads the norm.
        """
        norm = _total_norm([p.grad for p in self.parameters if p.grad is not None])
        if max_grad_norm > 0:
            nn.utils.clip_grads_with_norm_(self.parameters, max_grad_norm, norm)
        # The optimizer's contract with torch's gradient scaler is no part of its declared type.
        if self.skips_on_device:
            self.optimizer.found_inf = (~torch.isfinite(norm)).to(torch.float32)  # type: ignore[attr-defined]
            self.optimizer.step()
        elif norm.isfinite():
            self.optimizer.step()
        else:
            # Otherwise the schedule warns that it is moved before the optimizer.
            self.optimizer._opt_called = True  # type: ignore[attr-defined]
        # The fused kernel does not count as a change in place, by which copies in another dtype are known to be old.
        torch.autograd.graph.increment_version(self.parameters)
        self.optimizer.zero_grad(set_to_none=True)
        self.schedule.step()
        return norm

    def values(self) -> dict[str, Tensor]:
        """What is to be used: the parameters, or copies with the averages of an optimizer that averages."""
        if not self.kind.averages:
            return {name: parameter.detach() for name, parameter in self.named.items()}
        beta1, _ = self.optimizer.param_groups[0]["betas"]
        found = {}
        for name, parameter in self.named.items():
            # y = (1 - beta1) z + beta1 x, where y is trained and x is used: https://arxiv.org/abs/2405.15682
            last = self.optimizer.state.get(parameter, {}).get("z", parameter)
            found[name] = parameter.detach().lerp(last.detach(), 1 - 1 / beta1)
        return found

    @contextmanager
    def using_values(self) -> Iterator[None]:
        """A span in which the parameters have their `values`; afterwards they are as before, bit for bit."""
        if not self.kind.averages:
            yield
            return
        before = [parameter.detach().clone() for parameter in self.parameters]
        self._set(list(self.values().values()))
        try:
            yield
        finally:
            self._set(before)

    @torch.no_grad()
    def _set(self, values: Sequence[Tensor]) -> None:
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.copy_(value)

    def bytes_of_first_step(self) -> int:
        """What the first update makes and keeps: gradients, and what the optimizer keeps of each parameter.

        Waits for the device.
        """
        starts = {name: float(parameter.detach().any()) for name, parameter in self.named.items()}
        kept = sum(layout_of(name, self.named[name], self.spec, start).nbytes for name, start in starts.items())
        return kept + sum(parameter.nbytes for parameter in self.parameters)

    def _names_of_groups(self) -> list[list[str]]:
        """The names of the parameters of each group, in the optimizer's order."""
        names = {parameter: name for name, parameter in self.named.items()}
        return [[names[parameter] for parameter in group["params"]] for group in self.optimizer.param_groups]

    def _layout(self, name: str) -> Layout:
        return layout_of(name, self.named[name], self.spec)

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's memory of each parameter by name, what its groups remember, and the number of updates."""
        state = {name: dict(self.optimizer.state.get(parameter, {})) for name, parameter in self.named.items()}
        groups = [
            {name: group[name] for name in self.kind.settings} if self.kind.settings else numbers_of(group)
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
        # There is nothing before the first update; and if that was skipped, unless the device decides about it.
        if any(state.values()) or (count and self.skips_on_device):
            for name in self.named:
                check_kept(name, state[name], self._layout(name).state)
        if groups and len(groups) != len(self.optimizer.param_groups):
            counts = f"it has {len(groups)} parameter groups, this run {len(self.optimizer.param_groups)}"
            raise UserError(f"{counts}: are --optimizer, --lora_plus_ratio and --input_lr_scale those of that run?")
        if self.kind.settings:
            check_settings(groups, self.kind.settings)
            return
        for values, names in zip(groups, self._names_of_groups(), strict=False):
            known = self._layout(names[0]).settings
            for key, value in values.items():
                if key not in known or not is_number(value):
                    raise UserError(f"its optimizer has a setting {key!r} that this optimizer does not have")

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned. Learning rate and weight decay stay those of this run's options."""
        whole = self.optimizer.state_dict()
        states = enumerate(saved["state"][name] for name in chain(*self._names_of_groups()))
        whole["state"] = {index: dict(state) for index, state in states if state}
        self.optimizer.load_state_dict(whole)
        for values, group in zip(saved["groups"], self.optimizer.param_groups, strict=False):
            group |= {name: values[name] for name in self.kind.settings}
        self.schedule.last_epoch = saved["step_count"]
        for group, base, factor in zip(
            self.optimizer.param_groups, self.schedule.base_lrs, self.schedule.lr_lambdas, strict=True
        ):
            group["lr"] = base * factor(self.schedule.last_epoch)
        self.schedule._last_lr = [group["lr"] for group in self.optimizer.param_groups]


def _total_norm(gradients: Sequence[Tensor]) -> Tensor:
    """The norm of all gradients. Of those in bf16 it is fp32: their squares are added up that way anyway."""
    if gradients and all(gradient.dtype == torch.bfloat16 for gradient in gradients):
        norms = torch._foreach_norm(list(gradients), 2.0, dtype=torch.float32)
        return torch.linalg.vector_norm(torch.stack(norms))
    return nn.utils.get_total_norm(gradients)
