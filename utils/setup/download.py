"""Downloads a model's files from the Hugging Face hub: the only use of the network, and only on request."""

import re
import shlex
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.common.console import say
from utils.common.errors import UserError
from utils.common.files import existing_parent
from utils.common.formatting import readable_size
from utils.common.options import option
from utils.setup.doctor import print_findings
from wan.checkpoints import LOCAL_MODELS, TOKENIZER, ModelFiles, ModelNotFoundError, find_family
from wan.configs import FAMILIES

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
TOKENIZER_SOURCE = "Wan-AI/Wan2.1-T2V-1.3B"  # every release has the same one
# Of a repository in the layout of diffusers; the transformer with the first of these decides that it is one.
DIFFUSERS_CONFIGS = ("transformer/config.json", "transformer_2/config.json")
DIFFUSERS_PATTERNS = (
    "model_index.json",
    "transformer*/*.json",
    "transformer*/*.safetensors",
    "vae/*.json",
    "vae/*.safetensors",
    "text_encoder/*.json",
    "text_encoder/*.safetensors",
    "image_encoder/*.json",
    "image_encoder/*.safetensors",
    "tokenizer/*",
)


@dataclass(frozen=True)
class SetupOptions:
    """model and setup"""

    pretrained_model_name_or_path: str = option(
        "Wan-AI/Wan2.1-T2V-1.3B", "model folder, or hub name under ./models/", is_path=True
    )
    download_model: bool = option(
        False, "download the model's files from the hub to ./models/, then stop", affects_training=False
    )
    download_tokenizer: bool = option(
        False, "download the tokenizer alone (23 MB) to ./models/google/umt5-xxl, then stop", affects_training=False
    )
    doctor: bool = option(
        False,
        "print versions, devices, whether the model can be used, and known problems, then stop",
        affects_training=False,
    )


def set_up(opts: SetupOptions, open_model: Callable[[], ModelFiles]) -> bool:
    """Does what is asked for instead of a run, if anything is, and returns whether it was. Raises as downloads do.

    `open_model` opens the model of the options.
    """
    if opts.doctor:
        print_findings(open_model)
        return True
    if opts.download_model:
        download_model(opts.pretrained_model_name_or_path)
    if opts.download_tokenizer:
        download_tokenizer()
    return opts.download_model or opts.download_tokenizer


@contextmanager
def suggest_download(family: str | None = None) -> Iterator[None]:
    """Adds the command that downloads a model to the error for a missing one whose name the hub can have.

    With a `family` the missing one is a default, which is not what was asked for.
    """
    try:
        yield
    except ModelNotFoundError as error:
        if family is not None:
            raise UserError(f"--family {family}: name its folder with --pretrained_model_name_or_path") from None
        if not HUB_NAME.fullmatch(error.name):  # a folder, mistyped
            raise
        command = f"python train_wan_lora.py --download_model --pretrained_model_name_or_path {shlex.quote(error.name)}"
        raise UserError(f"{error}\ndownload it with: {command}") from None


def download_model(name: str) -> Path:
    """Downloads what training needs of a hub model to ./models/<name>; returns that folder.

    Repositories in the official layout and in that of diffusers are known. Files and sizes are listed first.
    Interrupted downloads resume, and files that exist are skipped. Raises UserError for a name that the hub does not
    know, without a connection, and for too little disk space.
    """
    folder = LOCAL_MODELS / name
    configs = sorted({file for family in FAMILIES.values() for file in family.config_files} | set(DIFFUSERS_CONFIGS))
    with _explain(name):
        _snapshot(name, folder, configs)
        if not any((folder / file).exists() for file in configs):
            raise UserError(f"{name} has none of the files of a Wan model ({', '.join(configs)})")
        # An unsupported model is reported here, before gigabytes are downloaded.
        family = find_family(folder)
        patterns = DIFFUSERS_PATTERNS if (folder / DIFFUSERS_CONFIGS[0]).exists() else family.hub_patterns
        _fetch(name, folder, patterns)
    say(f"{name} is complete in {folder}")
    return folder


def download_tokenizer() -> Path:
    """Downloads the tokenizer alone, which is the same for every model, to where `open_model` finds it."""
    folder = LOCAL_MODELS / TOKENIZER
    with _explain(TOKENIZER_SOURCE):
        _fetch(TOKENIZER_SOURCE, LOCAL_MODELS, [f"{TOKENIZER.as_posix()}/*"])
    say(f"the tokenizer is complete in {folder}")
    return folder


def _fetch(name: str, folder: Path, patterns: Sequence[str]) -> None:
    """Downloads what matches, after listing it. Raises UserError where the disk has no space for it."""
    _report(_snapshot(name, folder, patterns, dry_run=True), folder)
    _snapshot(name, folder, patterns)


def _snapshot(name: str, folder: Path, patterns: Sequence[str], **settings: bool) -> Any:
    from huggingface_hub import snapshot_download

    return snapshot_download(name, local_dir=folder, allow_patterns=list(patterns), **settings)


@contextmanager
def _explain(name: str) -> Iterator[None]:
    """Inside, errors of the hub and of the connection become a UserError of one line."""
    from huggingface_hub.errors import DryRunError, HFValidationError, RepositoryNotFoundError

    try:
        yield
    except RepositoryNotFoundError:
        raise UserError(f"the hub has no model {name}, or it requires a login; check the spelling") from None
    except DryRunError:
        raise UserError(f"cannot download {name}: the hub does not answer; check the connection") from None
    except (HFValidationError, OSError) as error:  # OSError: the errors of the hub and of the connection
        reason = str(error) or type(error).__name__
        raise UserError(f"cannot download {name}: {reason.splitlines()[0]}") from None


def _report(plan: list, folder: Path) -> None:
    """Lists each file with its size. Raises UserError where the disk has no space for what is missing."""
    width = max(len(file.filename) for file in plan)
    for file in plan:
        there = "" if file.will_download else "already there"
        say(f"{file.filename:<{width}}  {readable_size(file.file_size or 0):>9}  {there}".rstrip())
    needed = sum(file.file_size or 0 for file in plan if file.will_download)
    free = shutil.disk_usage(existing_parent(folder)).free
    say(f"to download: {readable_size(needed)} into {folder}")
    if needed > free:
        raise UserError(f"the disk of {folder} has {readable_size(free)} free, but {readable_size(needed)} are needed")
