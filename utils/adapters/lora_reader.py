"""LoRA files of every known key format, read into one form.

Sources: the key map and weight adapters of ComfyUI v0.3.77, the Wan loader of diffusers 0.42, LoraConfig of PEFT 0.21,
LyCORIS, and the files of LightX2V.
"""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from utils.adapters.dora import COMFY, PEFT, Magnitude
from utils.adapters.lora_file import FP32_MAX, MAX_DIMENSIONS, Factors, LoraError, LoraFile, LoraPair, largest, shown
from utils.adapters.lora_header import EXPERT_KEY
from utils.adapters.lora_keys import HIGH, Key, names_wan, parse_key, refusal
from utils.adapters.lora_metadata import SCALING_KEYS, read_shapes, read_statements, reconcile
from utils.adapters.lycoris import Lycoris, check_factors, kind_of
from utils.adapters.peft_folder import PeftConfig, find_weights
from utils.common.checkpoint_names import parse_name
from utils.common.tensor_files import TensorFileError, UnusableNameError, read_tensors
from wan.checkpoints import CheckpointError
from wan.checkpoints.files import broken_link, read_start, refuse_other_kinds
from wan.checkpoints.header import Cut, HeaderFile, read_by_header
from wan.configs import FAMILIES
from wan.names import PATCH

CONTROL_CHANNELS = 32  # inputs of a text-to-video Wan that follows control: 16 of latents, 16 of control
RELEASED_CHANNELS = {family.in_dim for family in FAMILIES.values()}

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2)

KERNEL = 4  # numbers of its weight for an input channel, 1 x 2 x 2


@dataclass
class _Module:
    """The tensors of one module by role ("down", "alpha", "diff_b", ...), and the one format that its keys have."""

    key: Key
    matrices: str = ""
    tensors: dict[str, Tensor] = field(default_factory=dict)


def read_lora(path: str | Path) -> LoraFile:
    """The content of a LoRA file, or of a PEFT folder, in any known key format, recognised by its keys alone.

    Alphas come from tensors, else from adapter_config.json or the metadata (`lora_metadata`). Raises LoraError, naming
    file and key, for a file that is not readable safetensors, unknown keys, incomplete pairs, matrices that do not fit
    together, one module under two names, what is no change of weights, numbers that are not finite or whose product
    would not be, and for a file that holds the LoRAs of two experts.
    """
    found = read_experts(path)
    if len(found) > 1:
        raise LoraError(
            f"{path}: holds the LoRAs of two experts. Make a file for each first:\n"
            f"python convert_lora_to_comfy.py --input_lora {path}"
        )
    return next(iter(found.values()))


def read_experts(path: str | Path) -> dict[str, LoraFile]:
    """As `read_lora`, for a file that may hold the LoRAs of both experts: by expert, or the only one under ""."""
    path, config = find_weights(Path(path))
    tensors, metadata, notes = _load(path)
    found = {}
    parts = _sort_into_modules(tensors, path)
    for expert, modules in sorted(parts.items()):
        # The first expert's prefix says nothing where it is alone: a model with one transformer has the same.
        says_expert = len(parts) > 1 or (expert != HIGH and EXPERT_KEY not in metadata)
        stated = {EXPERT_KEY: expert} if says_expert else {}
        lora = _assemble(modules, metadata | stated, config, path)
        found[expert if len(parts) > 1 else ""] = replace(lora, notes=(*notes, *lora.notes))
    return found


def _load(path: Path) -> tuple[dict[str, Tensor], dict[str, str], list[str]]:
    """The tensors and the metadata of a file, and what people should know of it, a sentence each."""
    if path.suffix.lower() in (".pt", ".pth", ".bin", ".ckpt", ".pkl"):
        raise LoraError(f"{path}: a pickle can run code when it is opened, so it is not read. Use a .safetensors file.")
    if not os.path.exists(path):
        raise LoraError(f"{path}: there is no such file{broken_link(path)}.")
    notes = []
    try:
        tensors, metadata = read_tensors(path)
    except UnusableNameError as error:
        raise LoraError(f"{path}: {error}.") from None
    except TensorFileError as error:
        file = _read_refused(path, str(error))
        tensors, metadata = {name: file.get_tensor(name) for name in file.offset_keys()}, dict(file.metadata())
        notes = [f"{path} has {file.surplus} bytes after its last tensor, which are not read"]
    if not tensors:
        raise LoraError(f"{path}: the file holds no tensors.")
    return tensors, metadata, notes


def _read_refused(path: Path, reason: str) -> HeaderFile:
    """A file that the library refuses, for a `reason`, though all tensors are there. Raises LoraError for any other."""
    try:
        refuse_other_kinds(path, read_start(path))
        file = read_by_header(path)
        if file.surplus:
            return file
    except CheckpointError as error:
        raise LoraError(f"{error}.") from None
    except Cut as error:
        raise LoraError(f"{path}: {error}. Copy or export it again.") from None
    except (OSError, ValueError):
        pass
    raise LoraError(f"{path}: not a complete safetensors file ({reason}). Copy or export it again.")


def _sort_into_modules(tensors: Mapping[str, Tensor], path: Path) -> dict[str, dict[str, _Module]]:
    """Expert -> official name -> the tensors found for it. Every key is understood or refused, so is every tensor."""
    parts: dict[str, dict[str, _Module]] = {}
    unknown = []
    for text in sorted(tensors):
        if reason := refusal(text):
            raise LoraError(f"{path}: {shown(text)} {reason}.")
        key = parse_key(text)
        if key is None:
            unknown.append(shown(text))
            continue
        module = parts.setdefault(key.expert or HIGH, {}).setdefault(key.name, _Module(key))
        if module.key.stem != key.stem or (key.matrices and module.matrices not in ("", key.matrices)):
            raise LoraError(f"{path}: {key.name} has keys of two formats, here {text}. Keep one of them.")
        if key.role in module.tensors:
            raise LoraError(f"{path}: {shown(text)} says again what another key says. Keep one of them.")
        if key.role not in ("alpha", "reshape_weight"):
            _check_numbers(tensors[text], f"{path}: {text}")
        module.matrices = key.matrices or module.matrices
        module.tensors[key.role] = tensors[text]
    if unknown:
        raise LoraError(_not_of_wan(unknown, tensors, path))
    return parts


def _not_of_wan(unknown: Sequence[str], tensors: Mapping[str, Tensor], path: Path) -> str:
    names, named = ", ".join(unknown[:3]), parse_name(path.name)
    if named is not None and named.trainable is None:
        return f"{path}: is a state, from which a run resumes, and not a LoRA. Its LoRAs are beside it."
    if all(name.endswith((".weight", ".bias", "modulation")) and "lora" not in name for name in tensors):
        return f"{path}: holds the weights of a model ({names}), not a LoRA."
    if not any(map(names_wan, tensors)):
        return f"{path}: none of its keys names a module of Wan ({names}). Is it a LoRA of another model?"
    return f"{path}: {len(unknown)} of {len(tensors)} keys are not LoRA keys of a Wan model: {names}."


def _alphas(
    modules: Mapping[str, _Module], metadata: Mapping[str, str], config: PeftConfig | None, path: Path
) -> tuple[dict[str, float], list[str]]:
    """The alphas of the modules that state one, wherever, and what people should know of these statements."""
    ranks = {name: module.tensors["down"].shape[0] for name, module in modules.items() if "down" in module.tensors}
    ranks |= {name: _lycoris_rank(module) for name, module in modules.items() if _factors_of(module)}
    scaled = {name: module for name, module in modules.items() if "alpha" in module.tensors}
    stated = {name: _alpha(m.tensors["alpha"], f"{path}: {''.join(m.key.stem)}") for name, m in scaled.items()}
    statements = [*([config.statement(ranks)] if config else []), *read_statements(metadata, ranks, str(path))]
    # Whole factors of a LoKr have no rank, and an alpha that says nothing, but in PEFT.
    names = [name for name, rank in ranks.items() if rank or (config is not None and config.kind == "LOKR")]
    alphas, notes = reconcile(statements, stated, names, path)
    return alphas, [*notes, *([] if config is None else config.remarks(ranks))]


def _assemble(
    modules: Mapping[str, _Module], metadata: Mapping[str, str], config: PeftConfig | None, path: Path
) -> LoraFile:
    alphas, notes = _alphas(modules, metadata, config, path)
    pairs: dict[str, LoraPair] = {}
    lycoris: dict[str, Lycoris] = {}
    diffs: dict[str, Tensor] = {}
    magnitudes: dict[str, Magnitude] = {}
    for name, module in modules.items():
        found, key = module.tensors, f"{path}: {''.join(module.key.stem)}"
        diffs |= {f"{name}.{role}": found[role] for role in ("diff", "diff_b") if role in found}
        factors: Factors | None = None
        if _factors_of(module):
            factors = lycoris[name] = _lycoris(module, alphas.get(name), key)
        elif found.keys() - {"diff", "diff_b"}:
            factors = pairs[name] = _pair(found, alphas.get(name), key)
        if factors is not None and "bias" in found:
            diffs[f"{name}.diff_b"] = _bias(found, factors, key)
        if factors is not None and {"dora_scale", "magnitude"} & found.keys():
            magnitudes[name] = _magnitude(found, factors, key)
    if config is not None and config.kind == "LOKR":
        lycoris = _scale_whole_factors(lycoris, config)
    made = {key.removesuffix(".diff"): tuple(diff.shape) for key, diff in diffs.items() if key.endswith(".diff")}
    made |= {name: factors.weight_shape for name, factors in (pairs | lycoris).items()}
    own = read_shapes(metadata, path)
    shapes = _stated_shapes(modules, made.get(PATCH, ()), path) if own is None else own
    return LoraFile(
        pairs,
        diffs,
        {name: _checked_shape(shape, made.get(name, ()), f"{path}: {name}") for name, shape in shapes.items()},
        {key: value for key, value in metadata.items() if key not in SCALING_KEYS},
        _key_format(modules),
        lycoris,
        magnitudes,
        tuple(notes),
    )


def _check_numbers(tensor: Tensor, key: str) -> None:
    """Refuses a matrix or diff with which nothing can be computed."""
    if tensor.dtype not in FLOATS:
        raise LoraError(f"{key}: stored as {tensor.dtype}, but the numbers of a LoRA are floating-point numbers.")
    if tensor.numel() == 0:
        raise LoraError(f"{key}: has the shape {tuple(tensor.shape)}, which is empty.")
    if not 1 <= tensor.ndim <= MAX_DIMENSIONS:
        raise LoraError(f"{key}: has {tensor.ndim} dimensions, but a weight has 1 to {MAX_DIMENSIONS}.")
    if not largest(tensor) <= FP32_MAX:
        remedy = "Download it again, or use an earlier checkpoint"
        raise LoraError(f"{key}: holds NaN or infinite numbers, so the LoRA is damaged. {remedy}.")


def _pair(found: Mapping[str, Tensor], alpha: float | None, key: str) -> LoraPair:
    for role in ("down", "up"):
        if role not in found:
            raise LoraError(f"{key}: half a pair, there is {', '.join(sorted(found))} but no {role} matrix.")
    if "diff" in found:
        raise LoraError(f"{key}: a LoRA pair and a full .diff exclude each other. Keep one of them.")
    down, up = found["down"], found["up"]
    if not (down.ndim >= 2 and up.ndim >= 2 and down.shape[0] == up.shape[1] and up.shape[2:].numel() == 1):
        raise LoraError(f"{key}: down {tuple(down.shape)} and up {tuple(up.shape)} do not fit together.")
    pair = LoraPair(down, up, alpha)
    if not pair.bound <= FP32_MAX:
        raise LoraError(f"{key}: the change of the weight, alpha / rank * up @ down, may be infinite in fp32.")
    return pair


def _factors_of(module: _Module) -> dict[str, Tensor]:
    return {role: tensor for role, tensor in module.tensors.items() if kind_of(role)}


def _lycoris_rank(module: _Module) -> int:
    return Lycoris(_factors_of(module), None).rank


def _lycoris(module: _Module, alpha: float | None, key: str) -> Lycoris:
    factors = _factors_of(module)
    if others := module.tensors.keys() & {"down", "up", "diff"}:
        raise LoraError(f"{key}: has two changes of one weight, {', '.join(sorted(factors | dict.fromkeys(others)))}.")
    try:
        check_factors(factors)
    except ValueError as error:
        raise LoraError(f"{key} {error}.") from error
    lycoris = Lycoris(factors, alpha)
    if not lycoris.bound <= FP32_MAX:
        raise LoraError(f"{key}: the change of the weight may be infinite in fp32.")
    return lycoris


def _scale_whole_factors(lycoris: Mapping[str, Lycoris], config: PeftConfig) -> dict[str, Lycoris]:
    """PEFT scales a LoKr of two whole factors by alpha / r, LyCORIS and ComfyUI do not: here it is in the first one."""
    ranks = config.ranks(list(lycoris))
    scaled = {}
    for name, each in lycoris.items():
        if not each.rank and each.alpha is not None:
            first = each.factors["lokr_w1"].float() * (each.alpha / ranks[name])
            each = Lycoris({**each.factors, "lokr_w1": first}, None)
        scaled[name] = each
    return scaled


def _bias(found: Mapping[str, Tensor], factors: Factors, key: str) -> Tensor:
    """PEFT's bias of the second matrix, as the change of the module's bias that it makes."""
    if "diff_b" in found:
        raise LoraError(f"{key}: a bias of the pair and a .diff_b exclude each other. Keep one of them.")
    return found["bias"] if factors.scale == 1 else found["bias"].float() * factors.scale


def _magnitude(found: Mapping[str, Tensor], factors: Factors, key: str) -> Magnitude:
    if len(found.keys() & {"dora_scale", "magnitude"}) > 1:
        raise LoraError(f"{key}: has the DoRA magnitudes of two programs. Keep one of them.")
    rule = COMFY if "dora_scale" in found else PEFT
    if math.prod(factors.weight_shape[1:]) == 1:
        raise LoraError(f"{key}: a DoRA of a vector, which has no rows to scale.")
    magnitude = Magnitude(found["dora_scale" if rule == COMFY else "magnitude"], rule)
    if not magnitude.fits(factors.weight_shape):
        shapes = f"{tuple(magnitude.values.shape)}, and the weight {factors.weight_shape}"
        raise LoraError(f"{key}: the DoRA magnitude has the shape {shapes}: it needs one number for each output.")
    return magnitude


def _alpha(tensor: Tensor, key: str) -> float:
    # Zero and negative alphas are kept: ComfyUI and diffusers compute with them too.
    is_number = tensor.numel() == 1 and tensor.dtype != torch.bool and not tensor.is_complex()
    alpha = float(tensor.item()) if is_number else math.nan
    if not abs(alpha) <= FP32_MAX:
        raise LoraError(f"{key}.alpha: must be one finite number.")
    return alpha


def _stated_shapes(
    modules: Mapping[str, _Module], embedding: tuple[int, ...], path: Path
) -> Mapping[str, Sequence[float]]:
    """The shapes of widened weights by module; `embedding` is that of the change of the patch embedding, if any."""
    shapes: dict[str, Sequence[float]] = {}
    for name, module in modules.items():
        if "reshape_weight" in module.tensors:
            stated = module.tensors["reshape_weight"]
            if stated.numel() > MAX_DIMENSIONS or stated.is_complex():
                raise LoraError(f"{path}: {''.join(module.key.stem)}.reshape_weight: is no shape of a weight.")
            shapes[name] = stated.flatten().tolist()
    # WanTraining adapts the patch embedding only to widen it for control, and does not state the new shape. That holds
    # for a file whose keys somebody has renamed, too: no Wan that it trains has this number of channels.
    channels, rest = divmod(math.prod(embedding[1:]), KERNEL)  # it comes flattened too
    bare = PATCH in modules and not modules[PATCH].key.prefix and "down" in modules[PATCH].tensors
    if not rest and (channels == CONTROL_CHANNELS or (bare and channels and channels not in RELEASED_CHANNELS)):
        shapes.setdefault(PATCH, (embedding[0], channels, 1, 2, 2))
    return shapes


def _checked_shape(stated: Sequence[float], made: tuple[int, ...], key: str) -> tuple[int, ...]:
    """A stated weight shape as integers. WanTraining's converter stores it as floats, which ComfyUI cannot load."""
    shape = tuple(int(size) for size in stated if math.isfinite(size) and size == int(size) > 0)
    if len(shape) != len(stated) or shape[:1] != made[:1] or math.prod(shape) != math.prod(made) or len(shape) < 2:
        raise LoraError(f"{key}: the stated shape {shown(list(stated))} is not that of the pair's weight, {made}.")
    return shape


def _key_format(modules: Mapping[str, _Module]) -> str:
    prefixes = sorted({module.key.prefix or "no prefix" for module in modules.values()})
    kinds = {kind_of(role) for module in modules.values() for role in module.tensors} - {""}
    matrices = sorted({module.matrices or "" for module in modules.values()} - {""} | kinds) or ["diffs"]
    spelled = {name: module.key.spelled.replace(".", "_") for name, module in modules.items()}
    # A change of the modulation may be spelled without its last word.
    diffusers = any(not name.replace(".", "_").startswith(flat) for name, flat in spelled.items())
    return ", ".join([*prefixes, *matrices, "diffusers names" if diffusers else "official names"])
