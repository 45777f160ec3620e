"""--clip_list: a file with a row for each clip of a dataset, which says which files are used, and their captions.

    [{"file_path": "train/fox.mp4", "text": "a fox", "type": "video"}]      JSON; JSON lines and CSV have the same keys

Paths are relative to the dataset's folder, and never lead out of it: a row can only name what a walk through the folder
has found. Other keys, such as width and height, are not read: files are measured. This is the metadata of VideoX-Fun.
"""

import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath

from utils.common.errors import UserError
from utils.data.caption_files import Row, UnusableError, is_visible, read_rows
from utils.data.captions import Captions
from utils.data.names import same_name
from utils.media.description import MediaInfo

IMAGE, VIDEO = KINDS = ("image", "video")


@dataclass(frozen=True)
class ClipList:
    """The rows of a list by the media file that they name, and what is wrong with other rows, a sentence each."""

    file: Path
    rows: dict[Path, Row] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    @property
    def captions(self) -> Captions:
        """The captions of the rows; the faults of the list are among the problems of its file."""
        found = Captions(file_problems=[(self.file, fault) for fault in self.faults])
        for path, row in self.rows.items():
            texts = tuple(filter(is_visible, row.texts))
            if texts:
                found.texts[path] = texts
            else:
                found.problems[path] = f"its caption in {self.file.name}, {row.place}, is empty: write one"
        return found

    def misfit(self, path: Path, info: MediaInfo) -> str:
        """Why a file is not what its row says; nothing where it is, or where the row does not say."""
        row, kind = self.rows[path], IMAGE if info.is_image else VIDEO
        if row.kind in ("", kind):
            return ""
        return f"it is {_a(kind)}, but {self.file.name}, {row.place}, says {row.kind}"


def read_clip_list(file: Path, folder: Path, media: Sequence[Path], per_line: bool = False) -> ClipList:
    """The rows of a file that name one of the `media` below the folder.

    Faulty are rows that name something else, a file again, or a type that is none. Raises UserError for a file that
    cannot be read, or has no rows.
    """
    found, names = ClipList(file), _Names(folder, media)
    try:
        for row in read_rows(file, per_line):
            path = names.find(row.name)
            if fault := _fault(row, path, found, folder):
                found.faults.append(f"{row.place} {fault}")
            elif path is not None:
                found.rows[path] = row
    except UnusableError as error:
        raise UserError(f"--clip_list {file}: {error}") from None
    if not found.rows and not found.faults:
        raise UserError(f"--clip_list {file}: it has no rows: write one for each clip")
    return found


def _fault(row: Row, path: Path | None, found: ClipList, folder: Path) -> str:
    """What is wrong with a row that names this file; the rest of a sentence after "row 1"."""
    name = row.name
    if row.kind and row.kind not in KINDS:
        return f"has the type {row.kind!r}: it must be image or video"
    if any(kind(name).anchor or ".." in kind(name).parts for kind in (PurePosixPath, PureWindowsPath)):
        return f"names {name}, which may lie elsewhere: write the path from {folder} on, without .."
    if path is None:
        there = any(os.path.isfile(folder / spelled) for spelled in _spellings(name))
        reason = "is no video or image that is trained on here" if there else f"is not in {folder}"
        return f"names {name}, which {reason}"
    if path in found.rows:
        return f"names {name} again, as {found.rows[path].place} does: keep one"
    return ""


class _Names:
    """Media files by their paths below a folder: as written, or else the only one that looks the same."""

    def __init__(self, folder: Path, media: Sequence[Path]) -> None:
        self.exact = {path.relative_to(folder).as_posix(): path for path in media}
        self.alike: dict[str, list[Path]] = defaultdict(list)
        for name, path in self.exact.items():
            self.alike[same_name(name)].append(path)

    def find(self, name: str) -> Path | None:
        for spelled in _spellings(name):
            if spelled in self.exact:
                return self.exact[spelled]
            if len(alike := self.alike.get(same_name(spelled), [])) == 1:
                return alike[0]
        return None


def _spellings(name: str) -> Iterator[str]:
    """A path without `.` and doubled separators: as written, and with the separators of Windows."""
    yield PurePosixPath(name).as_posix()
    yield PurePosixPath(name.replace("\\", "/")).as_posix()


def _a(kind: str) -> str:
    return f"an {kind}" if kind == IMAGE else f"a {kind}"
