"""Whether a model's files are there, and what they really are: a link to nothing, a pointer, a web page."""

import json
import os
from pathlib import Path
from typing import Any

from wan.checkpoints.errors import CheckpointError, shown

LOCAL_MODELS = Path("models")
_START = 512  # bytes that tell what a file is
_BLANK = b" \t\r\n"
_TEXT = frozenset(range(0x20, 0x7F)) | set(_BLANK)
_LFS = b"version https://git-lfs"
_UTF8_MARK = b"\xef\xbb\xbf"


def existing(path: Path, why: str = "the layout of the model has it") -> Path:
    """The path of a file or folder. Raises CheckpointError if there is none; `why` says why there should be one."""
    try:
        is_there = path.exists()
    except OSError as error:
        raise CheckpointError(f"cannot read {shown(str(path))}: {error.strerror}") from None
    if not is_there:
        raise CheckpointError(f"{path} is missing{broken_link(path) or f'; {why}'}")
    return path


def broken_link(path: Path) -> str:
    """That a missing path is, or lies below, a link to what is gone, to follow "is missing"; else an empty string."""
    for place in (path, *path.parents):
        if os.path.islink(place) and not os.path.exists(place):
            target = place.parent / os.readlink(place)
            if target.parent.name == "blobs":  # the hub's cache links to its files by their hashes
                gone = f"the blob {shown(target.name)}, which is missing from the hub's cache"
                return f": it is a link to {gone}; run the download again"
            return f": {'it' if place == path else place} is a link to {shown(str(target))}, which is gone"
    return ""


def is_named(path: Path) -> bool:
    """Whether a folder has an entry of this name, if only a link to what is gone."""
    return os.path.lexists(path)


def read_start(path: Path) -> bytes:
    """The first bytes of a file. Raises CheckpointError where it is missing or cannot be read."""
    existing(path)
    try:
        with path.open("rb") as file:
            return file.read(_START)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None


def refuse_other_kinds(path: Path, start: bytes, is_text: bool = False) -> None:
    """Raises CheckpointError for a file that begins like something else than weights, or than JSON where it `is_text`.

    The message says what it really is.
    """
    if kind := _kind(start, is_text):
        raise CheckpointError(f"{path} {kind}")


def _kind(start: bytes, is_text: bool) -> str:
    text = start.removeprefix(_UTF8_MARK).lstrip(_BLANK)
    if not start:
        return "is an empty file: download it again"
    if not start.strip(b"\0") and len(start) > 8:
        return "begins with nothing but zeros: its download has not ended, run it again"
    if start.startswith(b"GGUF"):
        return "is a GGUF file, which is not read here: give the safetensors file of the same model"
    if start.startswith(_LFS):
        return "is a pointer of Git LFS, not the file itself: download the file, or run git lfs pull"
    if text.startswith(b"<"):
        return "is a web page, not the file itself: download it again"
    if not is_text and _TEXT.issuperset(start):
        line = start.decode("ascii").strip().partition("\n")[0].strip()
        return f"is a text, not the file itself: it begins with {shown(line)}\ndownload it again"
    return ""


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises CheckpointError where there is none, with what the file really is."""
    refuse_other_kinds(path, read_start(path), is_text=True)
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged, it is not valid JSON: {shown(str(error))}") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} does not hold a JSON object")
    return values
