"""A model is the same in every layout that it is published in: the official one, diffusers' and ComfyUI's."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.layouts import (
    KINDS,
    Kind,
    Model,
    State,
    Stored,
    cast,
    read_model,
    scaled,
    stored,
    to_clip_vision,
    to_umt5,
    write_diffusers,
    write_parts,
    write_single,
    write_singles,
)
from tests.tiny import TINY_SHAPE, write_model
from wan.checkpoints import (
    CheckpointError,
    ModelFiles,
    find_family,
    load_text_encoder,
    load_transformer,
    load_vae,
    load_vision_encoder,
    open_model,
)
from wan.configs import FAMILIES
from wan.modules.clip import VisionEncoder, vision_shape
from wan.modules.model import is_fp32

# Two heads, which only a config.json tells: without one there is a head for each 128 channels.
BASE = replace(TINY_SHAPE, dim=128, ffn_dim=192, num_heads=2)
# The rows that a small model is taken for by its tensors, where that is another one.
BY_TENSORS = {
    "wan2.1-t2v-14B": "wan2.1-t2v-1.3B",
    "wan2.1-i2v-14B-720P": "wan2.1-i2v-14B-480P",
    "wan2.1-fun-14B-InP": "wan2.1-i2v-14B-480P",
    "wan2.2-fun-A14B-InP": "wan2.2-i2v-A14B",
}
DTYPES = torch.float32, torch.bfloat16


@dataclass(frozen=True)
class Written:
    """A small model in the official layout, in diffusers' as one file and as shards, and its parts as single files."""

    row: str
    official: Model
    diffusers: Path
    sharded: Path
    parts: Mapping[str, Path]

    def single(self, folder: Path, kind: Kind) -> tuple[Mapping[str, Path], Mapping[str, Mapping[str, Stored]]]:
        """The places of a model in single files, and what is stored of each transformer."""
        single = write_singles(folder, self.official, kind, self.parts)
        return single.places, single.transformers


def write(folder: Path, row: str) -> Written:
    family = FAMILIES[row]
    model = read_model(write_model(folder / row, family, base=BASE), family)
    whole = write_diffusers(folder / f"{row}-Diffusers", model)
    sharded = write_diffusers(folder / "sharded" / row, model, shards=2)
    return Written(row, model, whole, sharded, write_parts(folder / "comfy", model))


@pytest.fixture(scope="module", params=FAMILIES)
def written(request, tmp_path_factory) -> Written:
    return write(tmp_path_factory.mktemp("models"), request.param)


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Written:
    """A model of two experts."""
    return write(tmp_path_factory.mktemp("pair"), "wan2.2-t2v-A14B")


def contents(files: ModelFiles, dtype: torch.dtype) -> dict[str, State]:
    """The tensors of all modules of a model after loading."""
    modules: dict[str, nn.Module] = {name: load_transformer(each, dtype) for name, each in files.transformers.items()}
    modules |= {"vae": load_vae(files, dtype=dtype), "text_encoder": load_text_encoder(files, dtype, "cpu").encoder}
    if files.clip:
        modules["clip"] = load_vision_encoder(files, dtype=dtype)
    return {name: module.state_dict() for name, module in modules.items()}


def expected(
    model: Model,
    dtype: torch.dtype,
    transformers: Mapping[str, Mapping[str, Stored]] | None = None,
    parts: Callable[[str], torch.dtype | None] = lambda name: None,
) -> dict[str, State]:
    """What loading has to give: of parts that are stored in another dtype, values rounded to that."""

    def rounded(name: str, state: State) -> State:
        return {key: tensor.to(parts(name) or tensor.dtype).to(dtype) for key, tensor in state.items()}

    exact = {name: stored(state, cast(torch.float32)) for name, state in model.transformers.items()}
    found = {name: computed(tensors, dtype) for name, tensors in (transformers or exact).items()}
    found |= {"vae": rounded("vae", model.vae), "text_encoder": rounded("text_encoder", model.text_encoder)}
    if model.clip:
        encoder = VisionEncoder(vision_shape({name: tuple(tensor.shape) for name, tensor in model.clip.items()}))
        encoder.load_official(rounded("clip", model.clip))
        found["clip"] = encoder.state_dict()
    return found


def computed(tensors: Mapping[str, Stored], dtype: torch.dtype) -> State:
    """The parameters of a transformer that computes in `dtype`, some of which stay fp32."""
    kept = {name: each.values(dtype if each.is_fp8 else torch.float32) for name, each in tensors.items()}
    return {name: values.to(torch.float32 if is_fp32(name) else dtype) for name, values in kept.items()}


def assert_equal(found: Mapping[str, State], wanted: Mapping[str, State]) -> None:
    assert found.keys() == wanted.keys()
    for part, state in wanted.items():
        assert found[part].keys() == state.keys()
        for name, tensor in state.items():
            assert found[part][name].dtype == tensor.dtype, (part, name)
            assert torch.equal(found[part][name], tensor), (part, name)


def facts(files: ModelFiles) -> tuple[str, int, int]:
    """The row, the heads and the text length of a model."""
    (shape,) = {transformer.shape for transformer in files.transformers.values()}
    return files.family.name, shape.num_heads, files.text_len


# ------------------------------------------------------------------------------------------------------------- folders


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_diffusers_folder_gives_the_tensors_of_the_official_one(written, dtype):
    wanted = expected(written.official, dtype)
    for folder in (written.official.folder, written.diffusers, written.sharded):
        assert_equal(contents(open_model(folder), dtype), wanted)


def test_a_folder_tells_the_family_and_the_heads_and_is_corrected_by_a_named_row(written):
    named = "wan2.1-t2v-1.3B" if written.row == "wan2.1-t2v-14B" else written.row
    assert facts(open_model(written.official.folder)) == (named, 2, 64)
    for folder in (written.diffusers, written.sharded):
        assert facts(open_model(folder)) == (named, 2, 512)
        assert facts(open_model(folder, family=written.row)) == (written.row, 2, 512)
        assert find_family(folder) == FAMILIES[named]
        assert find_family(folder, family=written.row) == FAMILIES[written.row]


# -------------------------------------------------------------------------------------------------------- single files

PARTS_IN = {"vae": torch.bfloat16, "text_encoder": torch.bfloat16, "clip": torch.float16}


@pytest.mark.parametrize("kind", KINDS)
def test_single_files_give_what_they_store_by_their_own_rule(written, kind, tmp_path):
    places, transformers = written.single(tmp_path, KINDS[kind])
    files = open_model(**places)
    assert facts(files) == (BY_TENSORS.get(written.row, written.row), 1, 512)
    for dtype in DTYPES:
        assert_equal(contents(files, dtype), expected(written.official, dtype, transformers, PARTS_IN.get))


def test_a_named_row_decides_between_those_with_the_same_tensors(written, tmp_path):
    places, _ = written.single(tmp_path, KINDS["bf16"])
    assert facts(open_model(family=written.row, **places)) == (written.row, 1, 512)
    (first, *_) = written.official.transformers
    assert find_family(**{first: places[first]}, family=written.row) == FAMILIES[written.row]


def test_single_files_beside_a_folder_have_its_heads_and_its_text_length(written, tmp_path):
    places, transformers = written.single(tmp_path, KINDS["fp8-scaled-old"])
    given = {name: places[name] for name in transformers}
    for folder, text_len in ((written.official.folder, 64), (written.diffusers, 512)):
        files = open_model(folder, family=written.row, **given)
        assert facts(files) == (written.row, 2, text_len)
        assert_equal(contents(files, torch.bfloat16), expected(written.official, torch.bfloat16, transformers))
