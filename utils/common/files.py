"""Files that appear whole or not at all, in folders that were checked beforehand."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from utils.common.errors import UserError

UNFINISHED = ".*.partial.*"  # the names that `replacing` gives: what a crash leaves behind


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A hidden name beside `path` to write to. It becomes `path` if the block succeeds and is removed otherwise.

    The content is on disk before it gets its name, and the user's umask decides who may read it. Raises OSError.
    """
    unfinished = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
    try:
        unfinished.touch()
        mode = unfinished.stat().st_mode
        yield unfinished
        unfinished.chmod(mode)  # some writers make their file readable by its owner only
        with unfinished.open("rb+") as file:
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def file_stamp(status: os.stat_result) -> tuple[int, int, int, int]:
    """What tells versions of a file apart without reading it: size, times of change in nanoseconds, and file number.

    Programs can set the time of modification back, but not the second one.
    """
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def existing_parent(path: Path) -> Path:
    """The path itself where it exists, else the nearest folder above it that does."""
    return next(parent for parent in (path, *path.absolute().parents) if os.path.exists(parent))


def check_writable(folder: Path, option: str = "--output_dir") -> None:
    """Raises UserError where nothing can be written to a folder that is needed only hours later.

    The folder need not exist and is not created. A file is created and removed in the nearest folder that exists: the
    permission bits alone say nothing on Windows, to root, or of a read-only disk.
    """
    existing = existing_parent(folder)
    if not existing.is_dir():
        raise UserError(f"cannot write to {option} {folder}: {existing} is a file")
    trial = existing / f".writable.{os.getpid()}.partial.tmp"
    try:
        trial.touch()
        trial.unlink()
    except OSError as error:
        raise UserError(f"cannot write to {option} {folder}: {error.strerror}") from None
