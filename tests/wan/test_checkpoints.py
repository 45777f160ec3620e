"""Model folders in the official layout load exactly, at any width; anything else is refused by name."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.tiny import TINY_SHAPE, tiny_text_encoder, tiny_transformer, tiny_vae, write_model, write_transformer
from wan.checkpoints import (
    TEXT_ENCODER,
    TOKENIZER,
    TRANSFORMER,
    VAE,
    CheckpointError,
    find_model,
    load_config,
    load_text_encoder,
    load_transformer,
    load_vae,
    read_config,
    text_encoder_bytes,
    text_encoder_fingerprint,
    text_length,
)
from wan.modules.model import is_fp32

FP32, BF16 = torch.float32, torch.bfloat16
INDEX = f"{TRANSFORMER}.index.json"


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def folder(whole, tmp_path) -> Path:
    """A copy that may be damaged."""
    return Path(shutil.copytree(whole, tmp_path / "tiny"))


def edit_config(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def edit_tensors(folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    state = load_file(folder / TRANSFORMER)
    edit(state)
    save_file(state, folder / TRANSFORMER)


def edit_pth(path: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    state = torch.load(path, weights_only=True)
    edit(state)
    torch.save(state, path)


def refused(message: str | None, load: Callable, *args) -> str:
    with pytest.raises(CheckpointError, match=message) as caught:
        load(*args)
    assert len(str(caught.value).splitlines()) <= 3
    return str(caught.value)


# ------------------------------------------------------------------------------------------------------- what loads


@pytest.mark.parametrize("shards", [1, 3])
def test_one_file_or_shards_load_to_the_same_frozen_weights(tmp_path, shards):
    expected = tiny_transformer()
    write_transformer(tmp_path, expected, shards)
    model = load_transformer(tmp_path, FP32)
    assert all(torch.equal(tensor, expected.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert model.shape == expected.shape and not model.training
    assert not any(parameter.requires_grad or parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize(
    "changes",
    [
        {"dim": 96, "num_heads": 4},
        {"ffn_dim": 64, "num_layers": 5},
        {"in_dim": 36},
        {"out_dim": 4, "text_dim": 16, "freq_dim": 64},
        {"patch_size": (1, 4, 2), "text_len": 7, "eps": 1e-5},
    ],
)
def test_widths_are_read_from_the_tensors(tmp_path, changes):
    shape = replace(TINY_SHAPE, **changes)
    write_transformer(tmp_path, tiny_transformer(shape))
    assert load_transformer(tmp_path, FP32).shape == shape
    edit_config(tmp_path, **dict.fromkeys(("dim", "ffn_dim", "freq_dim", "in_dim", "num_layers", "out_dim")))
    assert load_transformer(tmp_path, FP32).shape == shape


def test_in_bf16_the_fp32_islands_stay_as_they_are(whole):
    expected = tiny_transformer().state_dict()
    for name, tensor in load_transformer(whole, BF16).state_dict().items():
        assert tensor.dtype == (FP32 if is_fp32(name) else BF16)
        assert torch.equal(tensor, expected[name].to(tensor.dtype))


def test_progress_sees_every_tensor(whole):
    seen = []
    load_transformer(whole, FP32, "cpu", lambda names: seen.append(len(list(names))) or names)
    assert seen == [len(tiny_transformer().state_dict())]


def test_the_vae_and_the_text_encoder_load_exactly(whole):
    vae, encoder = load_vae(whole), load_text_encoder(whole, 64, FP32, "cpu").encoder
    for loaded, expected in ((vae, tiny_vae()), (encoder, tiny_text_encoder(TINY_SHAPE.text_dim))):
        rounded = {name: t.bfloat16().float() if loaded is encoder else t for name, t in expected.state_dict().items()}
        assert all(torch.equal(tensor, rounded[name]) for name, tensor in loaded.state_dict().items())
        assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert load_text_encoder(whole, 64, BF16, "cpu").encoder.norm.weight.dtype == BF16


def test_the_text_length_truncates_prompts(whole):
    encoder = load_text_encoder(whole, 5, FP32, "cpu")
    assert len(encoder.encode(["a cat runs over the house and under the tree"])[0]) == 5


def test_the_config_names_the_family_whatever_the_width(whole):
    assert load_config(whole).task == "t2v" and load_config(whole).shift == 5.0
    assert text_length(whole) == TINY_SHAPE.text_len
    assert text_encoder_bytes(whole) == (whole / TEXT_ENCODER).stat().st_size


# ------------------------------------------------------------------------------------------------ where a model is


def test_a_hub_name_is_found_under_models_and_a_path_as_given(whole, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused("no model at Wan-AI/Tiny or models/Wan-AI/Tiny\ndownload it with: .*Wan-AI/Tiny", find_model, "Wan-AI/Tiny")
    shutil.copytree(whole, tmp_path / "models" / "Wan-AI" / "Tiny")
    assert find_model("Wan-AI/Tiny") == Path("models/Wan-AI/Tiny")
    assert find_model(str(whole)) == whole
    (tmp_path / "Wan-AI" / "Tiny").mkdir(parents=True)
    assert find_model("Wan-AI/Tiny") == Path("Wan-AI/Tiny")


# -------------------------------------------------------------------------------------------------- what is refused


FILES = ("config.json", TRANSFORMER, VAE, TEXT_ENCODER, TOKENIZER, f"{TOKENIZER}/tokenizer.json")


@pytest.mark.parametrize("missing", FILES)
def test_a_missing_file_is_named(folder, missing):
    path = folder / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    loads = {VAE: (load_vae, folder), TEXT_ENCODER: (load_text_encoder, folder, 64, FP32, "cpu")}
    load = loads.get(missing, loads[TEXT_ENCODER] if TOKENIZER in missing else (load_transformer, folder, FP32))
    message = refused(None, *load)
    assert Path(missing).name in message and str(folder) in message


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda s: s.pop("blocks.1.ffn.2.bias"), r"lacks tensor blocks\.1\.ffn\.2\.bias"),
        (lambda s: s.pop("patch_embedding.weight"), r"lacks the tensor patch_embedding\.weight"),
        (lambda s: s.update({"img_emb.emb_pos": torch.ones(1, 514, 1280)}), r"foreign tensor img_emb\.emb_pos"),
        (lambda s: s.update({"blocks.0.ffn.2.bias": torch.ones(47)}), r"wrong shape of tensor blocks\.0\.ffn\.2\.bias"),
        (lambda s: s.update({"head.head.weight": torch.ones(64, 40)}), r"wrong shape of tensor head\.head\.weight"),
        (lambda s: s.update({"patch_embedding.weight": torch.ones(48)}), "unexpected shape"),
        (lambda s: s.update({"head.head.weight": torch.tensor(1.0)}), "unexpected shape"),
    ],
)
def test_a_missing_foreign_or_misshapen_tensor_is_named(folder, edit, message):
    edit_tensors(folder, edit)
    assert TRANSFORMER in refused(message, load_transformer, folder, FP32)


@pytest.mark.parametrize(
    ("load", "file", "edit", "message"),
    [
        ("vae", VAE, lambda s: s.pop("conv2.weight"), r"lacks the tensor conv2\.weight"),
        ("vae", VAE, lambda s: s.update({"conv2.weight": torch.tensor(1.0)}), "unexpected shape"),
        ("vae", VAE, lambda s: s.update(other=torch.ones(1)), "foreign tensor other"),
        ("vae", VAE, lambda s: s.update(other={"nested": 1}), "does not hold a flat dictionary of tensors"),
        ("text", TEXT_ENCODER, lambda s: s.pop("blocks.0.ffn.fc1.weight"), r"lacks the tensor blocks\.0\.ffn\.fc1"),
        ("text", TEXT_ENCODER, lambda s: s.update({"norm.weight": torch.ones(3)}), r"wrong shape of tensor norm"),
        ("text", TEXT_ENCODER, lambda s: s.update({"token_embedding.weight": torch.ones(3)}), "unexpected shape"),
    ],
)
def test_a_pth_file_of_another_content_is_named(folder, load, file, edit, message):
    edit_pth(folder / file, edit)
    loads = {"vae": (load_vae, folder), "text": (load_text_encoder, folder, 64, FP32, "cpu")}
    assert file in refused(message, *loads[load])


def test_many_missing_tensors_are_counted_not_listed(folder):
    edit_tensors(folder, lambda s: [s.pop(name) for name in list(s) if name.startswith("blocks.1.self_attn")])
    assert "and 7 more" in refused("lacks tensor", load_transformer, folder, FP32)


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
        ({"eps": "small"}, "lacks a valid num_heads or eps"),
        ({"text_len": 0}, "text_len must be a positive whole number, not 0"),
        ({"text_len": "512"}, "text_len must be a positive whole number"),
    ],
)
def test_a_config_that_disagrees_is_refused(folder, changes, message):
    edit_config(folder, **changes)
    assert str(folder) in refused(message, load_transformer, folder, FP32)


@pytest.mark.parametrize("changes", [{"model_type": "i2v"}, {"model_type": None}, {"in_dim": 36}, {"model_type": []}])
def test_a_model_of_an_unsupported_kind_is_refused_with_what_is_supported(folder, changes):
    edit_config(folder, **changes)
    refused("supported: t2v with 16", load_config, folder)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe"])
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
    refused("names a shard outside its folder|is not a complete safetensors file", load_transformer, folder, FP32)


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"weight_map": ["a"]}', '{"weight_map": {"a": 7}}'])
def test_an_index_that_is_none_is_refused(folder, content):
    (folder / TRANSFORMER).unlink()
    (folder / INDEX).write_text(content)
    refused(f"{INDEX} is not a valid index of safetensors shards", load_transformer, folder, FP32)


def test_a_shard_that_the_index_names_but_the_folder_lacks_is_named(tmp_path):
    write_transformer(tmp_path, tiny_transformer(), shards=2)
    name = "diffusion_pytorch_model-00002-of-00002.safetensors"
    (tmp_path / name).unlink()
    refused(f"{name} is missing", load_transformer, tmp_path, FP32)


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_a_truncated_safetensors_file_is_named(folder, kept):
    path = folder / TRANSFORMER
    path.write_bytes(path.read_bytes()[:kept])
    refused(f"{path} is not a complete safetensors file: .*\ndownload it again", load_transformer, folder, FP32)


@pytest.mark.parametrize("kept", [0, 4, 1000, -1])
@pytest.mark.parametrize("file", [VAE, TEXT_ENCODER])
def test_a_truncated_pth_file_is_named(folder, file, kept):
    path = folder / file
    path.write_bytes(path.read_bytes()[:kept])
    load = (load_vae, folder) if file == VAE else (load_text_encoder, folder, 64, FP32, "cpu")
    refused(f"{path} is not a complete file of plain tensors: .*\ndownload it again", *load)


class Trap:
    """Makes a folder when it is unpickled."""

    def __reduce__(self) -> tuple:
        return os.mkdir, ("sprung",)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("file", [VAE, TEXT_ENCODER])
def test_a_pickled_object_is_refused_and_never_run(folder, monkeypatch, file, zipped):
    monkeypatch.chdir(folder)
    torch.save({"conv2.weight": Trap()}, folder / file, _use_new_zipfile_serialization=zipped)
    load = (load_vae, folder) if file == VAE else (load_text_encoder, folder, 64, FP32, "cpu")
    refused("is not a complete file of plain tensors", *load)
    assert not (folder / "sprung").exists()
    torch.load(folder / file, weights_only=False)
    assert (folder / "sprung").exists()  # the trap works where it is let


# ------------------------------------------------------------------------------------------------------- fingerprint


def test_the_fingerprint_is_of_the_content_and_not_of_the_path(whole, folder):
    expected = text_encoder_fingerprint(whole, 64, FP32)
    assert text_encoder_fingerprint(folder, 64, FP32) == expected
    assert text_encoder_fingerprint(folder.parent / "." / folder.name, 64, FP32) == expected


def test_the_fingerprint_changes_with_weights_tokenizer_length_and_dtype(folder):
    seen = [text_encoder_fingerprint(folder, *args) for args in ((64, FP32), (64, BF16), (63, FP32))]
    edit_pth(folder / TEXT_ENCODER, lambda s: s["norm.weight"][0].add_(1))
    seen.append(text_encoder_fingerprint(folder, 64, FP32))
    with (folder / TOKENIZER / "tokenizer.json").open("a") as file:
        file.write("\n")
    seen.append(text_encoder_fingerprint(folder, 64, FP32))
    assert len(set(seen)) == len(seen)


def test_the_fingerprint_of_a_large_file_sees_its_beginning_and_its_end(folder):
    path, seen = folder / TEXT_ENCODER, set()
    for position in (None, 0, 2**25 + 99):
        content = bytearray(2**25 + 100)
        if position is not None:
            content[position] = 1
        path.write_bytes(content)
        seen.add(text_encoder_fingerprint(folder, 64, FP32))
    assert len(seen) == 3
