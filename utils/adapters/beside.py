"""LoRAs that act beside a model for a while and leave no trace in it, as a speed LoRA does in previews.

Fusing a LoRA and subtracting it again would round the weights. Here the weights of layers are not touched at all: what
would be added to them acts on the outputs. Vectors and bare parameters are replaced, and come back as the same tensors.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.adapters.fitting import PATCH
from utils.adapters.lora import diff_target
from utils.adapters.lora_file import LoraFile, delta
from wan.modules.model import WanModel

Add = Callable[[Tensor, Tensor], Tensor]  # a layer's output and its input -> the output with something added


@dataclass(frozen=True)
class Chosen:
    """A LoRA on one transformer."""

    lora: LoraFile
    strength: float


@contextmanager
def beside(model: WanModel, loras: Sequence[Chosen], device: torch.device) -> Iterator[None]:
    """Inside, the model answers as if these LoRAs were fused into it; afterwards it is what it was, bit for bit.

    They act beside any adapter of the model, however its weights are stored. None is a control LoRA, and each must fit
    (`fitting`) the model as it was before a control widened it. Their matrices are on the `device` inside only, and the
    model's parameters must not be moved inside, but weights that are in a stream come and go.
    """
    with ExitStack() as undo:
        for chosen in loras:
            _put_on(model, chosen, device, undo)
        yield


def _put_on(model: WanModel, chosen: Chosen, device: torch.device, undo: ExitStack) -> None:
    """Puts one LoRA beside the model, until `undo` is closed."""
    pairs, strength = dict(chosen.lora.pairs), chosen.strength
    parameters = {name.replace(".base_layer", ""): value for name, value in model.named_parameters()}
    changes = {diff_target(key, parameters): diff for key, diff in chosen.lora.diffs.items()}
    for name in [name for name, pair in pairs.items() if name == PATCH or _is_vector(pair.down)]:
        changes[f"{name}.weight"] = delta(pairs.pop(name))  # small: it acts as a whole

    for name, pair in pairs.items():
        down, up = (matrix.flatten(1).to(device) for matrix in (pair.down, pair.up))
        undo.enter_context(_adding(model.get_submodule(name), partial(_add_pair, down, up, strength * pair.scale)))
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
    is_patch = {key: key.split(".")[0] == PATCH for key in (*lora.pairs, *lora.diffs)}
    parts = []
    for wanted in (True, False):
        pairs = {name: pair for name, pair in lora.pairs.items() if is_patch[name] == wanted}
        diffs = {key: diff for key, diff in lora.diffs.items() if is_patch[key] == wanted}
        parts.append(replace(lora, pairs=pairs, diffs=diffs, input_shapes=lora.input_shapes if wanted else {}))
    return parts[0], parts[1]


def _is_vector(matrix: Tensor) -> bool:
    """Whether it has one number in a row: the weight of a norm, also where it comes with a second dimension."""
    return matrix[0].numel() == 1


def _add_pair(down: Tensor, up: Tensor, scale: float, result: Tensor, x: Tensor) -> Tensor:
    """result + scale * x @ down^T @ up^T, in the dtype of x and in place, as adapters in training are computed."""
    hidden = F.linear(x, down.to(x.dtype)).flatten(0, -2)
    result.view(-1, result.shape[-1]).addmm_(hidden, up.to(x.dtype).T, alpha=scale)
    return result


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
