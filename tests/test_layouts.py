"""A model is the same in every layout that it is published in: the official one, diffusers' and ComfyUI's."""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.layouts import (
    KINDS,
    Model,
    State,
    Stored,
    cast,
    read_model,
    scaled,
    stored,
    to_clip_vision,
    to_diffusers,
    to_umt5,
    write_diffusers,
    write_parts,
    write_single,
    write_transformers,
)
from tests.manifests import load_manifest, write_empty
from tests.tiny import FAMILY, TINY_SHAPE, write_model
from wan.checkpoints import (
    CheckpointError,
    ModelFiles,
    build_transformer,
    cast_to,
    find_family,
    load_text_encoder,
    load_transformer,
    load_vae,
    load_vision_encoder,
    load_weights,
    open_model,
)
from wan.checkpoints.transformer import read_config, read_transformer
from wan.configs import FAMILIES, match_family
from wan.modules.clip import VisionEncoder, vision_shape
from wan.modules.model import WanModel, is_fp32

# Two heads, which only a config.json tells: without one there is a head for each 128 channels.
BASE = replace(TINY_SHAPE, dim=128, ffn_dim=192, num_heads=2)
# The rows that a small model is taken for, where that is another one: by a folder's name, and by its tensors alone.
BY_WIDTH = {"wan2.1-t2v-14B": "wan2.1-t2v-1.3B"}
BY_TENSORS = BY_WIDTH | {
    "wan2.1-i2v-14B-720P": "wan2.1-i2v-14B-480P",
    "wan2.1-fun-14B-InP": "wan2.1-i2v-14B-480P",
    "wan2.2-fun-A14B-InP": "wan2.2-i2v-A14B",
}
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@dataclass(frozen=True)
class Written:
    """A small model in the official layout, in diffusers', and its parts as single files."""

    row: str
    official: Model
    diffusers: Path
    parts: Mapping[str, Path]

    @property
    def first(self) -> str:
        """The name of the only transformer, or of that for high noise."""
        return self.official.family.experts[0].name


def write(folder: Path, row: str) -> Written:
    family = FAMILIES[row]
    model = read_model(write_model(folder / row, family, base=BASE), family)
    shards = 1 + list(FAMILIES).index(row) % 2
    diffusers = write_diffusers(folder / f"{row}-Diffusers", model, shards)
    return Written(row, model, diffusers, write_parts(folder / "comfy", model))


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Callable[[str], Written]:
    """A small model of a row, which is written once."""
    return cache(lambda row: write(tmp_path_factory.mktemp("models"), row))


@pytest.fixture(scope="module", params=FAMILIES)
def written(request, models) -> Written:
    return models(request.param)


@pytest.fixture(scope="module")
def empty(written) -> WanModel:
    """A transformer of the model for others to be loaded into: building one takes longer than reading it."""
    place = written.official.folder / written.official.family.experts[0].folder
    return build_transformer(read_transformer(place, read_config(place)))


def contents(files: ModelFiles, dtype: torch.dtype = FP32) -> dict[str, State]:
    """The tensors of all modules of a model after loading."""
    modules: dict[str, nn.Module] = {name: load_transformer(each, dtype) for name, each in files.transformers.items()}
    modules |= {"vae": load_vae(files, dtype=dtype), "text_encoder": load_text_encoder(files, dtype, "cpu").encoder}
    if files.clip:
        modules["clip"] = load_vision_encoder(files, dtype=dtype)
    return {name: module.state_dict() for name, module in modules.items()}


def expected(model: Model, stored_as: Mapping[str, torch.dtype] | None = None) -> dict[str, State]:
    """What loading in fp32 gives, of parts that are `stored_as` another dtype."""
    dtypes = stored_as or {}

    def rounded(state: State, part: str) -> State:
        return {name: tensor.to(dtypes.get(part, tensor.dtype)).float() for name, tensor in state.items()}

    found = {name: rounded(state, "transformer") for name, state in model.transformers.items()}
    found |= {"vae": rounded(model.vae, "vae"), "text_encoder": rounded(model.text_encoder, "text_encoder")}
    if model.clip:
        encoder = VisionEncoder(vision_shape({name: tuple(tensor.shape) for name, tensor in model.clip.items()}))
        encoder.load_official(rounded(model.clip, "clip"))
        found["clip"] = encoder.state_dict()
    return found


def computed(tensors: Mapping[str, Stored], dtype: torch.dtype) -> State:
    """The parameters of a transformer that computes in `dtype`, some of which stay fp32."""
    kept = {name: each.values(dtype if each.is_fp8 else FP32) for name, each in tensors.items()}
    return {name: values.to(FP32 if is_fp32(name) else dtype) for name, values in kept.items()}


def assert_equal(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def assert_all_equal(found: Mapping[str, State], wanted: Mapping[str, State]) -> None:
    assert found.keys() == wanted.keys()
    for part, state in wanted.items():
        assert_equal(found[part], state)


def facts(files: ModelFiles) -> tuple[str, int, int]:
    """The row, the heads and the text length of a model."""
    (shape,) = {transformer.shape for transformer in files.transformers.values()}
    return files.family.name, shape.num_heads, files.text_len


# ------------------------------------------------------------------------------------------------------------- folders


def test_a_diffusers_folder_gives_the_tensors_of_the_official_one(written):
    named, wanted = BY_WIDTH.get(written.row, written.row), expected(written.official)
    for folder, text_len in ((written.official.folder, 64), (written.diffusers, 512)):
        files = open_model(folder)
        assert facts(files) == (named, 2, text_len)
        assert_all_equal(contents(files), wanted)


def test_a_folder_is_of_the_row_that_is_named(written):
    for folder in (written.official.folder, written.diffusers):
        assert find_family(folder) == FAMILIES[BY_WIDTH.get(written.row, written.row)]
        assert find_family(folder, written.row) == FAMILIES[written.row]


# -------------------------------------------------------------------------------------------------------- single files


def test_single_files_give_the_tensors_of_the_official_folder(written, tmp_path):
    places, _ = write_transformers(tmp_path, written.official, KINDS["bf16"])
    files = open_model(**places, **written.parts)
    assert facts(files) == (BY_TENSORS.get(written.row, written.row), 1, 512)
    stored_as = {"transformer": BF16, "vae": BF16, "clip": FP16}
    assert_all_equal(contents(files), expected(written.official, stored_as))
    assert find_family(family=written.row, **{written.first: places[written.first]}) == FAMILIES[written.row]


@pytest.mark.parametrize("kind", ["bf16", "fp16", "fp8", "fp8-scaled-old", "fp8-scaled-new"])
def test_a_single_file_gives_what_it_stores_by_its_own_rule(written, empty, kind, tmp_path):
    places, transformers = write_transformers(tmp_path, written.official, KINDS[kind])
    for name, place in places.items():
        files = read_transformer(place)
        assert files.shape == replace(empty.shape, num_heads=1, text_len=512)
        for dtype in (FP32, BF16):
            loaded = load_weights(empty, files, cast_to(dtype), dtype=dtype)
            assert_equal(loaded.state_dict(), computed(transformers[name], dtype))


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model.", "model."])
def test_every_kind_of_file_is_read_below_every_prefix(models, tmp_path, prefix):
    model = models(FAMILY.name).official
    (state,) = model.transformers.values()
    empty = build_transformer(read_transformer(model.folder, read_config(model.folder)))
    other = {"first_stage_model.conv.weight": torch.ones(2, 2)} if prefix else {}
    for name, kind in KINDS.items():
        tensors = stored(state, kind.store)
        path = write_single(tmp_path / f"{name}.safetensors", tensors, prefix, kind.scales, more=other)
        for dtype in (FP32, BF16):
            loaded = load_weights(empty, read_transformer(path), cast_to(dtype), dtype=dtype)
            assert_equal(loaded.state_dict(), computed(tensors, dtype))


def test_single_files_beside_a_folder_have_its_heads_and_its_text_length(written, tmp_path):
    places, _ = write_transformers(tmp_path, written.official, KINDS["fp8-scaled-old"])
    folder, text_len = (written.diffusers, 512) if written.official.clip else (written.official.folder, 64)
    files = open_model(folder, written.row, **places)
    assert facts(files) == (written.row, 2, text_len)
    assert {each.path for each in files.transformers.values()} == set(places.values())


def test_a_whole_checkpoint_has_several_parts_in_one_file(models, tmp_path):
    model = models(FAMILY.name).official
    (transformer,) = model.transformers.values()
    spelled = {
        **{f"model.diffusion_model.{name}": tensor for name, tensor in transformer.items()},
        **{f"vae.{name}": tensor for name, tensor in model.vae.items()},
        **{f"text_encoders.umt5xxl.transformer.{to_umt5(name)}": each for name, each in model.text_encoder.items()},
    }
    save_file(spelled, tmp_path / "all.safetensors")
    places = dict.fromkeys(("transformer", "vae", "text_encoder"), tmp_path / "all.safetensors")
    assert_all_equal(contents(open_model(tokenizer=model.tokenizer, **places)), expected(model))


# --------------------------------------------------------------------------------------------------------- other parts


@pytest.mark.parametrize("row", ["wan2.1-t2v-1.3B", "wan2.2-ti2v-5B"])
@pytest.mark.parametrize(("dtype", "prefix"), [(BF16, ""), (FP16, "vae."), (FP32, "model.")])
def test_a_vae_is_read_in_the_dtype_of_its_file(models, row, dtype, prefix, tmp_path):
    model = models(row).official
    place = write_single(tmp_path / "vae.safetensors", stored(model.vae, cast(dtype)), prefix)
    loaded = load_vae(open_model(model.folder, vae=place)).state_dict()
    assert_equal(loaded, {name: tensor.to(dtype).float() for name, tensor in model.vae.items()})


@pytest.mark.parametrize("scales", ["old", "new", "header"])
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_a_text_encoder_is_read_in_fp8_with_its_scales(models, scales, dtype, tmp_path):
    model = models(FAMILY.name).official
    tensors = stored(model.text_encoder, scaled(r"blocks\.\d+\.(attn|ffn)", FP16))
    assert sum(each.is_fp8 for each in tensors.values()) == 2 * 7
    more = {"spiece_model": torch.arange(200, dtype=torch.uint8)}
    place = write_single(tmp_path / "umt5.safetensors", tensors, scales=scales, name_of=to_umt5, more=more)
    files = open_model(model.folder, text_encoder=place)
    loaded = load_text_encoder(files, dtype, "cpu").encoder.state_dict()
    assert_equal(loaded, {name: each.values(dtype) for name, each in tensors.items()})


@pytest.mark.parametrize("names", [["shared.weight"], ["encoder.embed_tokens.weight"], None])
def test_a_text_encoder_may_have_its_embedding_under_either_name_or_both(models, names, tmp_path):
    model = models(FAMILY.name).official
    state = {to_umt5(name): tensor for name, tensor in model.text_encoder.items()}
    table = state.pop("shared.weight")
    tables = {name: table.clone() for name in names or ["encoder.embed_tokens.weight", "shared.weight"]}
    save_file(state | tables, tmp_path / "umt5.safetensors")
    files = open_model(model.folder, text_encoder=tmp_path / "umt5.safetensors")
    assert_equal(load_text_encoder(files, BF16, "cpu").encoder.state_dict(), model.text_encoder)


@pytest.mark.parametrize("start", ["vision_model.", ""])
def test_a_vision_encoder_is_read_as_either_transformers_names_it(models, start, tmp_path):
    model = models("wan2.1-flf2v-14B-720P").official
    state = {name.replace("vision_model.", start): tensor.half() for name, tensor in to_clip_vision(model.clip).items()}
    save_file(state, tmp_path / "clip.safetensors")
    loaded = load_vision_encoder(open_model(model.folder, clip=tmp_path / "clip.safetensors")).state_dict()
    assert_equal(loaded, expected(model, {"clip": FP16})["clip"])


# -------------------------------------------------------------------------------------------- what tensors do not tell


@pytest.fixture
def swapped(models, tmp_path) -> dict[str, Path]:
    """Two experts in files whose names say the opposite."""
    states = models("wan2.2-t2v-A14B").official.transformers
    names = {"high_noise": "wan2.2_t2v_low_noise_14B_bf16", "low_noise": "wan2.2_t2v_high_noise_14B_bf16"}
    return {
        name: write_single(tmp_path / f"{names[name]}.safetensors", stored(state, cast(FP32)))
        for name, state in states.items()
    }


def test_an_expert_is_the_one_that_it_is_given_as_whatever_its_file_is_called(models, swapped):
    pair = models("wan2.2-t2v-A14B")
    for folder in (None, pair.official.folder, pair.diffusers):
        files = open_model(folder, **swapped, **pair.parts)
        assert list(files.transformers) == ["high_noise", "low_noise"]
        for name, state in pair.official.transformers.items():
            assert_equal(load_transformer(files.transformers[name], FP32).state_dict(), state)


def test_one_expert_replaces_that_of_the_folder_and_alone_makes_a_model_of_one(models, swapped):
    pair = models("wan2.2-t2v-A14B")
    high, low = swapped["high_noise"], swapped["low_noise"]
    files = open_model(pair.official.folder, low_noise=high)
    assert list(files.transformers) == ["high_noise", "low_noise"]
    for each in files.transformers.values():
        assert_equal(load_transformer(each, FP32).state_dict(), pair.official.transformers["high_noise"])
    alone = open_model(low_noise=low, **pair.parts)
    assert list(alone.transformers) == ["low_noise"]
    assert alone.family.name == "wan2.2-t2v-A14B"


def test_the_part_that_a_file_is_given_as_and_the_named_row_say_which_model_it_is(models, swapped):
    file = swapped["high_noise"]
    assert find_family(transformer=file).name == "wan2.1-t2v-1.3B"
    assert find_family(transformer=file, family="wan2.1-t2v-14B").name == "wan2.1-t2v-14B"
    assert find_family(low_noise=file).name == "wan2.2-t2v-A14B"
    files = open_model(transformer=file, **models("wan2.2-t2v-A14B").parts)
    assert (files.family.name, list(files.transformers)) == ("wan2.1-t2v-1.3B", ["transformer"])


def test_a_file_that_cannot_be_what_it_is_given_as_is_refused(models, swapped, tmp_path):
    state = models("wan2.2-i2v-A14B").official.transformers["high_noise"]
    file = write_single(tmp_path / "wan2.1_i2v_14B.safetensors", stored(state, cast(BF16)))
    with pytest.raises(CheckpointError, match="one of two experts .*give it as high_noise or low_noise"):
        find_family(transformer=file)
    with pytest.raises(CheckpointError, match="wan2.2-i2v-A14B has high_noise and low_noise, but .* as transformer"):
        find_family(transformer=file, family="wan2.2-i2v-A14B")
    with pytest.raises(CheckpointError, match="36 input .*but wan2.2-t2v-A14B has t2v with 16 input"):
        find_family(high_noise=file, family="wan2.2-t2v-A14B")
    with pytest.raises(CheckpointError, match="exclude each other"):
        find_family(transformer=file, low_noise=file)
    assert find_family(high_noise=file, family="wan2.2-fun-A14B-InP").name == "wan2.2-fun-A14B-InP"


@pytest.mark.skipif(sys.platform == "win32", reason="files of this size take their room on the disk there")
@pytest.mark.parametrize("row", [row for row in FAMILIES if "fun" not in row])
def test_tensors_of_the_released_widths_tell_the_family_in_every_spelling(row, tmp_path):
    family = FAMILIES[row]
    spellings = str, to_diffusers, lambda name: f"model.diffusion_model.{name}"
    for expert in family.experts:
        manifest = row.lower().replace("-", "_") + (f"_{expert.name}" if len(family.experts) > 1 else "")
        for spell in spellings:
            shapes = {spell(name): size for name, size in load_manifest(manifest).items()}
            files = read_transformer(write_empty(tmp_path / "empty.safetensors", shapes))
            assert files.shape == family.shape
            found = match_family(files.traits, [expert.name])
            assert found == FAMILIES[row.replace("i2v-14B-720P", "i2v-14B-480P")]


def test_a_file_that_the_system_does_not_map_is_read_without(models, tmp_path, monkeypatch):
    def refuse(path: Path, framework: str, backend: str = "mmap") -> safe_open:
        if backend == "mmap":
            raise RuntimeError("unable to mmap: Cannot allocate memory")
        return safe_open(path, framework=framework, backend=backend)

    monkeypatch.setattr("wan.checkpoints.tensors.safe_open", refuse)
    model = models(FAMILY.name).official
    files = open_model(model.folder).transformer
    assert_equal(load_transformer(files, FP32).state_dict(), model.transformers["transformer"])
