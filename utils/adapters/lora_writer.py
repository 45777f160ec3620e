"""LoRA files written in four layouts.

    comfy        diffusion_model.<official>.lora_A.weight, .lora_B.weight, .alpha; ComfyUI reads it, and so does
                 diffusers as long as only attention and feed-forward modules are adapted
    wantraining  <official>.lora_A.weight, .lora_B.weight, as WanTraining writes them; alpha is in the metadata
    kohya        lora_unet_<official, underscored>.lora_down.weight, .lora_up.weight, .alpha
    diffusers    transformer.<diffusers name>.lora_A.weight, .lora_B.weight; alpha is in the metadata

Sources: the key map and LoRA adapters of ComfyUI v0.3.64, the Wan loader of diffusers 0.42, LoraConfig of PEFT 0.21.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from utils.adapters.lora_file import FP32_MAX, LoraError, LoraFile, largest
from utils.adapters.lora_metadata import diffusers_metadata, own_metadata
from utils.common.tensor_files import TensorFileError, write_tensors
from wan.names import diffusers_name, is_parameter, official_name


@dataclass(frozen=True)
class _Layout:
    """How a module and its matrices are named, and the metadata that replaces tensors of alphas and shapes."""

    stem: Callable[[str], str]
    down: str = "lora_A"
    up: str = "lora_B"
    metadata: Callable[[LoraFile], dict[str, str]] | None = None
    unscaled: tuple[str, ...] = ()  # modules, by how their names begin, that get no alpha where the scale is 1


_LAYOUTS = {
    # diffusers reads the pairs of img_emb in this layout, but takes an alpha beside them for an unknown key.
    "comfy": _Layout(lambda name: f"diffusion_model.{name}", unscaled=("img_emb.",)),
    "wantraining": _Layout(lambda name: name, metadata=own_metadata),
    "kohya": _Layout(lambda name: f"lora_unet_{name.replace('.', '_')}", "lora_down", "lora_up"),
    "diffusers": _Layout(lambda name: f"transformer.{diffusers_name(name)}", metadata=diffusers_metadata),
}
LAYOUTS = tuple(_LAYOUTS)


def to_state_dict(
    lora: LoraFile, layout: str = "comfy", dtype: torch.dtype | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors, sorted by key, contiguous and on the CPU, and the metadata of a file in one of `LAYOUTS`.

    `dtype` casts matrices and diffs, never alphas or shapes. Where alpha is a tensor it is an fp32 scalar and always
    there (the rank where alpha is None), because programs differ in what a missing one means. The exceptions are
    modules whose alpha a program cannot read, where it equals the rank: that is what a missing one means everywhere.
    Raises LoraError for content that the layout cannot hold, and for numbers that are not finite after the cast.
    """
    lora = _cast(lora, dtype)
    _refuse_what_does_not_fit(lora, layout)
    _refuse_non_finite(lora)
    row = _LAYOUTS[layout]
    tensors = {f"{row.stem(name)}.{row.down}.weight": pair.down for name, pair in lora.pairs.items()}
    tensors |= {f"{row.stem(name)}.{row.up}.weight": pair.up for name, pair in lora.pairs.items()}
    if row.metadata is None:
        alphas = {name: torch.tensor(pair.effective_alpha, dtype=torch.float32) for name, pair in lora.pairs.items()}
        unscaled = {name for name, pair in lora.pairs.items() if name.startswith(row.unscaled) and pair.scale == 1}
        alphas = {name: alpha for name, alpha in alphas.items() if name not in unscaled}
        shapes = {name: torch.tensor(shape, dtype=torch.int64) for name, shape in lora.input_shapes.items()}
        tensors |= {f"{row.stem(name)}.alpha": alpha for name, alpha in alphas.items()}
        tensors |= {f"{row.stem(name)}.reshape_weight": shape for name, shape in shapes.items()}
    for key, tensor in lora.diffs.items():
        name, _, role = key.rpartition(".")
        tensors[f"{row.stem(name)}.{role}"] = tensor
    metadata = {**lora.metadata, **(row.metadata(lora) if row.metadata else {})}
    return {key: tensors[key].detach().cpu().contiguous() for key in sorted(tensors)}, metadata


def write_lora(path: str | Path, lora: LoraFile, layout: str = "comfy", dtype: torch.dtype | None = None) -> None:
    """Writes what `to_state_dict` returns. Raises LoraError as it and `write_state_dict` do."""
    write_state_dict(Path(path), *to_state_dict(lora, layout, dtype))


def write_state_dict(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes a .safetensors file, whole or not at all. Raises LoraError for a path that cannot be written."""
    if not path.parent.is_dir():
        raise LoraError(f"{path}: the folder {path.parent} does not exist.")
    if path.suffix != ".safetensors":
        raise LoraError(f"{path}: LoRA files are written as .safetensors. Give the file that ending.")
    try:
        write_tensors(path, tensors, metadata)
    except TensorFileError as error:
        raise LoraError(f"{path}: could not be written ({error}).") from error


def _refuse_what_does_not_fit(lora: LoraFile, layout: str) -> None:
    if layout not in _LAYOUTS:
        raise LoraError(f"there is no LoRA layout {layout!r}; the layouts are {', '.join(LAYOUTS)}.")
    changed = {key.rpartition(".")[0] for key in lora.diffs}
    for name in sorted(lora.pairs.keys() | lora.input_shapes.keys() | changed):
        if official_name(name) != name:
            raise LoraError(f"{name} is not the official name of a Wan module, so no program would find it.")
        if layout == "kohya" and is_parameter(name):
            raise LoraError(f"the layout kohya cannot hold {name}: it names modules, not bare parameters.")
    if layout in ("diffusers", "wantraining") and lora.diffs:
        raise LoraError(f"the layout {layout} holds LoRA pairs only, and there is a diff {min(lora.diffs)}.")
    if layout == "diffusers" and lora.input_shapes:
        raise LoraError(f"diffusers cannot load a control LoRA: it does not widen {min(lora.input_shapes)}.")


def _refuse_non_finite(lora: LoraFile) -> None:
    numbers = dict(lora.diffs)
    for name, pair in lora.pairs.items():
        alpha = torch.tensor(pair.effective_alpha)
        numbers |= {f"{name}.down": pair.down, f"{name}.up": pair.up, f"{name}.alpha": alpha}
    for key, tensor in numbers.items():
        if not largest(tensor) <= FP32_MAX:
            raise LoraError(f"{key} holds numbers that are not finite in {tensor.dtype}, so it is not written.")


def _cast(lora: LoraFile, dtype: torch.dtype | None) -> LoraFile:
    if dtype is None:
        return lora
    pairs = {name: replace(pair, down=pair.down.to(dtype), up=pair.up.to(dtype)) for name, pair in lora.pairs.items()}
    return replace(lora, pairs=pairs, diffs={key: tensor.to(dtype) for key, tensor in lora.diffs.items()})
