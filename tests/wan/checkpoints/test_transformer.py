"""A transformer is known by its config.json and the headers of its files; what they get wrong is refused by name."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.damage import edit_config, edit_tensors, refused
from tests.tiny import TINY_SHAPE, tiny_transformer, write_transformer
from wan.checkpoints.transformer import INDEX, TRANSFORMER, TransformerFiles, read_config, read_transformer


def read(folder: Path) -> TransformerFiles:
    return read_transformer(folder, read_config(folder))


@pytest.mark.parametrize(
    "changes",
    [
        {"dim": 96, "num_heads": 4},
        {"ffn_dim": 64, "num_layers": 5},
        {"in_dim": 36},
        {"out_dim": 4, "text_dim": 16, "freq_dim": 64},
        {"patch_size": (1, 4, 2), "text_len": 7, "eps": 1e-5},
        {"in_dim": 36, "image_dim": 40},
        {"in_dim": 36, "image_dim": 24, "image_positions": 10},
    ],
)
def test_widths_are_read_from_the_tensors(tmp_path, changes):
    shape = replace(TINY_SHAPE, **changes)
    write_transformer(tmp_path, tiny_transformer(shape))
    assert read(tmp_path).shape == shape
    edit_config(tmp_path, **dict.fromkeys(("dim", "ffn_dim", "freq_dim", "in_dim", "num_layers", "out_dim")))
    assert read(tmp_path).shape == shape


@pytest.mark.parametrize("shards", [1, 3])
def test_every_tensor_is_known_with_the_file_that_holds_it(tmp_path, shards):
    write_transformer(tmp_path, tiny_transformer(), shards)
    files = read(tmp_path)
    assert files.path == tmp_path / (TRANSFORMER if shards == 1 else INDEX)
    assert files.tensors.keys() == tiny_transformer().state_dict().keys()
    assert len(set(files.tensors.values())) == shards


def test_a_file_is_read_by_a_config_from_elsewhere(whole, tmp_path):
    file = shutil.copy(whole / TRANSFORMER, tmp_path / "other.safetensors")
    files = read_transformer(Path(file), read_config(whole))
    assert files.path == file and files.shape == TINY_SHAPE


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda s: s.pop("patch_embedding.weight"), r"lacks the tensor patch_embedding\.weight"),
        (lambda s: s.update({"patch_embedding.weight": torch.ones(48)}), "unexpected shape"),
        (lambda s: s.update({"patch_embedding.weight": torch.ones(48, 16, 1, 0, 2)}), "unexpected shape"),
        (lambda s: s.update({"head.head.weight": torch.tensor(1.0)}), "unexpected shape"),
        (lambda s: s.update({"img_emb.proj.1.weight": torch.ones(9)}), "unexpected shape"),
        (lambda s: s.update({"img_emb.emb_pos": torch.ones(9)}), "unexpected shape"),
    ],
)
def test_tensors_that_have_no_widths_are_named(folder, edit, message):
    edit_tensors(folder, edit)
    assert TRANSFORMER in refused(message, read, folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": 64}, "config.json says dim 64, but the weights have 48"),
        ({"num_layers": 3}, "config.json says num_layers 3, but the weights have 2"),
        ({"in_dim": 36}, "config.json says in_dim 36, but the weights have 16"),
        ({"patch_size": [1, 4, 4]}, "patch_size"),
        ({"num_heads": 5}, "5 heads do not divide the width 48"),
        ({"num_heads": 0}, "0 heads do not divide"),
        ({"num_heads": None}, "lacks a valid num_heads"),
        ({"num_heads": float("inf")}, "lacks a valid num_heads"),
        ({"eps": "small"}, "lacks a valid num_heads or eps"),
        ({"eps": float("nan")}, "lacks a valid num_heads or eps: eps is nan"),
        ({"eps": -1e-6}, "lacks a valid num_heads or eps"),
        ({"text_len": 0}, "text_len must be a positive whole number, not 0"),
        ({"text_len": "512"}, "text_len must be a positive whole number"),
        ({"text_len": True}, "text_len must be a positive whole number"),
        ({"text_len": 10**9}, "text_len must be a positive whole number"),
    ],
)
def test_a_config_that_disagrees_is_refused(folder, changes, message):
    edit_config(folder, **changes)
    assert str(folder) in refused(message, read, folder)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b"[" * 100_000])
def test_a_config_that_is_no_json_object_is_refused(folder, content):
    (folder / "config.json").write_bytes(content)
    assert "config.json" in refused("not a readable JSON file|not hold a JSON object", read_config, folder)


@pytest.mark.parametrize("name", ["../evil.safetensors", "/evil.safetensors", "sub/evil.safetensors", "..", "."])
def test_an_index_never_leads_out_of_its_folder(folder, name):
    for place in (folder.parent, folder / "sub"):
        place.mkdir(exist_ok=True)
        shutil.copy(folder / TRANSFORMER, place / "evil.safetensors")
    (folder / TRANSFORMER).unlink()
    (folder / INDEX).write_text(json.dumps({"weight_map": {"head.head.weight": name}}))
    refused("names a shard outside its folder|is not a complete safetensors file", read, folder)


@pytest.mark.parametrize(
    "content", ["", "{}", "[]", "[" * 100_000, '{"weight_map": ["a"]}', '{"weight_map": {"a": 7}}']
)
def test_an_index_that_is_none_is_refused(folder, content):
    (folder / TRANSFORMER).unlink()
    (folder / INDEX).write_text(content)
    refused(f"{INDEX} is not a valid index of safetensors shards", read, folder)


def test_a_shard_that_the_index_names_but_the_folder_lacks_is_named(tmp_path):
    write_transformer(tmp_path, tiny_transformer(), shards=2)
    name = "diffusion_pytorch_model-00002-of-00002.safetensors"
    (tmp_path / name).unlink()
    refused(f"{name} is missing", read, tmp_path)
