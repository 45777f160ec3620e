"""PEFT's folders: an adapter's matrices in one file, and all that decides their scale in another.

    adapter_model.safetensors   base_model.model.<module>.lora_A.weight, .lora_B.weight; no alphas
    adapter_config.json         r, lora_alpha, use_rslora, rank_pattern, alpha_pattern and more

Sources: `PeftModel.save_pretrained`, LoraConfig, LoHaConfig and LoKrConfig of PEFT 0.21.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from utils.adapters.lora_file import LoraError, LoraFile, shown
from utils.adapters.lora_header import CONFIG, WEIGHTS, files_of_lora
from utils.adapters.lora_metadata import Statement, by_pattern, peft_alphas, peft_scales
from utils.common.files import replacing
from utils.common.tensor_files import TensorFileError, write_tensors

MAX_CONFIG = 2**24  # bytes
DEFAULT = 8  # of ranks and of alphas, in PEFT
KINDS = {"LORA": "lora_alpha", "LOHA": "alpha", "LOKR": "alpha"}  # and what each calls its alpha

# Fields that make the change another one than that of the matrices alone, where they are set.
_OTHERWISE = (
    *("fan_in_fan_out", "use_qalora", "alora_invocation_tokens", "use_bdlora", "arrow_config", "kasa_config"),
    *("monteclora_config", "velora_config", "layer_replication"),
)

# Ways to begin that subtract something from the base model.
_ON_ANOTHER_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class PeftConfig:
    """An adapter_config.json that says nothing that is not understood."""

    path: Path
    fields: Mapping[str, Any]

    @property
    def kind(self) -> str:
        """LORA, LOHA or LOKR."""
        return str(self.fields["peft_type"])

    def remarks(self, ranks: Mapping[str, int]) -> list[str]:
        """A sentence where it states other ranks than the matrices have, which count. Raises LoraError."""
        stated = self.ranks(ranks) if "r" in self.fields else {}
        differing = [name for name, rank in stated.items() if ranks[name] and rank != ranks[name]]
        if not differing:
            return []
        said, counted = stated[differing[0]], ranks[differing[0]]
        return [f"{self.path} says rank {said:g}, the tensors {counted} ({differing[0]}): these count"]

    def statement(self, ranks: Mapping[str, int]) -> Statement:
        """The alphas that it states for modules of these ranks. Raises LoraError."""
        alpha = self.fields.get(KINDS[self.kind], DEFAULT)
        try:
            return Statement(CONFIG, peft_alphas({**self.fields, "lora_alpha": alpha}, ranks))
        except ValueError as error:
            raise LoraError(f"{self.path} gives no usable alpha: {error}.") from error

    def ranks(self, names: Iterable[str]) -> dict[str, float]:
        """The rank that it states for each of these modules: what PEFT divides alpha by. Raises LoraError."""
        stated = {"r": DEFAULT} | {name: value for name, value in self.fields.items() if value is not None}
        try:
            ranks = by_pattern(stated, "r", "rank_pattern", names)
        except ValueError as error:
            raise LoraError(f"{self.path} gives no usable rank: {error}.") from error
        if wrong := [name for name, rank in ranks.items() if rank <= 0]:
            raise LoraError(f"{self.path} gives no usable rank: that of {wrong[0]} is {ranks[wrong[0]]:g}.")
        return ranks


def find_weights(path: Path) -> tuple[Path, PeftConfig | None]:
    """As `files_of_lora`, with the configuration read. Raises LoraError, too, for one that is not understood."""
    file, config = files_of_lora(path)
    return file, _read(config) if config else None


def to_config(lora: LoraFile) -> dict[str, Any]:
    """The adapter_config.json of a LoRA, whose alphas are all known. Raises LoraError where one is not."""
    unknown = [name for name, pair in sorted(lora.pairs.items()) if pair.alpha is None]
    if unknown:
        raise LoraError(
            f"{CONFIG} has to state an alpha, and this LoRA states none ({unknown[0]}). Give it with --alpha; most "
            f"tools that state none mean the rank, here {lora.pairs[unknown[0]].rank}."
        )
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "lora_dropout": 0.0,
        "lora_bias": any(key.endswith(".diff_b") for key in lora.diffs),
        "use_dora": bool(lora.magnitudes),
        **peft_scales(dict(sorted(lora.pairs.items()))),
    }


def config_text(config: Mapping[str, Any]) -> str:
    """As PEFT writes it."""
    return json.dumps(config, indent=2, sort_keys=True) + "\n"


def check_folder(folder: Path) -> None:
    """Raises LoraError where an adapter's folder cannot have this path."""
    if folder.exists() and not folder.is_dir():
        raise LoraError(f"{folder}: is a file, and the layout of PEFT is a folder. Give another name.")
    if not folder.parent.is_dir():
        raise LoraError(f"{folder}: the folder {folder.parent} does not exist.")


def write_folder(folder: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], config: str) -> None:
    """Writes both files of an adapter. A write that fails leaves those that were there. Raises LoraError."""
    check_folder(folder)
    try:
        folder.mkdir(exist_ok=True)
        with replacing(folder / CONFIG) as unfinished:
            unfinished.write_text(config, encoding="utf-8")
            write_tensors(folder / WEIGHTS, tensors, metadata)
    except OSError as error:
        raise LoraError(f"{folder}: could not be written ({error.strerror}).") from error
    except TensorFileError as error:
        raise LoraError(f"{folder}: could not be written ({error}).") from error


def has_config(folder: Path, text: str) -> bool:
    """Whether a folder has exactly this adapter_config.json."""
    try:
        return (folder / CONFIG).read_text(encoding="utf-8") == text
    except (OSError, UnicodeDecodeError):
        return False


def _read(path: Path) -> PeftConfig:
    try:
        if path.stat().st_size > MAX_CONFIG:
            raise LoraError(f"{path}: has more than {MAX_CONFIG // 2**20} MB, so it is none of PEFT's.")
        fields = json.loads(path.read_bytes())
    except OSError as error:
        raise LoraError(f"{path}: cannot be read ({error.strerror}).") from error
    except (ValueError, RecursionError) as error:
        raise LoraError(f"{path}: is damaged: {error}.") from error
    kind = fields.get("peft_type", "LORA") if isinstance(fields, dict) else None
    if not isinstance(kind, str) or kind not in KINDS:
        raise LoraError(f"{path}: the peft_type is {shown(kind)}; those that are read are {', '.join(KINDS)}.")
    for name in _OTHERWISE:
        if fields.get(name):
            raise LoraError(f"{path}: {name} is set, so the change is not that of the matrices alone.")
    start = fields.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_ON_ANOTHER_BASE):
        raise LoraError(
            f"{path}: init_lora_weights is {shown(start)}, which changes the base model too. Convert the adapter to a "
            "plain LoRA with PEFT: save_pretrained(..., path_initial_model_for_weight_conversion=...)."
        )
    return PeftConfig(path, {**fields, "peft_type": kind})
