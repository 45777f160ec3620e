"""What a LoRA says before its tensors are read is what `read_lora` says, for files and folders of every kind."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.loras import half, written
from utils.adapters.lora_file import LoraError
from utils.adapters.lora_header import files_of_lora, lora_metadata_of
from utils.adapters.lora_reader import read_lora
from utils.adapters.pairs import resolve_experts
from utils.adapters.provenance import content_hash, find_fused_files, fused_file, to_metadata
from utils.common.errors import UserError

HIGH, LOW = "high_noise", "low_noise"
CONFIG = {"r": 2, "lora_alpha": 4}


def folder_of(path: Path, metadata: dict[str, str], name: str = "adapter_model.safetensors") -> Path:
    """As PEFT writes one, with metadata."""
    path.mkdir()
    (path / "adapter_config.json").write_text(json.dumps(CONFIG))
    written(path / name, half("base_model.model.blocks.0.self_attn.q"), metadata)
    return path


def with_surplus(path: Path, metadata: dict[str, str]) -> Path:
    written(path, half(), metadata)
    path.write_bytes(path.read_bytes() + b"1234567")
    return path


MAKERS = {
    "file": lambda path, metadata: written(path.with_suffix(".safetensors"), half(), metadata),
    "folder": folder_of,
    "folder with a file of another name": lambda path, metadata: folder_of(path, metadata, "fox.safetensors"),
    "file of a folder": lambda path, metadata: folder_of(path, metadata) / "adapter_model.safetensors",
    "surplus": lambda path, metadata: with_surplus(path.with_suffix(".safetensors"), metadata),
}


@pytest.mark.parametrize("kind", MAKERS)
def test_metadata_is_that_of_the_reader_and_what_it_was_trained_on_is_found(tmp_path, kind):
    style = written(tmp_path / "style.safetensors", {name: 2 * tensor for name, tensor in half().items()})
    said = to_metadata([fused_file(style, 0.5).record]) | {"author": "me"}
    lora = MAKERS[kind](tmp_path / "fox", said)
    assert lora_metadata_of(lora) == said == read_lora(lora).metadata
    (found,) = find_fused_files(lora, "Give it.", [style])
    assert (found.path, found.record.weight) == (style, 0.5)


@pytest.mark.parametrize("prefix", ["transformer_2.", "pipe.dit2.", "lora_transformer_2_"])
@pytest.mark.parametrize("kind", ["file", "surplus", "folder"])
def test_the_expert_that_the_keys_name_is_said_and_files_are_not_swapped(tmp_path, prefix, kind):
    separator = "_" if prefix.endswith("_") else "."
    module = separator.join(("blocks", "0", "attn1", "to_q"))
    (tmp_path / "two").mkdir()
    second = tmp_path / "two" / ("adapter_model" if kind == "folder" else "t2")
    second = written(second.with_suffix(".safetensors"), half(f"{prefix}{module}"), {"author": "me"})
    if kind == "surplus":
        second.write_bytes(second.read_bytes() + b"1234567")
    if kind == "folder":
        second = second.parent
    first = written(tmp_path / "t1.safetensors", half("transformer.blocks.0.attn1.to_q"))
    assert lora_metadata_of(second) == {"author": "me", "expert": LOW} == read_lora(second).metadata
    assert lora_metadata_of(first) == read_lora(first).metadata == {}
    for order in ([second, first], [first, second]):
        assert resolve_experts(order, (HIGH, LOW)) == {HIGH: first, LOW: second}
    assert resolve_experts([second], (HIGH, LOW)) == {LOW: second}


def test_metadata_counts_before_the_keys_and_both_experts_in_one_file_are_none(tmp_path):
    second = half("transformer_2.blocks.0.attn1.to_q")
    assert lora_metadata_of(written(tmp_path / "a.safetensors", second, {"expert": HIGH})) == {"expert": HIGH}
    both = second | half("transformer.blocks.0.attn1.to_q")
    assert lora_metadata_of(written(tmp_path / "b.safetensors", both)) == {}


def test_what_is_no_lora_says_nothing(tmp_path):
    (tmp_path / "pickle.pt").write_bytes(b"\x80\x02" + b"x" * 100)
    save_file({"a": torch.ones(2)}, tmp_path / "cut.safetensors", {"author": "me"})
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "cut.safetensors").read_bytes()[:-1])
    (tmp_path / "empty").mkdir()
    for path in (*tmp_path.iterdir(), tmp_path / "missing.safetensors"):
        assert lora_metadata_of(path) == {}


def test_a_configuration_belongs_to_one_file(tmp_path):
    folder = folder_of(tmp_path / "fox", {})
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    assert files_of_lora(folder) == files_of_lora(weights) == (weights, config)
    other = written(folder / "other.safetensors", half())
    assert files_of_lora(other) == (other, None) and files_of_lora(folder) == (weights, config)
    weights.unlink()
    assert files_of_lora(folder) == (other, config) and files_of_lora(other) == (other, None)  # it has other keys
    style = written(folder / "style.safetensors", half("base_model.model.blocks.0.self_attn.q"))
    assert files_of_lora(style) == (style, config)  # however many other files there are


@pytest.mark.parametrize("name", ["x" * 300 + ".safetensors", "x" * 300])
def test_a_name_that_is_too_long_is_that_of_no_file(tmp_path, name):
    path = tmp_path / name
    with pytest.raises(LoraError, match="there is no such file"):
        read_lora(path)
    for experts in ((HIGH, LOW), ("transformer",)):
        with pytest.raises(LoraError, match="there is no such file, and no pair"):
            resolve_experts([path], experts)
    assert lora_metadata_of(path) == {}
    with pytest.raises(UserError, match="cannot read .*: File name too long"):
        content_hash(path)


@pytest.mark.parametrize("names", [(b"fo\xfc.safetensors",), (b"fo\xfc", b"x.safetensors")])
def test_a_name_that_is_not_utf8_is_to_be_changed(tmp_path, names):
    path = tmp_path.joinpath(*map(os.fsdecode, names))
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(written(tmp_path / "fox.safetensors", half(), {"author": "me"}).read_bytes())
    for given in {path, path.parent} - {tmp_path}:
        with pytest.raises(LoraError, match=r"safetensors: safetensors cannot open a name that is not UTF-8. Rename"):
            read_lora(given)
    assert lora_metadata_of(path) == {"author": "me"}
