"""Finds the files below a folder, and says what cannot be read there and why."""

import errno
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from utils.common.errors import UserError
from utils.common.formatting import counted
from utils.media.description import UNREAD_SUFFIXES
from utils.media.probing import is_image, is_video

CONVERT = "convert pictures to PNG or JPEG, videos to MP4"
TEXT_SUFFIXES = frozenset(".txt .json .jsonl .csv".split())  # reported where captions are read


class NoMediaError(UserError):
    """A folder that must hold videos or images has none: `folder`."""

    def __init__(self, message: str, folder: Path) -> None:
        super().__init__(message)
        self.folder = folder


@dataclass(frozen=True)
class Files:
    """Files in path order: `media` by their suffix, and those in formats that no decoder here reads, `unread`.

    `faults` say why a folder or a link cannot be followed. A link may be among the other files too.
    """

    media: list[Path]
    unread: list[Path]
    faults: dict[Path, str]


def find_files(folder: Path, exclude: Sequence[Path] = ()) -> Files:
    """All files below `folder`, following links but entering no folder twice.

    Hidden files, hidden folders and the folders `exclude` are skipped. Raises nothing: what fails is among the faults.
    """
    found: list[Path] = []
    faults: dict[Path, str] = {}

    def fail(error: OSError) -> None:
        faults[Path(error.filename or folder)] = f"the folder cannot be read: {error.strerror}"

    visited = {os.path.realpath(path) for path in exclude}
    for here, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        real = os.path.realpath(here)
        if real in visited:
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(here, name) for name in names if not name.startswith(".")]
    found.sort(key=lambda path: path.relative_to(folder).parts)
    links = (path for path in found if path.suffix.lower() not in TEXT_SUFFIXES)
    faults |= {path: fault for path in links if (fault := _link_fault(path))}
    media = [path for path in found if is_image(path) or is_video(path)]
    return Files(media, [path for path in found if path.suffix.lower() in UNREAD_SUFFIXES], faults)


def require_files(folder: Path, exclude: Sequence[Path] = (), what: str = "dataset") -> Files:
    """The files below a folder that must hold media. Where something could not be read, media may be there: no error.

    Raises `UserError`, which calls the folder `what`, if it is missing, and `NoMediaError` if it has none.
    """
    if not os.path.isdir(folder):
        raise UserError(f"the {what} {folder} {_missing(folder)}")
    files = find_files(folder, exclude)
    if not files.media and not files.faults:
        message = f"there are no videos or images in {folder} or its subfolders: docs/formats.md lists what is read"
        if files.unread:
            unread = counted(len(files.unread), "file")
            message += f"\nnot read: {unread} such as {files.unread[0].name}: {CONVERT}"
        raise NoMediaError(message, folder)
    return files


def _missing(folder: Path) -> str:
    fault = _link_fault(folder)
    if fault:
        return f"cannot be read: {fault}"
    try:
        os.stat(folder)
    except FileNotFoundError:
        return "does not exist"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return "is a file, not a folder"


def _link_fault(path: Path) -> str:
    """Why a link cannot be followed; nothing for other files."""
    if not os.path.islink(path):
        return ""
    try:
        os.stat(path)
    except FileNotFoundError:
        return f"it is a link to {os.readlink(path)}, and nothing is there"
    except OSError as error:
        return "it is a link that leads to itself" if error.errno == errno.ELOOP else f"it is a link: {error.strerror}"
    return ""
