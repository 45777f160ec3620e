"""Folders of models as users have them: half downloaded, linked, copied from somewhere else."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.damage import refused
from tests.layouts import read_model, write_diffusers
from tests.tiny import FAMILY, write_model
from wan.checkpoints import INDEX, TRANSFORMER, MissingPartsError, find_family, open_model
from wan.configs import FAMILIES

EXPERTS = FAMILIES["wan2.2-t2v-A14B"]
SHARD = "diffusion_pytorch_model-0000{}-of-00003.safetensors"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"
BLOB = "it is a link to the blob abcdef, which is missing from the hub's cache; run the download again"


@pytest.fixture
def two_experts(tmp_path) -> Path:
    return write_model(tmp_path / "a14b", EXPERTS)


@pytest.fixture
def diffusers(whole, tmp_path) -> Path:
    return write_diffusers(tmp_path / "diffusers", read_model(whole, FAMILY))


def split(folder: Path) -> None:
    """The transformer as three shards with their index."""
    state = load_file(folder / TRANSFORMER)
    (folder / TRANSFORMER).unlink()
    place = {name: SHARD.format(1 + number % 3) for number, name in enumerate(state)}
    for shard in set(place.values()):
        save_file({name: state[name] for name in state if place[name] == shard}, folder / shard)
    (folder / INDEX).write_text(json.dumps({"weight_map": place}))


def unlink(path: Path, target: str = "../../blobs/abcdef") -> None:
    """A link to nothing in the place of a file."""
    path.unlink()
    path.symlink_to(target)


@pytest.mark.parametrize("part", ["config.json", TRANSFORMER, FAMILY.vae, FAMILY.text_encoder])
def test_a_link_to_a_missing_blob_is_named_in_the_place_of_every_part(folder, part):
    unlink(folder / part)
    assert refused(None, open_model, folder) == f"{folder / part} is missing: {BLOB}"


@pytest.mark.parametrize("part", ["vae", "text_encoder"])
def test_a_link_to_a_missing_blob_is_named_in_a_folder_that_is_given_for_one_part(folder, whole, part):
    path = folder / getattr(FAMILY, part)
    unlink(path)
    assert refused(None, open_model, whole, **{part: folder}) == f"{path} is missing: {BLOB}"


@pytest.mark.parametrize("part", [INDEX, SHARD.format(2)])
def test_a_link_to_a_missing_blob_is_named_among_shards(folder, part):
    split(folder)
    assert open_model(folder).shape.num_layers == 2
    unlink(folder / part)
    assert refused(None, open_model, folder) == f"{folder / part} is missing: {BLOB}"


@pytest.mark.parametrize("part", ["config.json", TRANSFORMER])
def test_a_link_to_a_missing_blob_is_named_in_one_of_two_experts(two_experts, part):
    unlink(two_experts / "low_noise_model" / part)
    assert refused(None, open_model, two_experts) == f"{two_experts / 'low_noise_model' / part} is missing: {BLOB}"


@pytest.mark.parametrize("name", ["high_noise_model", "low_noise_model"])
def test_an_expert_whose_folder_is_a_link_to_nothing_is_called_that(two_experts, name):
    shutil.rmtree(two_experts / name)
    (two_experts / name).symlink_to("/gone")
    refused(f"{name} is missing: it is a link to /gone, which is gone", open_model, two_experts)


def test_how_many_shards_are_missing_is_said(folder):
    split(folder)
    (folder / SHARD.format(2)).unlink()
    message = "is missing; {} names 3 shards, {} of which cannot be found: download the folder again"
    assert refused(None, open_model, folder) == f"{folder / SHARD.format(2)} {message.format(INDEX, 1)}"
    (folder / SHARD.format(1)).unlink()
    assert refused(None, open_model, folder) == f"{folder / SHARD.format(1)} {message.format(INDEX, 2)}"


def test_a_shard_of_a_name_that_no_file_can_have_is_refused(folder):
    split(folder)
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": "x" * 256}}))
    refused("cannot read .*: File name too long", open_model, folder)


@pytest.mark.parametrize("part", [SHARD.format(3), INDEX])
def test_a_pointer_among_shards_is_named(folder, part):
    split(folder)
    (folder / part).write_bytes(LFS)
    refused(f"{folder / part} is a pointer of Git LFS", open_model, folder)


def test_a_folder_of_gguf_files_alone_is_called_that(tmp_path):
    (tmp_path / "wan2.1-t2v-14b-Q4_K_M.gguf").write_bytes(b"GGUF\3" + bytes(99))
    for find_it in (find_family, open_model):
        refused("Q4_K_M.gguf is a GGUF file, which is not read here", find_it, tmp_path)


@pytest.mark.parametrize("below", ["", "models--Wan-AI--tiny"])
def test_of_the_cache_of_the_hub_the_snapshot_is_named(folder, tmp_path, below):
    cache = tmp_path / "hub" / below
    (cache / "snapshots").mkdir(parents=True)
    snapshot = cache / "snapshots" / "0123"
    folder.rename(snapshot)
    assert open_model(snapshot).family is FAMILY
    message = f"is a folder of the hub's cache, and the model is deeper in it: give {snapshot}"
    assert refused(None, open_model, tmp_path / "hub") == f"{tmp_path / 'hub'} {message}"
    (cache / "snapshots" / "0456").mkdir()
    refused(f"{message}, one of its 2 snapshots", open_model, tmp_path / "hub")


def test_all_that_a_diffusers_folder_lacks_is_named_at_once_whatever_else_is_wrong_with_it(diffusers):
    (diffusers / "transformer" / "config.json").write_text('{"num_layers": 2}')
    shutil.rmtree(diffusers / "vae")
    for file in (diffusers / "text_encoder").iterdir():
        file.unlink()
    shutil.rmtree(diffusers / "tokenizer")
    message = f"{diffusers} is a diffusers folder without files of its vae, text_encoder, tokenizer"
    with pytest.raises(MissingPartsError) as caught:
        open_model(diffusers)
    assert str(caught.value) == message and caught.value.parts == ["vae", "text_encoder", "tokenizer"]


def test_a_diffusers_folder_takes_parts_in_the_official_layout_and_given_ones(diffusers, whole):
    for part in ("vae", "text_encoder"):
        shutil.rmtree(diffusers / part)
    shutil.copy(whole / FAMILY.vae, diffusers)
    files = open_model(diffusers, text_encoder=whole / FAMILY.text_encoder)
    assert files.vae.path == diffusers / FAMILY.vae and files.text_encoder.path == whole / FAMILY.text_encoder


def test_a_diffusers_folder_without_its_transformer_is_known_by_its_index(diffusers):
    shutil.rmtree(diffusers / "transformer")
    (diffusers / "model_index.json").write_text("{}")
    refused(f"{diffusers}/transformer is missing", open_model, diffusers)


def test_the_files_of_all_weights_are_listed(whole, two_experts):
    assert open_model(whole).weights == sorted([whole / FAMILY.vae, whole / FAMILY.text_encoder, whole / TRANSFORMER])
    folders = {path.relative_to(two_experts).parts[0] for path in open_model(two_experts).weights}
    assert folders == {"high_noise_model", "low_noise_model", EXPERTS.vae, EXPERTS.text_encoder}
