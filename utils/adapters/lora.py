"""LoRA on a model: choosing modules, adding adapters, who speaks, reading and writing them, fusing them into weights.

Adapters are PEFT's. For plain LoRA on linear layers their forward is replaced by one that computes in the dtype of the
activations, with matrices kept in a dtype of their own, and adds in place.
"""

import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from types import MethodType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.adapters.dora import decomposed_change
from utils.adapters.lora_file import LoraFile, LoraPair, delta
from utils.adapters.peft import LoraLayer, LoraLinear, inject_lora
from utils.adapters.projection import is_plain
from utils.common.errors import UserError
from wan.modules.model import WanModel
from wan.names import PATCH

# Named sets of layers; every other target is a pattern over the names inside a block ("self_attn.q", "ffn.*"), and over
# the full names.
TARGETS = {"attn": ("self_attn.*", "cross_attn.*"), "all-linear": ("*",)}
ADAPTER = "default"  # what PEFT calls the only adapter of a model
PATCH_WEIGHT = f"{PATCH}.weight"


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
    for layer in _layers(model, adapter).values():
        for parameter in (layer.lora_A[adapter].weight, layer.lora_B[adapter].weight):
            parameter.data = parameter.data.to(dtype)
            parameters.append(parameter)
        if isinstance(layer, LoraLinear) and is_plain(layer, adapter):
            layer.forward = MethodType(_forward_in_place, layer)
    return parameters


def adapter_parameters(model: nn.Module, adapter: str = ADAPTER) -> dict[str, nn.Parameter]:
    """The parameters of an adapter by their names in the model."""
    return {name: p for name, p in model.named_parameters() if "lora_" in name and f".{adapter}." in name}


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
    for name, layer in _layers(model, adapter).items():
        down, up = (
            values[f"{name}.{matrix}.{adapter}.weight"].detach().cpu().clone() for matrix in ("lora_A", "lora_B")
        )
        pairs[name] = LoraPair(down, up, float(layer.lora_alpha[adapter]))
        if name == PATCH:
            input_shapes[name] = tuple(layer.get_base_layer().weight.shape)
    return LoraFile(pairs, input_shapes=input_shapes, metadata=metadata)


@torch.no_grad()
def load_lora(model: nn.Module, lora: LoraFile, adapter: str = ADAPTER) -> None:
    """Starts an adapter, in its own dtype, from a file of the same modules, ranks and alpha.

    Raises UserError, before anything changes, where they differ. What to do about that is said before, where adapters
    are planned (`utils.adapters.attach`).
    """
    if lora.extras:
        raise UserError(f"--init_lora holds more than LoRA pairs ({lora.extras[0]})")
    layers = _layers(model, adapter)
    faults = {"lacks": [name for name in layers if name not in lora.pairs]}
    faults["adapts, unlike this run,"] = [name for name in lora.pairs if name not in layers]
    for fault, names in faults.items():
        if names:
            raise UserError(f"--init_lora {fault} {names[0]} ({len(names)} such modules): the targets must be the same")
    copies = []
    for name, layer in layers.items():
        pair, rank, alpha = lora.pairs[name], layer.r[adapter], layer.lora_alpha[adapter]
        # Files hold alpha as fp32.
        if pair.rank != rank or not math.isclose(pair.effective_alpha, alpha, rel_tol=1e-6):
            raise UserError(
                f"--init_lora has rank {pair.rank} and alpha {pair.effective_alpha:g} at {name}, this run {rank} and "
                f"{alpha:g}"
            )
        for matrix, tensor in ((layer.lora_A, pair.down), (layer.lora_B, pair.up)):
            weight = matrix[adapter].weight
            if weight.shape != tensor.shape:
                shapes = f"it has {tuple(tensor.shape)}, the model needs {tuple(weight.shape)}"
                raise UserError(f"--init_lora does not fit at {name}: {shapes}")
            copies.append((weight, tensor))
    for weight, tensor in copies:
        weight.copy_(tensor)


class LoraFusion:
    """A LoRA that is added to the weights of a base model, one tensor at a time.

    As the `place` of `wan.checkpoints.load_weights` it works on each tensor before the next one is read, so it also
    serves weights that are stored quantised afterwards.
    """

    def __init__(self, model: nn.Module, lora: LoraFile, weight: float = 1.0) -> None:
        """Raises UserError where the LoRA adapts what the model lacks, or a shape does not fit; changes nothing."""
        parameters = dict(model.named_parameters())
        self.weight = weight
        self.in_dim = _stated_in_dim(lora)
        self.factors = {f"{name}.weight": factors for name, factors in lora.factors.items()}
        self.magnitudes = {f"{name}.weight": magnitude for name, magnitude in lora.magnitudes.items()}
        self.diffs = {diff_target(key, parameters): tensor for key, tensor in lora.diffs.items()}
        shapes = {target: factors.weight_shape for target, factors in self.factors.items()}
        shapes |= {target: tuple(tensor.shape) for target, tensor in self.diffs.items()}
        for target, shape in shapes.items():
            if target not in parameters:
                raise UserError(f"the LoRA adapts {target}, which this model does not have; is it for another Wan?")
            needed = tuple(parameters[target].shape)
            if target == PATCH_WEIGHT and self.in_dim is not None:
                needed = (needed[0], self.in_dim, *needed[2:])
            # Convolutions come flattened too.
            if (shape[0], math.prod(shape[1:])) != (needed[0], math.prod(needed[1:])):
                raise UserError(f"the LoRA has {shape} at {target}, the model {needed}; is it for another Wan?")

    @property
    def targets(self) -> set[str]:
        """The names of the parameters that it changes."""
        return self.factors.keys() | self.diffs.keys() | ({PATCH_WEIGHT} if self.in_dim is not None else set())

    def widen(self, model: WanModel) -> None:
        """Gives the patch embedding the inputs that a control LoRA reads; nothing for any other LoRA."""
        if self.in_dim is not None:
            widen_patch_embedding(model, self.in_dim)

    @torch.no_grad()
    def place(self, name: str, tensor: Tensor) -> Tensor:
        """The tensor with the LoRA added in fp32, rounded to its dtype; unchanged where the LoRA does not adapt it."""
        if name not in self.targets:
            return tensor
        if name == PATCH_WEIGHT and self.in_dim is not None:
            tensor = pad_inputs(tensor, self.in_dim)
        result = tensor
        if (factors := self.factors.get(name)) is not None:
            factors = factors.map(lambda matrix: matrix.to(tensor.device))
            if (magnitude := self.magnitudes.get(name)) is None:
                change = delta(factors, self.weight)
            else:
                change = self.weight * decomposed_change(tensor, delta(factors).view_as(tensor), magnitude)
            result = _add(result, change)
        if (diff := self.diffs.get(name)) is not None:
            result = _add(result, diff.to(tensor.device).float() * self.weight)
        return result


@torch.no_grad()
def fuse_lora(model: WanModel, lora: LoraFile, weight: float = 1.0) -> None:
    """Adds `weight` times a LoRA to the weights of a loaded model, in place. Raises UserError as `LoraFusion` does.

    Rounds to the weights' dtype; widens inputs first. On the meta device only the checks cost anything.
    """
    fusion = LoraFusion(model, lora, weight)
    fusion.widen(model)
    parameters = dict(model.named_parameters())
    for name in fusion.targets:
        parameters[name].copy_(fusion.place(name, parameters[name]))


def _stated_in_dim(lora: LoraFile) -> int | None:
    """The number of input channels that a control LoRA states, None for any other LoRA."""
    if other := [name for name in lora.input_shapes if name != PATCH]:
        raise UserError(f"the LoRA widens {other[0]}; only the patch embedding can be widened")
    shape = lora.input_shapes.get(PATCH)
    return None if shape is None else shape[1]


def _add(tensor: Tensor, change: Tensor) -> Tensor:
    return (tensor.float() + change.view_as(tensor)).to(tensor.dtype)


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


def _layers(model: nn.Module, adapter: str | None = None) -> dict[str, LoraLayer]:
    """The adapted layers by name: of one adapter, or of any."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    return {name: layer for name, layer in layers.items() if adapter is None or adapter in layer.lora_A}


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
