"""Weights are read as they were written, one by one, and nothing in a file is ever run."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tests.damage import edit_pth, refused
from tests.tiny import FAMILY
from wan.checkpoints import TRANSFORMER, CheckpointError, tensors
from wan.checkpoints.stored import Quantised
from wan.checkpoints.tensors import Entry, Piece, open_file, open_tensors, read_header, surplus_bytes

VAE, TEXT_ENCODER = FAMILY.vae, FAMILY.text_encoder
FP32, BF16, FP8, U8 = torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.uint8


def entry(path: Path, name: str, shape: tuple[int, ...], scale: str | None = None) -> Entry:
    return Entry(shape, (Piece(path, name, scale),))


# ---------------------------------------------------------------------------------------------------- what is read


def test_tensors_of_several_files_are_read_by_name(tmp_path):
    content = {"a": torch.randn(2, 3), "b": torch.randn(4).bfloat16(), "c": torch.arange(3)}
    places = {"a": tmp_path / "1.safetensors", "b": tmp_path / "2.safetensors", "c": tmp_path / "1.safetensors"}
    for path in set(places.values()):
        save_file({name: content[name] for name in content if places[name] == path}, path)
    header = read_header(places["a"])
    assert (header.path, header.shapes) == (places["a"], {"a": (2, 3), "c": (3,)})
    assert (header.dtypes, header.metadata) == ({"a": "F32", "c": "I64"}, {})
    entries = {f"our {name}": entry(path, name, tuple(content[name].shape)) for name, path in places.items()}
    with open_tensors(entries, BF16) as read:
        for name, tensor in content.items():
            assert torch.equal(read(f"our {name}"), tensor) and read(f"our {name}").dtype == tensor.dtype


DTYPES = {torch.float64: "F64", FP32: "F32", torch.float16: "F16", BF16: "BF16", FP8: "F8_E4M3"}
DTYPES |= {torch.float8_e5m2: "F8_E5M2"}


@pytest.mark.parametrize(("dtype", "name"), DTYPES.items())
@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt", ".bin", ".sft", ""])
def test_both_kinds_of_file_say_the_same_whatever_they_are_called(tmp_path, dtype, name, suffix):
    content, metadata = {"a.b": torch.ones(2, 3).to(dtype), "c": torch.ones(()).to(dtype)}, {"format": "pt"}
    first, second = tmp_path / f"first{suffix}", tmp_path / f"second{suffix if suffix != '.safetensors' else '.pth'}"
    save_file(content, first, metadata)
    torch.save(content, second)
    for path in (first, second):
        header = read_header(path)
        assert (header.shapes, set(header.dtypes.values())) == ({"a.b": (2, 3), "c": ()}, {name})
        assert header.metadata == (metadata if path == first else {})
        with open_file(path) as read:
            assert read("a.b").dtype == dtype and torch.equal(read("a.b").float(), torch.ones(2, 3))


def test_rows_are_joined_in_their_order_and_take_the_axes_of_the_module(tmp_path):
    content = {name: torch.randn(2, 3) for name in "qkv"} | {"x": torch.randn(4)}
    for name, tensor in content.items():
        save_file({name: tensor}, tmp_path / name)
    parts = tuple(Piece(tmp_path / name, name) for name in "kqv")
    entries = {"qkv": Entry((6, 3), parts), "x": entry(tmp_path / "x", "x", (1, 1, 4))}
    with open_tensors(entries, FP32) as read:
        assert torch.equal(read("qkv"), torch.cat([content[name] for name in "kqv"]))
        assert torch.equal(read("x"), content["x"][None, None])


def test_what_is_quantised_is_read_as_it_is_stored_and_several_parts_as_values_of_the_computation(tmp_path):
    path, weight, scale = tmp_path / "a.safetensors", torch.randn(2, 4).to(FP8), torch.tensor(0.3)
    codes, row_scale = torch.randint(-127, 128, (2, 4), dtype=torch.int8), torch.rand(2, 1)
    save_file({"w": weight, "s": scale, "b": torch.ones(2), "i": codes, "r": row_scale}, path)
    entries = {"w": entry(path, "w", (2, 4), "s"), "plain": entry(path, "w", (2, 4)), "b": entry(path, "b", (2,))}
    entries |= {"i": Entry((2, 4), (Piece(path, "i", "r", 4),)), "flat": entry(path, "w", (8,), "s")}
    entries["joined"] = Entry((4, 4), (Piece(path, "i", "r", 4), Piece(path, "w")))
    with open_tensors(entries, BF16) as read:
        found = {name: read(name) for name in ("w", "plain", "i")}
        expected = {"w": (weight, scale, 0), "plain": (weight, None, 0), "i": (codes, row_scale, 4)}
        for name, (own, own_scale, group) in expected.items():
            one = found[name]
            assert isinstance(one, Quantised) and one.group == group and one.codes.dtype == own.dtype
            assert torch.equal(one.codes.float(), own.float())
            assert (one.scale is None) if own_scale is None else torch.equal(one.scale, own_scale)
        assert read("b").dtype == FP32
        assert torch.equal(read("joined"), torch.cat([found["i"].values(BF16), weight.to(BF16)]))
        assert torch.equal(read("flat"), (weight.to(BF16) * scale.to(BF16)).flatten())


def test_the_length_of_a_header_is_not_taken_for_another_kind_of_file(tmp_path):
    table = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    header = table.ljust(256 + ord("<"))
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    assert read_header(tmp_path / "a.safetensors").shapes == {"a": (1,)}


def test_an_error_of_the_one_who_reads_is_not_blamed_on_the_file(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "1.safetensors")
    entries = {"a": entry(tmp_path / "1.safetensors", "a", (1,))}
    with pytest.raises(OSError, match="a disk is full"), open_tensors(entries, FP32):
        raise OSError("a disk is full")


@pytest.mark.parametrize("more", [b"\0", b"GGUF", bytes(99)])
def test_bytes_after_the_last_tensor_are_not_read_and_the_tensors_before_them_are(tmp_path, more):
    content = {
        "w": torch.randn(3, 5),
        "b": torch.randn(3).bfloat16(),
        "q": torch.randn(2, 3).to(FP8),
        "n": torch.arange(3),
    }
    path, long = tmp_path / "a.safetensors", tmp_path / "long.safetensors"
    save_file(content, path, {"format": "pt"})
    long.write_bytes(path.read_bytes() + more)
    assert replace(read_header(long), path=path) == read_header(path)
    assert list(read_header(long).shapes) == list(read_header(path).shapes)
    with open_file(long) as read, open_file(path) as expected:
        for name in content:
            one, other = read(name), expected(name)
            assert one.dtype == other.dtype and torch.equal(one.flatten().view(U8), other.flatten().view(U8))
            assert one.shape == other.shape
    assert (surplus_bytes(long), surplus_bytes(path)) == (len(more), 0)


def test_a_pth_file_has_no_surplus(folder):
    assert surplus_bytes(folder / VAE) == 0


def test_a_file_that_has_become_shorter_while_it_was_open_is_named(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(100)}, path)
    path.write_bytes(path.read_bytes() + b"more")
    with open_file(path) as read:
        path.write_bytes(path.read_bytes()[:-10])
        refused("a.safetensors is not a complete safetensors file: a is cut short", read, "a")


# ---------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("kept", "where"),
    [(4, " within its header, after 4 bytes"), (100, " within its header"), (-1, r", with \d+ of the")],
)
def test_a_truncated_safetensors_file_is_named_with_what_is_left_of_it(folder, kept, where):
    path = folder / TRANSFORMER
    path.write_bytes(path.read_bytes()[:kept])
    message = f"{path} is not a complete safetensors file: it is cut short{where}.*\ndownload it again"
    refused(message, read_header, path)
    with open_tensors({}, FP32):
        pass
    refused(message, open_tensors({"a": entry(path, "a", (1,))}, FP32).__enter__)


@pytest.mark.parametrize("kept", [4, 1000, -1])
@pytest.mark.parametrize("file", [VAE, TEXT_ENCODER])
def test_a_truncated_pth_file_is_named(folder, file, kept):
    path = folder / file
    path.write_bytes(path.read_bytes()[:kept])
    refused(f"{path} is not a complete file of plain tensors: it is cut short\ndownload it again", read_header, path)


def test_a_pth_file_must_hold_a_flat_dictionary(folder):
    edit_pth(folder / VAE, lambda state: state.update(other={"nested": 1}))
    refused("does not hold a flat dictionary of tensors", read_header, folder / VAE)


@pytest.mark.parametrize(
    "content", [{1: torch.ones(1)}, {("a",): torch.ones(1)}, [torch.ones(1)], torch.ones(1), 7, {"a": 7}]
)
def test_what_else_torch_saves_is_no_flat_dictionary_of_tensors(tmp_path, content):
    torch.save(content, tmp_path / "a.pth")
    refused("does not hold a flat dictionary of tensors", read_header, tmp_path / "a.pth")


@pytest.mark.parametrize("tensor", [torch.ones(1).expand(10**9, 10**9), torch.eye(3).to_sparse()])
def test_a_tensor_that_is_larger_than_its_file_is_refused(tmp_path, tensor):
    torch.save({"a": tensor}, tmp_path / "a.pth")
    refused(
        "has the tensor a with values that are not stored one by one|not a complete file",
        read_header,
        tmp_path / "a.pth",
    )


@pytest.mark.parametrize("name", ["a\nb\nc\nd", "\x1b[31m", "x" * 257, "a\0"])
@pytest.mark.parametrize("save", [save_file, torch.save])
def test_a_name_that_no_message_can_show_is_refused(tmp_path, name, save):
    save({name: torch.ones(1)}, tmp_path / "a")
    assert len(refused("has a tensor of the strange name", read_header, tmp_path / "a")) < 400


def test_a_tensor_of_a_thousand_axes_is_refused(tmp_path):
    write_safetensors(tmp_path / "a", {"a": {"dtype": "F32", "shape": [1] * 1000, "data_offsets": [0, 4]}})
    refused("has the tensor a with 1000 axes", read_header, tmp_path / "a")


def write_safetensors(path: Path, table: object) -> None:
    header = table if isinstance(table, bytes) else json.dumps(table).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))


ONE = '{"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'
HEADERS = {
    "brackets": b'{"a": ' + b"[" * 100_000,
    "no object": b"{1: 2}",
    "bytes": b"{\xff\xfe\0",
    "an unknown dtype": ('{"a": ' + ONE.replace("F32", "8" * 9999) + "}").encode(),
    "an unknown dtype of many lines": ('{"a": ' + ONE.replace("F32", "F\\n\\n\\n\\n8") + "}").encode(),
    "offsets beyond the file": ('{"a": ' + ONE.replace("4", "99") + "}").encode(),
    "offsets that do not fit": ('{"a": ' + ONE.replace("[1]", "[2]") + "}").encode(),
    "negative axes": ('{"a": ' + ONE.replace("[1]", "[-1]") + "}").encode(),
    "axes that overflow": ('{"a": ' + ONE.replace("[1]", "[4294967296, 4294967296, 4294967296]") + "}").encode(),
    "no dtype": b'{"a": {"shape": [1], "data_offsets": [0, 4]}}',
    "metadata of numbers": ('{"__metadata__": {"a": 1}, "a": ' + ONE + "}").encode(),
    "one name twice": ('{"a": ' + ONE + ', "b": ' + ONE + "}").encode(),
}


@pytest.mark.parametrize("kind", HEADERS)
def test_a_damaged_header_is_refused_in_a_short_message(tmp_path, kind):
    write_safetensors(tmp_path / "a.safetensors", HEADERS[kind])
    message = refused("a.safetensors is not a complete safetensors file: ", read_header, tmp_path / "a.safetensors")
    assert len(message) < 500


def test_a_file_that_cannot_be_mapped_is_read_without_a_map_and_a_damaged_one_is_named(tmp_path, monkeypatch):
    def refuse_maps(path, framework, backend="mmap"):
        if backend == "mmap":
            raise RuntimeError("unable to mmap")
        return safe_open(path, framework=framework, backend=backend)

    monkeypatch.setattr(tensors, "safe_open", refuse_maps)
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(3)}, path)
    with open_file(path) as read:
        assert read_header(path).shapes == {"a": (3,)} and torch.equal(read("a"), torch.ones(3))
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    refused("is not a complete safetensors file: it is cut short", read_header, path)
    path.write_bytes(content)
    monkeypatch.setattr(tensors, "safe_open", Mock(side_effect=RuntimeError("out of memory")))
    refused("is not a complete safetensors file: out of memory", read_header, path)


@pytest.mark.parametrize("length", [0, 2**26, 100 * 10**6 + 1, 2**63, 2**64 - 1])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_header_of_a_false_length_is_refused(tmp_path, length, suffix):
    (tmp_path / f"a{suffix}").write_bytes(length.to_bytes(8, "little") + b"{}" + bytes(99))
    refused(f"a{suffix} is not a complete .*file.*: ", read_header, tmp_path / f"a{suffix}")


def test_the_same_name_twice_is_one_tensor(tmp_path):
    write_safetensors(tmp_path / "a", ('{"a": ' + ONE + ', "a": ' + ONE + "}").encode())
    assert read_header(tmp_path / "a").shapes == {"a": (1,)}


FOREIGN = {
    b"GGUF\3\0\0\0": "is a GGUF file, which is not read here: give the safetensors file",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n": "is a pointer of Git LFS, not the file itself",
    b"<!DOCTYPE html><html>": "is a web page, not the file itself",
    b"": "is an empty file",
    b"{}": "is a text, not the file itself: it begins with {}",
    b"\x89PNG\r\n": "is not a complete",
}


@pytest.mark.parametrize("start", FOREIGN)
@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ""])
def test_another_kind_of_file_is_named(tmp_path, start, suffix):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(start)
    assert str(path) in refused(FOREIGN[start], read_header, path)


def test_what_torch_saved_as_safetensors_is_to_be_renamed(tmp_path):
    torch.save({"a": torch.ones(1)}, tmp_path / "a.safetensors")
    refused("a.safetensors was written by torch.save: rename it to a.pth", read_header, tmp_path / "a.safetensors")


def test_what_is_no_file_is_named(tmp_path):
    refused(f"cannot read {tmp_path}: Is a directory", read_header, tmp_path)
    refused(f"{tmp_path}/a is missing; the layout", read_header, tmp_path / "a")


@pytest.mark.parametrize("seed", range(8))
def test_a_pth_file_with_changed_bytes_is_refused_or_read(folder, seed):
    path, generator = folder / VAE, torch.Generator().manual_seed(seed)
    content = bytearray(path.read_bytes())
    start = content.index(b"data.pkl")
    for _ in range(40):
        damaged = bytearray(content)
        for position in torch.randint(start, start + 3000, (3,), generator=generator).tolist():
            damaged[position] = int(torch.randint(256, (), generator=generator))
        path.write_bytes(damaged)
        try:
            read_header(path)
        except CheckpointError as error:
            assert str(path) in str(error) and len(str(error).splitlines()) <= 3


class Trap:
    """Makes a folder when it is unpickled."""

    def __reduce__(self) -> tuple:
        return os.mkdir, ("sprung",)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("file", [VAE, TEXT_ENCODER])
def test_a_pickled_object_is_refused_and_never_run(folder, monkeypatch, file, zipped):
    monkeypatch.chdir(folder)
    torch.save({"conv2.weight": Trap()}, folder / file, _use_new_zipfile_serialization=zipped)
    message = "is not a complete file of plain tensors" if zipped else "in the format before torch 1.6"
    refused(message, read_header, folder / file)
    assert not (folder / "sprung").exists()
    torch.load(folder / file, weights_only=False)
    assert (folder / "sprung").exists()  # the trap works where it is let
    shutil.rmtree(folder / "sprung")
