"""The optimizers by name: which library makes them, what they ask of a run, and what they keep of a parameter.

Each takes parameter groups as torch's do, with learning rate and weight decay. Libraries that are not always there are
imported where they are used.
"""

import importlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from utils.common.errors import UserError
from utils.storage.formats import need_bitsandbytes
from utils.training.kahan import KahanAdamW, KahanAdamW8bit
from wan.names import PATCH

Groups = list[dict[str, Any]]
ADAMW, PRODIGY, MUON, SCHEDULE_FREE = "adamw", "prodigy", "muon", "schedulefree"
EPSILON = 1e-8  # torch's and bitsandbytes' own
UP = ".lora_B."  # in the names of the up matrices; Muon is for these


@dataclass(frozen=True)
class OptimizerSpec:
    """The values that decide an update; `schedule` is one of SCHEDULES, `name` one of KINDS."""

    learning_rate: float
    weight_decay: float
    schedule: str
    warmup_steps: int
    total_steps: int
    name: str = ADAMW
    up_scale: float = 1.0  # of the learning rate, for up matrices (LoRA+, https://arxiv.org/abs/2402.12354)
    input_scale: float = 1.0  # and for the patch embedding
    epsilon: float = EPSILON  # of those that take one


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters by name that are updated alike, with `lr_scale` times the base learning rate."""

    parameters: Mapping[str, nn.Parameter]
    lr_scale: float = 1.0
    use_muon: bool = False


def groups_of(parameters: Mapping[str, nn.Parameter], spec: OptimizerSpec) -> list[ParameterGroup]:
    """The parameters of an adapter, put together where they are updated alike; mostly one group."""
    groups: dict[tuple[float, bool], dict[str, nn.Parameter]] = {}
    for name, parameter in parameters.items():
        is_up = UP in name
        scale = (spec.up_scale if is_up else 1.0) * (spec.input_scale if PATCH in name else 1.0)
        use_muon = spec.name == MUON and is_up and parameter.ndim == 2
        groups.setdefault((scale, use_muon), {})[name] = parameter
    return [ParameterGroup(found, scale, use_muon) for (scale, use_muon), found in groups.items()]


@dataclass(frozen=True)
class Kind:
    """What an optimizer asks of a run. `library` is what pip installs; torch and transformers are always there."""

    make: Callable[[Groups, int], Optimizer]  # of groups, and of the steps over which their rate rises
    library: str = ""
    requirement: str = ""
    takes_bf16: bool = False
    takes_epsilon: bool = False  # AdamW's, as a setting of its groups
    averages: bool = False  # what is to be used is not what is trained, but an average
    finds_rate: bool = False  # one rate for all parameters, by itself; --learning_rate is a factor on it
    settings: Mapping[str, float] = field(default_factory=dict)  # what its groups remember, and the least of each
    state_bytes: float = 8.0  # that it keeps of each number of an fp32 LoRA, about; its up matrices start at zero


def _adamw(groups: Groups, _: int) -> Optimizer:
    if _are_bf16(groups):
        return KahanAdamW(groups)
    return AdamW(groups, fused=True)


def _adamw8bit(groups: Groups, _: int) -> Optimizer:
    if _are_bf16(groups):
        return KahanAdamW8bit(groups)
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(groups)


def _adafactor(groups: Groups, _: int) -> Optimizer:
    from transformers.optimization import Adafactor

    # Its rate is that of the options, as AdamW's, and not one that it makes of the number of steps.
    return Adafactor(groups, lr=groups[0]["lr"], scale_parameter=False, relative_step=False, warmup_init=False)


def _prodigy(groups: Groups, warmup_steps: int) -> Optimizer:
    from prodigyopt import Prodigy

    # As its authors advise for diffusion models.
    return Prodigy(groups, use_bias_correction=True, safeguard_warmup=warmup_steps > 0)


def _lion(groups: Groups, _: int) -> Optimizer:
    from bitsandbytes.optim import Lion

    return Lion(groups)


def _schedule_free(groups: Groups, warmup_steps: int) -> Optimizer:
    from schedulefree import AdamWScheduleFree

    optimizer = AdamWScheduleFree(groups, warmup_steps=warmup_steps)  # steps of the warm-up weigh less in its average
    optimizer.train()
    return optimizer


def _muon(groups: Groups, _: int) -> Optimizer:
    """Muon for matrices of groups with `use_muon`, its updates as large as AdamW's, and AdamW for all others."""
    matrices = [_without_mark(group) for group in groups if group["use_muon"]]
    others = [_without_mark(group) for group in groups if not group["use_muon"]]
    parts: list[Optimizer] = []
    if matrices:
        parts.append(torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw"))
    if others:
        parts.append(AdamW(others, fused=True))
    return Joined(parts)


def _without_mark(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "use_muon"}


BITSANDBYTES = "bitsandbytes", '"bitsandbytes>=0.49,<0.52"'
KINDS = {
    ADAMW: Kind(_adamw, takes_bf16=True, takes_epsilon=True),
    "adamw8bit": Kind(_adamw8bit, *BITSANDBYTES, takes_bf16=True, takes_epsilon=True, state_bytes=2.1),
    "adafactor": Kind(_adafactor, state_bytes=0.25),
    PRODIGY: Kind(
        _prodigy,
        "prodigyopt",
        '"prodigyopt>=1.1.2,<2"',
        finds_rate=True,
        settings={"d": 0, "d_max": 0, "d_numerator": -math.inf, "k": 0},
        state_bytes=14,  # 16 of down matrices; of up matrices it keeps a single zero in place of their start
    ),
    "lion": Kind(_lion, *BITSANDBYTES, state_bytes=4),
    SCHEDULE_FREE: Kind(
        _schedule_free,
        "schedulefree",
        '"schedulefree>=1.4,<2"',
        averages=True,
        takes_epsilon=True,
        settings={"k": 0, "weight_sum": 0, "lr_max": -1, "scheduled_lr": 0},
    ),
    MUON: Kind(_muon, state_bytes=6),
}


class Joined(Optimizer):
    """Optimizers of different parameters as one."""

    def __init__(self, parts: Iterable[Optimizer]) -> None:
        self.parts = list(parts)
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Gives each part its groups of this optimizer, and the memory of all."""
        first = 0
        for part in self.parts:
            count = len(part.param_groups)
            part.param_groups = self.param_groups[first : first + count]
            part.state = self.state
            first += count

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for part in self.parts:
            part.step()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()


def check_library(name: str) -> None:
    """Raises UserError where an optimizer needs a package that is not installed, or does not work."""
    kind = KINDS[name]
    if kind.library == "bitsandbytes":
        need_bitsandbytes(f"--optimizer {name}")
    elif kind.library:
        try:
            importlib.import_module(kind.library)
        except (ImportError, OSError, RuntimeError) as error:
            reason = f"{kind.library}, which cannot be imported: {error}"
            raise UserError(f"--optimizer {name} needs {reason}\npip install {kind.requirement}") from None


def _are_bf16(groups: Groups) -> bool:
    """Raises TypeError for a mixture."""
    dtypes = {parameter.dtype for group in groups for parameter in group["params"]}
    if len(dtypes) > 1:
        raise TypeError(f"an optimizer is for parameters of one dtype, not {', '.join(sorted(map(str, dtypes)))}")
    return dtypes == {torch.bfloat16}


def make_optimizer(groups: Sequence[ParameterGroup], spec: OptimizerSpec) -> Optimizer:
    """The optimizer of that name. Raises TypeError for a mixture of dtypes."""
    settings: list[dict[str, Any]] = [
        {
            "params": list(group.parameters.values()),
            "lr": spec.learning_rate * group.lr_scale,
            "weight_decay": spec.weight_decay,
        }
        for group in groups
    ]
    if KINDS[spec.name].takes_epsilon:
        settings = [each | {"eps": spec.epsilon} for each in settings]
    if spec.name == MUON:
        settings = [each | {"use_muon": group.use_muon} for each, group in zip(settings, groups, strict=True)]
    return KINDS[spec.name].make(settings, spec.warmup_steps)
