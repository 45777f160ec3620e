"""How LoRA files are spelled: every known spelling is read into one form, and four layouts are written from it.

A pair of matrices changes the weight of one module by `alpha / rank * up @ down`. In memory, modules carry their
official Wan names ("blocks.0.self_attn.q"). The layouts that can be written:

    comfy        diffusion_model.<official>.lora_A.weight, .lora_B.weight, .alpha; ComfyUI reads it, and diffusers too
                 as long as only attention and feed-forward modules are adapted
    predecessor  <official>.lora_A.weight, .lora_B.weight, as WanTraining writes them; alpha lives in the metadata
    kohya        lora_unet_<official, underscored>.lora_down.weight, .lora_up.weight, .alpha
    diffusers    transformer.<diffusers name>.lora_A.weight, .lora_B.weight; alpha lives in the metadata

Sources: the key map and LoRA adapters of ComfyUI v0.3.64, the Wan loader of diffusers 0.42, LoraConfig of PEFT 0.21.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from utils.common.errors import UserError
from utils.common.files import replacing
from wan.names import diffusers_name, is_parameter, official_name

LAYOUTS = ("comfy", "predecessor", "kohya", "diffusers")

# Metadata that states alphas. It is taken out on reading and written only in layouts whose tensors say no alpha:
# diffusers applies its key on top of alpha tensors, so a converted file that kept it would be scaled twice.
DIFFUSERS_KEY = "lora_adapter_metadata"
OWN_KEY = "wan_lora_scaling"

CONTROL_CHANNELS = 32  # inputs of a text-to-video Wan that follows control: 16 of latents, 16 of control

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
    r"lora_magnitude_vector|\.dora_scale": "is a DoRA magnitude, which no layout here can carry",
    r"\.hada_[wt]\d": "belongs to a LoHa, which is not a LoRA pair",
    r"\.lokr_[wt]\d": "belongs to a LoKr, which is not a LoRA pair",
    r"\.set_weight$": "replaces a whole weight instead of adapting it",
    r"\.lora_mid\.": "belongs to a Tucker decomposition, which is not a LoRA pair",
    r"\.lora_B\.(\w+\.)?bias$": "is a bias inside the adapter, which only PEFT can apply",
}


class LoraError(UserError):
    """A LoRA file that cannot be read, or content that the asked layout cannot hold."""


@dataclass(frozen=True)
class LoraPair:
    """The two matrices of one module, down (rank, in, ...) and up (out, rank, ...); alpha is None where unknown."""

    down: Tensor
    up: Tensor
    alpha: float | None

    @property
    def rank(self) -> int:
        """The inner dimension that both matrices share."""
        return self.down.shape[0]

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """(out, in, ...), the shape of the weight that the pair changes."""
        return self.up.shape[0], *self.down.shape[1:]

    @property
    def scale(self) -> float:
        """alpha / rank (Hu et al. 2021, section 4.1), and 1 where no alpha is known, as in ComfyUI."""
        return self.effective_alpha / self.rank

    @property
    def effective_alpha(self) -> float:
        """The alpha to write where one must be said: a scale of 1 is an alpha equal to the rank."""
        return float(self.rank) if self.alpha is None else self.alpha


@dataclass(frozen=True)
class LoraFile:
    """What a LoRA file says, under official Wan names.

    `extras` are deltas added as they are: "blocks.0.norm3.diff" to the weight, "blocks.0.norm3.diff_b" to the bias.
    `input_shapes` gives the shape to which a weight is padded with zeros before its pair is added: a control LoRA
    widens "patch_embedding" this way. `spelling` tells in words how the file was spelled.
    """

    pairs: dict[str, LoraPair]
    extras: dict[str, Tensor] = field(default_factory=dict)
    input_shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    spelling: str = ""


def delta(pair: LoraPair, weight: float = 1.0) -> Tensor:
    """`weight * scale * up @ down` in fp32, shaped (out, in, ...) like the weight it is added to."""
    product = pair.up.float().flatten(1) @ pair.down.float().flatten(1)
    return (product * (weight * pair.scale)).reshape(pair.weight_shape)


# ---------------------------------------------------------------------------------------------------------- reading


@dataclass
class _Module:
    """The tensors of one module by role ("down", "alpha", "diff_b", ...), and the one way in which it is spelled."""

    stem: tuple[str, str]  # prefix, name
    matrices: str = ""
    tensors: dict[str, Tensor] = field(default_factory=dict)


def read_lora(path: str | Path) -> LoraFile:
    """The content of a .safetensors LoRA file in any known spelling, told apart by its names alone.

    Alphas come from tensors, else from the metadata that this file's writers or diffusers leave; `use_rslora` is folded
    into them. Raises LoraError, naming file and key, for a file that is not readable safetensors, unknown keys, half
    pairs, matrices that do not fit, one module spelled twice, and adapters other than LoRA.
    """
    path = Path(path)
    tensors, metadata = _load(path)
    modules = _sort_into_modules(tensors, path)
    alphas, shapes = _take_scaling(metadata, modules, path)
    pairs, extras = {}, {}
    for name, module in modules.items():
        found, key = module.tensors, f"{path}: {''.join(module.stem)}"
        extras |= {f"{name}.{role}": found[role] for role in ("diff", "diff_b") if role in found}
        if found.keys() - {"diff", "diff_b"}:
            pairs[name] = _pair(found, alphas.get(name), key)
    shapes = _stated_shapes(modules, pairs) if shapes is None else shapes
    input_shapes = {name: _checked_shape(shape, pairs.get(name), f"{path}: {name}") for name, shape in shapes.items()}
    return LoraFile(pairs, extras, input_shapes, metadata, _spelling(modules))


def _spelling(modules: dict[str, _Module]) -> str:
    prefixes = sorted({module.stem[0] or "no prefix" for module in modules.values()})
    matrices = sorted({module.matrices or "deltas" for module in modules.values()})
    diffusers = any(module.stem[1].replace(".", "_") != name.replace(".", "_") for name, module in modules.items())
    return ", ".join([*prefixes, *matrices, "diffusers names" if diffusers else "official names"])


def _load(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if path.is_dir():
        raise LoraError(f"{path} is a folder. Give a .safetensors file in it.")
    if path.suffix.lower() in (".pt", ".pth", ".bin", ".ckpt", ".pkl"):
        raise LoraError(f"{path}: a pickle can run code when it is opened, so it is not read. Use a .safetensors file.")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118, safe_open is no mapping
            metadata = dict(file.metadata() or {})
    except FileNotFoundError as error:
        raise LoraError(f"{path}: there is no such file.") from error
    except (OSError, SafetensorError) as error:
        raise LoraError(f"{path}: not a whole safetensors file ({error}). Copy or export it again.") from error
    if not tensors:
        raise LoraError(f"{path}: the file holds no tensors.")
    return tensors, metadata


def _sort_into_modules(tensors: dict[str, Tensor], path: Path) -> dict[str, _Module]:
    """Official name -> the tensors found for it; every key is understood or refused."""
    modules: dict[str, _Module] = {}
    unknown = []
    for key in sorted(tensors):
        for pattern, reason in _REFUSED.items():
            if re.search(pattern, key):
                raise LoraError(f"{path}: {key} {reason}.")
        match = _KEY.fullmatch(key)
        name = match and official_name(match["name"])
        if not name or (is_parameter(name) and match["other"] != "diff"):
            unknown.append(key)
            continue
        stem = (match["prefix"], match["name"])
        role, matrices = _MATRICES.get(match["matrix"], (match["other"], ""))
        matrices += match["tail"] or ""
        module = modules.setdefault(name, _Module(stem))
        if module.stem != stem or (matrices and module.matrices not in ("", matrices)):
            raise LoraError(f"{path}: {name} is spelled in two ways, here as {key}. Keep one of them.")
        module.matrices = matrices or module.matrices
        module.tensors[role] = tensors[key]
    if unknown:
        names = ", ".join(unknown[:3])
        raise LoraError(f"{path}: {len(unknown)} of {len(tensors)} keys are not LoRA keys of a Wan model: {names}.")
    return modules


def _pair(found: dict[str, Tensor], effective_alpha: float | None, key: str) -> LoraPair:
    for role in ("down", "up"):
        if role not in found:
            raise LoraError(f"{key}: half a pair, there is {', '.join(sorted(found))} but no {role} matrix.")
    if "diff" in found:
        raise LoraError(f"{key}: a LoRA pair and a full .diff exclude each other. Keep one of them.")
    down, up = found["down"], found["up"]
    fits = down.ndim >= 2 and up.ndim >= 2 and down.shape[0] == up.shape[1] > 0 and up.shape[2:].numel() == 1
    if not (fits and down.is_floating_point() and up.is_floating_point()):
        raise LoraError(
            f"{key}: down {tuple(down.shape)} {down.dtype} and up {tuple(up.shape)} {up.dtype} do not fit together."
        )
    if "alpha" in found:
        effective_alpha = float(found["alpha"].item()) if found["alpha"].numel() == 1 else math.nan
    if effective_alpha is not None and not math.isfinite(effective_alpha):
        raise LoraError(f"{key}.alpha: must be one finite number.")
    return LoraPair(down, up, effective_alpha)


def _stated_shapes(modules: dict[str, _Module], pairs: dict[str, LoraPair]) -> dict[str, Sequence[float]]:
    stated = {name: module.tensors.get("reshape_weight") for name, module in modules.items()}
    shapes = {name: tensor.flatten().tolist() for name, tensor in stated.items() if tensor is not None}
    embedding = pairs.get("patch_embedding")
    if embedding and embedding.down.ndim == 5:
        # WanTraining adapts the patch embedding only to widen it for control, and leaves the new shape unsaid, also
        # when somebody has renamed its keys; no released Wan has so many channels.
        bare = not modules["patch_embedding"].stem[0]
        if bare or embedding.down.shape[1] == CONTROL_CHANNELS:
            shapes.setdefault("patch_embedding", embedding.weight_shape)
    return shapes


def _checked_shape(stated: Sequence[float], pair: LoraPair | None, key: str) -> tuple[int, ...]:
    """A stated weight shape as integers; a float copy, which ComfyUI cannot load, is mended here."""
    made = pair.weight_shape if pair else ()
    shape = tuple(int(size) for size in stated if math.isfinite(size) and size == int(size) > 0)
    if len(shape) != len(stated) or shape[:1] != made[:1] or math.prod(shape) != math.prod(made):
        raise LoraError(f"{key}.reshape_weight: says {list(stated)}, but the pair makes a weight of shape {made}.")
    return shape


def _take_scaling(
    metadata: dict[str, str], modules: dict[str, _Module], path: Path
) -> tuple[dict[str, float | None], dict[str, Sequence[float]] | None]:
    """Takes alphas and weight shapes by official name out of the metadata; the shapes are None without our own key."""
    own, config = metadata.pop(OWN_KEY, None), metadata.pop(DIFFUSERS_KEY, None)
    try:
        if own is not None:
            said = json.loads(own)
            shapes = {name: [float(size) for size in shape] for name, shape in said["shapes"].items()}
            return {name: float(alpha) for name, alpha in said["alpha"].items()}, shapes
        config = {key.removeprefix("transformer."): value for key, value in json.loads(config or "{}").items()}
        return {name: _peft_alpha(config, name, module) for name, module in modules.items()}, None
    except (TypeError, ValueError, KeyError, AttributeError, re.error) as error:
        key = DIFFUSERS_KEY if own is None else OWN_KEY
        raise LoraError(f"{path}: the metadata {key} gives no usable alpha ({error}).") from error


def _peft_alpha(config: dict[str, Any], name: str, module: _Module) -> float | None:
    """The alpha that a LoraConfig gives a module: a pattern that ends like its name, else lora_alpha."""
    patterns = (config.get("alpha_pattern") or {}).items()
    spellings = {module.stem[1], name, diffusers_name(name)}
    matching = [alpha for pattern, alpha in patterns if any(re.match(rf"(.*\.)?({pattern})$", s) for s in spellings)]
    alpha = matching[0] if matching else config.get("lora_alpha")
    if alpha is None or "down" not in module.tensors:
        return None
    # rsLoRA scales by alpha / sqrt(rank) (Kalajdzievski 2023), while a file can only say alpha / rank.
    return float(alpha) * (math.sqrt(module.tensors["down"].shape[0]) if config.get("use_rslora") else 1.0)


# ---------------------------------------------------------------------------------------------------------- writing


def _own_metadata(lora: LoraFile) -> dict[str, str]:
    alphas = {name: pair.alpha for name, pair in sorted(lora.pairs.items()) if pair.alpha is not None}
    return {OWN_KEY: json.dumps({"alpha": alphas, "shapes": lora.input_shapes})}


def _diffusers_metadata(lora: LoraFile) -> dict[str, str]:
    """A LoraConfig as diffusers reads it; the patterns are anchored, because PEFT matches the end of a name."""
    ranks = {diffusers_name(name): pair.rank for name, pair in sorted(lora.pairs.items())}
    alphas = {diffusers_name(name): pair.effective_alpha for name, pair in sorted(lora.pairs.items())}
    (rank, _), (alpha, _) = Counter(ranks.values()).most_common(1)[0], Counter(alphas.values()).most_common(1)[0]
    config = {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {f"^{re.escape(name)}": value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {f"^{re.escape(name)}": value for name, value in alphas.items() if value != alpha},
        "target_modules": list(ranks),
    }
    return {DIFFUSERS_KEY: json.dumps({f"transformer.{key}": value for key, value in config.items()}, sort_keys=True)}


@dataclass(frozen=True)
class _Layout:
    """A row: how a module is named, what its matrices are called, and the metadata that stands in for other tensors."""

    stem: Callable[[str], str]
    down: str = "lora_A"
    up: str = "lora_B"
    metadata: Callable[[LoraFile], dict[str, str]] | None = None


_ROWS = {
    "comfy": _Layout(lambda name: f"diffusion_model.{name}"),
    "predecessor": _Layout(lambda name: name, metadata=_own_metadata),
    "kohya": _Layout(lambda name: f"lora_unet_{name.replace('.', '_')}", "lora_down", "lora_up"),
    "diffusers": _Layout(lambda name: f"transformer.{diffusers_name(name)}", metadata=_diffusers_metadata),
}


def to_state_dict(lora: LoraFile, layout: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors, sorted by key, contiguous and on the CPU, and the metadata of a file in one of `LAYOUTS`.

    Where alpha is a tensor it is an fp32 scalar and always there (the rank where alpha is None), because readers differ
    in what a missing one means. Raises LoraError for content that the layout cannot hold and for numbers not finite.
    """
    _refuse_what_does_not_fit(lora, layout)
    _refuse_non_finite(lora)
    row = _ROWS[layout]
    tensors = {f"{row.stem(name)}.{row.down}.weight": pair.down for name, pair in lora.pairs.items()}
    tensors |= {f"{row.stem(name)}.{row.up}.weight": pair.up for name, pair in lora.pairs.items()}
    if row.metadata is None:
        alphas = {name: torch.tensor(pair.effective_alpha, dtype=torch.float32) for name, pair in lora.pairs.items()}
        shapes = {name: torch.tensor(shape, dtype=torch.int64) for name, shape in lora.input_shapes.items()}
        tensors |= {f"{row.stem(name)}.alpha": alpha for name, alpha in alphas.items()}
        tensors |= {f"{row.stem(name)}.reshape_weight": shape for name, shape in shapes.items()}
    for key, tensor in lora.extras.items():
        name, _, role = key.rpartition(".")
        tensors[f"{row.stem(name)}.{role}"] = tensor
    metadata = {**lora.metadata, **(row.metadata(lora) if row.metadata else {})}
    return {key: tensors[key].detach().cpu().contiguous() for key in sorted(tensors)}, metadata


def _refuse_what_does_not_fit(lora: LoraFile, layout: str) -> None:
    if layout not in _ROWS:
        raise LoraError(f"there is no LoRA layout {layout!r}; the layouts are {', '.join(LAYOUTS)}.")
    changed = {key.rpartition(".")[0] for key in lora.extras}
    for name in sorted(lora.pairs.keys() | lora.input_shapes.keys() | changed):
        if official_name(name) != name:
            raise LoraError(f"{name} is not the official name of a Wan module, so no reader would find it.")
        if layout == "kohya" and is_parameter(name):
            raise LoraError(f"the layout kohya cannot hold {name}: it names modules, not bare parameters.")
    if layout in ("diffusers", "predecessor") and lora.extras:
        raise LoraError(f"the layout {layout} holds LoRA pairs only, and there is a delta {min(lora.extras)}.")
    if layout == "diffusers" and lora.input_shapes:
        raise LoraError(f"diffusers cannot load a control LoRA: it does not widen {min(lora.input_shapes)}.")


def _refuse_non_finite(lora: LoraFile) -> None:
    numbers = dict(lora.extras)
    for name, pair in lora.pairs.items():
        numbers |= {
            f"{name}.down": pair.down,
            f"{name}.up": pair.up,
            f"{name}.alpha": torch.tensor(pair.effective_alpha),
        }
    for key, tensor in numbers.items():
        if not tensor.float().isfinite().all():
            raise LoraError(f"{key} holds numbers that are not finite in {tensor.dtype}, so it is not written.")


def _cast(lora: LoraFile, dtype: torch.dtype | None) -> LoraFile:
    if dtype is None:
        return lora
    pairs = {name: replace(pair, down=pair.down.to(dtype), up=pair.up.to(dtype)) for name, pair in lora.pairs.items()}
    return replace(lora, pairs=pairs, extras={key: tensor.to(dtype) for key, tensor in lora.extras.items()})


def write_lora(path: str | Path, lora: LoraFile, layout: str = "comfy", dtype: torch.dtype | None = None) -> None:
    """Writes a .safetensors file whole or not at all; `dtype` casts matrices and deltas, never alphas or shapes.

    Raises LoraError for what `to_state_dict` refuses, and for a path that cannot be written.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise LoraError(f"{path}: the folder {path.parent} does not exist.")
    if path.suffix != ".safetensors":
        raise LoraError(f"{path}: LoRA files are written as .safetensors. Give the file that ending.")
    tensors, metadata = to_state_dict(_cast(lora, dtype), layout)
    try:
        # Clones, because safetensors refuses tensors that are views of one buffer.
        with replacing(path) as unfinished:
            save_file({key: tensor.clone() for key, tensor in tensors.items()}, unfinished, metadata=metadata or None)
    except (OSError, SafetensorError) as error:
        raise LoraError(f"{path}: could not be written ({error}).") from error


def has_same_content(path: str | Path, lora: LoraFile, layout: str = "comfy", dtype: torch.dtype | None = None) -> bool:
    """Whether the file at `path` holds, bit for bit, what `write_lora` with the same arguments would put there."""
    path = Path(path)
    try:
        found, found_metadata = _load(path)
    except LoraError:
        return False
    tensors, metadata = to_state_dict(_cast(lora, dtype), layout)
    return (
        metadata == found_metadata
        and tensors.keys() == found.keys()
        and all(
            tensor.dtype == found[key].dtype
            and tensor.shape == found[key].shape
            and torch.equal(tensor.flatten().view(torch.uint8), found[key].flatten().view(torch.uint8))
            for key, tensor in tensors.items()
        )
    )
