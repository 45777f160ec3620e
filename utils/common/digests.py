"""SHA-256 digests of files, remembered between runs: a dataset is hashed once, not at every start."""

import contextlib
import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path

from utils.common.errors import UserError
from utils.common.files import file_stamp, replacing

LATENTS = "latents"  # the folder inside a cache folder that holds the latents and the index of digests
DIGESTS = "digests.json"
BLOCK = 2**22  # bytes that are read at a time

Entry = tuple[tuple[int, ...], str]
_HEX_DIGEST = re.compile(r"[0-9a-f]{64}")


class Digests:
    """The SHA-256 of each file, remembered in a JSON index as long as the file has the same `file_stamp`.

    The index maps an absolute path to [the four numbers of the stamp, 64 hex digits]. An index that cannot be read
    counts as empty. An entry of any other form is dropped, and its file is hashed again. Without a path there is no
    index: what is hashed is remembered until the run ends.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._known = {} if path is None else _read_index(path)

    def of(self, path: Path) -> str:
        """The SHA-256 of a file's bytes as 64 hex digits. Raises UserError if the file cannot be read."""
        try:
            stamp = file_stamp(path.stat())
            known = self.known(path, stamp)
            if known is None:
                known = hash_file(path)
                self.remember(path, stamp, known)
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from None
        return known

    def known(self, path: Path, stamp: tuple[int, ...]) -> str | None:
        """The digest of a file that has this stamp, if it is remembered."""
        then, digest = self._known.get(str(path.absolute()), ((), None))
        return digest if then == stamp else None

    def remember(self, path: Path, stamp: tuple[int, ...], digest: str) -> None:
        """`stamp` is that of the file before it was hashed."""
        self._known[str(path.absolute())] = stamp, digest

    def save(self) -> None:
        """Writes the index for the next run. A folder that cannot be written only costs hashing again."""
        if self.path is None:
            return
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
        case [[*stamp], str(digest)] if len(stamp) == 4 and _HEX_DIGEST.fullmatch(digest):
            numbers = [number for number in stamp if type(number) is int]  # JSON's true is not
            return (tuple(numbers), digest) if len(numbers) == len(stamp) else None
    return None


def hash_file(path: Path, progress: Callable[[int], None] = lambda position: None) -> str:
    """The SHA-256 of a file's bytes as 64 hex digits; `progress` is called with how many were read. Raises OSError."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
            progress(file.tell())
    return digest.hexdigest()
