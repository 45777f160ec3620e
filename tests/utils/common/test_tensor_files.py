import hashlib

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from utils.common import tensor_files
from utils.common.tensor_files import (
    TensorFileError,
    file_metadata,
    has_same_content,
    read_tensors,
    tensor_names,
    write_tensors,
)

TENSORS = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.ones(2, dtype=torch.bfloat16)}


@pytest.fixture
def path(tmp_path):
    write_tensors(tmp_path / "file.safetensors", TENSORS, {"source": "here"})
    return tmp_path / "file.safetensors"


def test_what_is_written_is_read(path):
    tensors, metadata = read_tensors(path)
    assert tensors.keys() == TENSORS.keys() and metadata == {"source": "here"}
    assert all(
        torch.equal(tensors[key], tensor) and tensors[key].dtype == tensor.dtype for key, tensor in TENSORS.items()
    )


def test_the_bytes_are_those_of_safetensors_own_writer(path, tmp_path):
    save_file(TENSORS, tmp_path / "own.safetensors", metadata={"source": "here"})
    assert path.read_bytes() == (tmp_path / "own.safetensors").read_bytes()
    for metadata in (None, {}):
        write_tensors(path, TENSORS, metadata)
        save_file(TENSORS, tmp_path / "own.safetensors")
        assert path.read_bytes() == (tmp_path / "own.safetensors").read_bytes()
        assert read_tensors(path)[1] == {}


def test_tensors_that_were_read_do_not_change_with_the_file(path):
    tensors, _ = read_tensors(path)
    content = path.read_bytes()
    with path.open("r+b") as file:  # in place, as a view of the file would see it
        file.seek(-24, 2)
        file.write(b"\xff" * 24)
    assert path.read_bytes() != content and torch.equal(tensors["b"], TENSORS["b"])


def test_views_of_one_buffer_transposed_and_trained_tensors_are_written(tmp_path):
    buffer = torch.arange(12.0)
    tensors = {"left": buffer[:6].view(2, 3).T, "right": buffer[6:], "again": buffer, "more": buffer}
    tensors["trained"] = torch.nn.Parameter(torch.ones(2))
    write_tensors(tmp_path / "file.safetensors", tensors)
    found = load_file(tmp_path / "file.safetensors")
    assert found.keys() == tensors.keys() and all(torch.equal(found[key], tensors[key]) for key in tensors)


def content_hash(path) -> str:
    data = path.read_bytes()
    return hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()


def test_a_hash_of_the_content_is_that_of_the_bytes_after_the_header(tmp_path):
    path = tmp_path / "file.safetensors"
    said = {"modelspec.hash_sha256": "0xabc", "sshs_model_hash": "", "source": '"modelspec.hash_sha256":"0x00"'}
    for tensors in (TENSORS, {**TENSORS, "c": torch.zeros((), dtype=torch.int64)}):
        write_tensors(path, tensors, said)
        found, metadata = read_tensors(path)
        digest = content_hash(path)
        assert metadata == said | {"modelspec.hash_sha256": f"0x{digest}", "sshs_model_hash": digest}
        assert all(torch.equal(found[key], tensors[key]) for key in tensors)
        assert not list(path.parent.glob(".*"))
        assert has_same_content(path, tensors, said) and not has_same_content(path, tensors, said | {"source": "x"})
    write_tensors(path, TENSORS, {"source": "here"})
    assert read_tensors(path)[1] == {"source": "here"}  # none is added


def test_a_hash_that_cannot_be_put_into_the_header_is_reported(tmp_path, monkeypatch):
    def spaced(tensors, path, metadata) -> None:
        header = b'{"__metadata__": {"modelspec.hash_sha256": "0x0"}}'
        path.write_bytes(len(header).to_bytes(8, "little") + header)

    monkeypatch.setattr(tensor_files, "save_file", spaced)
    with pytest.raises(TensorFileError, match="modelspec.hash_sha256"):
        write_tensors(tmp_path / "file.safetensors", TENSORS, {"modelspec.hash_sha256": ""})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("No space left on device")])
def test_a_file_appears_whole_or_not_at_all(path, monkeypatch, error):
    def full(*_, **__) -> None:
        raise error

    before = path.read_bytes()
    monkeypatch.setattr(tensor_files, "save_file", full)
    with pytest.raises(TensorFileError, match="No space left on device"):
        write_tensors(path, TENSORS)
    assert list(path.parent.iterdir()) == [path] and path.read_bytes() == before


@pytest.mark.parametrize("content", [None, b"", b"no tensors at all", "cut"])
def test_a_file_that_cannot_be_read_is_reported_and_incomplete(path, content):
    whole = path.read_bytes()
    path.unlink() if content is None else path.write_bytes(whole[:-1] if content == "cut" else content)
    with pytest.raises(TensorFileError):
        read_tensors(path)
    assert tensor_names(path) == set() and not has_same_content(path, TENSORS, {"source": "here"})
    with pytest.raises(TensorFileError):
        read_tensors(path.parent)


def test_a_complete_file_holds_the_tensor_that_is_asked_for(path):
    names = tensor_names(path)
    assert "b" in names and "c" not in names


@pytest.mark.parametrize(
    ("change", "metadata"),
    [
        ({}, {"source": "there"}),
        ({}, {}),
        ({"c": torch.ones(1)}, {"source": "here"}),
        ({"b": TENSORS["b"].reshape(3, 2)}, {"source": "here"}),
        ({"b": TENSORS["b"].view(torch.int32)}, {"source": "here"}),
        ({"b": TENSORS["b"] * -1}, {"source": "here"}),
        ({"a": torch.ones(2)}, {"source": "here"}),
    ],
)
def test_content_is_the_same_only_if_names_shapes_dtypes_bits_and_metadata_are(path, change, metadata):
    assert has_same_content(path, TENSORS, {"source": "here"})
    assert not has_same_content(path, TENSORS | change, metadata)


def test_nan_has_the_same_content_as_itself_and_zero_not_as_minus_zero(tmp_path):
    path = tmp_path / "file.safetensors"
    write_tensors(path, {"x": torch.tensor([torch.nan, 0.0])})
    assert has_same_content(path, {"x": torch.tensor([torch.nan, 0.0])}, {})
    assert not has_same_content(path, {"x": torch.tensor([torch.nan, -0.0])}, {})


def test_metadata_alone_is_read_from_a_file_and_none_from_what_is_no_file(path, tmp_path):
    assert file_metadata(path) == {"source": "here"}
    write_tensors(path, TENSORS)
    assert file_metadata(path) == {} == file_metadata(tmp_path / "missing.safetensors") == file_metadata(tmp_path)
    path.write_bytes(path.read_bytes()[:-1])
    assert file_metadata(path) == {}


def test_metadata_that_is_no_utf8_is_written_with_escapes(path):
    metadata = {"source": "\udcba\udcfc.mp4"}  # a file name in another encoding, as Python reads it
    write_tensors(path, TENSORS, metadata)
    assert file_metadata(path) == {"source": "\\udcba\\udcfc.mp4"}
    assert has_same_content(path, TENSORS, metadata) and not has_same_content(path, TENSORS, {"source": "x.mp4"})
