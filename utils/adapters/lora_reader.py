"""LoRA files of every known key format, read into one form.

Sources: the key map and LoRA adapters of ComfyUI v0.3.64, the Wan loader of diffusers 0.42, LoraConfig of PEFT 0.21.
"""

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from utils.adapters.lora_file import FP32_MAX, MAX_DIMENSIONS, LoraError, LoraFile, LoraPair, largest, shown
from utils.adapters.lora_metadata import SCALING_KEYS, read_scaling
from utils.common.tensor_files import TensorFileError, read_tensors
from wan.names import is_parameter, official_name

CONTROL_CHANNELS = 32  # inputs of a text-to-video Wan that follows control: 16 of latents, 16 of control

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2)

_KEY = re.compile(
    r"(?P<prefix>(?:model\.)?diffusion_model\.|base_model\.model\.|transformer\.|lora_unet__?|)(?P<name>.+?)\."
    r"(?:(?P<matrix>lora_[AB]|lora[._](?:down|up))(?P<tail>(?:\.default)?(?:\.weight)?)"
    r"|(?P<other>alpha|diff|diff_b|reshape_weight))"
)
_MATRICES = {
    matrix: (role, f"{down}/{up}")
    for down, up in (("lora_A", "lora_B"), ("lora_down", "lora_up"), ("lora.down", "lora.up"))
    for matrix, role in ((down, "down"), (up, "up"))
}
_REFUSED = {
    r"lora_magnitude_vector|\.dora_scale": "is a DoRA magnitude, which no layout here can hold",
    r"\.hada_[wt]\d": "belongs to a LoHa, which is not a LoRA pair",
    r"\.lokr_[wt]\d": "belongs to a LoKr, which is not a LoRA pair",
    r"\.set_weight$": "replaces a whole weight instead of adapting it",
    r"\.lora_mid\.": "belongs to a Tucker decomposition, which is not a LoRA pair",
    r"\.lora_B\.(\w+\.)?bias$": "is a bias inside the adapter, which only PEFT can apply",
}


@dataclass
class _Module:
    """The tensors of one module by role ("down", "alpha", "diff_b", ...), and the one format that its keys have."""

    stem: tuple[str, str]  # prefix, name
    matrices: str = ""
    tensors: dict[str, Tensor] = field(default_factory=dict)


def read_lora(path: str | Path) -> LoraFile:
    """The content of a .safetensors LoRA file in any known key format, recognised by its keys alone.

    Alphas come from tensors, else from the metadata (`lora_metadata`). Raises LoraError, naming file and key, for a
    file that is not readable safetensors, unknown keys, incomplete pairs, matrices that do not fit together, one module
    under two names, adapters other than LoRA, and numbers that are not finite or whose product would not be.
    """
    path = Path(path)
    tensors, metadata = _load(path)
    modules = _sort_into_modules(tensors, path)
    ranks = {name: module.tensors["down"].shape[0] for name, module in modules.items() if "down" in module.tensors}
    scaling = read_scaling(metadata, ranks, path)
    pairs: dict[str, LoraPair] = {}
    diffs: dict[str, Tensor] = {}
    for name, module in modules.items():
        found, key = module.tensors, f"{path}: {''.join(module.stem)}"
        diffs |= {f"{name}.{role}": found[role] for role in ("diff", "diff_b") if role in found}
        if found.keys() - {"diff", "diff_b"}:
            pairs[name] = _pair(found, scaling.alphas.get(name), key)
    shapes = _stated_shapes(modules, pairs, path) if scaling.shapes is None else scaling.shapes
    input_shapes = {name: _checked_shape(shape, pairs.get(name), f"{path}: {name}") for name, shape in shapes.items()}
    others = {key: value for key, value in metadata.items() if key not in SCALING_KEYS}
    return LoraFile(pairs, diffs, input_shapes, others, _key_format(modules))


def _load(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if os.path.isdir(path):
        raise LoraError(f"{path} is a folder. Give a .safetensors file in it.")
    if path.suffix.lower() in (".pt", ".pth", ".bin", ".ckpt", ".pkl"):
        raise LoraError(f"{path}: a pickle can run code when it is opened, so it is not read. Use a .safetensors file.")
    if not os.path.exists(path):
        raise LoraError(f"{path}: there is no such file.")
    try:
        tensors, metadata = read_tensors(path)
    except TensorFileError as error:
        raise LoraError(f"{path}: not a complete safetensors file ({error}). Copy or export it again.") from error
    if not tensors:
        raise LoraError(f"{path}: the file holds no tensors.")
    return tensors, metadata


def _sort_into_modules(tensors: Mapping[str, Tensor], path: Path) -> dict[str, _Module]:
    """Official name -> the tensors found for it. Every key is understood or refused, and so is every tensor."""
    modules: dict[str, _Module] = {}
    unknown = []
    for key in sorted(tensors):
        for pattern, reason in _REFUSED.items():
            if re.search(pattern, key):
                raise LoraError(f"{path}: {shown(key)} {reason}.")
        match = _KEY.fullmatch(key)
        name = match and official_name(match["name"])
        if not match or not name or (is_parameter(name) and match["other"] != "diff"):
            unknown.append(shown(key))
            continue
        stem = (match["prefix"], match["name"])
        role, matrices = _MATRICES.get(match["matrix"], (match["other"], ""))
        matrices += match["tail"] or ""
        module = modules.setdefault(name, _Module(stem))
        if module.stem != stem or (matrices and module.matrices not in ("", matrices)):
            raise LoraError(f"{path}: {name} has keys of two formats, here {key}. Keep one of them.")
        if role not in ("alpha", "reshape_weight"):
            _check_numbers(tensors[key], f"{path}: {key}")
        module.matrices = matrices or module.matrices
        module.tensors[role] = tensors[key]
    if unknown:
        names = ", ".join(unknown[:3])
        raise LoraError(f"{path}: {len(unknown)} of {len(tensors)} keys are not LoRA keys of a Wan model: {names}.")
    return modules


def _check_numbers(tensor: Tensor, key: str) -> None:
    """Refuses a matrix or diff with which nothing can be computed."""
    if tensor.dtype not in FLOATS:
        raise LoraError(f"{key}: stored as {tensor.dtype}, but the numbers of a LoRA are floating-point numbers.")
    if tensor.numel() == 0:
        raise LoraError(f"{key}: has the shape {tuple(tensor.shape)}, which is empty.")
    if not 1 <= tensor.ndim <= MAX_DIMENSIONS:
        raise LoraError(f"{key}: has {tensor.ndim} dimensions, but a weight has 1 to {MAX_DIMENSIONS}.")
    if not largest(tensor) <= FP32_MAX:
        raise LoraError(f"{key}: holds NaN or infinite numbers, so the LoRA is damaged. Use an earlier checkpoint.")


def _pair(found: Mapping[str, Tensor], alpha: float | None, key: str) -> LoraPair:
    for role in ("down", "up"):
        if role not in found:
            raise LoraError(f"{key}: half a pair, there is {', '.join(sorted(found))} but no {role} matrix.")
    if "diff" in found:
        raise LoraError(f"{key}: a LoRA pair and a full .diff exclude each other. Keep one of them.")
    down, up = found["down"], found["up"]
    if not (down.ndim >= 2 and up.ndim >= 2 and down.shape[0] == up.shape[1] and up.shape[2:].numel() == 1):
        raise LoraError(f"{key}: down {tuple(down.shape)} and up {tuple(up.shape)} do not fit together.")
    pair = LoraPair(down, up, _alpha(found["alpha"], key) if "alpha" in found else alpha)
    if not pair.bound <= FP32_MAX:
        raise LoraError(f"{key}: the change of the weight, alpha / rank * up @ down, may be infinite in fp32.")
    return pair


def _alpha(tensor: Tensor, key: str) -> float:
    # Zero and negative alphas are kept: ComfyUI and diffusers compute with them too.
    is_number = tensor.numel() == 1 and tensor.dtype != torch.bool and not tensor.is_complex()
    alpha = float(tensor.item()) if is_number else math.nan
    if not abs(alpha) <= FP32_MAX:
        raise LoraError(f"{key}.alpha: must be one finite number.")
    return alpha


def _stated_shapes(
    modules: Mapping[str, _Module], pairs: Mapping[str, LoraPair], path: Path
) -> dict[str, Sequence[float]]:
    shapes: dict[str, Sequence[float]] = {}
    for name, module in modules.items():
        if "reshape_weight" in module.tensors:
            stated = module.tensors["reshape_weight"]
            if stated.numel() > MAX_DIMENSIONS or stated.is_complex():
                raise LoraError(f"{path}: {''.join(module.stem)}.reshape_weight: is no shape of a weight.")
            shapes[name] = stated.flatten().tolist()
    embedding = pairs.get("patch_embedding")
    if embedding and embedding.down.ndim == 5:
        # WanTraining adapts the patch embedding only to widen it for control, and does not state the new shape. That
        # holds for a file whose keys somebody has renamed, too: no released Wan has this number of channels.
        bare = not modules["patch_embedding"].stem[0]
        if bare or embedding.down.shape[1] == CONTROL_CHANNELS:
            shapes.setdefault("patch_embedding", embedding.weight_shape)
    return shapes


def _checked_shape(stated: Sequence[float], pair: LoraPair | None, key: str) -> tuple[int, ...]:
    """A stated weight shape as integers. WanTraining's converter stores it as floats, which ComfyUI cannot load."""
    made = pair.weight_shape if pair else ()
    shape = tuple(int(size) for size in stated if math.isfinite(size) and size == int(size) > 0)
    if len(shape) != len(stated) or shape[:1] != made[:1] or math.prod(shape) != math.prod(made) or len(shape) < 2:
        raise LoraError(f"{key}: the stated shape {shown(list(stated))} is not that of the pair's weight, {made}.")
    return shape


def _key_format(modules: Mapping[str, _Module]) -> str:
    prefixes = sorted({module.stem[0] or "no prefix" for module in modules.values()})
    matrices = sorted({module.matrices or "diffs" for module in modules.values()})
    diffusers = any(module.stem[1].replace(".", "_") != name.replace(".", "_") for name, module in modules.items())
    return ", ".join([*prefixes, *matrices, "diffusers names" if diffusers else "official names"])
