"""Adapters that start from a LoRA file: whether one can, the options with which one can, and how it does."""

import math
from collections.abc import Collection, Sequence
from contextlib import suppress
from typing import Any

import torch

from utils.adapters.lora import ADAPTER, adapted_layers, select_modules
from utils.adapters.lora_file import LoraFile
from utils.common.errors import UserError
from wan.modules.model import WanModel
from wan.names import PATCH

# What a file is tried for, before the names of its modules, from the shortest.
_NAMED = (("attn",), ("all-linear",), ("attn", "ffn.*"), ("self_attn.*",), ("cross_attn.*",), ("ffn.*",))
_MOST_NAMES = 16  # that a message lists
_SMALLEST_ALPHA = 0.001  # that --lora_alpha takes


def differences(lora: LoraFile, modules: Collection[str], rank: int, alpha: float) -> list[str]:
    """How a file differs from an adapter of this rank and alpha on these modules, for people; shapes are not compared.

    An adapter on the patch embedding is that of a control LoRA.
    """
    found = []
    if other := [name for name in lora.factors if name not in modules]:
        found.append(f"it adapts {_some(other)} that this run does not")
    if lacking := [name for name in modules if name not in lora.factors]:
        found.append(f"it lacks {_some(lacking)} that this run adapts")
    if lora.extras:
        found.append(f"it holds more than LoRA pairs ({lora.extras[0]})")
    if _is_scaled_otherwise(lora, rank, alpha):
        (ranks, alphas), shown = _scales(lora), []
        for values in (ranks, alphas):
            shown.append(f"{values[0]:g}" if len(values) == 1 else f"{values[0]:g} to {values[-1]:g}")
        found.append(f"it has rank {shown[0]} and alpha {shown[1]}, this run {rank} and {alpha:g}")
    return found


def options_for(
    lora: LoraFile, model: WanModel, modules: Collection[str], rank: int, alpha: float
) -> dict[str, Any] | None:
    """The options to change so that an adapter of this rank and alpha, on these modules, is like the file.

    None where no options make one.
    """
    ranks, alphas = _scales(lora)
    uniform = not lora.extras and len(ranks) == 1 and alphas[-1] - alphas[0] <= 1e-6 * abs(alphas[0])
    if not uniform or alphas[0] < _SMALLEST_ALPHA or (PATCH in modules and PATCH not in lora.pairs):
        return None
    options: dict[str, Any] = {}
    if _is_scaled_otherwise(lora, rank, alpha):
        options = {"lora_rank": ranks[0], "lora_alpha": _readable(alphas[0])}
    if set(lora.pairs) != set(modules):
        if (found := targets_of(model, [name for name in lora.pairs if name != PATCH])) is None:
            return None
        options |= {"lora_target": found[0], "lora_blocks": found[1]}
        if PATCH in lora.pairs and PATCH not in modules:
            options["control_lora"] = True
    return options


@torch.no_grad()
def load_lora(model: WanModel, lora: LoraFile, adapter: str = ADAPTER) -> None:
    """Starts an adapter, in its own dtype, from a file of the same modules, ranks and alpha.

    Raises UserError, before anything changes, where they differ. What to do about that is said before, where adapters
    are planned (`utils.adapters.attach`).
    """
    layers = adapted_layers(model, adapter)
    first = next(iter(layers.values()))
    if found := differences(lora, layers.keys(), first.r[adapter], first.lora_alpha[adapter]):
        raise UserError(f"--init_lora: {'; '.join(found)}")
    copies = []
    for name, layer in layers.items():
        for matrix, tensor in ((layer.lora_A, lora.pairs[name].down), (layer.lora_B, lora.pairs[name].up)):
            weight = matrix[adapter].weight
            if weight.shape != tensor.shape:
                shapes = f"it has {tuple(tensor.shape)}, the model needs {tuple(weight.shape)}"
                raise UserError(f"--init_lora does not fit at {name}: {shapes}")
            copies.append((weight, tensor))
    for weight, tensor in copies:
        weight.copy_(tensor)


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


def _scales(lora: LoraFile) -> tuple[list[int], list[float]]:
    """The different ranks and alphas of its pairs, from the smallest."""
    ranks, alphas = ({getattr(pair, name) for pair in lora.pairs.values()} for name in ("rank", "effective_alpha"))
    return sorted(ranks), sorted(alphas)


def _is_scaled_otherwise(lora: LoraFile, rank: int, alpha: float) -> bool:
    ranks, alphas = _scales(lora)
    # Files hold alpha as fp32.
    return any(each != rank for each in ranks) or any(not math.isclose(each, alpha, rel_tol=1e-6) for each in alphas)


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
