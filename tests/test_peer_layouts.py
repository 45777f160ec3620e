"""Folders in diffusers' layout as diffusers and transformers themselves read and write them."""

import inspect
import json
from dataclasses import dataclass
from pathlib import Path

import diffusers
import pytest
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from safetensors.torch import load_file
from transformers import CLIPVisionModelWithProjection, UMT5EncoderModel

from tests.layouts import State, model_index, read_model, write_diffusers
from tests.test_layouts import assert_all_equal, assert_equal, contents
from tests.tiny import write_model
from wan.checkpoints import open_model
from wan.configs import FAMILIES

CLASSES = {
    "transformer": WanTransformer3DModel,
    "transformer_2": WanTransformer3DModel,
    "vae": AutoencoderKLWan,
    "text_encoder": UMT5EncoderModel,
    "image_encoder": CLIPVisionModelWithProjection,
}


@dataclass(frozen=True)
class Folders:
    """A model in the official layout, in diffusers' by our own writer, and by that of the libraries."""

    official: Path
    ours: Path
    theirs: Path


@pytest.fixture(scope="module", params=["wan2.1-flf2v-14B-720P", "wan2.2-t2v-A14B", "wan2.2-ti2v-5B"])
def folders(request, tmp_path_factory) -> Folders:
    folder, family = tmp_path_factory.mktemp("peers"), FAMILIES[request.param]
    official = write_model(folder / "official", family)
    ours, theirs = write_diffusers(folder / "ours", read_model(official, family)), folder / "theirs"
    for name, class_ in CLASSES.items():
        if (ours / name).is_dir():
            class_.from_pretrained(ours / name).save_pretrained(theirs / name, max_shard_size="100KB")
    (ours / "tokenizer").rename(theirs / "tokenizer")
    return Folders(official, ours, theirs)


def tensors_of(folder: Path) -> State:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_the_libraries_read_what_is_written_here_and_write_the_same(folders):
    names = [name for name in CLASSES if (folders.ours / name).is_dir()]
    assert len(names) >= 3
    for name in names:
        assert_equal(tensors_of(folders.theirs / name), tensors_of(folders.ours / name))
        places = (folder / name / "config.json" for folder in (folders.ours, folders.theirs))
        ours, theirs = (json.loads(place.read_text()) for place in places)
        ours.pop("_diffusers_version", None)
        assert ours == {key: theirs[key] for key in ours}


def test_what_the_libraries_write_is_the_official_model(folders):
    assert len(list((folders.theirs / "transformer").glob("*-of-*.safetensors"))) > 1
    assert_all_equal(contents(open_model(folders.theirs)), contents(open_model(folders.official)))


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_an_index_has_the_components_of_its_pipeline(family):
    index = model_index(family)
    pipeline = getattr(diffusers, index.pop("_class_name"))
    del index["_diffusers_version"]
    assert index.keys() == inspect.signature(pipeline.__init__).parameters.keys() - {"self"}
    for library, class_ in (each for each in index.values() if isinstance(each, list) and each[0]):
        assert hasattr(__import__(library), class_)
