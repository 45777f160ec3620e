"""Which family transformers are of, and what is refused because it cannot be that of the model."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.damage import edit_pth, refused
from tests.layouts import read_model, write_diffusers
from tests.tiny import FAMILY, write_model
from wan.checkpoints import TRANSFORMER, MissingPartsError, find_family, find_model, open_model
from wan.checkpoints.families import family_of, find_named, mismatch
from wan.configs import FAMILIES, Traits

A14B = FAMILIES["wan2.2-t2v-A14B"]
ALONE, HIGH = {"transformer": Path("t.safetensors")}, {"high_noise": Path("h.safetensors")}
T2V, I2V = Traits(5120, 16, 16, image=False), Traits(5120, 36, 16, image=False)


@pytest.mark.parametrize(
    ("traits", "paths", "message"),
    [
        (
            I2V,
            ALONE,
            r"t.safetensors is one of two experts \(wan2.2-i2v-A14B, wan2.2-fun-A14B-InP\): give it",
        ),
        (
            Traits(3072, 48, 48),
            HIGH,
            "h.safetensors is no expert, but the only transformer of wan2.2-ti2v-5B",
        ),
        (Traits(1536, 16, 16), HIGH, "h.safetensors has the width 1536, but wan2.2-t2v-A14B has 5120"),
        (
            Traits(3072, 16, 16),
            ALONE,
            "t.safetensors has the width 3072, but wan2.1-t2v-1.3B has 1536 and wan2.1-t2v-14B",
        ),
        (Traits(5120, 20, 16), ALONE, "not supported: 20 input and 16 output channels\nsupported: t2v with 16 input"),
    ],
)
def test_what_cannot_be_is_refused_with_what_it_is(traits, paths, message):
    refused(message, family_of, traits, paths, None, None)


def test_the_way_of_giving_decides_between_one_transformer_and_two():
    assert family_of(T2V, ALONE, None, None).name == "wan2.1-t2v-14B"
    assert family_of(T2V, HIGH, None, None) is A14B


def test_a_name_decides_where_tensors_do_not_and_is_checked_where_they_do():
    named = find_named("Wan2.2-Fun-A14B-InP")
    assert named is FAMILIES["wan2.2-fun-A14B-InP"] and family_of(I2V, HIGH, None, named) is named
    assert family_of(I2V, HIGH, Path("models/Wan2.2-Fun-A14B-InP"), None) is named
    refused(
        "h.safetensors has 16 input and 16 output channels, but wan2.2-fun-A14B-InP has i2v with 36",
        family_of,
        T2V,
        HIGH,
        None,
        named,
    )
    refused(
        "wan2.2-fun-A14B-InP has high_noise and low_noise, but t.safetensors is given",
        family_of,
        I2V,
        ALONE,
        None,
        named,
    )
    refused("there is no family wan3\nthere are: wan2.1-t2v-1.3B, ", find_named, "wan3")
    assert find_named("") is None
    assert (
        mismatch(T2V, FAMILY)
        == "has 16 input and 16 output channels, but wan2.1-t2v-1.3B has t2v with 16 input and 16 output channels"
    )


def test_a_release_that_is_not_there_is_not_known_by_its_name_where_a_transformer_is_given(whole):
    transformer, name = whole / TRANSFORMER, "Wan-AI/Wan2.1-T2V-14B"
    refused(f"no model at {name}", find_family, name, transformer=transformer)
    assert find_family(name, vae=transformer) is FAMILIES["wan2.1-t2v-14B"]
    refused("wan2.2-t2v-A14B has high_noise and low_noise", find_family, None, A14B.name, transformer=transformer)


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "a\n\n\n\nb"])
def test_a_name_that_no_folder_can_have_is_that_of_no_model(name):
    assert len(refused("^no model at ", find_model, name)) < 300


def test_a_given_transformer_is_read_whatever_the_config_beside_it_says(whole, tmp_path):
    shutil.copy(whole / "config.json", tmp_path)
    (tmp_path / "a.safetensors").write_text("nothing")
    refused("a.safetensors is a text, not the file itself", find_family, transformer=tmp_path / "a.safetensors")


# ------------------------------------------------------------------------------------------------ folders in part


@pytest.fixture(scope="module")
def official(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "official", A14B)


@pytest.mark.parametrize(("name", "has_index"), [("model", True), ("Wan2.2-T2V-A14B-Diffusers", False)])
def test_a_diffusers_folder_that_lacks_its_second_expert_is_no_model_of_one(official, tmp_path, name, has_index):
    folder = write_diffusers(tmp_path / name, read_model(official, A14B))
    assert open_model(folder).family is A14B
    low = (folder / "transformer_2").rename(tmp_path / "low")
    if not has_index:
        (folder / "model_index.json").unlink()
    for find_it in (open_model, find_family):
        refused("transformer_2 is missing", find_it, folder)
    assert list(open_model(folder, low_noise=low).transformers) == ["high_noise", "low_noise"]


@pytest.mark.parametrize("content", ["[", "[]", "7", '{"transformer_2": [null, null]}', '{"transformer_2": "x"}'])
def test_an_index_that_lists_no_second_transformer_asks_for_none(tmp_path, content):
    model = write_model(tmp_path / "official")
    folder = write_diffusers(tmp_path / "model", read_model(model, FAMILY))
    (folder / "model_index.json").write_text(content)
    assert open_model(folder).family is FAMILY


def test_a_given_expert_takes_the_place_of_one_that_the_folder_lacks(official, tmp_path):
    folder = Path(shutil.copytree(official, tmp_path / "part"))
    low = (folder / "low_noise_model").rename(tmp_path / "elsewhere")
    refused("low_noise_model is missing", open_model, folder)
    files = open_model(folder, low_noise=low)
    assert [each.path.parent for each in files.transformers.values()] == [folder / "high_noise_model", low]


def test_two_experts_without_their_configs_are_still_a_model_of_two(official, tmp_path):
    folder = Path(shutil.copytree(official, tmp_path / "part"))
    shutil.rmtree(folder / "low_noise_model")
    (folder / "high_noise_model" / "config.json").unlink()
    refused("low_noise_model is missing", open_model, folder)


def test_a_folder_named_transformer_does_not_make_an_official_one_that_of_diffusers(folder):
    (folder / "transformer").mkdir()
    assert open_model(folder).transformer.path == folder / TRANSFORMER


def test_a_named_family_lets_one_transformer_replace_two(official):
    alone = official / "high_noise_model" / TRANSFORMER
    files = open_model(official, FAMILY.name, transformer=alone)
    assert files.family is FAMILY and files.transformer.path == alone and files.vae.path == official / A14B.vae


def test_one_file_is_not_both_experts(official):
    high = official / "high_noise_model"
    again = official / "low_noise_model" / ".." / "high_noise_model"
    refused(
        "is given as high_noise and as low_noise: they are two files",
        open_model,
        official,
        high_noise=high,
        low_noise=again,
    )


# --------------------------------------------------------------------------------------------- parts from elsewhere


def test_a_part_may_be_in_the_folder_of_another_model(official, tmp_path):
    other = write_diffusers(tmp_path / "other", read_model(official, A14B))
    places = {"vae": "vae", "text_encoder": "text_encoder", "tokenizer": "tokenizer"}
    files = open_model(official, **dict.fromkeys(places, other))
    assert files.vae.path.parent == other / "vae" and files.tokenizer == other / "tokenizer"
    assert files.text_encoder.path.is_relative_to(other / "text_encoder")
    files = open_model(other, **dict.fromkeys(places, official))
    assert files.vae.path == official / A14B.vae and files.text_encoder.path == official / A14B.text_encoder


def test_a_part_of_an_official_folder_may_be_a_safetensors_file_and_a_broken_link_is_called_one(folder):
    pth = folder / FAMILY.vae
    vae = pth.with_suffix(".safetensors")
    save_file(torch.load(pth, weights_only=True), vae)
    pth.unlink()
    assert open_model(folder).vae.path == vae
    vae.unlink()
    pth.symlink_to(folder / "gone")
    refused(f"{pth} is missing: it is a link to {folder}/gone, which is gone", open_model, folder)


def test_all_missing_parts_are_named_at_once(official, tmp_path):
    with pytest.raises(MissingPartsError, match="no vae, no text_encoder, no tokenizer is given") as caught:
        open_model(high_noise=official / "high_noise_model")
    assert caught.value.parts == ["vae", "text_encoder", "tokenizer"]
    folder = Path(shutil.copytree(official, tmp_path / "part"))
    for name in (A14B.vae, A14B.text_encoder):
        (folder / name).unlink()
    message = f"{folder / A14B.vae} is missing, and no vae, no text_encoder is given instead"
    assert refused("is missing", open_model, folder) == message


def test_a_vision_encoder_that_lacks_a_tensor_is_refused_before_it_is_loaded(tmp_path):
    family = FAMILIES["wan2.1-i2v-14B-480P"]
    folder = write_model(tmp_path / "i2v", family)
    edit_pth(folder / family.clip, lambda state: state.pop("visual.transformer.0.norm1.weight"))
    assert family.clip in refused("visual.transformer.0.norm1.weight", open_model, folder)


def test_a_config_of_another_part_beside_a_single_file_is_not_its_own(official, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "umt5", "d_model": 32, "num_heads": 4}')
    state = load_file(official / "high_noise_model" / "diffusion_pytorch_model.safetensors")
    save_file(state, tmp_path / "high.safetensors")
    assert open_model(official, high_noise=tmp_path / "high.safetensors").family is A14B


@pytest.mark.parametrize("content", [{}, {"hidden_size": 768}, {"dim": 1536}])
def test_a_config_that_says_nothing_of_a_wan_is_no_model_to_download(tmp_path, content):
    (tmp_path / "config.json").write_text(json.dumps(content))
    refused("config.json is not that of a Wan: it has neither model_type nor in_dim", find_family, tmp_path)
