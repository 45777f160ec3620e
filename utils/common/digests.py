"""SHA-256 digests of files, remembered between runs: a dataset is hashed once, not at every start."""

import contextlib
import hashlib
import json
import re
from pathlib import Path

from utils.common.errors import UserError
from utils.common.files import replacing

LATENTS = "latents"  # the folder inside a cache folder that holds the latents and the index of digests
DIGESTS = "digests.json"

Entry = tuple[int, int, str]
_HEX_DIGEST = re.compile(r"[0-9a-f]{64}")


class Digests:
    """The SHA-256 of each file, remembered in a JSON index as long as the file's size and modification time match.

    The index maps an absolute path to [size in bytes, modification time in nanoseconds, 64 hex digits]. An index that
    cannot be read counts as empty. An entry of any other form is dropped, and its file is hashed again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._known = _read_index(path)

    def of(self, path: Path) -> str:
        """The SHA-256 of a file's bytes as 64 hex digits. Raises UserError if the file cannot be read."""
        try:
            status = path.stat()
            stamp = status.st_size, status.st_mtime_ns
            known = self._known.get(str(path.absolute()))
            if known is None or known[:2] != stamp:
                with path.open("rb") as file:
                    known = (*stamp, hashlib.file_digest(file, "sha256").hexdigest())
                self._known[str(path.absolute())] = known
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from None
        return known[2]

    def save(self) -> None:
        """Writes the index for the next run. A folder that cannot be written only costs hashing again."""
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self.path) as unfinished:
                unfinished.write_text(json.dumps(self._known), encoding="utf-8")


def _read_index(path: Path) -> dict[str, Entry]:
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # RecursionError: nested thousands of levels deep
        return {}
    if not isinstance(index, dict):
        return {}
    entries = {file: _checked_entry(content) for file, content in index.items()}
    return {file: entry for file, entry in entries.items() if entry is not None}


def _checked_entry(content: object) -> Entry | None:
    match content:
        case [int(size), int(modified), str(digest)] if _HEX_DIGEST.fullmatch(digest):
            is_number = not isinstance(size, bool) and not isinstance(modified, bool)  # JSON's true is an int here
            return (size, modified, digest) if is_number else None
    return None
