"""The header of a safetensors file, read without the library: what is wrong with one that the library refuses.

8 bytes with the length of the header; the header, a JSON table of names, dtypes, shapes and places; the tensors' bytes.
Source of the format: https://github.com/huggingface/safetensors#format
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

LONGEST_HEADER = 100 * 10**6  # bytes, as in the library
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class Cut(ValueError):
    """A file that is shorter than its header says; the message says by how much."""


class Span(NamedTuple):
    """A tensor in a file."""

    dtype: str
    shape: tuple[int, ...]
    start: int  # its first byte, counted from the beginning of the file
    length: int  # bytes

    def get_shape(self) -> list[int]:
        """As a slice of the library has it."""
        return list(self.shape)

    def get_dtype(self) -> str:
        """As a slice of the library has it."""
        return self.dtype


@dataclass(frozen=True)
class HeaderFile:
    """A safetensors file that is read from its header, with what is used here of the library's `safe_open`."""

    path: Path
    places: Mapping[str, Span]  # in the order of the file
    notes: Mapping[str, str]
    surplus: int  # bytes after the last tensor

    def __enter__(self) -> "HeaderFile":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def offset_keys(self) -> list[str]:
        """The names of the tensors, in the order of the file."""
        return list(self.places)

    def metadata(self) -> Mapping[str, str]:
        """What the header says besides."""
        return self.notes

    def get_slice(self, name: str) -> Span:
        """The dtype and the shape of a tensor."""
        return self.places[name]

    def get_tensor(self, name: str) -> Tensor:
        """A copy of a tensor. Raises OSError for a file that has become shorter."""
        place = self.places[name]
        content = torch.empty(place.length, dtype=torch.uint8)
        with self.path.open("rb") as file:
            file.seek(place.start)
            if file.readinto(content.numpy().data) < place.length:
                raise OSError(f"{name} is cut short")
        return content.view(DTYPES[place.dtype]).reshape(place.shape)


def read_by_header(path: Path) -> HeaderFile:
    """A safetensors file by its header alone. Raises Cut, OSError, and ValueError for a header that is not valid."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or (length > size - 8 and length <= LONGEST_HEADER):
            raise Cut(f"it is cut short within its header, after {size} bytes")
        if length > LONGEST_HEADER:
            raise ValueError("length of the header")
        try:
            table = json.loads(file.read(length))
            notes = table.pop("__metadata__", {})
            places = {name: _place(entry, 8 + length) for name, entry in table.items()}
            if not all(isinstance(text, str) for text in notes.values()):
                raise TypeError("__metadata__")
        except (KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(str(error)) from None
    places, end = dict(sorted(places.items(), key=lambda item: (item[1].start, item[1].length))), 8 + length
    for name, place in places.items():  # as in the library: else a small file could fill the memory
        if place.start != end:
            raise ValueError(f"{name} does not begin where the tensor before it ends")
        end += place.length
    if end > size:
        raise Cut(f"it is cut short, with {size} of the {end} bytes that its header says")
    return HeaderFile(path, places, notes, size - end)


def _place(entry: Mapping[str, Any], begin: int) -> Span:
    """Where a tensor is. Raises ValueError, KeyError or TypeError for an entry that is not valid."""
    dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not all(type(number) is int and number >= 0 for number in (*shape, start, end)):
        raise ValueError("numbers")
    if end - start != math.prod(shape) * DTYPES[dtype].itemsize:
        raise ValueError("data_offsets")
    return Span(dtype, tuple(shape), begin + start, end - start)
