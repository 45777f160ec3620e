"""What a LoRA says before its tensors are read: which files it is, its metadata, the expert that its keys name.

A folder of PEFT, or a file in one, is two files: adapter_config.json decides the scale of the other's matrices.
"""

import os
from collections.abc import Collection, Iterable
from pathlib import Path

from utils.adapters.lora_file import LoraError
from utils.adapters.lora_keys import parse_key
from utils.common.checkpoint_names import CHECKPOINTS
from utils.common.tensor_files import file_metadata, tensor_names
from wan.checkpoints.header import read_by_header

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
EXPERT_KEY = "expert"  # of a LoRA file's metadata


def files_of_lora(path: Path) -> tuple[Path, Path | None]:
    """The file of tensors that a path means, and the adapter_config.json that belongs to it, if any.

    A folder means its adapter_model.safetensors, or the only .safetensors file in it, and its configuration. A file
    that is given itself belongs to the configuration beside it where it has PEFT's name, or where no file there has and
    its keys are PEFT's. Raises LoraError.
    """
    is_folder = os.path.isdir(path)
    if is_folder:  # unlike Path.is_dir it raises nothing for a name that is too long
        files = sorted(path.glob("*.safetensors"))
        named = [file for file in files if file.name == WEIGHTS]
        if len(named or files) != 1:
            if not files and os.path.isdir(path / CHECKPOINTS):
                raise LoraError(f"{path}: is the folder of a run. Give one of its LoRAs, in {path / CHECKPOINTS}.")
            has = f"{len(files)} .safetensors files, and none is {WEIGHTS}. Give one of them" if files else "no LoRA"
            raise LoraError(f"{path}: the folder has {has}.")
        (path,) = named or files
    config = path.parent / CONFIG
    if path.name == CONFIG:
        raise LoraError(f"{path}: says how an adapter is scaled, and holds none. Give its folder, {path.parent}.")
    if path.suffix != ".safetensors" or not os.path.isfile(config):
        return path, None
    # How many other files there are says nothing: converted ones are written beside their source.
    is_named = is_folder or path.name == WEIGHTS
    belongs = is_named or (not (path.parent / WEIGHTS).exists() and _is_of_peft(tensor_names(path)))
    return path, config if belongs else None


def lora_metadata_of(path: Path) -> dict[str, str]:
    """The metadata that `read_lora` finds in a file or a folder, with the expert that the keys alone name.

    Reads the header alone. Empty for what is no LoRA file: `read_lora` says why.
    """
    try:
        file, _ = files_of_lora(path)
        names, metadata = tensor_names(file), file_metadata(file)
        if not names:
            header = read_by_header(file)
            names, metadata = set(header.places), dict(header.notes)
    except (OSError, ValueError, LoraError):
        return {}
    expert = _named_by_keys(names)
    return {EXPERT_KEY: expert, **metadata} if expert else metadata


def _is_of_peft(names: Collection[str]) -> bool:
    """Whether these are PEFT's keys, which it writes without alphas."""
    return any(name.startswith("base_model.") for name in names) and not any(name.endswith(".alpha") for name in names)


def _named_by_keys(names: Iterable[str]) -> str | None:
    """The expert that the prefixes of all keys name. The first expert's say nothing where they are alone."""
    experts = {key.expert for key in map(parse_key, names) if key is not None}
    return experts.pop() if len(experts) == 1 else None
