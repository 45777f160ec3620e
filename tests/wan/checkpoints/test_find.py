"""A model is found by name or path, its family by what the folder holds, and its parts may come from elsewhere."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from tests.damage import edit_config, edit_tensors, refused
from tests.tiny import FAMILY, TINY_SHAPE, tiny_transformer, tiny_vae, write_transformer, write_vae
from wan.checkpoints import (
    INDEX,
    TRANSFORMER,
    find,
    find_family,
    find_model,
    open_model,
)
from wan.checkpoints.errors import ModelNotFoundError
from wan.configs import FAMILIES, Expert

TOKENIZER_FILE = f"{FAMILY.tokenizer}/tokenizer.json"
FILES = ("config.json", TRANSFORMER, FAMILY.vae, FAMILY.text_encoder, FAMILY.tokenizer, TOKENIZER_FILE)


def test_a_hub_name_is_found_under_models_and_a_path_as_given(whole, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused("^no model at Wan-AI/Tiny or models/Wan-AI/Tiny$", find_model, "Wan-AI/Tiny")
    shutil.copytree(whole, tmp_path / "models" / "Wan-AI" / "Tiny")
    assert find_model("Wan-AI/Tiny") == Path("models/Wan-AI/Tiny")
    assert find_model(str(whole)) == whole
    (tmp_path / "Wan-AI" / "Tiny").mkdir(parents=True)
    assert find_model("Wan-AI/Tiny") == Path("Wan-AI/Tiny")


def test_the_family_of_a_release_is_known_without_its_files_but_a_folder_comes_first(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_family("Wan-AI/Wan2.1-T2V-14B") is FAMILIES["wan2.1-t2v-14B"]
    folder.rename("Wan2.1-T2V-14B")
    assert find_family("Wan2.1-T2V-14B") is FAMILIES["wan2.1-t2v-1.3B"]  # the first of the same kind
    edit_config(Path("Wan2.1-T2V-14B"), model_type="i2v")
    refused("is a i2v model", find_family, "Wan2.1-T2V-14B")
    with pytest.raises(ModelNotFoundError) as caught:
        find_family("Wan-AI/Wan9-T2V")
    assert caught.value.name == "Wan-AI/Wan9-T2V"


def test_a_folder_is_opened_with_all_its_parts(whole):
    files = open_model(whole)
    assert files.source == str(whole) and files.family is FAMILY
    assert files.family.task == "t2v" and files.family.shift == 5.0
    assert list(files.transformers) == ["transformer"] and files.transformer.path == whole / TRANSFORMER
    assert files.transformer.shape == TINY_SHAPE and files.text_len == TINY_SHAPE.text_len
    assert (files.vae, files.text_encoder) == (whole / FAMILY.vae, whole / FAMILY.text_encoder)
    assert files.tokenizer == whole / FAMILY.tokenizer


def test_a_folder_is_read_once(whole, monkeypatch):
    read = []
    for name in ("read_config", "read_transformer"):
        original = getattr(find, name)
        monkeypatch.setattr(find, name, lambda *args, original=original: read.append(original) or original(*args))
    files = open_model(whole)
    assert files.transformer.shape and files.text_len
    assert len(read) == 2  # the config and the headers


@pytest.mark.parametrize("missing", FILES)
def test_a_missing_file_is_named(folder, missing):
    path = folder / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    message = refused(None, open_model, folder)
    assert Path(missing).name in message and str(folder) in message


@pytest.mark.parametrize("changes", [{"model_type": "i2v"}, {"model_type": None}, {"in_dim": 36}, {"model_type": []}])
def test_a_model_of_an_unsupported_kind_is_refused_with_what_is_supported(folder, changes):
    edit_config(folder, **changes)
    for find_it in (find_family, open_model):
        refused("supported: t2v with 16", find_it, folder)


# ----------------------------------------------------------------------------------------------------- single files


def test_each_part_may_be_another_file(whole, tmp_path):
    write_vae(tmp_path, tiny_vae(seed=1))
    write_transformer(tmp_path / "sharded", tiny_transformer(replace(TINY_SHAPE, num_layers=3)), shards=2)
    files = open_model(str(whole), vae=tmp_path / FAMILY.vae, transformer=str(tmp_path / "sharded"), clip=None)
    assert files.vae == tmp_path / FAMILY.vae and files.text_encoder == whole / FAMILY.text_encoder
    assert files.transformer.path == tmp_path / "sharded" / INDEX and files.transformer.shape.num_layers == 3


def test_a_transformer_without_a_config_is_read_by_that_of_the_folder(whole, tmp_path):
    (tmp_path / "alone").mkdir()
    file = Path(shutil.copy(whole / TRANSFORMER, tmp_path / "alone" / "tuned.safetensors"))
    assert open_model(whole, transformer=file).transformer.path == file
    refused(r"alone/config\.json is missing", open_model, transformer=file)


def test_a_model_may_be_made_of_single_files(whole):
    files = {"vae": whole / FAMILY.vae, "text_encoder": whole / FAMILY.text_encoder}
    files |= {"tokenizer": whole / FAMILY.tokenizer, "transformer": whole / TRANSFORMER}
    assert replace(open_model(**files), source=str(whole)) == open_model(whole)
    for name in ("vae", "text_encoder", "tokenizer"):
        rest = {role: path for role, path in files.items() if role != name}
        refused(f"no {name} is given", open_model, **rest)
    refused("no model is given", open_model, vae=files["vae"])


def test_a_given_file_that_is_not_there_is_named(whole, tmp_path):
    for name in ("transformer", "vae", "text_encoder", "tokenizer"):
        refused(f"{tmp_path}/nowhere is missing", open_model, whole, **{name: tmp_path / "nowhere"})


@pytest.mark.parametrize("name", ["high_noise", "low_noise", "clip"])
def test_a_part_that_no_supported_model_has_is_refused(whole, name):
    message = f"some.safetensors cannot be used: the model has no part called {name}"
    refused(message, open_model, whole, **{name: "some.safetensors"})
    refused(message, open_model, **{name: "some.safetensors"})


def test_an_unknown_part_is_a_mistake_of_the_program(whole):
    with pytest.raises(TypeError, match="unknown parts of a model: vea"):
        open_model(whole, vea=None)


def test_a_transformer_of_another_kind_is_refused(whole, tmp_path):
    write_transformer(tmp_path, tiny_transformer(replace(TINY_SHAPE, in_dim=36)))
    edit_config(tmp_path, model_type="i2v")
    message = "is of a i2v model with 36 input and 16 output channels, not of a t2v model with 16 input and 16 output"
    assert str(tmp_path) in refused(message, open_model, whole, transformer=tmp_path)


def test_output_channels_that_are_no_latents_of_the_family_are_refused(folder):
    write_transformer(folder, tiny_transformer(replace(TINY_SHAPE, out_dim=4)))
    refused("with 16 input and 4 output channels", open_model, folder)


# ---------------------------------------------------------------------------------------------------- several experts


@pytest.fixture
def two_experts(monkeypatch, whole, tmp_path) -> Path:
    """A model of a kind that is planted among the families: two transformers, each in its own folder."""
    experts = (Expert("high_noise", "high", (0.9, 1.0)), Expert("low_noise", "low", (0.0, 0.9)))
    planted = {**FAMILIES, "planted": replace(FAMILY, experts=experts, shift=12.0)}
    monkeypatch.setattr(find, "FAMILIES", planted)
    monkeypatch.setattr("wan.configs.FAMILIES", planted)
    folder = Path(shutil.copytree(whole, tmp_path / "two"))
    for name in ("high", "low"):
        (folder / name).mkdir()
        shutil.copy(folder / "config.json", folder / name)
    (folder / TRANSFORMER).rename(folder / "high" / TRANSFORMER)
    shutil.copy(folder / "high" / TRANSFORMER, folder / "low")
    (folder / "config.json").unlink()
    return folder


def test_a_row_with_two_experts_needs_no_other_code(two_experts, whole):
    files = open_model(two_experts)
    paths = {name: expert.path for name, expert in files.transformers.items()}
    assert paths == {"high_noise": two_experts / "high" / TRANSFORMER, "low_noise": two_experts / "low" / TRANSFORMER}
    assert files.family.shift == find_family(two_experts).shift == 12.0 and open_model(whole).family.shift == 5.0
    other = open_model(two_experts, low_noise=whole / TRANSFORMER)
    assert other.transformers["low_noise"].path == whole / TRANSFORMER
    assert other.transformers["high_noise"] == files.transformers["high_noise"]
    refused("the model has no part called transformer", open_model, two_experts, transformer=whole / TRANSFORMER)
    refused("the model has no part called high_noise", open_model, whole, high_noise=whole / TRANSFORMER)


def test_the_tensors_of_each_expert_are_checked(two_experts):
    edit_tensors(two_experts / "low", lambda state: state.pop("patch_embedding.weight"))
    assert "low" in refused("lacks the tensor patch_embedding", open_model, two_experts)
