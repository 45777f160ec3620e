"""LoRA on a model: choosing modules, adding adapters, who speaks, and what of an adapter goes into a file.

Adapters are PEFT's. For plain LoRA on linear layers their forward is replaced by one that computes in the dtype of the
activations, with matrices kept in a dtype of their own, and adds in place.
"""

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from types import MethodType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.adapters.lora_file import LoraFile, LoraPair
from utils.adapters.peft import LoraLayer, LoraLinear, inject_lora
from utils.adapters.projection import is_plain
from utils.common.errors import UserError
from wan.modules.model import WanModel
from wan.names import PATCH

# Named sets of layers; every other target is a pattern over the names inside a block ("self_attn.q", "ffn.*"), and over
# the full names.
TARGETS = {"attn": ("self_attn.*", "cross_attn.*"), "all-linear": ("*",)}
ADAPTER = "default"  # what PEFT calls the only adapter of a model


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


def select_modules(model: WanModel, targets: Sequence[str], blocks: str | None = None) -> list[str]:
    """The names of the linear layers that are meant: those inside `model.blocks`, and those of the image embedding.

    Never head or other embeddings. The image embedding (img_emb.proj.1 and img_emb.proj.3), where the model has one, is
    in no block: it is not meant where `blocks`, as `parse_blocks` reads it, chooses some. `targets` are named sets
    ("attn", "all-linear") or patterns over names. Raises UserError for a pattern that matches nothing.
    """
    numbers = parse_blocks(blocks, len(model.blocks))
    inner = {
        f"blocks.{index}.{name}": name
        for index in sorted(numbers)
        for name, module in model.blocks[index].named_modules()
        if _is_linear(name, module)
    }
    if blocks is None:
        inner |= {name: name for name, module in model.named_modules() if _is_image_layer(name, module)}
    chosen: set[str] = set()
    for target in targets:
        patterns = TARGETS.get(target, (target,))
        matched = {full for full, name in inner.items() if any(_matches(name, full, pattern) for pattern in patterns)}
        if not matched:
            known = f"{', '.join(TARGETS)}, or patterns over {', '.join(dict.fromkeys(inner.values()))}"
            raise UserError(f"lora_target {target!r} matches no layer; known: {known}")
        chosen |= matched
    return [name for name in inner if name in chosen]


def add_lora(
    model: nn.Module,
    names: list[str],
    rank: int,
    alpha: float,
    adapter: str = ADAPTER,
    dtype: torch.dtype = torch.float32,
) -> list[nn.Parameter]:
    """Puts a fresh adapter, which changes nothing yet, on these modules; returns its parameters, of this dtype."""
    with warnings.catch_warnings():
        # Several adapters on one base are what is wanted here.
        warnings.filterwarnings("ignore", "Already found a `peft_config` attribute", UserWarning)
        inject_lora(model, names, adapter, rank, alpha)
    parameters = []
    for layer in adapted_layers(model, adapter).values():
        for parameter in (layer.lora_A[adapter].weight, layer.lora_B[adapter].weight):
            parameter.data = parameter.data.to(dtype)
            parameters.append(parameter)
        if isinstance(layer, LoraLinear) and is_plain(layer, adapter):
            layer.forward = MethodType(_forward_in_place, layer)
    return parameters


def adapted_layers(model: nn.Module, adapter: str | None = None) -> dict[str, LoraLayer]:
    """The adapted layers by name: of one adapter, or of any."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    return {name: layer for name, layer in layers.items() if adapter is None or adapter in layer.lora_A}


def adapter_parameters(model: nn.Module, adapter: str | None = ADAPTER) -> dict[str, nn.Parameter]:
    """The parameters of an adapter, or of all, by their names in the model."""
    own = "." if adapter is None else f".{adapter}."
    return {name: p for name, p in model.named_parameters() if "lora_" in name and own in name}


@contextmanager
def speaking(model: nn.Module, adapter: str | None) -> Iterator[None]:
    """Inside, the model answers with this adapter, or as its base for None. Spans may be nested.

    Forward and backward belong into one span: a checkpointed block runs again in the backward pass.
    """
    changed = []
    for layer in _adapted(model):
        before = layer.disable_adapters, list(layer.active_adapters)
        wanted = (False, [adapter]) if adapter in layer.lora_A else (True, before[1])
        if before != wanted:
            changed.append((layer, *before))
            _switch(layer, *wanted)
    try:
        yield
    finally:
        for layer, disabled, active in changed:
            _switch(layer, disabled, active)


def let_speak(model: nn.Module, adapter: str) -> None:
    """From here on the model answers with this adapter, outside of spans; only that is trainable."""
    for layer in adapted_layers(model, adapter).values():
        _switch(layer, False, [adapter])


def _switch(layer: LoraLayer, disabled: bool, active: list[str]) -> None:
    if active != list(layer.active_adapters):
        layer.set_adapter(active)
    if disabled != layer.disable_adapters:
        layer.enable_adapters(not disabled)


def extract_lora(
    model: nn.Module, metadata: dict[str, str], values: Mapping[str, Tensor] | None = None, adapter: str = ADAPTER
) -> LoraFile:
    """An adapter as the content of a LoRA file: copies on the CPU, of the `values` by parameter name where given."""
    values = adapter_parameters(model, adapter) if values is None else values
    pairs, input_shapes = {}, {}
    for name, layer in adapted_layers(model, adapter).items():
        down, up = (
            values[f"{name}.{matrix}.{adapter}.weight"].detach().cpu().clone() for matrix in ("lora_A", "lora_B")
        )
        pairs[name] = LoraPair(down, up, float(layer.lora_alpha[adapter]))
        if name == PATCH:
            input_shapes[name] = tuple(layer.get_base_layer().weight.shape)
    return LoraFile(pairs, input_shapes=input_shapes, metadata=metadata)


def widen_patch_embedding(model: WanModel, in_dim: int) -> None:
    """Gives the patch embedding `in_dim` input channels; the new ones have zero weights and change nothing yet.

    Raises UserError where it already has more.
    """
    old = model.patch_embedding
    if isinstance(old, LoraLayer) and old.get_base_layer().in_channels == in_dim:
        return  # another adapter of this model has widened it
    if in_dim < old.in_channels:
        raise UserError(f"the patch embedding has {old.in_channels} input channels, more than the {in_dim} asked for")
    wide = nn.Conv3d(in_dim, old.out_channels, model.shape.patch_size, model.shape.patch_size, device="meta")
    wide.weight = nn.Parameter(pad_inputs(old.weight.detach(), in_dim), requires_grad=False)
    wide.bias = old.bias
    model.patch_embedding = wide


def pad_inputs(weight: Tensor, in_dim: int) -> Tensor:
    """A convolution's weight (out, in, ...) with zeros for inputs up to `in_dim`."""
    return F.pad(weight, (0, 0, 0, 0, 0, 0, 0, in_dim - weight.shape[1]))


def diff_target(key: str, parameters: Mapping[str, nn.Parameter]) -> str:
    """The parameter that a delta is added to: "x.diff_b" -> "x.bias", "x.diff" -> "x.weight", or x itself."""
    name, _, role = key.rpartition(".")
    if role == "diff_b":
        return f"{name}.bias"
    return name if name in parameters else f"{name}.weight"


def _is_linear(name: str, module: nn.Module) -> bool:
    """Whether this is a linear layer of the base model, also one that has an adapter already."""
    return isinstance(module, nn.Linear | LoraLinear) and not re.search(r"\.(base_layer|lora_[AB])\b", name)


def _is_image_layer(name: str, module: nn.Module) -> bool:
    return name.startswith("img_emb.") and _is_linear(name, module)


def _matches(name: str, full: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(full, pattern)


def _adapted(module: nn.Module) -> Iterator[LoraLayer]:
    """The adapted layers. Most modules are inside of them and are not visited: every step looks for the layers."""
    for child in module.children():
        if isinstance(child, LoraLayer):
            yield child
        else:
            yield from _adapted(child)


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
