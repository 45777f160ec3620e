"""Files that appear whole or not at all, in folders that were asked beforehand."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from utils.common.errors import UserError

UNFINISHED = ".*.partial.*"  # names that `replacing` gives, where a crash has left them


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A hidden name beside `path`, to write to; it becomes `path` when the block ends well and vanishes otherwise.

    The file is on the disk before it gets its name, and readable to whom the user's umask allows. Raises OSError.
    """
    unfinished = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
    try:
        unfinished.touch()
        mode = unfinished.stat().st_mode
        yield unfinished
        unfinished.chmod(mode)  # some writers let nobody but the user read their file
        with unfinished.open("rb+") as file:
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def check_writable(folder: Path, option: str = "--output_dir") -> None:
    """Raises UserError where a folder that will be written to hours later cannot be; creates nothing."""
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not (existing.is_dir() and os.access(existing, os.W_OK)):
        reason = "it may not be written" if existing.is_dir() else f"{existing} is a file"
        raise UserError(f"cannot write to {option} {folder}: {reason}")
