"""Fetching a model's files from the Hugging Face hub: the only use of the network, and only when asked for."""

import shutil
from pathlib import Path

from utils.common.errors import UserError
from utils.common.formatting import readable_size
from wan.checkpoints import HUB_PATTERNS, LOCAL_MODELS, load_config


def download_model(name: str) -> Path:
    """Fetches what training needs of a hub model into ./models/<name>, told beforehand; returns that folder.

    Interrupted downloads go on where they stopped, and what is there already is not fetched again. Raises UserError
    for a name the hub does not know, no connection, or too little disk space.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import DryRunError, HFValidationError, RepositoryNotFoundError

    folder = LOCAL_MODELS / name
    try:
        plan = snapshot_download(name, local_dir=folder, allow_patterns=list(HUB_PATTERNS), dry_run=True)
        if not plan:
            raise UserError(f"{name} has none of the files of a Wan model ({', '.join(HUB_PATTERNS)})")
        snapshot_download(name, local_dir=folder, allow_patterns=["config.json"])
        load_config(folder)  # an unsupported model is told before gigabytes are spent on it
        _tell(plan, folder)
        snapshot_download(name, local_dir=folder, allow_patterns=list(HUB_PATTERNS))
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
