"""Whether an adapter can start from a LoRA file, and the options with which one can."""

import math
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from utils.adapters.lora import select_modules
from utils.adapters.lora_file import LoraFile
from utils.common.errors import UserError
from wan.modules.model import WanModel
from wan.names import PATCH

# What a file is tried for, before the names of its modules, from the shortest.
_NAMED = (("attn",), ("all-linear",), ("attn", "ffn.*"), ("self_attn.*",), ("cross_attn.*",), ("ffn.*",))
_MOST_NAMES = 16  # that a message lists
_SMALLEST_ALPHA = 0.001  # that --lora_alpha takes


@dataclass(frozen=True)
class Misfit:
    """How a LoRA file differs from the adapter that is to start from it."""

    faults: Sequence[str]
    options: Mapping[str, Any] | None  # with which an adapter is like the file; None where no options make one


def compare(lora: LoraFile, model: WanModel, modules: Collection[str], rank: int, alpha: float) -> Misfit | None:
    """How the file differs from an adapter of this rank and alpha on these modules of a model; None where in nothing.

    An adapter on the patch embedding is that of a control LoRA. Shapes are not compared.
    """
    faults = []
    lacking = [name for name in modules if name not in lora.factors]
    other = [name for name in lora.factors if name not in modules]
    if other:
        faults.append(f"it adapts {_some(other)} that this run does not")
    if lacking:
        faults.append(f"it lacks {_some(lacking)} that this run adapts")
    if lora.extras:
        faults.append(f"it holds more than LoRA pairs ({lora.extras[0]})")
    ranks = sorted({pair.rank for pair in lora.pairs.values()})
    alphas = sorted({pair.effective_alpha for pair in lora.pairs.values()})
    # Files hold alpha as fp32.
    is_scaled_otherwise = ranks and not (
        ranks == [rank] and all(math.isclose(each, alpha, rel_tol=1e-6) for each in alphas)
    )
    if is_scaled_otherwise:
        own = [str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"]
        own += [f"{alphas[0]:g}" if len(alphas) == 1 else f"{alphas[0]:g} to {alphas[-1]:g}"]
        faults.append(f"it has rank {own[0]} and alpha {own[1]}, this run {rank} and {alpha:g}")
    if not faults:
        return None
    uniform = not lora.extras and len(ranks) == 1 and alphas[-1] - alphas[0] <= 1e-6 * abs(alphas[0])
    if not uniform or alphas[0] < _SMALLEST_ALPHA or (PATCH in modules and PATCH not in lora.pairs):
        return Misfit(faults, None)
    options: dict[str, Any] = {}
    if is_scaled_otherwise:
        options = {"lora_rank": ranks[0], "lora_alpha": _readable(alphas[0])}
    if other or lacking:
        inner = [name for name in lora.pairs if name != PATCH]
        if (found := targets_of(model, inner)) is None:
            return Misfit(faults, None)
        options |= {"lora_target": found[0], "lora_blocks": found[1]}
        if PATCH in other:
            options["control_lora"] = True
    return Misfit(faults, options)


def targets_of(model: WanModel, modules: Collection[str]) -> tuple[tuple[str, ...], str | None] | None:
    """The --lora_target and --lora_blocks (None: all) that mean exactly these modules; None where none short do."""
    wanted = set(modules)
    order = [name for name in select_modules(model, ("all-linear",)) if name in wanted]
    blocks = sorted({int(name.split(".")[1]) for name in order if name.startswith("blocks.")})
    some = None if len(blocks) in (0, len(model.blocks)) else _ranges(blocks)
    inner = tuple(dict.fromkeys(_inner(name) for name in order))
    for targets, within in [*((named, some) for named in (*_NAMED, inner)), (tuple(order), None)]:
        with suppress(UserError):
            if len(targets) <= _MOST_NAMES and set(select_modules(model, targets, within)) == wanted:
                return targets, within
    return None


def _some(names: Sequence[str]) -> str:
    return f"{names[0]}, a module" if len(names) == 1 else f"{len(names)} modules, such as {names[0]},"


def _inner(name: str) -> str:
    """The name of a layer inside its block; of one in no block its own."""
    return name.split(".", 2)[2] if name.startswith("blocks.") else name


def _ranges(numbers: Sequence[int]) -> str:
    """Sorted numbers as --lora_blocks takes them: "0,4-9"."""
    starts = [number for number in numbers if number - 1 not in numbers]
    ends = [number for number in numbers if number + 1 not in numbers]
    return ",".join(f"{a}" if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))


def _readable(alpha: float) -> float:
    """The number that a person would type for an alpha that a file holds as fp32."""
    short = float(f"{alpha:.6g}")
    return short if math.isclose(short, alpha, rel_tol=1e-7) else alpha
