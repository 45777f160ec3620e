"""A model is found by name or path, its family by what the folder holds, and its parts may come from elsewhere."""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.damage import edit_config, edit_tensors, refused
from tests.layouts import read_model, to_umt5, write_diffusers
from tests.tiny import (
    FAMILY,
    TINY_SHAPE,
    tiny_clip,
    tiny_shape,
    tiny_text_encoder,
    tiny_transformer,
    tiny_vae,
    write_clip,
    write_model,
    write_text_encoder,
    write_transformer,
    write_vae,
)
from wan.checkpoints import (
    INDEX,
    TRANSFORMER,
    find,
    find_family,
    find_model,
    open_model,
)
from wan.checkpoints.errors import ModelNotFoundError, shown
from wan.configs import FAMILIES

TOKENIZER_FILE = f"{FAMILY.tokenizer}/tokenizer.json"
I2V, I2V_720P = FAMILIES["wan2.1-i2v-14B-480P"], FAMILIES["wan2.1-i2v-14B-720P"]
EXPERTS = FAMILIES["wan2.2-i2v-A14B"]
A14B = "wan2.2-t2v-A14B"
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
    refused("a kind that is not supported: i2v with 16 input", find_family, "Wan2.1-T2V-14B")
    with pytest.raises(ModelNotFoundError) as caught:
        find_family("Wan-AI/Wan9-T2V")
    assert caught.value.name == "Wan-AI/Wan9-T2V"


def test_a_folder_is_opened_with_all_its_parts(whole):
    files = open_model(whole)
    assert files.source == str(whole) and files.family is FAMILY
    assert files.family.task == "t2v" and files.family.shift == 5.0
    assert list(files.transformers) == ["transformer"] and files.transformer.path == whole / TRANSFORMER
    assert files.transformer.shape == TINY_SHAPE and files.text_len == TINY_SHAPE.text_len
    assert (files.vae.path, files.text_encoder.path) == (whole / FAMILY.vae, whole / FAMILY.text_encoder)
    assert files.tokenizer == whole / FAMILY.tokenizer and files.clip is None


def test_a_folder_is_read_once(whole, monkeypatch):
    read = []
    for name in ("read_config", "read_transformer", "read_weights"):
        original = getattr(find, name)
        monkeypatch.setattr(find, name, lambda *args, original=original: read.append(original) or original(*args))
    files = open_model(whole)
    assert files.transformer.shape and files.text_len and files.vae.shapes
    assert len(read) == 4  # the config, and the headers of the transformer, the VAE and the text encoder


@pytest.mark.parametrize("missing", FILES)
def test_a_missing_file_is_named(folder, missing):
    path = folder / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    message = refused(None, open_model, folder)
    assert Path(missing).name in message and str(folder) in message


@pytest.mark.parametrize("task", ["i2v", [], {}, 7, "a\nb\nc\nd", "long" * 100, "[" * 100])
def test_a_model_of_an_unsupported_kind_is_refused_with_what_is_supported(folder, task):
    edit_config(folder, model_type=task)
    for find_it in (find_family, open_model):
        assert len(refused("supported: t2v with 16 input", find_it, folder)) < 800


@pytest.mark.parametrize("name", ["model_type", "in_dim", "out_dim", "dim"])
def test_what_a_config_does_not_say_the_tensors_tell(tmp_path, name):
    for family in (FAMILY, I2V):
        folder = write_model(tmp_path / family.name, family)
        edit_config(folder, **{name: None})
        assert open_model(folder).family is find_family(folder) is family


def test_what_is_supported_is_listed_once(folder):
    edit_config(folder, in_dim=36)
    wide = "with 36 input and 16 output channels"
    kinds = ["t2v with 16 input and 16 output channels", f"i2v {wide} and image tokens"]
    kinds += [
        f"flf2v {wide} and image tokens and image positions",
        f"i2v {wide}",
        "ti2v with 48 input and 48 output channels",
    ]
    assert refused(None, find_family, folder).endswith(f"\nsupported: {', '.join(kinds)}")
    refused("says in_dim 36, but the weights have 16", open_model, folder)


SHOWN = [("t2v", "t2v"), (16, "16"), (None, "None"), ([1], "[1]"), ("a\nb", r"'a\nb'"), ("x" * 101, "x" * 100 + "...")]


@pytest.mark.parametrize(("value", "text"), SHOWN)
def test_what_a_file_says_is_shown_short_and_on_one_line(value, text):
    assert shown(value) == text


# ---------------------------------------------------------------------------------------------------- every family


@pytest.mark.parametrize("name", FAMILIES)
def test_a_small_model_of_every_row_is_found_with_all_its_parts(tmp_path, name):
    family = FAMILIES[name]
    folder = write_model(tmp_path / name, family)
    files = open_model(folder)
    assert files.family is find_family(folder)
    # Small T2V models are of the first width.
    assert replace(files.family, shape=family.shape, name=name) == family
    assert [place.path for place in files.transformers.values()] == [
        folder / expert.folder / TRANSFORMER for expert in family.experts
    ]
    assert {place.shape for place in files.transformers.values()} == {tiny_shape(family)}
    assert files.vae.path == folder / family.vae
    assert (files.clip and files.clip.path) == (folder / family.clip if family.clip else None)


def test_the_name_of_the_folder_tells_480p_from_720p(tmp_path, monkeypatch):
    folder = write_model(tmp_path / "Wan2.1-I2V-14B-720P", I2V)
    assert open_model(folder).family is find_family(folder) is I2V_720P
    monkeypatch.chdir(folder)
    assert open_model(".").family is find_family(".") is I2V_720P
    files = {name: folder / file for name, file in names_of(I2V).items()}
    assert open_model(transformer=folder / TRANSFORMER, **files).family is I2V  # of a file no name decides
    folder.rename(tmp_path / "Wan2.1-T2V-14B")
    assert open_model(tmp_path / "Wan2.1-T2V-14B").family is I2V


def test_the_vision_encoder_is_needed_where_the_model_reads_through_one_and_only_there(tmp_path, whole):
    folder = write_model(tmp_path / "i2v", I2V)
    elsewhere = (folder / I2V.clip).rename(tmp_path / "clip.pth")
    refused(f"{folder / I2V.clip} is missing", open_model, folder)
    assert open_model(folder, clip=elsewhere).clip.path == elsewhere
    files = {name: folder / file for name, file in names_of(I2V).items() if name != "clip"}
    refused("no clip is given", open_model, transformer=folder / TRANSFORMER, **files)
    assert open_model(transformer=folder / TRANSFORMER, clip=elsewhere, **files).clip.path == elsewhere
    refused("wan2.1-t2v-1.3B reads no image tokens, leave clip out", open_model, whole, clip=elsewhere)


def names_of(family) -> dict[str, str]:
    names = {"vae": family.vae, "text_encoder": family.text_encoder, "tokenizer": family.tokenizer}
    return names | ({"clip": family.clip} if family.clip else {})


def test_an_i2v_without_image_tokens_is_not_that_of_wan_2_1_and_one_with_them_is_no_expert(tmp_path, two_experts):
    folder = write_model(tmp_path / "i2v", I2V)
    write_transformer(folder, tiny_transformer(tiny_shape(EXPERTS)), family=EXPERTS)
    kind = "i2v with 36 input and 16 output channels"
    refused(r"one of two experts \(wan2.2-i2v-A14B, .+\): give it as high_noise or low_noise", open_model, folder)
    refused(f"has {kind}, but {I2V.name} has {kind} and image tokens", open_model, folder, I2V.name)
    write_transformer(two_experts / "low_noise_model", tiny_transformer(tiny_shape(I2V)), family=I2V)
    assert "low_noise_model" in refused(
        f"has {kind} and image tokens, but {EXPERTS.name} has {kind}$", open_model, two_experts
    )


# ----------------------------------------------------------------------------------------------------- single files


def test_each_part_may_be_another_file(whole, tmp_path):
    write_vae(tmp_path, tiny_vae(seed=1))
    write_transformer(tmp_path / "sharded", tiny_transformer(replace(TINY_SHAPE, num_layers=3)), shards=2)
    files = open_model(str(whole), vae=tmp_path / FAMILY.vae, transformer=str(tmp_path / "sharded"), clip=None)
    assert files.vae.path == tmp_path / FAMILY.vae and files.text_encoder.path == whole / FAMILY.text_encoder
    assert files.transformer.path == tmp_path / "sharded" / INDEX and files.transformer.shape.num_layers == 3


def test_a_transformer_without_a_config_is_read_by_that_of_the_folder(whole, tmp_path):
    (tmp_path / "alone").mkdir()
    file = Path(shutil.copy(whole / TRANSFORMER, tmp_path / "alone" / "tuned.safetensors"))
    assert open_model(whole, transformer=file).transformer.path == file
    refused(r"tuned.safetensors has the width 48, .+; it needs a config.json beside it", open_model, transformer=file)


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


def test_a_part_that_the_model_does_not_have_is_refused(whole, two_experts):
    some = whole / TRANSFORMER
    message = f"{some} cannot be used: "
    refused(f"{message}wan2.1-t2v-1.3B reads no image tokens", open_model, whole, clip=some)
    refused(f"{message}{two_experts} has two experts", open_model, two_experts, transformer=some)


@pytest.mark.parametrize("name", ["high_noise", "low_noise"])
def test_the_only_transformer_of_a_model_is_no_expert(tmp_path, name):
    folder = write_model(tmp_path / "i2v", I2V)
    message = "is no expert, but the only transformer of wan2.1-i2v-14B-480P, .+: give it as transformer"
    refused(message, open_model, folder, **{name: folder / TRANSFORMER})
    refused(f"{I2V.name} has transformer, but .+ is given as {name}", open_model, folder, I2V.name, **{name: folder})
    refused("transformer and high_noise exclude each other", open_model, transformer=folder, high_noise=folder)


def test_a_vision_encoder_alone_is_no_model():
    refused("no model is given", open_model, clip=__file__)


def test_an_unknown_part_is_a_mistake_of_the_program(whole):
    with pytest.raises(TypeError, match="unknown parts of a model: vea"):
        open_model(whole, vea=None)


def test_a_transformer_of_another_kind_is_refused(whole, tmp_path):
    write_transformer(tmp_path, tiny_transformer(replace(TINY_SHAPE, in_dim=36)))
    edit_config(tmp_path, model_type="i2v")
    assert str(tmp_path) in refused("is one of two experts", open_model, whole, transformer=tmp_path)
    message = "has i2v with 36 input and 16 output channels, but wan2.1-t2v-1.3B has t2v with 16 input"
    assert str(tmp_path) in refused(message, open_model, whole, FAMILY.name, transformer=tmp_path)


def test_output_channels_that_are_no_latents_of_the_family_are_refused(folder):
    write_transformer(folder, tiny_transformer(replace(TINY_SHAPE, out_dim=4)))
    refused("with 16 input and 4 output channels", open_model, folder)


# ---------------------------------------------------------------------------------------------------- several experts


@pytest.fixture(scope="module")
def kept_experts(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "two", EXPERTS)


@pytest.fixture
def two_experts(kept_experts, tmp_path) -> Path:
    """A model of two transformers, each in its own folder."""
    return Path(shutil.copytree(kept_experts, tmp_path / "two"))


def test_each_expert_may_be_another_file(two_experts, whole, tmp_path):
    files = open_model(two_experts)
    assert list(files.transformers) == ["high_noise", "low_noise"]
    other = tmp_path / "other"
    write_transformer(other, tiny_transformer(tiny_shape(EXPERTS)), family=EXPERTS)
    changed = open_model(two_experts, low_noise=other / TRANSFORMER)
    assert changed.transformers["low_noise"].path == other / TRANSFORMER
    assert changed.transformers["high_noise"] == files.transformers["high_noise"]
    refused("has two experts, high_noise and low_noise", open_model, two_experts, transformer=whole / TRANSFORMER)
    mixed = refused(None, open_model, two_experts, low_noise=whole / TRANSFORMER)
    assert f"{whole / TRANSFORMER} has t2v with 16 input and 16 output channels, but wan2.2-i2v-A14B has i2v" in mixed


def test_two_experts_may_be_given_as_single_files(two_experts, tmp_path):
    files = {name: two_experts / file for name, file in names_of(EXPERTS).items()}
    high, low = (two_experts / f"{name}_noise_model" / TRANSFORMER for name in ("high", "low"))
    opened = open_model(high_noise=high, low_noise=low, **files)
    assert replace(opened, source=str(two_experts)) == open_model(two_experts)
    for name, path in (("high_noise", high), ("low_noise", low)):
        alone = open_model(**{name: path}, **files)
        assert alone.transformers == {name: opened.transformers[name]} and alone.family is opened.family is EXPERTS
    beside = {name: tmp_path / f"{name}.safetensors" for name in ("high_noise", "low_noise")}
    shutil.copy(two_experts / "high_noise_model" / "config.json", tmp_path)
    for source, target in zip((high, low), beside.values(), strict=True):
        shutil.copy(source, target)
    assert {name: t.path for name, t in open_model(**beside, **files).transformers.items()} == beside
    refused("nowhere is missing", open_model, high_noise=tmp_path / "nowhere", low_noise=low, **files)


def test_an_expert_that_is_missing_is_named(two_experts):
    shutil.rmtree(two_experts / "low_noise_model")
    for find_it in (find_family, open_model):
        refused("low_noise_model is missing", find_it, two_experts)


@pytest.mark.parametrize(("changes", "name"), [({"ffn_dim": 64}, "ffn_dim"), ({"num_layers": 3}, "num_layers")])
def test_experts_of_different_widths_are_refused(two_experts, changes, name):
    shape = replace(tiny_shape(EXPERTS), **changes)
    write_transformer(two_experts / "low_noise_model", tiny_transformer(shape), family=EXPERTS)
    message = refused("they are not experts of one model", open_model, two_experts)
    assert f"low_noise_model/{TRANSFORMER} has {name} {changes[name]}, but" in message


def test_the_tensors_of_each_expert_are_checked(two_experts):
    edit_tensors(two_experts / "low_noise_model", lambda state: state.pop("patch_embedding.weight"))
    assert "low_noise_model" in refused("lacks the tensor patch_embedding", open_model, two_experts)


def test_experts_of_2_1_and_2_2_differ_by_where_their_transformers_are(two_experts, tmp_path):
    assert find_family(two_experts) is EXPERTS
    single = write_model(tmp_path / "single", I2V)
    assert find_family(single) is I2V


# ----------------------------------------------------------------------------------------------- what fits each other


def test_a_vae_whose_latents_the_model_cannot_read_is_refused_and_the_right_one_named(whole, tmp_path):
    coarse = FAMILIES["wan2.2-ti2v-5B"]
    folder = write_model(tmp_path / "5b", coarse)
    text = refused("the Wan 2.1 VAE, which has 16 latent", open_model, folder, vae=whole / FAMILY.vae)
    assert str(whole / FAMILY.vae) in text and "the model has 48: give it Wan2.2_VAE.pth" in text
    text = refused("the Wan 2.2 VAE, which has 48 latent", open_model, whole, vae=folder / coarse.vae)
    assert str(folder / coarse.vae) in text and "the model has 16: give it Wan2.1_VAE.pth" in text


def test_encoders_of_other_widths_than_the_transformer_reads_are_refused(tmp_path):
    folder, other = write_model(tmp_path / "i2v", I2V), tmp_path / "other"
    write_text_encoder(other, tiny_text_encoder(16))
    wrong = other / FAMILY.text_encoder
    reader = re.escape(str(folder / TRANSFORMER))
    refused(f"{wrong} has the width 16, but {reader} reads 32", open_model, folder, text_encoder=wrong)
    clip = write_clip(other, 160)
    refused(f"{clip} has the width 160, but {reader} reads 80", open_model, folder, clip=clip)
    # Both in one file, of which only the second fits.
    both = {f"text_encoders.umt5xxl.transformer.{to_umt5(n)}": t for n, t in tiny_text_encoder(16).state_dict().items()}
    both |= {f"model.{name}": tensor for name, tensor in tiny_clip().items()}
    torch.save(both, other / "both.pth")
    refused("has the width 16", open_model, folder, text_encoder=other / "both.pth", clip=other / "both.pth")


def test_a_named_row_must_be_one_and_fit(whole, folder):
    for find_it in (find_family, open_model):
        refused(f"there is no family wan9\nthere are: {', '.join(FAMILIES)}$", find_it, whole, "wan9")
        refused("but wan2.1-i2v-14B-480P has i2v with 36 input", find_it, whole, I2V.name)
        refused("wan2.2-t2v-A14B has high_noise and low_noise, but .+ is given as transformer", find_it, whole, A14B)
        assert getattr(find_it(whole, FAMILY.name), "family", FAMILY) is FAMILY
    edit_config(folder, dim=5120)
    refused("has the width 5120, but wan2.1-t2v-1.3B has 1536", find_family, folder, FAMILY.name)
    assert find_family(family=A14B) is FAMILIES[A14B]
    assert find_family("Wan-AI/Unheard", A14B) is FAMILIES[A14B]


def test_a_file_is_no_folder_of_a_model(whole):
    refused("is a file, not a model's folder: give it as what it holds: --transformer", open_model, whole / TRANSFORMER)
    refused("config.json is a file of a model: give the folder that it is in", open_model, whole / "config.json")
    with pytest.raises(ModelNotFoundError, match=f"^no model at {whole / 'nowhere'}$"):
        open_model(whole / "nowhere")


def test_given_experts_replace_the_only_transformer_of_a_folder_that_has_the_other_parts(whole, two_experts):
    given = {f"{name}_noise": two_experts / f"{name}_noise_model" for name in ("high", "low")}
    files = open_model(whole, **given)
    assert files.family is find_family(whole, **given) is EXPERTS
    assert files.transformers == open_model(two_experts).transformers
    assert files.vae.path == whole / FAMILY.vae and files.source == str(whole)


@pytest.mark.parametrize("missing", ["vae", "text_encoder", "tokenizer", "transformer", "image_encoder"])
def test_a_missing_part_of_a_diffusers_folder_is_named(tmp_path, missing):
    model = read_model(write_model(tmp_path / "i2v", I2V), I2V)
    folder = write_diffusers(tmp_path / "diffusers", model)
    files = open_model(folder)
    assert files.family is find_family(folder) is I2V
    assert files.tokenizer == folder / "tokenizer" and files.clip.files == [folder / "image_encoder/model.safetensors"]
    shutil.rmtree(folder / missing)
    assert str(folder) in refused(missing, open_model, folder)


def test_the_second_transformer_of_a_diffusers_folder_is_that_of_low_noise(two_experts, tmp_path):
    folder = write_diffusers(tmp_path / "diffusers", read_model(two_experts, EXPERTS))
    files = open_model(folder)
    assert files.family is find_family(folder) is EXPERTS
    places = {name: each.path.parent for name, each in files.transformers.items()}
    assert places == {"high_noise": folder / "transformer", "low_noise": folder / "transformer_2"}
