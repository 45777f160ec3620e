"""The parts of a dataset: what is trained on, what is held out, and what is neither."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from utils.common.formatting import counted, one_line
from utils.data.names import same_name
from utils.data.notices import Kind, Notice, format_notices
from utils.data.walking import find_files

TRAINING, VALIDATION = "train", ("val", "validation", "eval", "test")

_BESIDE = Kind("file", f"not used, as only {TRAINING}/ is")


@dataclass(frozen=True)
class Parts:
    """Folders of a dataset: `train`, which is the dataset itself if it has no such folder, and `held_out`, if any.

    The folders `unused` have names of such parts too. All but `train` may lie inside of it.
    """

    dataset: Path
    train: Path
    held_out: Path | None
    unused: tuple[Path, ...] = ()

    @property
    def not_trained(self) -> list[Path]:
        """The folders to leave out in training."""
        return [*([self.held_out] if self.held_out else []), *self.unused]


def split_folders(dataset: Path, is_listed: bool = False) -> Parts:
    """Finds `train` and the first of `VALIDATION`, in any letter case where nothing has the exact name.

    Where a list says what is trained on (`is_listed`), that is not `train` alone, but what is in no other part.
    """
    try:
        names = sorted(os.listdir(dataset))
    except OSError:  # reported where the folder is scanned
        names = []
    folders = [dataset / name for name in names if os.path.isdir(dataset / name)]
    train, *others = ([] if is_listed else _named(folders, (TRAINING,))) or [dataset]
    held_out = _named(folders, VALIDATION)
    return Parts(dataset, train, held_out[0] if held_out else None, (*others, *held_out[1:]))


def dataset_name(part: Path) -> str:
    """The name of the dataset's folder that a part is in, or that it is itself."""
    folder = part.resolve()
    return folder.parent.name if same_name(folder.name) == TRAINING else folder.name


def notices_of(parts: Parts, used: Sequence[Path] = ()) -> list[Notice]:
    """Folders with other names than the parts they are used as, and what is not used. `used` are other folders."""
    found = []
    held_out = [parts.held_out] if parts.held_out else []
    for path, names in ((parts.train, [TRAINING]), *((path, VALIDATION) for path in held_out)):
        if path != parts.dataset and path.name not in names:
            role = next(name for name in names if same_name(path.name) == name)
            found.append(Notice(Kind("folder", f"used as {role}/"), path, f"{path.name}/"))
    found += _unused(parts)
    return found + [Notice(_BESIDE, path, path.relative_to(parts.dataset).as_posix()) for path in _beside(parts, used)]


def media_elsewhere(parts: Parts, empty: Path, used: Sequence[Path] = ()) -> list[str]:
    """Lines that say where media of a dataset lie, one of whose parts is `empty`. `used` are other folders."""
    lines = []
    beside = _beside(parts, used) if empty == parts.train else []
    if beside:
        lie, them = ("lies", "it") if len(beside) == 1 else ("lie", "them")
        example, place = one_line(beside[0].relative_to(parts.dataset).as_posix()), f"{parts.train.name}/"
        found = f"{counted(len(beside), 'file')} {lie} beside {place}, such as {example}"
        lines.append(f"{found}: move {them} in, or remove {place}")
    if empty == parts.dataset and parts.held_out and find_files(parts.held_out).media:
        lines.append(f"the files in {parts.held_out.name}/ are held out for validation")
    return lines + format_notices(_unused(parts))


def _unused(parts: Parts) -> list[Notice]:
    found = []
    for path in parts.unused:
        chosen = parts.train if same_name(path.name) == TRAINING else parts.held_out
        outcome = f"not used, as {chosen.name if chosen else TRAINING}/ is"
        found.append(Notice(Kind("folder", outcome), path, f"{path.name}/"))
    return found


def _beside(parts: Parts, used: Sequence[Path]) -> list[Path]:
    """Pictures and videos in the dataset's folder that belong to no part of it, in any format."""
    if parts.train == parts.dataset:
        return []
    elsewhere = [path for path in used if os.path.realpath(path) != os.path.realpath(parts.dataset)]
    files = find_files(parts.dataset, [parts.train, *parts.not_trained, *elsewhere])
    return files.media + files.unread


def _named(folders: Sequence[Path], names: Sequence[str]) -> list[Path]:
    """The folders that have one of the names in any letter case; of each name the exact one first."""
    found: dict[str, Path] = {}
    for name in names:
        alike = [path for path in folders if same_name(path.name) == name]
        for path in sorted(alike, key=lambda path: path.name not in names):
            found.setdefault(os.path.realpath(path), path)  # a link to another of them is no other folder
    return list(found.values())
