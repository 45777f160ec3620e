"""safetensors files: read whole, written whole or not at all, and compared bit for bit.

Where metadata has a hash of the content, it is that of the file: `write_tensors` fills it in, whatever it was before.
"""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from utils.common.files import replacing

CONTENT_HASH = "modelspec.hash_sha256"
# The SHA-256 of all that follows the header, as ModelSpec 1.0 and kohya's trainers write it.
_HASHES = {CONTENT_HASH: "0x{}", "sshs_model_hash": "{}"}


class TensorFileError(Exception):
    """A safetensors file that cannot be read or written. The message is the reason alone, without the path."""


class UnusableNameError(TensorFileError):
    """A path that safetensors cannot open, whatever the file holds."""


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a file, copied into memory, and its metadata. Raises TensorFileError."""
    with _opened(path) as file:
        # Copies: a loaded tensor is a view of the file, which may be replaced.
        tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118, safe_open is no mapping
        return tensors, dict(file.metadata() or {})


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Writes tensors from any device. The file appears whole or not at all. Raises TensorFileError.

    A hash of the content among the `metadata` is replaced by that of these tensors.
    """
    stated = {name: form.format("0" * 64) for name, form in _HASHES.items() if metadata and name in metadata}
    try:
        with replacing(path) as unfinished:
            save_file(_separate(tensors), unfinished, metadata=_as_utf8({**metadata, **stated}) if metadata else None)
            _fill_in_hashes(unfinished, stated)
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
    """Whether a file holds exactly these CPU tensors, bit for bit, and this metadata. False where there is no file.

    Hashes of the content need not be the same: they follow from the tensors.
    """
    try:
        with _opened(path) as file:
            same_metadata = _without_hashes(file.metadata() or {}) == _without_hashes(_as_utf8(metadata))
            same_names = same_metadata and set(file.keys()) == tensors.keys()
            return same_names and all(_same_bits(file.get_tensor(key), tensor) for key, tensor in tensors.items())
    except TensorFileError:
        return False


@contextmanager
def _opened(path: Path) -> Iterator[safe_open]:
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise UnusableNameError("safetensors cannot open a name that is not UTF-8. Rename the file or folder") from None
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise TensorFileError(str(error)) from error
    except (AttributeError, TypeError) as error:
        # What torch says of a dtype that it lacks, or of a dimension beyond 64 bits.
        raise TensorFileError(f"torch cannot hold one of its tensors: {str(error).splitlines()[0]}") from error


def _fill_in_hashes(path: Path, stated: Mapping[str, str]) -> None:
    """Puts the hash of a file's content in the place of the zeros in its header, which are as many."""
    if not stated:
        return
    with path.open("rb+") as file:
        header = file.read(int.from_bytes(file.read(8), "little"))
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        for name, zeros in stated.items():
            place, found = (f'"{name}":"{text}"'.encode() for text in (zeros, _HASHES[name].format(digest)))
            if header.count(place) != 1:
                raise OSError(f"safetensors wrote the metadata {name} in an unknown way")
            header = header.replace(place, found)
        file.seek(8)
        file.write(header)


def _without_hashes(metadata: Mapping[str, str]) -> dict[str, str]:
    return {name: text for name, text in metadata.items() if name not in _HASHES}


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
