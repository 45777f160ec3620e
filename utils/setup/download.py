"""Downloads a model's files from the Hugging Face hub: the only use of the network, and only on request."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from utils.common.console import say
from utils.common.errors import UserError
from utils.common.files import existing_parent
from utils.common.formatting import readable_size
from utils.common.options import option
from wan.checkpoints import LOCAL_MODELS, ModelNotFoundError, find_family
from wan.configs import FAMILIES


@dataclass(frozen=True)
class SetupOptions:
    """model and setup"""

    pretrained_model_name_or_path: str = option("Wan-AI/Wan2.1-T2V-1.3B", "model folder, or hub name under ./models/")
    download_model: bool = option(
        False, "download the model's files from the hub to ./models/, then stop", affects_training=False
    )
    doctor: bool = option(
        False, "print versions, devices and known problems of this machine, then stop", affects_training=False
    )


@contextmanager
def suggest_download() -> Iterator[None]:
    """Adds the command that downloads a model to the error for a missing one."""
    try:
        yield
    except ModelNotFoundError as error:
        command = f"python train_wan_lora.py --download_model --pretrained_model_name_or_path {error.name}"
        raise UserError(f"{error}\ndownload it with: {command}") from None


def download_model(name: str) -> Path:
    """Downloads what training needs of a hub model to ./models/<name>; returns that folder.

    Files and sizes are listed first. Interrupted downloads resume, and files that exist are skipped. Raises UserError
    for a name that the hub does not know, without a connection, and for too little disk space.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import DryRunError, HFValidationError, RepositoryNotFoundError

    folder = LOCAL_MODELS / name
    configs = sorted({file for family in FAMILIES.values() for file in family.config_files})
    try:
        snapshot_download(name, local_dir=folder, allow_patterns=configs)
        if not any((folder / file).exists() for file in configs):
            raise UserError(f"{name} has none of the files of a Wan model ({', '.join(configs)})")
        # An unsupported model is reported here, before gigabytes are downloaded.
        patterns = list(find_family(folder).hub_patterns)
        _report(snapshot_download(name, local_dir=folder, allow_patterns=patterns, dry_run=True), folder)
        snapshot_download(name, local_dir=folder, allow_patterns=patterns)
    except RepositoryNotFoundError:
        raise UserError(f"the hub has no model {name}, or it requires a login; check the spelling") from None
    except DryRunError:
        raise UserError(f"cannot download {name}: the hub does not answer; check the connection") from None
    except (HFValidationError, OSError) as error:  # OSError: the errors of the hub and of the connection
        reason = str(error) or type(error).__name__
        raise UserError(f"cannot download {name}: {reason.splitlines()[0]}") from None
    say(f"{name} is complete in {folder}")
    return folder


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
