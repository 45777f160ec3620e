"""The weights of one part of a model on disk: where they are, and which tensor of the module each of them is."""

import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from wan.checkpoints.errors import CheckpointError, shown
from wan.checkpoints.files import existing, is_named, read_json
from wan.checkpoints.quantised import find_scales, is_float
from wan.checkpoints.spellings import Spelling, find_spelling, spellings_of
from wan.checkpoints.tensors import LONGEST_NAME, Entry, Header, Piece, Shape, open_file, read_header

_STEMS = ("diffusion_pytorch_model", "model")  # of the files in a folder, in the official layout and in diffusers'
DESCRIPTIONS = {
    "transformer": "a Wan transformer",
    "vae": "a Wan VAE",
    "text_encoder": "a UMT5 text encoder",
    "clip": "a CLIP vision encoder",
}
_MOST_BLOCKS = 1000  # of one part; no released one has more than 40
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors")
_LORA = re.compile(r"[._]lora_(?:A|B|up|down|mid)\b|\.lora\.(?:up|down)\.|\.(?:hada_w\d_[ab]|lokr_w\d|diff|diff_b)$")


@dataclass(frozen=True)
class Weights:
    """A part of a model on disk."""

    path: Path  # the file, or the index or the folder of several
    tensors: Mapping[str, Entry] = field(repr=False)  # by their official names, in the order of reading

    @property
    def shapes(self) -> dict[str, Shape]:
        """The shape of each tensor by its official name."""
        return {name: entry.shape for name, entry in self.tensors.items()}

    @property
    def files(self) -> list[Path]:
        """The files that hold the tensors."""
        return sorted({part.path for entry in self.tensors.values() for part in entry.parts})


def read_weights(path: Path, part: str) -> Weights:
    """What a file, or a folder with one file or with shards, holds of one of the parts, in any known layout.

    Raises CheckpointError for a file that is missing or cannot be read, and for one that holds something else.
    """
    path, files = _find_files(path, part) if existing(path).is_dir() else (path, [path])
    headers = [read_header(file) for file in files]
    names = {name for header in headers for name in header.shapes}
    spelling, prefix = find_spelling(names, part) or _refuse_other(path, names, part)
    pieces: dict[str, dict[int, tuple[Piece, Shape]]] = {}
    stored = [(part, shape) for header in headers for part, shape in _read_parts(header, spelling, prefix)]
    # What is tied comes last: it is read where the file has nothing else in its place.
    for piece, shape in sorted(stored, key=lambda each: each[0].name.endswith(spelling.tied)):
        official, number = spelling.target(piece.name.removeprefix(prefix))
        rows = pieces.setdefault(official, {})
        if number not in rows:
            rows[number] = piece, shape
        elif not piece.name.endswith(spelling.tied):
            raise CheckpointError(f"{path} has {official} twice, as {rows[number][0].name} and {piece.name}")
    return Weights(path, {name: _join(path, spelling, name, rows) for name, rows in pieces.items()})


@contextmanager
def reading_widths(path: Path) -> Iterator[None]:
    """Inside, a tensor that is missing or has other axes than the official one becomes a CheckpointError."""
    try:
        yield
    except KeyError as error:
        raise CheckpointError(f"{path} lacks the tensor {error.args[0]}: not the official layout") from None
    except (ValueError, IndexError, TypeError, ZeroDivisionError, OverflowError, RuntimeError) as error:
        raise CheckpointError(f"{path} has a tensor of unexpected shape: {shown(str(error))}") from None


def count_blocks(names: Collection[str]) -> int:
    """The number of blocks that tensors of these names belong to. Raises ValueError for more than any module has."""
    count = len({name.split(".")[1] for name in names if name.startswith("blocks.")})
    if count > _MOST_BLOCKS:
        raise ValueError(f"{count} blocks")
    return count


def _read_parts(header: Header, spelling: Spelling, prefix: str) -> Iterator[tuple[Piece, Shape]]:
    """The tensors in one file that are of the part, with their shapes. Raises CheckpointError for what is no weight."""
    with open_file(header.path) as read:
        try:
            found = find_scales(header.shapes, header.dtypes, header.metadata, read)
        except CheckpointError as error:
            raise CheckpointError(f"{header.path} {error}") from None
    for name, shape in header.shapes.items():
        own = name.removeprefix(prefix)
        if name in found.unread or not name.startswith(prefix) or own.startswith(spelling.unread):
            continue
        if not is_float(header.dtypes[name]) and name not in found.groups:
            raise CheckpointError(f"{header.path} has {name} of dtype {header.dtypes[name]}, which is none of weights")
        if 0 in shape:
            raise CheckpointError(f"{header.path} has {name} of shape {list(shape)}, which is empty")
        yield Piece(header.path, name, found.scales.get(name), found.groups.get(name, 0)), shape


def _join(path: Path, spelling: Spelling, name: str, rows: Mapping[int, tuple[Piece, Shape]]) -> Entry:
    """One tensor of the module from its parts, which are its rows."""
    parts, shapes = zip(*(rows[number] for number in sorted(rows)), strict=True)
    shape = shapes[0]
    if len(parts) > 1:
        if not all(shapes) or len({each[1:] for each in shapes}) > 1:
            raise CheckpointError(f"{path} has parts of {name} that do not fit together")
        shape = (sum(each[0] for each in shapes), *shape[1:])
    return Entry((1,) * (3 - len(shape)) + shape if name in spelling.flat else shape, parts)


def _refuse_other(path: Path, names: Collection[str], part: str) -> NoReturn:
    """Raises CheckpointError for tensors that are none of this part, with what they are where that is known."""
    if any(map(_LORA.search, names)):
        raise CheckpointError(f"{path} is a LoRA, not {DESCRIPTIONS[part]}")
    if found := [DESCRIPTIONS[spelling.part] for spelling, _ in spellings_of(names)]:
        raise CheckpointError(f"{path} is {found[0]}, not {DESCRIPTIONS[part]}")
    others = f"tensors such as {min(names)}" if names else "no tensors"
    raise CheckpointError(f"{path} is not {DESCRIPTIONS[part]}: it has {others}")


def _find_files(folder: Path, part: str) -> tuple[Path, list[Path]]:
    """The one file in a folder, or the index, or the folder itself, and the shards."""
    files = sorted(folder.glob("*.safetensors"))
    for stem in _STEMS:
        whole, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
        if whole in files:
            return whole, [whole]
        if is_named(index):
            return index, _indexed(index)
    if shards := _unindexed(folder, files):
        return folder, shards
    faults: list[CheckpointError] = []
    fitting = [file for file in files if _holds(file, part, faults)]
    if len(fitting) == 1:
        return fitting[0], fitting
    if fitting:
        raise CheckpointError(f"{folder} has several files of {DESCRIPTIONS[part]}: give the one to use")
    for gguf in sorted(folder.glob("*.gguf"))[:1]:
        _holds(gguf, part, faults)
    raise (
        faults[0]
        if faults
        else CheckpointError(f"{folder} has no file of {DESCRIPTIONS[part]}, such as {_STEMS[0]}.safetensors")
    )


def _holds(file: Path, part: str, faults: list[CheckpointError]) -> bool:
    """Whether a file has tensors of this part. Why it cannot be read is appended to `faults`."""
    try:
        return find_spelling(read_header(file).shapes.keys(), part) is not None
    except CheckpointError as error:
        faults.append(error)
        return False


def _indexed(index: Path) -> list[Path]:
    """The shards that an index names. Raises CheckpointError for an index that is none, and for missing shards."""
    values = read_json(index)
    try:
        names = sorted(set(values["weight_map"].values()))
        outside = [name for name in names if Path(name).name != name or name == ".."]
        if not all(name.isprintable() and len(name) <= LONGEST_NAME for name in names):
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{index} is not a valid index of safetensors shards") from None
    # A name from a file's content is never followed out of the folder.
    if outside:
        raise CheckpointError(f"{index} names a shard outside its folder: {shown(outside[0])}")
    return _all_there([index.parent / name for name in names], f"{index.name} names")


def _unindexed(folder: Path, files: Collection[Path]) -> list[Path]:
    """The shards in a folder without an index, which their names count; none where there are none."""
    shards = [match for match in (_SHARD.fullmatch(file.name) for file in files) if match]
    if not shards:
        return []
    (stem, count), *others = sorted({(shard["stem"], shard["count"]) for shard in shards})
    if others:
        raise CheckpointError(f"{folder} has several sets of shards, such as {stem} and {others[0][0]}: remove one")
    names = [f"{stem}-{number + 1:05d}-of-{count}.safetensors" for number in range(int(count))]
    return _all_there([folder / name for name in names], "by their names there are")


def _all_there(shards: Sequence[Path], says: str) -> list[Path]:
    """The shards. Raises CheckpointError for the first one that is missing, with how many are, and what `says` so."""
    # Unlike Path.exists, this raises nothing for a name that is too long.
    missing = sum(not os.path.exists(path) for path in shards)
    why = f"{says} {len(shards)} shards, {missing} of which cannot be found: download the folder again"
    return [existing(path, why) for path in shards]
