"""The weights of a part are found in files and folders of every layout, and read under their official names."""

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.damage import refused
from tests.layouts import (
    Kind,
    scaled,
    stored,
    to_clip_vision,
    to_diffusers,
    to_umt5,
    vae21_to_diffusers,
    vae22_to_diffusers,
    write_single,
)
from tests.tiny import tiny_clip, tiny_text_encoder, tiny_transformer, tiny_vae, tiny_vae22, write_weights
from wan.checkpoints.stored import values_of
from wan.checkpoints.tensors import open_tensors
from wan.checkpoints.weights import DESCRIPTIONS, Weights, read_weights

State = dict[str, Tensor]
PART_NAMES = ("transformer", "vae", "text_encoder", "clip")


@cache
def official(part: str, is_22: bool = False) -> State:
    modules = {"transformer": tiny_transformer, "vae": tiny_vae22 if is_22 else tiny_vae}
    return tiny_clip() if part == "clip" else modules.get(part, tiny_text_encoder)().state_dict()


def renamed(state: State, name_of) -> State:
    return {name_of(name): tensor for name, tensor in state.items()}


def visual(state: State) -> State:
    """Without the projection, which has no place in the official layout."""
    return {name: tensor for name, tensor in state.items() if name != "visual.head"}


OPEN_CLIP = (
    ("visual.transformer.", "visual.transformer.resblocks."),
    ("cls_embedding", "class_embedding"),
    ("pos_embedding", "positional_embedding"),
    ("patch_embedding", "conv1"),
    ("visual.pre_norm", "visual.ln_pre"),
    ("visual.post_norm", "visual.ln_post"),
    ("visual.head", "visual.proj"),
    (".norm1", ".ln_1"),
    (".norm2", ".ln_2"),
    ("attn.to_qkv.", "attn.in_proj_"),
    ("attn.proj", "attn.out_proj"),
    ("mlp.0", "mlp.c_fc"),
    ("mlp.2", "mlp.c_proj"),
)


def open_clip(state: State) -> State:
    found = State()
    for name, tensor in state.items():
        for ours, theirs in OPEN_CLIP:
            name = name.replace(ours, theirs)
        found[name] = tensor.flatten() if "class_emb" in name else tensor[0] if "positional" in name else tensor
    return found


# Part, its official tensors, and how they are stored
LAYOUTS: dict[str, tuple[str, State, State]] = {
    "transformer": ("transformer", official("transformer"), official("transformer")),
    "transformer of diffusers": (
        "transformer",
        official("transformer"),
        renamed(official("transformer"), to_diffusers),
    ),
    "vae": ("vae", official("vae"), official("vae")),
    "vae of diffusers": ("vae", official("vae"), renamed(official("vae"), vae21_to_diffusers)),
    "vae 2.2": ("vae", official("vae", True), official("vae", True)),
    "vae 2.2 of diffusers": ("vae", official("vae", True), renamed(official("vae", True), vae22_to_diffusers)),
    "text encoder": ("text_encoder", official("text_encoder"), official("text_encoder")),
    "text encoder of transformers": (
        "text_encoder",
        official("text_encoder"),
        renamed(official("text_encoder"), to_umt5),
    ),
    "clip": ("clip", official("clip"), official("clip")),
    "clip of transformers": ("clip", visual(official("clip")), to_clip_vision(official("clip"))),
    "clip of transformers 5": (
        "clip",
        visual(official("clip")),
        {name.removeprefix("vision_model."): each for name, each in to_clip_vision(official("clip")).items()},
    ),
    "clip of open_clip": ("clip", official("clip"), open_clip(official("clip"))),
}
BESIDE = {  # what is in the same file and is not read
    "text encoder of transformers": {
        "spiece_model": torch.zeros(9, dtype=torch.uint8),
        "lm_head.weight": torch.ones(2),
    },
    "clip": {"textual.x.weight": torch.ones(2), "log_scale": torch.ones(())},
    "clip of transformers": {
        "vision_model.embeddings.position_ids": torch.arange(9)[None],
        "logit_scale": torch.ones(()),
    },
    "clip of open_clip": {"transformer.resblocks.0.ln_1.weight": torch.ones(2), "positional_embedding": torch.ones(2)},
}


# Where parts are in files of ComfyUI and of trainers, and nowhere else.
BELOW = ["", "model.diffusion_model.", "model.model.", "net.", "model.", "diffusion_model.", "vae."]
BELOW += ["text_encoders.umt5xxl.transformer."]


def write(path: Path, state: Mapping[str, Tensor], prefix: str = "") -> Path:
    save_file({prefix + name: tensor.contiguous() for name, tensor in state.items()}, path)
    return path


def assert_reads(weights: Weights, expected: State) -> None:
    assert weights.tensors.keys() == expected.keys()
    assert weights.shapes == {name: tuple(tensor.shape) for name, tensor in expected.items()}
    with open_tensors(weights.tensors, torch.float32) as read:
        for name, tensor in expected.items():
            assert torch.equal(values_of(read(name), torch.float32), tensor), name


# --------------------------------------------------------------------------------------------------------- one file


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["any name.safetensors", "weights"])
def test_a_file_of_any_name_is_read_in_every_layout_with_what_is_beside_it(tmp_path, layout, name):
    part, expected, state = LAYOUTS[layout]
    path = write(tmp_path / name, state | BESIDE.get(layout, {}))
    weights = read_weights(path, part)
    assert (weights.path, weights.files) == (path, [path])
    assert_reads(weights, expected)
    torch.save(state, tmp_path / "same.pth")
    assert_reads(read_weights(tmp_path / "same.pth", part), expected)


@pytest.mark.parametrize("layout", ["transformer", "transformer of diffusers", "vae", "text encoder of transformers"])
@pytest.mark.parametrize("prefix", BELOW)
def test_a_prefix_is_taken_off_and_what_has_another_is_of_other_parts(tmp_path, layout, prefix):
    part, expected, state = LAYOUTS[layout]
    below = {prefix + name: tensor for name, tensor in state.items()}
    others = {"first_stage_model.x.weight": torch.ones(2), "cond_stage_model.y": torch.arange(3)} if prefix else {}
    assert_reads(read_weights(write(tmp_path / "a", below | others), part), expected)


def test_a_whole_checkpoint_in_one_file_has_all_its_parts(tmp_path):
    prefixes = {"transformer": "model.diffusion_model.", "vae": "vae."}
    prefixes["text_encoder"] = "text_encoders.umt5xxl.transformer."
    layouts = {"transformer": "transformer", "vae": "vae", "text_encoder": "text encoder of transformers"}
    state = {prefixes[p] + name: t for p, layout in layouts.items() for name, t in LAYOUTS[layout][2].items()}
    path = write(tmp_path / "all.safetensors", state | {"text_encoders.umt5xxl.logit_scale": torch.ones(())})
    for part in layouts:
        assert_reads(read_weights(path, part), official(part))
    refused(f"{path} is a Wan transformer, not a CLIP vision encoder", read_weights, path, "clip")


# ----------------------------------------------------------------------------------------------------------- a folder

MODEL, DIFFUSION = "model", "diffusion_pytorch_model"


@pytest.mark.parametrize(
    "layout", ["transformer", "vae of diffusers", "text encoder of transformers", "clip of transformers"]
)
@pytest.mark.parametrize("stem", [MODEL, DIFFUSION, f"{MODEL}.fp16", f"{DIFFUSION}.bf16", "anything"])
@pytest.mark.parametrize("shards", [1, 2, 3])
@pytest.mark.parametrize("index", [True, False])
def test_a_folder_has_one_file_or_shards_with_or_without_their_index(tmp_path, layout, stem, shards, index):
    part, expected, state = LAYOUTS[layout]
    write_weights(tmp_path, {name: tensor.contiguous() for name, tensor in state.items()}, stem, shards)
    own = tmp_path / f"{stem}.safetensors.index.json"
    if own.exists() and not index:
        own.unlink()
    weights = read_weights(tmp_path, part)
    known = index and stem in (MODEL, DIFFUSION)
    assert weights.path == (tmp_path / f"{stem}.safetensors" if shards == 1 else own if known else tmp_path)
    assert len(weights.files) == shards
    assert_reads(weights, expected)


def test_the_whole_file_comes_before_shards_and_before_versions_in_other_dtypes(tmp_path):
    state = official("vae")
    for stem in (f"{DIFFUSION}.fp16", f"{DIFFUSION}.bf16", f"{DIFFUSION}_other"):
        write(tmp_path / f"{stem}.safetensors", {name: tensor * 0 for name, tensor in state.items()})
    write_weights(tmp_path, state, DIFFUSION, 2)
    index = tmp_path / f"{DIFFUSION}.safetensors.index.json"
    assert read_weights(tmp_path, "vae").path == index
    write(tmp_path / f"{DIFFUSION}.safetensors", state)
    assert read_weights(tmp_path, "vae").path == tmp_path / f"{DIFFUSION}.safetensors"


def test_of_several_files_the_one_of_the_part_is_read(tmp_path):
    for part in PART_NAMES:
        write(tmp_path / f"{part}.safetensors", official(part))
    (tmp_path / "notes.txt").write_text("nothing")
    for part in PART_NAMES:
        assert_reads(read_weights(tmp_path, part), official(part))


def test_several_files_or_sets_of_shards_of_one_part_are_not_chosen_from(tmp_path):
    for name in ("a.fp16", "a.bf16"):
        write(tmp_path / f"{name}.safetensors", official("vae"))
    refused(f"{tmp_path} has several files of a Wan VAE: give the one to use", read_weights, tmp_path, "vae")
    write_weights(tmp_path, official("vae"), f"{DIFFUSION}.bf16", 2)
    assert len(read_weights(tmp_path, "vae").files) == 2
    write_weights(tmp_path, official("vae"), f"{DIFFUSION}.fp16", 2)
    message = rf"several sets of shards, such as {DIFFUSION}\.bf16 and {DIFFUSION}\.fp16"
    refused(message, read_weights, tmp_path, "vae")


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_shard_that_is_missing_is_named_even_without_an_index(tmp_path, number):
    write_weights(tmp_path, official("vae"), MODEL, 3)
    (tmp_path / f"{MODEL}.safetensors.index.json").unlink()
    missing = tmp_path / f"{MODEL}-0000{number}-of-00003.safetensors"
    missing.unlink()
    message = f"{missing} is missing; by their names there are 3 shards, 1 of which cannot be found"
    refused(message, read_weights, tmp_path, "vae")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.gguf", b"GGUF\3", "x.gguf is a GGUF file, which is not read here"),
        ("x.safetensors", b"version https://git-lfs.github.com/spec/v1", "x.safetensors is a pointer of Git LFS"),
        ("model.safetensors", b"version https://git-lfs.github.com/spec/v1", "model.safetensors is a pointer of"),
        ("model.safetensors", b"", "model.safetensors is an empty file"),
        ("model-00001-of-00001.safetensors", b"", "is an empty file"),
        ("model-00001-of-00000.safetensors", b"", "is an empty file"),
        ("model-00001-of-99999.safetensors", b"", "model-00002-of-99999.safetensors is missing"),
        ("x.pth", b"", "has no file of a Wan VAE, such as diffusion_pytorch_model.safetensors"),
        ("config.json", b"{}", "has no file of a Wan VAE"),
    ],
)
def test_a_folder_without_weights_says_what_it_has(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    assert str(tmp_path) in refused(message, read_weights, tmp_path, "vae")


def test_a_folder_in_the_place_of_a_file_is_no_file(tmp_path):
    (tmp_path / "model.safetensors").mkdir()
    refused("cannot read .*model.safetensors: Is a directory", read_weights, tmp_path, "vae")
    refused("nowhere is missing", read_weights, tmp_path / "nowhere", "vae")


# ------------------------------------------------------------------------------------------------ what is no such part


@pytest.mark.parametrize("part", PART_NAMES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_another_part_is_named(tmp_path, layout, part):
    own, _, state = LAYOUTS[layout]
    if own != part:
        path = write(tmp_path / "a.safetensors", state)
        refused(f"^{path} is {DESCRIPTIONS[own]}, not {DESCRIPTIONS[part]}$", read_weights, path, part)


@pytest.mark.parametrize(
    "name",
    [
        "diffusion_model.blocks.0.self_attn.q.lora_A.weight",
        "lora_unet_blocks_0_self_attn_q.lora_down.weight",
        "transformer.blocks.0.attn1.to_q.lora_B.default.weight",
        "blocks.0.ffn.0.lora.up.weight",
        "diffusion_model.blocks.0.ffn.0.hada_w1_a",
        "diffusion_model.blocks.0.ffn.0.lokr_w1",
        "diffusion_model.patch_embedding.diff",
        "diffusion_model.head.head.diff_b",
    ],
)
def test_a_lora_is_named(tmp_path, name):
    path = write(tmp_path / "a.safetensors", {name: torch.ones(2), "other": torch.ones(1)})
    for part in PART_NAMES:
        refused(f"^{path} is a LoRA, not {DESCRIPTIONS[part]}$", read_weights, path, part)


@pytest.mark.parametrize("part", PART_NAMES)
def test_a_file_of_nothing_known_is_refused_with_one_of_its_names(tmp_path, part):
    path = write(tmp_path / "a.safetensors", {"y": torch.arange(2), "x.weight": torch.ones(2)})
    refused(f"^{path} is not {DESCRIPTIONS[part]}: it has tensors such as x.weight$", read_weights, path, part)
    torch.save({}, tmp_path / "none.pth")
    refused(f"is not {DESCRIPTIONS[part]}: it has no tensors$", read_weights, tmp_path / "none.pth", part)


# --------------------------------------------------------------------------------------------- ties, rows and doubles

SHARED, EMBED = "shared.weight", "encoder.embed_tokens.weight"


@pytest.mark.parametrize("names", [(SHARED,), (EMBED,), (SHARED, EMBED), (EMBED, SHARED)])
@pytest.mark.parametrize("files", [1, 2])
def test_tied_embeddings_are_read_from_whichever_is_there_and_the_shared_one_first(tmp_path, names, files):
    state = renamed(official("text_encoder"), to_umt5)
    table = state.pop(SHARED)
    tied = {name: table.clone() if name == names[0] or name == SHARED else table * 0 for name in names}
    if files == 1:
        write(tmp_path / "model.safetensors", state | tied)
    else:  # the copy is in the first of two shards
        shards = [{**state}, {}]
        for name, tensor in tied.items():
            shards[0 if name == EMBED else 1][name] = tensor
        for number, shard in enumerate(shards, start=1):
            write(tmp_path / f"model-0000{number}-of-00002.safetensors", shard)
    assert_reads(read_weights(tmp_path, "text_encoder"), official("text_encoder"))


@pytest.mark.parametrize("reverse", [False, True])
def test_q_k_and_v_are_joined_in_their_order_from_whichever_shards(tmp_path, reverse):
    shards = [State(), State(), State()]
    for index, (name, tensor) in enumerate(to_clip_vision(official("clip")).items()):
        letter = next((x for x in "qkv" if f".{x}_proj." in name), "")
        shards["qkv".index(letter) if letter else index % 3][name] = tensor
    for number, shard in enumerate(shards[::-1] if reverse else shards, start=1):
        write(tmp_path / f"model-0000{number}-of-00003.safetensors", shard)
    weights = read_weights(tmp_path, "clip")
    assert_reads(weights, visual(official("clip")))
    assert [part.name[-13:] for part in weights.tensors["visual.transformer.0.attn.to_qkv.weight"].parts] == [
        f"{x}_proj.weight" for x in "qkv"
    ]


@pytest.mark.parametrize("wrong", [torch.ones(()), torch.ones(80), torch.ones(80, 79), torch.ones(80, 80, 1)])
@pytest.mark.parametrize("letter", "qkv")
def test_rows_that_do_not_fit_together_are_refused(tmp_path, wrong, letter):
    name = f"vision_model.encoder.layers.1.self_attn.{letter}_proj.weight"
    path = write(tmp_path / "a", to_clip_vision(official("clip")) | {name: wrong})
    message = r"has parts of visual\.transformer\.1\.attn\.to_qkv\.weight that do not fit together"
    refused(message, read_weights, path, "clip")


def test_rows_of_no_axes_do_not_fit_together_with_those_of_one(tmp_path):
    state = to_clip_vision(official("clip"))
    for letter, wrong in zip("qkv", (torch.ones(80), torch.ones(()), torch.ones(80)), strict=True):
        state[f"vision_model.encoder.layers.1.self_attn.{letter}_proj.bias"] = wrong
    refused("parts of .+ that do not fit together", read_weights, write(tmp_path / "a", state), "clip")


def test_a_tensor_under_two_names_or_in_two_shards_is_refused(tmp_path):
    state = renamed(official("transformer"), to_diffusers)
    path = write(tmp_path / "a", state | {"blocks.0.ffn.0.weight": torch.ones(96, 48)})
    names = r"blocks\.0\.ffn\.0\.weight twice, as blocks\.0\.ffn\.(0|net\.0\.proj)\.weight and "
    refused(names, read_weights, path, "transformer")
    write_weights(tmp_path, official("vae"), MODEL, 2)
    second = tmp_path / "model-00002-of-00002.safetensors"
    write(second, official("vae"))
    refused("has .+ twice, as .+ and ", read_weights, tmp_path, "vae")


# --------------------------------------------------------------------------------------------------- dtypes and scales


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.uint8, torch.complex64])
@pytest.mark.parametrize("name", ["head.modulation", "blocks.0.norm3.bias", "blocks.0.ffn.0.weight"])
def test_what_is_no_number_of_a_weight_is_refused(tmp_path, name, dtype):
    path = write(tmp_path / "a", official("transformer") | {name: torch.ones(2, 2).to(dtype)})
    assert name in refused("of dtype .+, which is none of weights|is quantised to ", read_weights, path, "transformer")


@pytest.mark.parametrize("shape", [(0,), (0, 48), (48, 0), (1, 2, 0)])
def test_a_tensor_of_size_zero_is_refused(tmp_path, shape):
    path = write(tmp_path / "a", official("transformer") | {"head.modulation": torch.ones(shape)})
    refused("has head.modulation of shape .+, which is empty", read_weights, path, "transformer")


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("scales", ["old", "new", "header"])
def test_scales_belong_to_their_weights_and_are_no_tensors_of_the_part(tmp_path, prefix, scales):
    kind = Kind(scaled(r"blocks\.", torch.float32), prefix, scales)
    tensors = stored(official("transformer"), kind.store)
    path = write_single(tmp_path / "a.safetensors", tensors, prefix, scales)
    weights = read_weights(path, "transformer")
    assert_reads(weights, {name: each.values(torch.float32) for name, each in tensors.items()})
    for name, entry in weights.tensors.items():
        (part,) = entry.parts
        spelling = "scale_weight" if scales == "old" else "weight_scale"
        scale = f"{prefix}{name.removesuffix('weight')}{spelling}" if tensors[name].scale is not None else None
        assert (part.name, part.scale) == (prefix + name, scale)
    assert sum(each.scale is not None for each in tensors.values()) == 20


def test_a_format_that_is_not_read_is_refused_with_the_path(tmp_path):
    path = tmp_path / "a.safetensors"
    layers = {"layers": {"blocks.0.ffn.0": {"format": "nvfp4"}}}
    save_file(official("transformer"), path, {"_quantization_metadata": json.dumps(layers)})
    refused(rf"^{path} is quantised to nvfp4 \(at blocks\.0\.ffn\.0\)", read_weights, path, "transformer")
