"""LoRA on a model: which modules, adding adapters, moving them from and to files, fusing them into the weights.

Adapters are PEFT's; for plain LoRA on linear layers their forward is replaced by one that computes in the dtype of the
activations, with matrices kept in fp32, and adds in place.
"""

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from fnmatch import fnmatchcase
from types import MethodType

import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from utils.adapters.lora_file import LoraFile, LoraPair, delta
from utils.common.errors import UserError

# Named sets of layers; every other target is a pattern over the names inside a block ("self_attn.q", "ffn.*").
TARGETS = {"attn": ("self_attn.*", "cross_attn.*"), "all-linear": ("*",)}
ADAPTER = "default"
PATCH_WEIGHT = "patch_embedding.weight"


def parse_blocks(text: str | None, num_blocks: int) -> set[int]:
    """Block numbers of "1", "0,2", "4-9" or a mixture; None means all. Raises UserError for anything else."""
    if text is None:
        return set(range(num_blocks))
    chosen: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if not match:
            raise UserError(f"lora_blocks {text!r} is not understood; write 1 or 0,2 or 4-9")
        first, last = int(match[1]), int(match[2] or match[1])
        if not first <= last < num_blocks:
            raise UserError(f"lora_blocks {part.strip()!r}: the model has blocks 0 to {num_blocks - 1}")
        chosen.update(range(first, last + 1))
    return chosen


def select_modules(model: nn.Module, targets: Sequence[str], blocks: str | None = None) -> list[str]:
    """The names of the linear layers inside `model.blocks` that are meant, never head or embeddings.

    `targets` are named sets ("attn", "all-linear") or patterns over names; `blocks` is as `parse_blocks` reads it.
    Raises UserError for a pattern that matches nothing.
    """
    numbers = parse_blocks(blocks, len(model.blocks))
    inner = {
        f"blocks.{index}.{name}": name
        for index in sorted(numbers)
        for name, module in model.blocks[index].named_modules()
        if isinstance(module, nn.Linear)
    }
    chosen: set[str] = set()
    for target in targets:
        patterns = TARGETS.get(target, (target,))
        matched = {full for full, name in inner.items() if any(_matches(name, full, pattern) for pattern in patterns)}
        if not matched:
            known = f"{', '.join(TARGETS)}, or patterns over {', '.join(dict.fromkeys(inner.values()))}"
            raise UserError(f"lora_target {target!r} matches no layer; known: {known}")
        chosen |= matched
    return [name for name in inner if name in chosen]


def add_lora(model: nn.Module, names: list[str], rank: int, alpha: float) -> list[nn.Parameter]:
    """Puts a fresh adapter, which changes nothing yet, on these modules; returns its fp32 parameters."""
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=alpha, target_modules=names), model, ADAPTER)
    parameters = []
    for layer in _layers(model).values():
        for parameter in (layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight):
            parameter.data = parameter.data.float()
            parameters.append(parameter)
        if isinstance(layer, LoraLinear):
            layer.forward = MethodType(_forward_in_place, layer)
    return parameters


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Inside, the model answers as its base does. Scopes may be nested."""
    layers = [layer for layer in _layers(model).values() if not layer.disable_adapters]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def extract_lora(model: nn.Module, metadata: dict[str, str]) -> LoraFile:
    """The adapter's matrices, copied to the CPU, as the content of a LoRA file."""
    pairs, input_shapes = {}, {}
    for name, layer in _layers(model).items():
        down, up = (matrix[ADAPTER].weight.detach().cpu().clone() for matrix in (layer.lora_A, layer.lora_B))
        pairs[name] = LoraPair(down, up, float(layer.lora_alpha[ADAPTER]))
        if name == "patch_embedding":
            input_shapes[name] = tuple(layer.get_base_layer().weight.shape)
    return LoraFile(pairs, input_shapes=input_shapes, metadata=metadata)


@torch.no_grad()
def load_lora(model: nn.Module, lora: LoraFile) -> None:
    """Starts the adapter from a file of the same modules, ranks and alpha. Raises UserError where they differ."""
    layers = _layers(model)
    for ours, theirs, fault in ((layers, lora.pairs, "lacks"), (lora.pairs, layers, "adapts, unlike this run,")):
        if absent := [name for name in ours if name not in theirs]:
            more = f"{absent[0]} ({len(absent)} such modules)"
            raise UserError(f"the LoRA to start from {fault} {more}; it must have the same targets")
    if lora.diffs:
        raise UserError(f"the LoRA to start from holds more than pairs ({next(iter(lora.diffs))}); fuse it instead")
    for name, layer in layers.items():
        pair, rank, alpha = lora.pairs[name], layer.r[ADAPTER], layer.lora_alpha[ADAPTER]
        # Files hold alpha as fp32.
        if pair.rank != rank or not math.isclose(pair.effective_alpha, alpha, rel_tol=1e-6):
            raise UserError(
                f"the LoRA to start from has rank {pair.rank} and alpha {pair.effective_alpha:g}, this run {rank} and "
                f"{alpha:g}; pass --lora_rank {pair.rank} --lora_alpha {pair.effective_alpha:g}"
            )
        for matrix, tensor in ((layer.lora_A, pair.down), (layer.lora_B, pair.up)):
            weight = matrix[ADAPTER].weight
            if weight.shape != tensor.shape:
                shapes = f"{tuple(tensor.shape)}, the model needs {tuple(weight.shape)}"
                raise UserError(f"the LoRA to start from does not fit at {name}: {shapes}")
            weight.copy_(tensor)


@torch.no_grad()
def fuse_lora(model: nn.Module, lora: LoraFile, weight: float = 1.0) -> None:
    """Adds `weight` times a LoRA to the weights as they are, in fp32, then rounds to their dtype; widens inputs first.

    Raises UserError, before anything is changed, for a module the model lacks or a shape that does not fit; on the
    meta device that is all that it costs.
    """
    widened = _widened(lora)
    parameters = dict(model.named_parameters())
    pairs = {f"{name}.weight": pair for name, pair in lora.pairs.items()}
    extras = {_extra_target(key, parameters): tensor for key, tensor in lora.diffs.items()}
    shapes = {target: (len(pair.up), *pair.down.shape[1:]) for target, pair in pairs.items()}
    shapes |= {target: tuple(tensor.shape) for target, tensor in extras.items()}
    for target, shape in shapes.items():
        if target not in parameters:
            raise UserError(f"the LoRA adapts {target}, which this model does not have; is it for another Wan?")
        needed = tuple(parameters[target].shape)
        if target == PATCH_WEIGHT and widened is not None:
            needed = (needed[0], widened, *needed[2:])
        if (shape[0], math.prod(shape[1:])) != (needed[0], math.prod(needed[1:])):  # convolutions come flattened too
            raise UserError(f"the LoRA has {shape} at {target}, the model {needed}; is it for another Wan?")
    if widened is not None:
        widen_patch_embedding(model, widened)
        parameters[PATCH_WEIGHT] = model.patch_embedding.weight
    for target, pair in pairs.items():
        device = parameters[target].device
        pair = replace(pair, down=pair.down.to(device), up=pair.up.to(device))
        _add(parameters[target], delta(pair, weight))
    for target, tensor in extras.items():
        _add(parameters[target], tensor.to(parameters[target].device).float() * weight)


def _widened(lora: LoraFile) -> int | None:
    """The number of input channels that a control LoRA needs, None for any other."""
    if other := [name for name in lora.input_shapes if name != "patch_embedding"]:
        raise UserError(f"the LoRA widens {other[0]}; only the patch embedding can be widened")
    shape = lora.input_shapes.get("patch_embedding")
    return None if shape is None else shape[1]


def _add(parameter: nn.Parameter, change: Tensor) -> None:
    parameter.copy_(parameter.float() + change.view_as(parameter))


def widen_patch_embedding(model: nn.Module, in_dim: int) -> None:
    """Gives the patch embedding `in_dim` input channels; the new ones have zero weights and change nothing yet.

    Raises UserError where it has more already.
    """
    old = model.patch_embedding
    if in_dim < old.in_channels:
        raise UserError(f"the patch embedding has {old.in_channels} input channels, more than the {in_dim} asked for")
    wide = nn.Conv3d(in_dim, old.out_channels, old.kernel_size, old.stride, device="meta")
    padded = F.pad(old.weight.detach(), (0, 0, 0, 0, 0, 0, 0, in_dim - old.in_channels))
    wide.weight, wide.bias = nn.Parameter(padded, requires_grad=False), old.bias
    model.patch_embedding = wide


def _extra_target(key: str, parameters: dict[str, nn.Parameter]) -> str:
    """The parameter that a delta is added to: "x.diff_b" -> "x.bias", "x.diff" -> "x.weight", or x itself."""
    name, _, role = key.rpartition(".")
    if role == "diff_b":
        return f"{name}.bias"
    return name if name in parameters else f"{name}.weight"


def _matches(name: str, full: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(full, pattern)


def _layers(model: nn.Module) -> dict[str, LoraLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def _forward_in_place(layer: LoraLinear, x: Tensor) -> Tensor:
    """base(x) + scaling * x @ A^T @ B^T: PEFT's forward of plain LoRA, added in place by the second product."""
    flat = x.reshape(-1, x.shape[-1])
    result = layer.base_layer(flat)
    if not layer.disable_adapters:
        for name in layer.active_adapters:
            down, up = layer.lora_A[name].weight, layer.lora_B[name].weight
            hidden = flat @ down.to(x.dtype).T
            result = result.addmm_(hidden, up.to(x.dtype).T, alpha=layer.scaling[name])
    return result.view(*x.shape[:-1], result.shape[-1])
