"""LoRA files written in five layouts.

    comfy        diffusion_model.<official>.lora_A.weight, .lora_B.weight, .alpha; ComfyUI reads it, and so does
                 diffusers as long as only attention and feed-forward modules are adapted
    wantraining  <official>.lora_A.weight, .lora_B.weight, as WanTraining writes them; alpha is in the metadata
    kohya        lora_unet_<official, underscored>.lora_down.weight, .lora_up.weight, .alpha
    diffusers    transformer.<diffusers name>.lora_A.weight, .lora_B.weight; alpha is in the metadata
    peft         a folder: base_model.model.<official>.lora_A.weight, .lora_B.weight; alpha in adapter_config.json

What the program that reads a layout can apply is in `lora_targets`. Sources: the key map and weight adapters of ComfyUI
v0.3.77, the Wan loader of diffusers 0.42, LoraConfig of PEFT 0.21.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from utils.adapters.lora_file import FP32_MAX, LoraError, LoraFile, largest
from utils.adapters.lora_metadata import diffusers_metadata, own_metadata, restated
from utils.adapters.lora_targets import TARGETS, adapt, check_kinds, unsupported
from utils.adapters.peft_folder import config_text, to_config, write_folder
from utils.common.tensor_files import TensorFileError, write_tensors
from wan.names import diffusers_name, is_parameter, official_name

PEFT_LAYOUT = "peft"


@dataclass(frozen=True)
class _Layout:
    """How a module and its matrices are named, and the metadata that replaces tensors of alphas and shapes."""

    stem: Callable[[str], str]
    down: str = "lora_A"
    up: str = "lora_B"
    magnitude: str = "dora_scale"
    has_alphas: bool = True  # as tensors, as well as shapes
    metadata: Callable[[LoraFile], dict[str, str]] = lambda lora: {}
    unscaled: tuple[str, ...] = ()  # modules, by how their names begin, that get no alpha where the scale is 1


_LAYOUTS = {
    # diffusers reads the pairs of img_emb in this layout, but takes an alpha beside them for an unknown key.
    "comfy": _Layout(lambda name: f"diffusion_model.{name}", unscaled=("img_emb.",)),
    "wantraining": _Layout(lambda name: name, has_alphas=False, metadata=own_metadata),
    "kohya": _Layout(lambda name: f"lora_unet_{name.replace('.', '_')}", "lora_down", "lora_up"),
    "diffusers": _Layout(
        lambda name: f"transformer.{diffusers_name(name)}", has_alphas=False, metadata=diffusers_metadata
    ),
    PEFT_LAYOUT: _Layout(lambda name: f"base_model.model.{name}", magnitude="lora_magnitude_vector", has_alphas=False),
}
LAYOUTS = tuple(_LAYOUTS)


def to_state_dict(
    lora: LoraFile, layout: str = "comfy", dtype: torch.dtype | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors, sorted by key, contiguous and on the CPU, and the metadata of a file in one of `LAYOUTS`.

    `dtype` casts matrices and diffs, never alphas or shapes. Where alpha is a tensor it is an fp32 scalar, and there
    where it is known: without one every program takes the scale for 1, and nothing that was guessed gets into a file.
    It is also left out of modules whose alpha a program cannot read, where it equals the rank. Raises LoraError for
    content that the layout, or the program that reads it, cannot hold, and for numbers that are not finite after the
    cast.
    """
    if layout not in _LAYOUTS:
        raise LoraError(f"there is no LoRA layout {layout!r}; the layouts are {', '.join(LAYOUTS)}.")
    row, target = _LAYOUTS[layout], TARGETS[layout]
    _check_names(lora)
    check_kinds(lora, target)
    lora = adapt(lora, target)
    if left := unsupported(lora, target):
        raise LoraError(f"{target.program} cannot apply {left[0]} in the layout {layout} ({len(left)} such changes).")
    lora = lora if dtype is None else lora.map(lambda tensor: tensor.to(dtype))
    _refuse_non_finite(lora)
    tensors = {f"{row.stem(name)}.{row.down}.weight": pair.down for name, pair in lora.pairs.items()}
    tensors |= {f"{row.stem(name)}.{row.up}.weight": pair.up for name, pair in lora.pairs.items()}
    for name, lycoris in lora.lycoris.items():
        tensors |= {f"{row.stem(name)}.{role}": factor for role, factor in lycoris.factors.items()}
    tensors |= {f"{row.stem(name)}.{row.magnitude}": each.values for name, each in lora.magnitudes.items()}
    tensors |= _full_changes(lora, row) if target.layers else _biases(lora, row)
    if row.has_alphas:
        alphas = {name: each.alpha for name, each in lora.factors.items() if each.alpha is not None}
        unscaled = {name for name in alphas if name.startswith(row.unscaled) and lora.factors[name].scale == 1}
        shapes = {name: torch.tensor(shape, dtype=torch.int64) for name, shape in lora.input_shapes.items()}
        tensors |= {f"{row.stem(name)}.alpha": torch.tensor(alphas[name]) for name in alphas.keys() - unscaled}
        tensors |= {f"{row.stem(name)}.reshape_weight": shape for name, shape in shapes.items()}
    tensors = {key: tensors[key].detach().cpu().contiguous() for key in sorted(tensors)}
    return tensors, {**restated(lora), **row.metadata(lora)}


def write_lora(path: str | Path, lora: LoraFile, layout: str = "comfy", dtype: torch.dtype | None = None) -> None:
    """Writes what `to_state_dict` returns; PEFT's layout as a folder. Raises LoraError as it and the writing do."""
    path, content = Path(path), to_state_dict(lora, layout, dtype)
    if layout == PEFT_LAYOUT:
        write_folder(path, *content, config_text(to_config(adapt(lora, TARGETS[layout]))))
    else:
        write_state_dict(path, *content)


def check_path(path: Path) -> None:
    """Raises LoraError where a LoRA file cannot have this path."""
    if path.is_dir():
        raise LoraError(f"{path}: is a folder. Give a file in it, such as {path / 'lora.safetensors'}.")
    if not path.parent.is_dir():
        raise LoraError(f"{path}: the folder {path.parent} does not exist.")
    if path.suffix != ".safetensors":
        raise LoraError(f"{path}: LoRA files are written as .safetensors. Give the file that ending.")


def write_state_dict(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes a .safetensors file, whole or not at all. Raises LoraError for a path that cannot be written."""
    check_path(path)
    try:
        write_tensors(path, tensors, metadata)
    except TensorFileError as error:
        raise LoraError(f"{path}: could not be written ({error}).") from error


def _full_changes(lora: LoraFile, row: _Layout) -> dict[str, Tensor]:
    split = {key: key.rpartition(".") for key in lora.diffs}
    return {f"{row.stem(name)}.{role}": lora.diffs[key] for key, (name, _, role) in split.items()}


def _biases(lora: LoraFile, row: _Layout) -> dict[str, Tensor]:
    """Changes of biases as biases of the second matrix, which are scaled as it is: of all modules, or of none."""
    if not lora.diffs:
        return {}
    biases = {}
    for name, pair in lora.pairs.items():
        diff = lora.diffs.get(f"{name}.diff_b", torch.zeros(len(pair.up), dtype=pair.up.dtype))
        biases[f"{row.stem(name)}.{row.up}.bias"] = diff if pair.scale == 1 else (diff.float() / pair.scale)
    return biases


def _check_names(lora: LoraFile) -> None:
    for name in sorted(lora.modules | lora.input_shapes.keys()):
        if official_name(name) != name:
            raise LoraError(f"{name} is not the official name of a Wan module, so no program would find it.")
        if is_parameter(name) and name in lora.factors:
            raise LoraError(f"{name} is no layer, so it can have no pair of matrices.")


def _refuse_non_finite(lora: LoraFile) -> None:
    numbers = dict(lora.diffs) | {name: each.values for name, each in lora.magnitudes.items()}
    for name, factors in lora.factors.items():
        numbers |= {f"{name}.{role}": tensor for role, tensor in factors.tensors.items()}
        if factors.alpha is not None:
            numbers[f"{name}.alpha"] = torch.tensor(factors.alpha)
    for key, tensor in numbers.items():
        if not largest(tensor) <= FP32_MAX:
            raise LoraError(f"{key} holds numbers that are not finite in {tensor.dtype}, so it is not written.")
