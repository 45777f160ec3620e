"""The header of a safetensors file is read as the library reads it, and nothing that it claims is believed."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from wan.checkpoints.header import DTYPES, Cut, read_by_header

ONE = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


def write(path: Path, table: object, content: bytes = bytes(4)) -> Path:
    header = json.dumps(table).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + content)
    return path


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.flatten().view(torch.uint8)


@pytest.mark.parametrize("name", DTYPES)
def test_a_tensor_of_every_dtype_is_that_of_the_library(tmp_path, name):
    path, dtype = tmp_path / "a", DTYPES[name]
    drawn = (torch.randn(3, 2, 5) * 50).to(dtype)
    save_file({"a": drawn, "none": torch.zeros(0, 4).to(dtype), "one": torch.ones(()).to(dtype)}, path, {"b": "c"})
    with safe_open(path, framework="pt") as file, read_by_header(path) as own:
        assert own.offset_keys() == list(file.offset_keys()) and own.metadata() == {"b": "c"} and own.surplus == 0
        for key in own.offset_keys():
            theirs, ours = file.get_slice(key), own.get_slice(key)
            assert (ours.get_shape(), ours.get_dtype()) == (theirs.get_shape(), theirs.get_dtype())
            one, other = own.get_tensor(key), file.get_tensor(key)
            assert (one.dtype, one.shape) == (other.dtype, other.shape) and torch.equal(bits(one), bits(other))


def test_a_tensor_may_begin_at_any_byte(tmp_path):
    odd = {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]}
    table = {"odd": odd, "a": ONE | {"data_offsets": [3, 7]}}
    content = bytes([1, 2, 3]) + torch.tensor(0.1).numpy().tobytes()
    assert read_by_header(write(tmp_path / "a", table, content + b"more")).get_tensor("a").item() == pytest.approx(0.1)


def test_what_a_header_says_besides_and_an_empty_one_are_read(tmp_path):
    assert read_by_header(write(tmp_path / "a", {}, b"")).offset_keys() == []
    file = read_by_header(write(tmp_path / "a", {"__metadata__": {"x": "y"}, "a": ONE}, bytes(9)))
    assert (file.metadata(), file.surplus) == ({"x": "y"}, 5)


@pytest.mark.parametrize(
    ("kept", "message"),
    [(0, "within its header, after 0 bytes"), (7, "within its header, after 7"), (20, "within its header, after 20")],
)
def test_a_file_that_ends_within_its_header_is_cut(tmp_path, kept, message):
    path = write(tmp_path / "a", {"a": ONE})
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(Cut, match=message):
        read_by_header(path)


def test_a_file_that_ends_within_its_tensors_is_cut_and_both_sizes_are_named(tmp_path):
    path = write(tmp_path / "a", {"a": ONE})
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(Cut, match=f"with {size - 1} of the {size} bytes that its header says"):
        read_by_header(path)


@pytest.mark.parametrize(
    "table",
    [
        [],
        7,
        {"a": 7},
        {"a": []},
        {"a": {}},
        {"a": ONE | {"dtype": "F3"}},
        {"a": ONE | {"dtype": []}},
        {"a": ONE | {"shape": [-1]}},
        {"a": ONE | {"shape": ["1"]}},
        {"a": ONE | {"shape": 1}},
        {"a": ONE | {"shape": [True]}},
        {"a": ONE | {"shape": [1.0]}},
        {"a": ONE | {"shape": [2]}},
        {"a": ONE | {"shape": [2**32] * 3}},
        {"a": ONE | {"data_offsets": [4, 0]}},
        {"a": ONE | {"data_offsets": [-4, 0]}},
        {"a": ONE | {"data_offsets": [0, 4, 8]}},
        {"a": ONE | {"data_offsets": None}},
        {"__metadata__": {"x": 1}, "a": ONE},
        {"__metadata__": [], "a": ONE},
        {"__metadata__": None, "a": ONE},
    ],
    ids=str,
)
def test_a_header_that_says_what_cannot_be_is_not_valid(tmp_path, table):
    with pytest.raises(ValueError) as caught:
        read_by_header(write(tmp_path / "a", table, bytes(64)))
    assert not isinstance(caught.value, Cut)


@pytest.mark.parametrize("header", [b"{", b"[" * 100_000, b"\xff\xfe", b""])
@pytest.mark.parametrize("length", [None, 2**63, 2**64 - 1])
def test_a_header_that_is_no_json_or_has_a_false_length_is_not_valid(tmp_path, header, length):
    size = len(header) if length is None else length
    (tmp_path / "a").write_bytes(size.to_bytes(8, "little") + header)
    with pytest.raises(ValueError):
        read_by_header(tmp_path / "a")


@pytest.mark.parametrize("start", [0, 2, 6])
def test_tensors_that_overlap_or_leave_a_gap_are_refused(tmp_path, start):
    """A small file could otherwise name the same bytes a million times, and fill the memory."""
    table = {
        name: {"dtype": "F32", "shape": [1], "data_offsets": [at, at + 4]} for name, at in (("a", 0), ("b", start))
    }
    with pytest.raises(ValueError, match="b does not begin where the tensor before it ends"):
        read_by_header(write(tmp_path / "a", table, bytes(16)))
