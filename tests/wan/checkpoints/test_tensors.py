"""Weights are read as they were written, one by one, and nothing in a file is ever run."""

import os
import shutil

import pytest
import torch
from safetensors.torch import save_file

from tests.damage import edit_pth, refused
from tests.tiny import FAMILY
from wan.checkpoints import TRANSFORMER
from wan.checkpoints.tensors import open_tensors, read_pth, read_shapes

VAE, TEXT_ENCODER = FAMILY.vae, FAMILY.text_encoder


def test_tensors_of_several_files_are_read_by_name(tmp_path):
    content = {"a": torch.randn(2, 3), "b": torch.randn(4).bfloat16(), "c": torch.arange(3)}
    places = {"a": tmp_path / "1.safetensors", "b": tmp_path / "2.safetensors", "c": tmp_path / "1.safetensors"}
    for path in set(places.values()):
        save_file({name: content[name] for name in content if places[name] == path}, path)
    assert read_shapes(places["a"]) == {"a": (2, 3), "c": (3,)}
    with open_tensors(places, "cpu") as read:
        assert all(torch.equal(read(name), tensor) for name, tensor in content.items())


def test_an_error_of_the_one_who_reads_is_not_blamed_on_the_file(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "1.safetensors")
    with pytest.raises(OSError, match="a disk is full"), open_tensors({"a": tmp_path / "1.safetensors"}, "cpu"):
        raise OSError("a disk is full")


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_a_truncated_safetensors_file_is_named(folder, kept):
    path = folder / TRANSFORMER
    path.write_bytes(path.read_bytes()[:kept])
    message = f"{path} is not a complete safetensors file: .*\ndownload it again"
    refused(message, read_shapes, path)
    with open_tensors({}, "cpu"):
        pass
    refused(message, open_tensors({"a": path}, "cpu").__enter__)


@pytest.mark.parametrize("kept", [0, 4, 1000, -1])
@pytest.mark.parametrize("file", [VAE, TEXT_ENCODER])
def test_a_truncated_pth_file_is_named(folder, file, kept):
    path = folder / file
    path.write_bytes(path.read_bytes()[:kept])
    refused(f"{path} is not a complete file of plain tensors: .*\ndownload it again", read_pth, path)


def test_a_pth_file_must_hold_a_flat_dictionary(folder):
    edit_pth(folder / VAE, lambda state: state.update(other={"nested": 1}))
    refused("does not hold a flat dictionary of tensors", read_pth, folder / VAE)


class Trap:
    """Makes a folder when it is unpickled."""

    def __reduce__(self) -> tuple:
        return os.mkdir, ("sprung",)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("file", [VAE, TEXT_ENCODER])
def test_a_pickled_object_is_refused_and_never_run(folder, monkeypatch, file, zipped):
    monkeypatch.chdir(folder)
    torch.save({"conv2.weight": Trap()}, folder / file, _use_new_zipfile_serialization=zipped)
    refused("is not a complete file of plain tensors", read_pth, folder / file)
    assert not (folder / "sprung").exists()
    torch.load(folder / file, weights_only=False)
    assert (folder / "sprung").exists()  # the trap works where it is let
    shutil.rmtree(folder / "sprung")
