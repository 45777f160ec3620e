"""safetensors files: read whole, written whole or not at all, and compared bit for bit."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from utils.common.files import replacing


class TensorFileError(Exception):
    """A safetensors file that cannot be read or written. The message is the reason alone, without the path."""


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a file, copied into memory, and its metadata. Raises TensorFileError."""
    with _opened(path) as file:
        # Copies: a loaded tensor is a view of the file, which may be replaced.
        tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118, safe_open is no mapping
        return tensors, dict(file.metadata() or {})


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Writes tensors from any device. The file appears whole or not at all. Raises TensorFileError."""
    try:
        with replacing(path) as unfinished:
            save_file(_separate(tensors), unfinished, metadata=_as_utf8(metadata) if metadata else None)
    except (OSError, SafetensorError) as error:
        raise TensorFileError(str(error)) from error


def tensor_names(path: Path) -> set[str]:
    """The names of a file's tensors; none if it is missing, or shorter than its header says. Reads the header alone."""
    try:
        with _opened(path) as file:
            return set(file.keys())
    except TensorFileError:
        return set()


def file_metadata(path: Path) -> dict[str, str]:
    """A file's metadata; none if it is missing, or shorter than its header says. Reads the header alone."""
    try:
        with _opened(path) as file:
            return dict(file.metadata() or {})
    except TensorFileError:
        return {}


def has_same_content(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bool:
    """Whether a file holds exactly these CPU tensors, bit for bit, and this metadata. False where there is no file."""
    try:
        with _opened(path) as file:
            same_names = dict(file.metadata() or {}) == _as_utf8(metadata) and set(file.keys()) == tensors.keys()
            return same_names and all(_same_bits(file.get_tensor(key), tensor) for key, tensor in tensors.items())
    except TensorFileError:
        return False


@contextmanager
def _opened(path: Path) -> Iterator[safe_open]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise TensorFileError(str(error)) from error
    except (AttributeError, TypeError) as error:
        # What torch says of a dtype that it lacks, or of a dimension beyond 64 bits.
        raise TensorFileError(f"torch cannot hold one of its tensors: {str(error).splitlines()[0]}") from error


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, contiguous and on the CPU; a copy of those that share memory, which safetensors refuses to write."""
    separate: dict[str, Tensor] = {}
    seen: set[int] = set()
    for key, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        memory = tensor.untyped_storage().data_ptr()
        separate[key] = tensor.clone() if memory in seen else tensor
        seen.add(memory)
    return separate


def _same_bits(one: Tensor, other: Tensor) -> bool:
    alike = one.dtype == other.dtype and one.shape == other.shape
    return alike and torch.equal(one.flatten().view(torch.uint8), other.flatten().view(torch.uint8))


def _as_utf8(metadata: Mapping[str, str]) -> dict[str, str]:
    """With escapes for what UTF-8 cannot say: a file name may have bytes that are no text."""
    return {name: text.encode("utf-8", "backslashreplace").decode() for name, text in metadata.items()}
