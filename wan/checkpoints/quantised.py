"""Quantised weights of single files: fp8, plain or with a scale for each layer, and int8, rotated or not.

Other formats are refused by name. Two layouts state scales. The older one has a marker `scaled_fp8` and
`<layer>.scale_weight`; the newer one has `<layer>.weight_scale` and names its format in `<layer>.comfy_quant`, or in
the file's metadata. What an fp8 tensor is follows from its dtype and its scale alone: tools do not agree on the layers
that they leave in high precision. int8 is read only where it is stated: nothing else says whether it is rotated.
"""

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Set
from typing import Any, NamedTuple

import torch
from torch import Tensor

from wan.checkpoints.errors import CheckpointError, shown
from wan.checkpoints.stored import GROUPS

_SCALES = (".scale_weight", ".weight_scale")
_MARKER = "scaled_fp8"
_LAYER_FORMAT = ".comfy_quant"
_FILE_FORMATS = "_quantization_metadata"  # in the metadata of a file
# Of activations, which are not quantised here; they do not change the weights.
_UNREAD = (".scale_input", ".input_scale", _LAYER_FORMAT)
_LONGEST_TEXT = 2**20  # bytes, of the JSON beside a layer
_READABLE = "bf16, fp16, fp32, fp8, plain or scaled, and int8 of ComfyUI are"
_FP8_FORMAT, _INT8_FORMAT = "float8_e", "int8_tensorwise"
_FLOATS = ("F64", "F32", "F16", "BF16")
_FP8 = ("F8_E4M3", "F8_E5M2")
# What tensors of these names belong to, and weights of these dtypes, where no format is stated.
_BY_NAME = {
    ".quant_state.bitsandbytes__nf4": "nf4 of bitsandbytes",
    ".quant_state.bitsandbytes__fp4": "fp4 of bitsandbytes",
    ".weight_scale_2": "nvfp4",
    ".SCB": "int8 of bitsandbytes",
    ".qweight": "GPTQ or AWQ",
    ".pre_quant_scale": "a format with scaled inputs",
}
_BY_DTYPE = {"I8": "int8", "U8": "4 or 8 bits", "F8_E8M0": "mxfp8", "F4": "fp4"}


class Found(NamedTuple):
    """What a file says of its quantised weights."""

    scales: dict[str, str]  # the name of each weight's scale
    groups: dict[str, int]  # the rotation of each int8 weight, as `Quantised.group`
    unread: set[str]  # all tensors that only serve to quantise others


def find_scales(
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, str],
    metadata: Mapping[str, str],
    read: Callable[[str], Tensor],
) -> Found:
    """How the tensors of a file are quantised.

    `read` reads one tensor by name. Raises CheckpointError, without a path, for weights that are not readable, with the
    name of their format.
    """
    stated = _read_statements(shapes.keys(), metadata, read)
    for name in shapes:
        if kind := next((kind for end, kind in _BY_NAME.items() if name.endswith(end)), ""):
            raise CheckpointError(f"is quantised to {kind} (it has {name}), which is not read here; {_READABLE}")
    groups = dict(_int8_weights(stated, shapes, dtypes))
    scales, unread = dict[str, str](), set[str]()
    for name in shapes:
        weight = _weight_of(name)
        if name.endswith(_MARKER) or (name.endswith(_UNREAD) and weight in shapes):
            unread.add(name)
        elif name.endswith(_SCALES) and weight in shapes:
            if weight not in groups:
                _refuse_dtype(weight, dtypes[weight], (*_FLOATS, *_FP8))
            _refuse_dtype(name, dtypes[name], _FLOATS)
            _check_scale(name, shapes[name], weight, shapes[weight])
            if weight in scales:
                raise CheckpointError(f"has two scales of {weight}: {scales[weight]} and {name}")
            scales[weight] = name
            unread.add(name)
    for name in shapes:
        if name.endswith(".weight") and name not in groups:
            _refuse_dtype(name, dtypes[name], (*_FLOATS, *_FP8))
        is_stated = dtypes[name] in _FP8 and _stated_of(name, stated) is not None
        if name not in scales and (is_stated or name in groups):
            raise CheckpointError(f"has no scale of {name}, which is stated to be scaled")
    return Found(scales, groups, unread)


def _read_statements(
    names: Set[str], metadata: Mapping[str, str], read: Callable[[str], Tensor]
) -> dict[str, "_Settings"]:
    """What is stated of each layer. Raises CheckpointError for a format that is not read."""
    stated = dict(_stated_formats(names, metadata, read))
    for layer, settings in stated.items():
        if not settings.format.startswith(_FP8_FORMAT) and settings.format != _INT8_FORMAT:
            facts = f"{shown(settings.format)} (at {shown(layer)})"
            raise CheckpointError(f"is quantised to {facts}, which is not read here; {_READABLE}")
    return stated


def _int8_weights(
    stated: Mapping[str, "_Settings"], shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, str]
) -> Iterator[tuple[str, int]]:
    """The int8 weights whose format is stated, each with the group of its rotation, 0 for none."""
    for name, shape in shapes.items():
        settings = _stated_of(name, stated) if dtypes[name] == "I8" else None
        if settings is None or settings.format != _INT8_FORMAT:
            continue
        if len(shape) != 2:
            raise CheckpointError(f"has {name} of shape {list(shape)} in int8, which is no matrix")
        if settings.group and shape[1] % settings.group:
            raise CheckpointError(f"has {name} of {shape[1]} columns, which are rotated in groups of {settings.group}")
        yield name, settings.group


def _stated_of(name: str, stated: Mapping[str, "_Settings"]) -> "_Settings | None":
    """What is stated of the layer of a weight."""
    layer = name.removesuffix(".weight")
    return stated.get(layer, stated.get(_bare(layer)))


def _bare(layer: str) -> str:
    """The name of a layer as the metadata of a file may have it: without the prefix of the tensors."""
    return layer.removeprefix("model.").removeprefix("diffusion_model.")


def is_float(dtype: str) -> bool:
    """Whether a dtype, by safetensors' name, is one of floating-point numbers that can be read."""
    return dtype in (*_FLOATS, *_FP8)


def _refuse_dtype(name: str, dtype: str, known: Collection[str]) -> None:
    """Raises CheckpointError for a tensor of a quantised layer that has none of the known dtypes."""
    if dtype not in known:
        kind = _BY_DTYPE.get(dtype, dtype)
        raise CheckpointError(f"is quantised to {kind} ({name} is {dtype}), which is not read here; {_READABLE}")


def _weight_of(name: str) -> str:
    """The name of the weight of the layer that a tensor belongs to."""
    return f"{name.rpartition('.')[0]}.weight"


def _check_scale(name: str, scale: tuple[int, ...], weight_name: str, weight: tuple[int, ...]) -> None:
    """Raises CheckpointError unless a scale is one value, or one for each row or block of columns of a matrix."""
    one = scale in ((), (1,), (1, 1))
    per_row = len(weight) == 2 and scale == (weight[0], 1)
    per_block = len(weight) == 2 and len(scale) == 3 and scale[::2] == (weight[0], 1) and scale[1] > 0
    if not (one or per_row or (per_block and weight[1] % scale[1] == 0)):
        raise CheckpointError(
            f"has the scale {name} of shape {list(scale)}, which does not fit {weight_name} {list(weight)}"
        )


def _stated_formats(
    names: Set[str], metadata: Mapping[str, str], read: Callable[[str], Tensor]
) -> Iterator[tuple[str, "_Settings"]]:
    """Each layer whose format is stated, and what is stated of it."""
    stated = _parse(metadata.get(_FILE_FORMATS, "{}"), f"the metadata {_FILE_FORMATS}")
    layers = stated.get("layers", {})
    if not isinstance(layers, dict):
        raise CheckpointError(f"has metadata {_FILE_FORMATS} without a table of layers")
    for layer, settings in layers.items():
        yield layer, _settings_of(settings, f"the metadata of {shown(layer)}")
    for name in names:
        if name.endswith(_LAYER_FORMAT):
            yield name.removesuffix(_LAYER_FORMAT), _settings_of(_parse(_text(read(name), name), name), name)


class _Settings(NamedTuple):
    """What is stated of a quantised layer."""

    format: str
    group: int  # as `Quantised.group`


def _settings_of(settings: Any, where: str) -> _Settings:
    facts = settings if isinstance(settings, dict) else {"format": settings}
    format_ = facts.get("format")
    if not isinstance(format_, str):
        raise CheckpointError(f"states no format in {where}")
    rotated, group = facts.get("convrot", False), facts.get("convrot_groupsize", 256)
    if not isinstance(rotated, bool) or (rotated and (type(group) is not int or group not in GROUPS)):
        raise CheckpointError(f"states a rotation of groups of {shown(str(group))} in {where}, which is not read here")
    return _Settings(format_, group if rotated else 0)


def _text(tensor: Tensor, name: str) -> str:
    if tensor.dtype != torch.uint8 or tensor.ndim != 1 or tensor.numel() > _LONGEST_TEXT:
        raise CheckpointError(f"has {name} that is no text")
    return bytes(tensor.tolist()).decode("utf-8", errors="replace")


def _parse(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise CheckpointError(f"has {where} that is not a JSON object")
    return value
