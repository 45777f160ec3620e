"""A transformer is known by its config.json and the headers of its files; what they get wrong is refused by name."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.damage import edit_config, edit_tensors, refused
from tests.tiny import TINY_SHAPE, tiny_transformer, write_transformer
from wan.checkpoints.tensors import read_header
from wan.checkpoints.transformer import INDEX, TRANSFORMER, TransformerFiles, read_config, read_transformer
from wan.configs import Traits


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
    assert len(files.files) == shards
    for name, entry in files.tensors.items():
        (part,) = entry.parts
        assert (part.name, part.scale) == (name, None)
        assert name in read_header(part.path).shapes
    assert files.shapes == {name: tuple(tensor.shape) for name, tensor in tiny_transformer().state_dict().items()}


def test_a_file_is_read_by_a_config_from_elsewhere(whole, tmp_path):
    file = shutil.copy(whole / TRANSFORMER, tmp_path / "other.safetensors")
    files = read_transformer(Path(file), read_config(whole))
    assert files.path == file and files.shape == TINY_SHAPE


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda s: s.pop("patch_embedding.weight"), r"lacks the tensor patch_embedding\.weight"),
        (lambda s: s.update({"patch_embedding.weight": torch.ones(48)}), "unexpected shape"),
        (lambda s: s.update({"patch_embedding.weight": torch.ones(48, 16, 1, 0, 2)}), "of shape .+, which is empty"),
        (lambda s: s.update({"head.head.weight": torch.tensor(1.0)}), "unexpected shape"),
        (lambda s: s.update({"patch_embedding.weight": torch.ones(0, 16, 1, 2, 2)}), "of shape .+, which is empty"),
        (lambda s: s.update({"blocks.0.ffn.0.weight": torch.ones(0, 48)}), "of shape .+, which is empty"),
        (lambda s: s.update({"blocks.0.ffn.0.bias": torch.ones(96).long()}), "of dtype I64, which is none of weights"),
        (lambda s: s.update({f"blocks.{n}.x": torch.ones(1) for n in range(1001)}), "unexpected shape: 1001 blocks"),
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
        ({"in_dim": "16\n\n\n"}, "config.json says in_dim '16"),
        ({"in_dim": "x" * 10_000}, "config.json says in_dim x+[.]{3}, but the weights have 16"),
        ({"ffn_dim": [[[96]]] * 999}, "config.json says ffn_dim .+, but the weights have 96"),
        ({"num_heads": 10**4000}, "heads do not divide the width 48"),
        ({"text_len": "x\n\n\n" * 999}, "text_len must be a positive whole number"),
        ({"patch_size": [1, 4, 4]}, "patch_size"),
        ({"num_heads": 5}, "5 heads do not divide the width 48"),
        ({"num_heads": 0}, "0 heads do not divide"),
        ({"num_heads": None}, "config.json does not state num_heads, the number of heads"),
        ({"num_heads": 16}, "16 heads of the width 48 have 3 channels, where an even number"),
        ({"num_heads": 12}, "12 heads of the width 48 have 4 channels, where an even number of at least 6"),
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


def test_heads_of_an_odd_number_of_channels_are_refused(tmp_path):
    folder = tmp_path / "odd"
    write_transformer(folder, tiny_transformer(replace(TINY_SHAPE, dim=54, num_heads=3)))
    assert read(folder).shape.num_heads == 3
    edit_config(folder, num_heads=6)
    refused("6 heads of the width 54 have 9 channels, where an even number of at least 6 is needed", read, folder)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b"[" * 100_000])
def test_a_config_that_is_no_json_object_is_refused(folder, content):
    (folder / "config.json").write_bytes(content)
    assert "config.json" in refused("is an empty file|is not valid JSON|not hold a JSON object", read_config, folder)


@pytest.mark.parametrize("name", ["../evil.safetensors", "/evil.safetensors", "sub/evil.safetensors", "..", "."])
def test_an_index_never_leads_out_of_its_folder(folder, name):
    for place in (folder.parent, folder / "sub"):
        place.mkdir(exist_ok=True)
        shutil.copy(folder / TRANSFORMER, place / "evil.safetensors")
    (folder / TRANSFORMER).unlink()
    (folder / INDEX).write_text(json.dumps({"weight_map": {"head.head.weight": name}}))
    refused("names a shard outside its folder", read, folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is an empty file"),
        ("<html>", "is a web page"),
        ("version https://git-lfs.github.com/spec/v1", "is a pointer of Git LFS"),
        ("[" * 100_000, "is damaged, it is not valid JSON"),
        ("[]", "does not hold a JSON object"),
        ("{}", "is not a valid index of safetensors shards"),
        ('{"weight_map": ["a"]}', "is not a valid index of safetensors shards"),
        ('{"weight_map": {"a": 7}}', "is not a valid index of safetensors shards"),
        ('{"weight_map": {"a": []}}', "is not a valid index of safetensors shards"),
    ],
)
def test_an_index_that_is_none_is_refused(folder, content, message):
    (folder / TRANSFORMER).unlink()
    (folder / INDEX).write_text(content)
    refused(f"{INDEX} {message}", read, folder)


@pytest.mark.parametrize("name", ["a" * 5000, "a\0b", "a\n\n\nb", "", "\ud800"])
def test_an_index_of_strange_names_is_refused(folder, name):
    (folder / TRANSFORMER).unlink()
    (folder / INDEX).write_text(json.dumps({"weight_map": {"head.head.weight": name}}))
    assert len(refused(None, read, folder)) < 500


def test_a_shard_that_the_index_names_but_the_folder_lacks_is_named(tmp_path):
    write_transformer(tmp_path, tiny_transformer(), shards=2)
    name = "diffusion_pytorch_model-00002-of-00002.safetensors"
    (tmp_path / name).unlink()
    refused(f"{name} is missing", read, tmp_path)


# -------------------------------------------------------------------------------------------- what no tensor tells


def test_without_a_config_heads_and_text_are_those_of_the_released_models(tmp_path):
    write_transformer(tmp_path, tiny_transformer(replace(TINY_SHAPE, dim=256)))
    shape = read_transformer(tmp_path).shape
    assert (shape.num_heads, shape.text_len, shape.eps) == (2, 512, 1e-6)
    write_transformer(tmp_path, tiny_transformer())
    refused("has the width 48, which is no multiple of 128: its number of heads", read_transformer, tmp_path)


def test_the_first_config_with_the_same_widths_tells_what_no_tensor_does(whole, tmp_path):
    config, file = read_config(whole), Path(shutil.copy(whole / TRANSFORMER, tmp_path))
    wider = replace(config, values=dict(config.values) | {"dim": 96, "num_heads": 8})
    other = replace(config, values=dict(config.values) | {"num_heads": 4})
    assert read_transformer(file, others=[wider, config, other]).shape.num_heads == TINY_SHAPE.num_heads
    assert read_transformer(file, others=[other, config]).shape.num_heads == 4
    assert read_transformer(file, config, [other]).shape.num_heads == TINY_SHAPE.num_heads
    refused("says dim 96", read_transformer, file, wider, [config])


DIFFUSERS = {
    "num_attention_heads": 2,
    "attention_head_dim": 24,
    "in_channels": 16,
    "out_channels": 16,
    "ffn_dim": 96,
    "num_layers": 2,
    "text_dim": 32,
    "freq_dim": 32,
    "patch_size": [1, 2, 2],
    "eps": 1e-5,
    "image_dim": None,
    "pos_embed_seq_len": None,
}


def test_the_config_of_diffusers_says_the_same_in_other_words(folder):
    (folder / "config.json").write_text(json.dumps(DIFFUSERS))
    config = read_config(folder)
    assert not config.is_official and config.is_of_transformer
    assert read(folder).shape == replace(TINY_SHAPE, text_len=512, eps=1e-5)
    traits = Traits(48, 16, 16, image=False, positions=False)
    assert config.traits(is_alone=True) == config.traits(is_alone=False) == traits
    edit_config(folder, image_dim=80, pos_embed_seq_len=514)
    assert read_config(folder).traits(True) == replace(traits, image=True, positions=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": 3}, "config.json says dim 72, but the weights have 48"),
        ({"in_channels": 36}, "config.json says in_channels 36, but the weights have 16"),
        ({"num_attention_heads": "2"}, None),
        ({"num_attention_heads": None}, "config.json does not state num_attention_heads, the number of heads"),
    ],
)
def test_a_config_of_diffusers_that_disagrees_is_refused(folder, changes, message):
    (folder / "config.json").write_text(json.dumps(DIFFUSERS))
    edit_config(folder, **changes)
    if message:
        refused(message, read, folder)
    else:
        assert read(folder).shape.num_heads == 2


@pytest.mark.parametrize(
    ("task", "is_alone", "image"),
    [("t2v", True, False), ("i2v", True, True), ("i2v", False, False), ("flf2v", True, True), (None, True, None)],
)
def test_an_official_config_tells_image_tokens_by_its_task_and_by_being_alone(whole, task, is_alone, image):
    config = read_config(whole)
    said = replace(config, values={"model_type": task, "dim": 48})
    assert said.is_official and said.traits(is_alone) == Traits(48, None, None, image, task=task)


def test_a_config_of_another_part_is_known_as_such(tmp_path):
    vision = {"hidden_size": 80, "num_attention_heads": 1, "patch_size": 14}
    text = {"model_type": "umt5", "d_model": 4096, "num_heads": 64, "num_layers": 24}
    for values in (vision, text, {"z_dim": 16}, {}):
        (tmp_path / "config.json").write_text(json.dumps(values))
        assert not read_config(tmp_path).is_of_transformer
