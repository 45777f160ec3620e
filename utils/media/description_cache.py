"""DescriptionCache of media files on disk, by content: a file is decoded in full once, not at every start.

<folder>/<hash of the content and of how it was read>.json
"""

import contextlib
import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import av

from utils.common.files import replacing
from utils.media.description import MediaError, MediaInfo, from_json, to_json
from utils.media.probing import is_image

Found = MediaInfo | MediaError
VERSION = 2  # of what a description says of a file; another number makes all files to be read again


class DescriptionCache:
    """What was found in files, under `folder`; nothing is kept without one. Unreadable entries do not count."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def find(self, path: Path, digest: str, stamp: tuple[int, ...], full: bool, mask: bool) -> Found | None:
        """What is known of a file with this content: with `full` after decoding it, else also without.

        Damage that is known counts without `full` too.
        """
        if self.folder is None:
            return None
        try:
            file = _path(self.folder, path, digest, mask)
            if not file.is_file():  # a pipe would be waited for
                return None
            entry = json.loads(file.read_text(encoding="utf-8"))
            if full and not entry["full"]:
                return None
            if entry["reason"] is not None:
                return MediaError(path, str(entry["reason"]))
            return replace(from_json(entry["info"]), stamp=stamp, digest=digest)
        except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError):
            return None

    def keep(self, path: Path, digest: str, found: Found, full: bool, mask: bool) -> None:
        """Remembers what was found. A folder that cannot be written only costs reading the file again."""
        if self.folder is None:
            return
        entry: dict[str, Any] = {"full": full, "reason": None, "info": None}
        if isinstance(found, MediaError):
            entry["reason"] = found.reason
        else:
            entry["info"] = to_json(replace(found, stamp=(), digest=""))
        with contextlib.suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            with replacing(_path(self.folder, path, digest, mask)) as unfinished:
                unfinished.write_text(json.dumps(entry), encoding="utf-8")


def _path(folder: Path, path: Path, digest: str, mask: bool) -> Path:
    how = [digest, VERSION, is_image(path), mask, av.__version__, sorted(av.library_versions.items())]
    name = hashlib.sha256(json.dumps(how).encode()).hexdigest()[:32]
    return folder / f"{name}.json"
