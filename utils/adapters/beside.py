"""LoRAs that act beside a model for a while and leave no trace in it, as a speed LoRA does in previews.

Fusing a LoRA and subtracting it again would round the weights. Here the weights of layers are not touched at all: what
would be added to them acts on the outputs. Vectors and bare parameters are replaced, and come back as the same tensors.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.adapters.dora import decomposed_change
from utils.adapters.lora import diff_target
from utils.adapters.lora_file import Factors, LoraFile, LoraPair, delta
from utils.adapters.peft import LoraLayer
from utils.storage.linear import QuantisedLinear
from wan.modules.model import WanModel
from wan.names import PATCH

Add = Callable[[Tensor, Tensor], Tensor]  # a layer's output and its input -> the output with something added


@dataclass(frozen=True)
class Chosen:
    """A LoRA on one transformer."""

    lora: LoraFile
    strength: float
    path: Path | None = None  # of its file, by which messages name it


@contextmanager
def beside(model: WanModel, loras: Sequence[Chosen], device: torch.device) -> Iterator[None]:
    """Inside, the model answers as if these LoRAs were fused into it; afterwards it is what it was, bit for bit.

    They act beside any adapter of the model, however its weights are stored. None is a control LoRA, and each must fit
    (`fitting`) the model as it was before a control widened it. Their matrices are on the `device` inside only, and the
    model's parameters must not be moved inside, but weights that are in a stream come and go.
    """
    with ExitStack() as undo:
        for number, chosen in enumerate(loras):
            _put_on(model, chosen, loras[:number], device, undo)
        yield


def _put_on(model: WanModel, chosen: Chosen, earlier: Sequence[Chosen], device: torch.device, undo: ExitStack) -> None:
    """Puts one LoRA beside the model, on top of the earlier ones, until `undo` is closed."""
    factors, magnitudes, strength = chosen.lora.factors, chosen.lora.magnitudes, chosen.strength
    parameters = {name.replace(".base_layer", ""): value for name, value in model.named_parameters()}
    changes = {diff_target(key, parameters): diff for key, diff in chosen.lora.diffs.items()}
    for name in [name for name, each in factors.items() if name == PATCH or math.prod(each.weight_shape[1:]) == 1]:
        change = delta(factors.pop(name))  # small: it acts as a whole
        if name in magnitudes:
            change = change.reshape(len(change), -1, *model.shape.patch_size)
            weight = parameters[f"{name}.weight"][:, : change.shape[1]].cpu().float()
            for other in earlier:
                weight = weight + _change(other, name, weight)
            change = _change(replace(chosen, strength=1.0), name, weight)
        changes[f"{name}.weight"] = change

    for name, each in factors.items():
        layer, moved = model.get_submodule(name), each.map(lambda matrix: matrix.to(device))
        if name in magnitudes:
            own, *before = (_of_layer(one, name, device) for one in (chosen, *earlier))
            undo.enter_context(_adding(layer, _Decomposed(name, _base_of(layer), own, before)))
        elif isinstance(moved, LoraPair):
            down, up = moved.down.flatten(1), moved.up.flatten(1)
            undo.enter_context(_adding(layer, partial(_add_pair, down, up, strength * moved.scale)))
        else:
            undo.enter_context(_adding(layer, partial(_add_factors, moved, strength)))
    for target, change in changes.items():
        change = change.to(device).float() * strength
        name, _, role = target.rpartition(".")
        if name == PATCH and role == "weight":
            change = change.reshape(len(change), -1, *model.shape.patch_size)
            undo.enter_context(_adding(model.get_submodule(name), partial(_add_convolution, change)))
        elif role == "weight" and not _is_vector(change):
            undo.enter_context(_adding(model.get_submodule(name), partial(_add_product, change.flatten(1))))
        else:
            undo.enter_context(_changed(parameters[target], change))


def split_patch(lora: LoraFile) -> tuple[LoraFile, LoraFile]:
    """What of a LoRA is for the patch embedding, which a control LoRA widens, and what is for everything else."""
    return lora.part(_is_of_patch), lora.part(lambda name: not _is_of_patch(name))


def _is_of_patch(name: str) -> bool:
    return name.split(".")[0] == PATCH


def _is_vector(matrix: Tensor) -> bool:
    """Whether it has one number in a row: the weight of a norm, also where it comes with a second dimension."""
    return matrix[0].numel() == 1


def _add_pair(down: Tensor, up: Tensor, scale: float, result: Tensor, x: Tensor) -> Tensor:
    """result + scale * x @ down^T @ up^T, in the dtype of x and in place, as adapters in training are computed."""
    hidden = F.linear(x, down.to(x.dtype)).flatten(0, -2)
    result.view(-1, result.shape[-1]).addmm_(hidden, up.to(x.dtype).T, alpha=scale)
    return result


def _add_factors(factors: Factors, strength: float, result: Tensor, x: Tensor) -> Tensor:
    """As `_add_product`, of a change that exists only while it is used: in full it takes as much as the weight."""
    return _add_product(delta(factors, strength).flatten(1), result, x)


@dataclass
class _Decomposed:
    """DoRA beside a layer, whose weight is looked at when it is there: result + strength (W' - W) x.

    W is the weight with the earlier LoRAs, as if these were fused.
    """

    name: str
    base: nn.Linear
    chosen: Chosen
    earlier: Sequence[Chosen]

    def __call__(self, result: Tensor, x: Tensor) -> Tensor:
        base = self.base
        weight = base.values(torch.float32) if isinstance(base, QuantisedLinear) else base.weight.float()
        for chosen in self.earlier:
            weight = weight + _change(chosen, self.name, weight)
        return _add_product(_change(self.chosen, self.name, weight), result, x)


def _of_layer(chosen: Chosen, name: str, device: torch.device) -> Chosen:
    """What of a LoRA is for one layer, on the device."""
    part = chosen.lora.part(lambda key: key in (name, f"{name}.diff"))
    return replace(chosen, lora=part.map(lambda tensor: tensor.to(device)))


def _change(chosen: Chosen, name: str, weight: Tensor) -> Tensor:
    """What a LoRA changes of the weight (out, in) of a layer, at its strength."""
    lora, change = chosen.lora, torch.zeros_like(weight)
    if (factors := lora.factors.get(name)) is not None:
        change = delta(factors.map(lambda matrix: matrix.to(weight.device))).view_as(weight)
        if name in lora.magnitudes:
            change = decomposed_change(weight, change, lora.magnitudes[name])
    if (diff := lora.diffs.get(f"{name}.diff")) is not None:
        change = change + diff.to(weight.device).float().view_as(weight)
    return change * chosen.strength


def _base_of(layer: nn.Module) -> nn.Linear:
    """The layer that holds the weight, below any adapter in training."""
    base = layer.get_base_layer() if isinstance(layer, LoraLayer) else layer
    assert isinstance(base, nn.Linear)
    return base


def _add_product(change: Tensor, result: Tensor, x: Tensor) -> Tensor:
    return result + F.linear(x, change.to(x.dtype))


def _add_convolution(change: Tensor, result: Tensor, x: Tensor) -> Tensor:
    """`change` (out, in, ...) of the patch embedding, whose patches do not overlap; x may have inputs after its own."""
    return result + F.conv3d(x[:, : change.shape[1]], change.to(x.dtype), stride=change.shape[2:])


@contextmanager
def _adding(layer: nn.Module, add: Add) -> Iterator[None]:
    """Inside, the layer's answer is what `add` makes of it. Parameter names and hooks stay."""
    before, own = layer.forward, vars(layer).get("forward")
    layer.forward = lambda x: add(before(x), x)
    try:
        yield
    finally:
        del layer.forward
        if own is not None:
            layer.forward = own


@contextmanager
def _changed(parameter: nn.Parameter, change: Tensor) -> Iterator[None]:
    """Inside, the change is added to the parameter, in fp32 and rounded to its dtype."""
    before = parameter.data
    parameter.data = (before.float() + change.view_as(before)).to(before.dtype)
    try:
        yield
    finally:
        parameter.data = before
