"""The base model of a LoRA: how its metadata names it, and how it is found again.

    base_model         the hub name, or of a folder on disk its own name, or those of single files
    base_files         of single files: the options that they were given by
    base_model_hash    which files its transformer was read from, whatever they are called

Names of folders are shown and compared, never opened, and neither are the paths that earlier versions wrote, without a
hash. Where folders are is in the options that a run keeps beside its LoRAs.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from utils.adapters.lora_file import shown
from utils.adapters.lora_header import lora_metadata_of
from utils.adapters.pairs import resolve_experts
from utils.common.errors import UserError
from utils.common.run_options import options_of_run
from utils.setup.download import HUB_NAME
from utils.setup.model import BASE_FILES, BASE_MODEL, SingleFiles
from wan.checkpoints import (
    TRANSFORMERS,
    CheckpointError,
    ModelFiles,
    find_model,
    open_model,
    transformer_fingerprint,
)
from wan.configs import FAMILIES

BASE_HASH = "base_model_hash"
FOLDER = "pretrained_model_name_or_path"


def find_base(opts: SingleFiles, lora: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """The options that open the base model of a LoRA, for what `opts` leave open: its folder, its single files.

    They are those of the run in whose folder the LoRA lies, where what they name is there and has the recorded names or
    the recorded hash. Else a hub name is one. Raises UserError, which asks for the model by name, for one that is in
    neither.
    """
    name, has_transformers = metadata.get(BASE_MODEL), bool(opts.given_transformers)
    for options in options_of_run(lora) if name else ():
        named, single = _read_options(options)
        if _is_there(named, single) and _is_of(named, single, metadata):
            return {FOLDER: named} | _left_open(opts, single)
    if BASE_FILES in metadata:
        if has_transformers:
            return {}
        raise UserError(
            f"the LoRA was trained on single files: give them again, {shown(metadata[BASE_FILES])}\n"
            "and --vae, --text_encoder and --tokenizer, or the folder that has these as --pretrained_model_name_or_path"
        )
    if name and HUB_NAME.fullmatch(name):
        return {FOLDER: name}
    if has_transformers:
        return {}
    if not name:
        raise UserError(f"{lora} does not name its base model; pass --{FOLDER}")
    digest = metadata.get(BASE_HASH)
    which = "" if digest is None else f", a folder whose transformer has the hash {shown(digest)}"
    raise UserError(f"{lora} was trained on '{shown(name)}'{which}\npass that folder as --{FOLDER}")


def base_remarks(files: ModelFiles, loras: Sequence[Path]) -> Iterator[str]:
    """A sentence for each LoRA that was trained on other files than the model has. Raises as `resolve_experts` does."""
    for part, path in resolve_experts(loras, [expert.name for expert in files.family.experts]).items():
        metadata = lora_metadata_of(path)
        trained, transformer = metadata.get(BASE_HASH), files.transformers.get(part)
        if trained and transformer and trained != (here := transformer_fingerprint(transformer)):
            whose = f"{shown(metadata.get(BASE_MODEL, 'a model'))}, hash {shown(trained)}"
            yield f"note: {path} was trained on {whose}; {transformer.path} has the hash {here}: another file"


def _read_options(options: Mapping[str, object]) -> tuple[str | None, SingleFiles]:
    """What a run was given: its folder or hub name, and single files. Values of other types count as not given."""
    named = options.get(FOLDER)
    texts = {row.name: options.get(row.name) for row in fields(SingleFiles)}
    family = texts.pop("family")
    single = {name: Path(text) for name, text in texts.items() if isinstance(text, str)}
    given_family = family if isinstance(family, str) and family in FAMILIES else None
    return named if isinstance(named, str) else None, SingleFiles(**single, family=given_family)


def _is_there(named: str | None, single: SingleFiles) -> bool:
    """Whether the files exist; the folder need not be there where transformers are given, since it has a default."""
    if not all(os.path.exists(path) for path in single.given.values()):
        return False
    if single.given_transformers:
        return True
    try:
        return named is not None and find_model(named).is_dir()
    except CheckpointError:
        return False


def _is_of(named: str | None, single: SingleFiles, metadata: Mapping[str, str]) -> bool:
    """Whether a LoRA says that this is its base model: by the names, or else by the hash."""
    said = {key: metadata[key] for key in (BASE_MODEL, BASE_FILES) if key in metadata}
    if single.base(named or "") == said or metadata.get(BASE_MODEL) == named:
        return True
    if BASE_HASH not in metadata:
        return False
    try:
        files = open_model(named, single.family or "", **single.given)
    except CheckpointError:
        return False
    return metadata[BASE_HASH] in map(transformer_fingerprint, files.transformers.values())


def _left_open(opts: SingleFiles, single: SingleFiles) -> dict[str, Any]:
    """Of these options those that are not given; no transformers, and no family, where others are given."""
    kept = set(TRANSFORMERS) | {"family"} if opts.given_transformers else set()
    values = {row.name: getattr(single, row.name) for row in fields(SingleFiles)}
    return {
        name: value
        for name, value in values.items()
        if value is not None and name not in kept and getattr(opts, name) is None
    }
