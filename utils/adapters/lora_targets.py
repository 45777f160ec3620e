"""What the programs that read LoRA files can apply, and LoRAs brought to what one of them can.

    ComfyUI      pairs, LoHa, LoKr, its own DoRA, full changes of the weight and bias of any layer. No bare parameters:
                 its patcher leaves out those of modules that contain others, as modulation and img_emb.emb_pos are
    diffusers    pairs, and changes of the biases of their layers. Nothing that widens a layer
    PEFT         the same, and its own DoRA where all layers have it
    WanTraining  pairs

Sources: `ModelPatcher._load_list`, `model_lora_keys_unet` and the weight adapters of ComfyUI v0.3.77, the Wan loader of
diffusers 0.42, LoraConfig of PEFT 0.21.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from utils.adapters.dora import COMFY, PEFT, Magnitude
from utils.adapters.lora_file import Factors, LoraError, LoraFile, LoraPair, delta
from utils.adapters.lycoris import LOKR
from wan.names import PATCH, is_parameter

KERNEL = (1, 2, 2)  # of the patch embedding, in every Wan
KERNELS = (PATCH, "vace_patch_embedding")  # the convolutions


@dataclass(frozen=True)
class Target:
    """A program, for people, and what it can apply besides pairs."""

    program: str
    layers: bool = False  # full changes of weights and biases of layers
    biases: bool = False  # changes of the biases of layers that have a pair
    lycoris: bool = False
    widened: bool = True
    dora: str = ""  # whose rule


TARGETS = {
    "comfy": Target("ComfyUI", layers=True, lycoris=True, dora=COMFY),
    "kohya": Target("ComfyUI", layers=True, lycoris=True, dora=COMFY),
    "wantraining": Target("WanTraining"),
    "diffusers": Target("diffusers", biases=True, widened=False),
    "peft": Target("PEFT", biases=True, widened=False, dora=PEFT),
}


def check_kinds(lora: LoraFile, target: Target) -> None:
    """Raises LoraError for kinds of changes that the target has no way to hold, with what can be done."""
    if lora.lycoris and not target.lycoris:
        kinds = " and ".join(sorted({each.kind for each in lora.lycoris.values()}))
        raise LoraError(
            f"the layout that {target.program} reads holds no {kinds}. Fold it into plain LoRA: --fold RANK."
        )
    others = {magnitude.rule for magnitude in lora.magnitudes.values()} - {target.dora}
    if others:
        differs = "PEFT divides by the length of the changed weight, ComfyUI by that of the unchanged one"
        why = differs if target.dora else f"{target.program} cannot load DoRA of Wan"
        rule = " and ".join(sorted(others))
        raise LoraError(f"this is a DoRA of {rule}: {why}. Fold it into plain LoRA: --fold RANK --base FILE.")
    if target.dora == PEFT and lora.magnitudes and lora.magnitudes.keys() != lora.pairs.keys():
        raise LoraError("PEFT has DoRA in all layers or in none. Fold it into plain LoRA: --fold RANK --base FILE.")
    if lora.input_shapes and not target.widened:
        raise LoraError(f"{target.program} cannot load a control LoRA: it does not widen {min(lora.input_shapes)}.")


def adapt(lora: LoraFile, target: Target) -> LoraFile:
    """The same change in the form that the target can apply, as far as there is one.

    ComfyUI widens a layer for a pair alone, and PEFT and WanTraining have pairs alone: there a full change of a matrix
    becomes a pair of full rank, which is exact, and so does a LoHa or LoKr that widens a layer. PEFT's matrices of a
    convolution have its axes. ComfyUI adds a full change only if it has the shape of the weight, and knows no kernels
    of three dimensions in LoHa and LoKr: it would take them for another change.
    """
    pairs, shapes = dict(lora.pairs), dict(lora.input_shapes)
    diffs = {key: _shaped(key, diff) for key, diff in lora.diffs.items()}
    lycoris = {name: each.flattened() if name in KERNELS else each for name, each in lora.lycoris.items()}
    magnitudes = {name: _aligned(name, each) for name, each in lora.magnitudes.items()}
    for key, diff in lora.diffs.items():
        name, _, role = key.rpartition(".")
        is_matrix = role == "diff" and not is_parameter(name) and diff.ndim > 1 and diff[0].numel() > 1
        if is_matrix and (not target.layers or name in shapes):
            pairs[name] = _exact_pair(diffs.pop(key))
    for name in sorted(shapes.keys() & lycoris.keys()):
        pairs[name] = _exact_pair(_as_kernels(delta(lycoris.pop(name))))
    if not target.layers:
        pairs |= {name: _unflattened(pairs[name]) for name in KERNELS if name in pairs}
    return replace(lora, pairs=pairs, diffs=diffs, input_shapes=shapes, lycoris=lycoris, magnitudes=magnitudes)


def unsupported(lora: LoraFile, target: Target) -> list[str]:
    """The keys of the full changes that the target cannot apply."""
    return [key for key in sorted(lora.diffs) if not _applies(key, lora, target)]


def share(lora: LoraFile, keys: Iterable[str]) -> float | None:
    """How much of the squared change of all weights these full changes are; None where that depends on the base."""
    if lora.magnitudes:
        return None
    whole = sum(map(squared_norm, lora.factors.values())) + sum(map(_square, lora.diffs.values()))
    return sum(_square(lora.diffs[key]) for key in keys) / whole if whole else 0.0


def squared_norm(factors: Factors) -> float:
    """|change|^2 of a weight, in fp64. Of a pair that is tr((up^T up)(down down^T)), whose matrices are small."""
    if isinstance(factors, LoraPair):
        down, up = factors.down.double().flatten(1), factors.up.double().flatten(1)
        square = ((up.T @ up) * (down @ down.T)).sum().item()
    elif factors.kind == LOKR:
        square = _square(factors.whole("lokr_w1")) * _square(factors.whole("lokr_w2", "lokr_t2"))
    else:
        square = _square(factors.product())
    return square * factors.scale**2


def _applies(key: str, lora: LoraFile, target: Target) -> bool:
    name, _, role = key.rpartition(".")
    if is_parameter(name):
        return False
    if target.layers:
        return True
    return target.biases and role == "diff_b" and name in lora.pairs and lora.pairs[name].scale != 0


def _square(tensor: Tensor) -> float:
    return tensor.double().square().sum().item()


def _exact_pair(diff: Tensor) -> LoraPair:
    """A full change (out, in, ...) as a pair: one of its matrices is the identity."""
    out, inputs = diff.flatten(1).shape
    ones = [1] * (diff.ndim - 2)
    if out <= inputs:
        return LoraPair(diff, _identity(out, diff).reshape(out, out, *ones), float(out))
    down = _identity(inputs, diff).reshape(inputs, *diff.shape[1:])
    return LoraPair(down, diff.flatten(1).reshape(out, inputs, *ones), float(inputs))


def _identity(size: int, like: Tensor) -> Tensor:
    return torch.eye(size).to(like.dtype)


def _unflattened(pair: LoraPair) -> LoraPair:
    return replace(pair, down=_as_kernels(pair.down), up=pair.up.reshape(len(pair.up), pair.rank, 1, 1, 1))


def _as_kernels(matrix: Tensor) -> Tensor:
    """(rows, in * ...) as (rows, in, *KERNEL)."""
    if matrix[0].numel() % math.prod(KERNEL):
        raise LoraError(f"a change of {PATCH} has {matrix[0].numel()} numbers for an output, so it is of no Wan.")
    return matrix.reshape(len(matrix), -1, *KERNEL)


def _shaped(key: str, diff: Tensor) -> Tensor:
    """A full change in the shape of what it changes: vectors and kernels may come with other axes."""
    name, _, role = key.rpartition(".")
    if is_parameter(name):
        return diff
    if role == "diff_b" or diff[0].numel() == 1:
        return diff.flatten()
    return _as_kernels(diff) if name in KERNELS else diff


def _aligned(name: str, magnitude: Magnitude) -> Magnitude:
    """A magnitude with the axes that its program expects: ComfyUI broadcasts it, PEFT has its own."""
    ones, values = [1] * len(KERNEL) if name in KERNELS else [], magnitude.values
    if magnitude.rule == PEFT:
        return replace(magnitude, values=values.reshape(1, -1, *ones) if ones else values.flatten())
    shape = (1, -1) if len(values) == 1 else (-1, 1)  # for each input, or for each output
    return replace(magnitude, values=values.reshape(*shape, *ones))
