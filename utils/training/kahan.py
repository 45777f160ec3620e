"""AdamW for bf16 parameters, which by themselves lose every update smaller than 1/256 of a value.

What a parameter cannot hold is kept beside it, as in Kahan's summation: parameter + compensation is the value, to about
16 bits. Both are bf16. Moments are fp32, and so is all that is computed.

AdamW: https://arxiv.org/abs/1711.05101. Compensation: https://arxiv.org/abs/2010.06192; here the value is put together
in fp32, updated, and split again.
"""

import math
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from utils.common.tensors import in_parts

MOMENTS = "exp_avg", "exp_avg_sq"
MIN_QUANTISED, BLOCK = 4096, 256  # numbers; as in bitsandbytes, small tensors stay fp32


class KahanAdamW(Optimizer):
    """As torch's fused AdamW, for bf16 parameters. No step waits for the device.

    Of each parameter it keeps `exp_avg` and `exp_avg_sq` in fp32, a bf16 `compensation`, and the counter `step` on the
    parameter's device. Where the attribute `found_inf`, a tensor, is not 0, a step changes nothing, bit for bit.
    """

    found_inf: Tensor | None = None
    _step_supports_amp_scaling = True  # torch's mark of those that take it

    def __init__(
        self,
        params: Iterable[dict[str, Any]] | Iterable[Tensor],
        lr: float = 1e-3,
        weight_decay: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        """Raises TypeError for parameters of another dtype."""
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps})
        others = {p.dtype for group in self.param_groups for p in group["params"]} - {torch.bfloat16}
        if others:
            raise TypeError(f"KahanAdamW is for parameters in bf16, not {', '.join(map(str, others))}")

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Updates the parameters that have a gradient, a part at a time: what is computed in fp32 stays small."""
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            for part in in_parts(parameters):
                self._update(parameters[part], group)

    def _update(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        states = [self._state_of(parameter) for parameter in parameters]
        rests, steps = ([state[name] for state in states] for name in ("compensation", "step"))
        means, squares = ([self._moment(state, name) for state in states] for name in MOMENTS)
        gradients = [p.grad.float() for p in parameters if p.grad is not None]
        (beta1, beta2), lr = group["betas"], group["lr"]

        next_steps = torch._foreach_add(steps, 1)
        next_means = torch._foreach_lerp(means, gradients, 1 - beta1)
        next_squares = torch._foreach_mul(squares, beta2)
        torch._foreach_addcmul_(next_squares, gradients, gradients, 1 - beta2)
        del gradients

        # The value decays, and moves by lr times the corrected mean over the corrected root plus eps.
        divisors = torch._foreach_sqrt(next_squares)
        torch._foreach_div_(divisors, torch._foreach_sqrt(_bias(beta2, next_steps)))
        torch._foreach_add_(divisors, group["eps"])
        torch._foreach_mul_(divisors, _bias(beta1, next_steps))
        values = torch._foreach_add([p.float() for p in parameters], rests)
        torch._foreach_mul_(values, 1 - lr * group["weight_decay"])
        torch._foreach_addcdiv_(values, next_means, divisors, -lr)
        del divisors

        rounded = [value.bfloat16() for value in values]
        torch._foreach_sub_(values, rounded)
        next_rests = [value.bfloat16() for value in values]
        olds, news = [*parameters, *rests, *steps], [*rounded, *next_rests, *next_steps]
        for name, moments in zip(MOMENTS, (next_means, next_squares), strict=True):
            for state, moment in zip(states, moments, strict=True):
                stored = self._stored(name, moment)
                olds += [state[key] for key in stored]
                news += stored.values()
        self._keep(olds, news)

    def _moment(self, state: dict[str, Tensor], name: str) -> Tensor:
        """The fp32 moment of a parameter."""
        return state[name]

    def _stored(self, name: str, moment: Tensor) -> dict[str, Tensor]:
        """What a parameter's state holds of an fp32 moment."""
        return {name: moment}

    def _keep(self, olds: list[Tensor], news: list[Tensor]) -> None:
        """Puts the new values in place of the old ones, unless the step is to be skipped."""
        if self.found_inf is None:
            torch._foreach_copy_(olds, news)
            return
        skipped = self.found_inf.to(torch.bool)
        for old, new in zip(olds, news, strict=True):
            torch.where(skipped, old, new, out=old)

    def _state_of(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            for name in MOMENTS:
                state |= self._stored(name, torch.zeros_like(parameter, dtype=torch.float32))
            state["compensation"] = torch.zeros_like(parameter)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores copies of what `state_dict` returned, every tensor in its own dtype."""
        super().load_state_dict(state_dict)
        # That has rounded the moments to the dtype of the parameters.
        indices = [index for group in state_dict["param_groups"] for index in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for index, parameter in zip(indices, parameters, strict=True):
            if index in state_dict["state"]:
                saved = state_dict["state"][index]
                self.state[parameter] = {key: value.to(parameter.device, copy=True) for key, value in saved.items()}


class KahanAdamW8bit(KahanAdamW):
    """The same with moments of 8 bits, quantised by bitsandbytes in blocks: codes under their names, and a scale each.

    Dynamic quantisation: https://arxiv.org/abs/2110.02861.
    """

    def _moment(self, state: dict[str, Tensor], name: str) -> Tensor:
        from bitsandbytes.functional import dequantize_blockwise

        if _scale(name) not in state:
            return state[name]
        code = _code(name, state[name].device)
        return dequantize_blockwise(state[name], absmax=state[_scale(name)], code=code, blocksize=BLOCK)

    def _stored(self, name: str, moment: Tensor) -> dict[str, Tensor]:
        from bitsandbytes.functional import quantize_blockwise

        if moment.numel() < MIN_QUANTISED:
            return {name: moment}
        codes, how = quantize_blockwise(moment, code=_code(name, moment.device), blocksize=BLOCK)
        return {name: codes, _scale(name): how.absmax}


@cache
def _code(name: str, device: torch.device) -> Tensor:
    """The values of the 256 codes of a moment: of both signs for means, of one for squares."""
    from bitsandbytes.functional import create_dynamic_map

    return create_dynamic_map(signed=name == "exp_avg").to(device)


def _scale(name: str) -> str:
    return f"{name}_scale"


def _bias(beta: float, steps: Sequence[Tensor]) -> list[Tensor]:
    """1 - beta ** step, without the digits that this difference would lose in fp32."""
    powers = torch._foreach_expm1(torch._foreach_mul(list(steps), math.log(beta)))
    return list(torch._foreach_neg(powers))
