"""What a LoRA was trained on top of: LoRAs that were fused into its base model. Their record, and their files again.

The metadata of a LoRA records them in the order in which they were fused:

    fused_lora    a JSON list of {"name": file name, "sha256": of its content, "weight": number, "bytes": its size}

A file is found by its content. Names are shown and never opened, since a file must not choose a path. `bytes` spares
hashing files of other sizes and may be missing. Earlier versions recorded options only, and so no content: there, and
in files that were converted from theirs, `sha256` is null.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath

from tqdm import tqdm

from utils.adapters.lora_file import FP32_MAX, LoraError, shown
from utils.adapters.lora_header import CONFIG, EXPERT_KEY, files_of_lora, lora_metadata_of
from utils.adapters.pairs import expert_of, find_pair, lora_of
from utils.common.digests import hash_file
from utils.common.errors import UserError
from utils.common.run_options import options_of_run

FUSED_KEY = "fused_lora"
OPTIONS_KEY = "options"  # in the metadata of a LoRA: all options of its run, as JSON
LARGEST = 2**33  # bytes of a file that may be a LoRA
_DIGEST = re.compile(r"[0-9a-f]{64}")


class DamagedRecordError(LoraError):
    """Metadata that record fused LoRAs, but not as they should."""


@dataclass(frozen=True)
class FusedRecord:
    """A LoRA that another was trained on top of, as its metadata records it."""

    name: str  # of its file when it was fused
    sha256: str | None  # None in files of versions that did not record it
    weight: float
    size: int | None = None  # bytes

    def __str__(self) -> str:
        return f"{shown(self.name)} (weight {self.weight:g}, SHA-256 {self.sha256 or 'not recorded'})"


@dataclass(frozen=True)
class FusedFile:
    """A LoRA to fuse: where it is, and what is recorded of it."""

    path: Path
    record: FusedRecord

    def __str__(self) -> str:
        return f"{self.path.name} at {self.record.weight:g}"


def fused_file(path: Path, weight: float) -> FusedFile:
    """A LoRA that is to be fused at this weight. Raises UserError for a file that cannot be read."""
    return FusedFile(path, FusedRecord(path.absolute().name, content_hash(path), weight, content_size(path)))


def to_metadata(records: Sequence[FusedRecord]) -> dict[str, str]:
    """What the metadata of a LoRA that is trained on top of these says of them."""
    rows = [(record.name, record.sha256, record.weight, record.size) for record in records]
    return {FUSED_KEY: json.dumps([dict(zip(("name", "sha256", "weight", "bytes"), row, strict=True)) for row in rows])}


def read_records(metadata: Mapping[str, str], source: Path) -> list[FusedRecord]:
    """What the metadata of a LoRA records. Raises DamagedRecordError, with the file's name `source`."""
    if FUSED_KEY not in metadata:
        return _fused_by_options(metadata)
    try:
        rows = json.loads(metadata[FUSED_KEY])
        if not isinstance(rows, list):
            raise ValueError(f"it is {shown(rows)}, not a list")
        return [_read_row(row) for row in rows]
    except (ValueError, RecursionError) as error:
        said = f"{source}: the metadata {FUSED_KEY} does not say what it was trained on"
        raise DamagedRecordError(f"{said}: {error}.") from None


def readable_records(metadata: Mapping[str, str], source: Path) -> tuple[list[FusedRecord], list[str]]:
    """As `read_records` where nothing of it is fused: none for a damaged record, and a note of that."""
    try:
        return read_records(metadata, source), []
    except DamagedRecordError as error:
        return [], [f"note: {error}"]


def content_hash(path: Path) -> str:
    """The SHA-256 of a LoRA file; where an adapter_config.json belongs to it, that of the digests of both.

    A folder has that of the file that it means. Raises UserError for a file that cannot be read.
    """
    try:
        *config, weights = [hash_file(file) for file in _contents(path)]
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    return hashlib.sha256("".join([*config, weights]).encode()).hexdigest() if config else weights


def content_size(path: Path) -> int:
    """The bytes that `content_hash` reads; 0 where there is nothing to read."""
    try:
        return sum(file.stat().st_size for file in _contents(path))
    except (OSError, LoraError):
        return 0


def find_fused_files(lora: Path, advice: str, given: Sequence[Path] = ()) -> list[FusedFile]:
    """The LoRAs that this one was trained on top of, in their order; none for most LoRAs.

    Looked at are the `given` files, what the options of its run name, and the files beside it and beside those, each
    by its content. Where a LoRA records no content, that is the file of the recorded name of those and beside it, or
    else one that is given or named by the run, and what is returned has its content recorded. Raises LoraError for a
    damaged record, and UserError, ending in the `advice`, for a LoRA that is nowhere.
    """
    wanted = read_records(lora_metadata_of(lora), lora)
    if not wanted:
        return []
    named = [*given, *_named_by_run(lora)]
    found = _by_content(wanted, lora, named)
    expert = expert_of(lora, lora_metadata_of(lora))
    others = [path for path in named if path not in found.values() and not _is_same(path, lora)]
    others = [path for path in others if _may_share_an_expert(expert_of(path, lora_metadata_of(path)), expert)]
    files = list[FusedFile]()
    for fused in wanted:
        path = found.get(fused.sha256 or "")
        if fused.sha256 is None:
            taken = [file.path for file in files]
            free = [path for path in others if path not in taken]
            beside = [path for path in _loras_in([lora.parent]) if path not in taken and not _is_same(path, lora)]
            same_name = [path for path in (*free, *beside) if path.name == fused.name]
            path = next(iter((*same_name, *free)), None)
        if path is None:
            raise UserError(
                f"{lora} was trained on top of {fused}, and no such file is beside it or where its run had it\n{advice}"
            )
        files.append(FusedFile(path, fused) if fused.sha256 else fused_file(path, fused.weight))
    return files


def find_fused_files_of_experts(
    own: Mapping[str, Path], experts: Sequence[str], given: Sequence[Path], advice: str
) -> dict[str, list[FusedFile]]:
    """For each transformer what its LoRA was trained on top of; `own` are the LoRAs, by the names of some `experts`.

    Each given file must be one that a LoRA records, or that of an expert without a LoRA, which records nothing: it gets
    the half of a pair whose other half is recorded. Raises UserError for other files, and as `find_fused_files` does.
    """
    records = {name: read_records(lora_metadata_of(path), path) for name, path in own.items()}
    recorded = list(dict.fromkeys(fused for fused_here in records.values() for fused in fused_here))
    files = [file for path in given for file in files_of(path)]
    if files and not recorded:
        loras = " and ".join(str(path) for path in dict.fromkeys(own.values()))
        not_on_top = f"{loras} was not trained on top of a LoRA"
        raise UserError(f"--fuse_lora {given[0]}: {not_on_top}. Add others with --also_lora.")
    hashes = {file: content_hash(file) for file in files}
    whole: dict[Path, FusedRecord] = {}  # what is recorded of a given name: of a pair, of one of its halves
    for path in given:
        known = [fused for fused in recorded for file in files_of(path) if fused.sha256 in (None, hashes[file])]
        if not known:
            listed = " and ".join(f"{file} has the SHA-256 {hashes[file]}" for file in files_of(path))
            raise UserError(
                f"--fuse_lora is not what the LoRA was trained on top of: {' and '.join(map(str, recorded))}.\n{listed}"
            )
        whole[path] = known[0]
    found = {name: find_fused_files(path, advice, files) for name, path in own.items()}
    for name in experts:
        if name not in own:
            halves = {path: lora_of(path, name, experts) for path in given}
            found[name] = [FusedFile(half, whole[path]) for path, half in halves.items() if half is not None]
    return {name: found[name] for name in experts}


def files_of(path: Path) -> list[Path]:
    """The files that a name means: the two of a pair, or itself."""
    return [*find_pair(path).values()] or [path]


def _read_row(row: object) -> FusedRecord:
    match row:
        case {"name": str(name), "sha256": str() | None as digest, "weight": weight, **others}:
            size, number = others.get("bytes"), _finite(weight)
            is_digest = digest is None or _DIGEST.fullmatch(digest)
            if is_digest and number is not None and (size is None or type(size) is int):
                return FusedRecord(name, digest, number, size)
    raise ValueError(f"{shown(row)} is not a name, a SHA-256 and a weight")


def _finite(value: object) -> float | None:
    """A JSON number as a float; None for anything else, and for one that fp32 cannot hold."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= FP32_MAX:
        return None
    return float(value)


def _fused_by_options(metadata: Mapping[str, str]) -> list[FusedRecord]:
    """What a LoRA says that records no more than the options of its run."""
    try:
        options = json.loads(metadata.get(OPTIONS_KEY, "{}"))
    except (ValueError, RecursionError):
        return []
    match options:
        case {"fuse_lora": str(path)}:
            name, weight = PureWindowsPath(path).name, _finite(options.get("fuse_lora_weight"))
            if name and _may_share_an_expert(expert_of(Path(name), {}), metadata.get(EXPERT_KEY)):
                return [FusedRecord(name, None, 1.0 if weight is None else weight)]
    return []


def _may_share_an_expert(one: str | None, other: str | None) -> bool:
    return one is None or other is None or one == other


def _named_by_run(lora: Path) -> list[Path]:
    """The files that a LoRA's run has fused, as far as they are still there."""
    texts = (options.get("fuse_lora") for options in options_of_run(lora))
    files = list[Path]()
    for text in dict.fromkeys(text for text in texts if isinstance(text, str)):
        with suppress(OSError):  # a name that the system does not take
            files += files_of(Path(text))
    return [file for file in files if os.path.exists(file)]


def _by_content(wanted: Sequence[FusedRecord], lora: Path, named: Sequence[Path]) -> dict[str, Path]:
    """The file of each recorded content that is found. Of files beside the LoRA those of the same name come first."""
    missing = {fused.sha256 for fused in wanted if fused.sha256 is not None}
    if not missing:
        return {}
    names = {fused.name for fused in wanted}
    folders = dict.fromkeys(path.parent for path in (lora, *named))
    beside = sorted(_loras_in(folders), key=lambda path: path.name not in names)
    others = [path for path in dict.fromkeys((*named, *beside)) if not _is_same(path, lora)]
    sizes = {fused.size for fused in wanted}
    plausible = [
        path for path in others if 0 < (size := content_size(path)) <= LARGEST and (None in sizes or size in sizes)
    ]
    found: dict[str, Path] = {}
    for path in tqdm(plausible, "looking for the fused LoRA", unit="file", leave=False, disable=not plausible):
        if missing <= found.keys():
            break
        with suppress(UserError):
            found.setdefault(content_hash(path), path)
    return {digest: path for digest, path in found.items() if digest in missing}


def _contents(path: Path) -> list[Path]:
    """What decides a LoRA's change: adapter_config.json where one belongs to it, and its file. Raises LoraError."""
    weights, config = files_of_lora(path)
    return [config, weights] if config else [weights]


def _loras_in(folders: Iterable[Path]) -> Iterator[Path]:
    for folder in folders:
        with suppress(OSError):
            for path in sorted(folder.iterdir()):
                if path.suffix.lower() == ".safetensors" or os.path.isfile(path / CONFIG):
                    yield path


def _is_same(path: Path, other: Path) -> bool:
    with suppress(OSError):
        return path.samefile(other)
    return False
