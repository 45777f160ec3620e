"""Fetching a model's files from the Hugging Face hub: the only use of the network, and only when asked for."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from utils.common.errors import UserError
from utils.common.formatting import readable_size
from wan.checkpoints import LOCAL_MODELS, ModelNotFoundError, find_family
from wan.configs import FAMILIES


@contextmanager
def suggest_download() -> Iterator[None]:
    """Adds the command that downloads a model to the error for a missing one."""
    try:
        yield
    except ModelNotFoundError as error:
        command = f"python train_wan_lora.py --download_model --pretrained_model_name_or_path {error.name}"
        raise UserError(f"{error}\ndownload it with: {command}") from None


def download_model(name: str) -> Path:
    """Fetches what training needs of a hub model into ./models/<name>, told beforehand; returns that folder.

    Interrupted downloads go on where they stopped, and what is there already is not fetched again. Raises UserError
    for a name the hub does not know, no connection, or too little disk space.
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
        _tell(snapshot_download(name, local_dir=folder, allow_patterns=patterns, dry_run=True), folder)
        snapshot_download(name, local_dir=folder, allow_patterns=patterns)
    except RepositoryNotFoundError:
        raise UserError(f"the hub has no model {name}, or only for those who log in; check the spelling") from None
    except DryRunError:
        raise UserError(f"cannot download {name}: the hub does not answer; check the connection") from None
    except (HFValidationError, OSError) as error:  # the errors of the hub and of the connection are OSErrors
        reason = str(error) or type(error).__name__
        raise UserError(f"cannot download {name}: {reason.splitlines()[0]}") from None
    print(f"{name} is complete in {folder}")
    return folder


def _tell(plan: list, folder: Path) -> None:
    """Prints each file with its size, and stops where the disk cannot hold what is still to come."""
    width = max(len(file.filename) for file in plan)
    for file in plan:
        there = "" if file.will_download else "already there"
        print(f"{file.filename:<{width}}  {readable_size(file.file_size or 0):>9}  {there}".rstrip())
    needed = sum(file.file_size or 0 for file in plan if file.will_download)
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    print(f"to download: {readable_size(needed)} into {folder}")
    if needed > free:
        raise UserError(f"the disk of {folder} has {readable_size(free)} free, {readable_size(needed)} are needed")
