"""Tensors read from files, never unpickled. The only module of wan/ that opens weights.

Safetensors are known by their content, whatever the file is called. Other files are read as torch.save writes them.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from zipfile import is_zipfile

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from wan.checkpoints.errors import CheckpointError, shown
from wan.checkpoints.files import read_start, refuse_other_kinds
from wan.checkpoints.header import DTYPES, LONGEST_HEADER, Cut, HeaderFile, read_by_header
from wan.checkpoints.stored import FP8, Quantised, Stored, values_of

Shape = tuple[int, ...]
Read = Callable[[str], Tensor]
ReadStored = Callable[[str], Stored]

LONGEST_NAME = 256  # characters
_MOST_AXES = 8
_FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")  # what a .pth file may hold
_DTYPES = {DTYPES[name]: name for name in _FLOATS}
_OLD_PICKLE = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P"  # how torch.save began before it wrote zip files


@dataclass(frozen=True)
class Header:
    """What a file says of its tensors, without their content."""

    path: Path
    shapes: Mapping[str, Shape]
    dtypes: Mapping[str, str]  # by safetensors' names, such as BF16 and F8_E4M3
    metadata: Mapping[str, str]


@dataclass(frozen=True)
class Piece:
    """A tensor in a file, and that of its scale where it is quantised."""

    path: Path
    name: str
    scale: str | None = None
    group: int = 0  # as `Quantised.group`


@dataclass(frozen=True)
class Entry:
    """One tensor of a module, and where it is: usually one part; otherwise the parts are its rows, in this order."""

    shape: Shape
    parts: tuple[Piece, ...]


def read_header(path: Path) -> Header:
    """The names, shapes and dtypes of all tensors in a file. Raises CheckpointError for what cannot be read."""
    if not _is_pth(path):
        with _open_safetensors(path) as file:
            slices = {name: file.get_slice(name) for name in file.offset_keys()}  # in the order of the file
            shapes = {name: tuple(each.get_shape()) for name, each in slices.items()}
            dtypes = {name: each.get_dtype() for name, each in slices.items()}
            metadata = dict(file.metadata() or {})
        _check_names(path, shapes)
        return Header(path, shapes, dtypes, metadata)
    state = _read_pth(path)
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    dtypes = {name: _DTYPES.get(tensor.dtype, str(tensor.dtype)) for name, tensor in state.items()}
    _check_names(path, shapes)
    return Header(path, shapes, dtypes, {})


@contextmanager
def open_file(path: Path) -> Iterator[Read]:
    """A function that reads one tensor by name. Raises CheckpointError for what cannot be read.

    A tensor is a view of the file: it takes no memory until it is changed.
    """
    if _is_pth(path):
        state = _read_pth(path)
        yield lambda name: state[name]
        return
    with _open_safetensors(path) as file:

        def read(name: str) -> Tensor:
            try:
                return file.get_tensor(name)
            except (SafetensorError, OSError) as error:
                raise _incomplete(path, error) from None

        yield read


@contextmanager
def open_tensors(entries: Mapping[str, Entry], dtype: torch.dtype) -> Iterator[ReadStored]:
    """A function that reads one tensor of a module by its official name, as it is stored.

    Of several parts the values in `dtype` are read. Raises CheckpointError for a file that cannot be read.
    """
    with ExitStack() as stack:
        paths = {part.path for entry in entries.values() for part in entry.parts}
        files = {path: stack.enter_context(open_file(path)) for path in sorted(paths)}

        def read(name: str) -> Stored:
            entry = entries[name]
            parts = [_read_part(files[part.path], part) for part in entry.parts]
            if len(parts) == 1 and parts[0].shape == entry.shape:
                return parts[0]
            tensors = [values_of(part, dtype) for part in parts]
            return (tensors[0] if len(tensors) == 1 else torch.cat(tensors)).reshape(entry.shape)

        yield read


def _read_part(read: Read, part: Piece) -> Stored:
    tensor = read(part.name)
    if part.scale is None and tensor.dtype not in FP8:
        return tensor
    return Quantised(tensor, None if part.scale is None else read(part.scale), part.group)


def _is_pth(path: Path) -> bool:
    """Whether a file is to be read as torch.save writes one. Raises CheckpointError for what is neither of the two."""
    start = read_start(path)
    # First, because the length of a header may have the first byte of another kind of file.
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= LONGEST_HEADER:
        return False
    refuse_other_kinds(path, start)
    if start.startswith(b"PK") and path.suffix == ".safetensors":  # some versions of torch go by the name
        raise CheckpointError(f"{path} was written by torch.save: rename it to {path.stem}.pth")
    if start.startswith(_OLD_PICKLE):
        fact = "in the format before torch 1.6, which is not read here"
        raise CheckpointError(f"{path} was written by torch.save {fact}: give the safetensors file of the same part")
    return path.suffix != ".safetensors"


def _read_pth(path: Path) -> dict[str, Tensor]:
    """The flat dictionary of tensors in a file of torch.save, memory-mapped."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a damaged one ends in almost any error, such as those of a wrong index or argument
        is_cut = read_start(path).startswith(b"PK") and not is_zipfile(path)
        reason = "it is cut short" if is_cut else _first_line(error)
        reason = f"{reason}\ndownload it again"
        raise CheckpointError(f"{path} is not a complete file of plain tensors: {reason}") from None
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()
    ):
        raise CheckpointError(f"{path} does not hold a flat dictionary of tensors")
    for name, tensor in state.items():
        if tensor.layout != torch.strided or tensor.nbytes > tensor.untyped_storage().nbytes():
            raise CheckpointError(f"{path} has the tensor {shown(name)} with values that are not stored one by one")
    return state


def _open_safetensors(path: Path) -> safe_open | HeaderFile:
    try:
        try:
            return safe_open(path, framework="pt")
        except RuntimeError:  # Linux may refuse to map a file larger than its memory; it can be read all the same
            return safe_open(path, framework="pt", backend="pread")
    except (SafetensorError, OSError, RuntimeError) as error:
        fault = error
    try:
        file = read_by_header(path)
    except Cut as cut:
        raise _incomplete(path, cut) from None
    except (OSError, ValueError):
        raise _incomplete(path, fault) from None
    # The library refuses a file with more bytes than its tensors have. What the header says is there all the same.
    if file.surplus:
        return file
    raise _incomplete(path, fault)


def surplus_bytes(path: Path) -> int:
    """How many bytes follow the last tensor of a safetensors file; 0 for any other file. Reads the header alone."""
    try:
        return 0 if _is_pth(path) else read_by_header(path).surplus
    except (OSError, ValueError):
        return 0


def _incomplete(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{path} is not a complete safetensors file: {_first_line(error)}\ndownload it again")


def _first_line(error: Exception) -> str:
    return shown(next(iter(str(error).splitlines()), type(error).__name__))


def _check_names(path: Path, shapes: Mapping[str, Shape]) -> None:
    """Raises CheckpointError for names and shapes that are no module's: messages could not show them."""
    for name, shape in shapes.items():
        if len(name) > LONGEST_NAME or not name.isprintable():
            raise CheckpointError(f"{path} has a tensor of the strange name {shown(name)}")
        if len(shape) > _MOST_AXES:
            raise CheckpointError(f"{path} has the tensor {name} with {len(shape)} axes")
