"""Models load exactly, at any width, through one hook per tensor; what does not fit the model is refused by name."""

import gc
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.damage import edit_pth, edit_tensors, refused
from tests.tiny import (
    CLIP,
    FAMILY,
    TINY_SHAPE,
    tiny_clip,
    tiny_text_encoder,
    tiny_transformer,
    tiny_vae,
    tiny_vae22,
    write_clip,
    write_transformer,
)
from utils.adapters.lora import widen_patch_embedding
from wan.checkpoints import (
    TRANSFORMER,
    ModelFiles,
    TransformerFiles,
    build_transformer,
    cast_to,
    load_text_encoder,
    load_transformer,
    load_vae,
    load_vision_encoder,
    load_weights,
    open_model,
    read_some,
)
from wan.checkpoints.transformer import read_config, read_transformer
from wan.checkpoints.weights import read_weights
from wan.configs import FAMILIES
from wan.modules.clip import VisionEncoder, vision_shape
from wan.modules.model import is_fp32
from wan.modules.vae2_2 import Wan22VAE

FP32, BF16 = torch.float32, torch.bfloat16
VAE, TEXT_ENCODER = FAMILY.vae, FAMILY.text_encoder


def files_of(folder: Path) -> TransformerFiles:
    return read_transformer(folder, read_config(folder))


# ------------------------------------------------------------------------------------------------------- what loads


@pytest.mark.parametrize("shards", [1, 3])
def test_one_file_or_shards_load_to_the_same_frozen_weights(tmp_path, shards):
    expected = tiny_transformer()
    write_transformer(tmp_path, expected, shards)
    model = load_transformer(files_of(tmp_path), FP32)
    assert all(torch.equal(tensor, expected.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert model.shape == expected.shape and not model.training
    assert not any(parameter.requires_grad or parameter.is_meta for parameter in model.parameters())


def test_in_bf16_the_fp32_islands_stay_as_they_are(whole):
    expected = tiny_transformer().state_dict()
    for name, tensor in load_transformer(files_of(whole), BF16).state_dict().items():
        assert tensor.dtype == (FP32 if is_fp32(name) else BF16)
        assert torch.equal(tensor, expected[name].to(tensor.dtype))


def test_progress_sees_every_tensor(whole):
    seen = []
    load_transformer(files_of(whole), FP32, "cpu", lambda names: seen.append(len(list(names))) or names)
    assert seen == [len(tiny_transformer().state_dict())]


def test_a_transformer_is_built_without_memory_and_frozen(whole):
    model = build_transformer(files_of(whole))
    assert model.shape == TINY_SHAPE and not model.training
    assert all(parameter.is_meta and not parameter.requires_grad for parameter in model.parameters())


def test_the_vae_and_the_text_encoder_load_exactly(whole):
    files = open_model(whole)
    vae, encoder = load_vae(files), load_text_encoder(files, FP32, "cpu").encoder
    for loaded, expected in ((vae, tiny_vae()), (encoder, tiny_text_encoder(TINY_SHAPE.text_dim))):
        rounded = {name: t.bfloat16().float() if loaded is encoder else t for name, t in expected.state_dict().items()}
        assert all(torch.equal(tensor, rounded[name]) for name, tensor in loaded.state_dict().items())
        assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert load_text_encoder(files, BF16, "cpu").encoder.norm.weight.dtype == BF16


def files_of_the_5b(whole: Path, vae: Path) -> ModelFiles:
    return replace(open_model(whole), family=FAMILIES["wan2.2-ti2v-5B"], vae=read_weights(vae, "vae"))


def test_the_vae_of_wan_22_is_known_by_its_tensors_and_loads_exactly_at_any_width(whole, tmp_path):
    expected, path = tiny_vae22(dim=8, decoder_dim=12), tmp_path / "of_any_name.pth"
    torch.save(expected.state_dict(), path)
    vae = load_vae(files_of_the_5b(whole, path))
    assert isinstance(vae, Wan22VAE)
    assert all(torch.equal(tensor, expected.state_dict()[name]) for name, tensor in vae.state_dict().items())
    video = torch.ones(1, 3, 5, 32, 32)
    assert torch.equal(vae.decode(vae.encode(video)), expected.decode(expected.encode(video)))


def test_the_text_length_truncates_prompts(tmp_path, folder):
    config = folder / "config.json"
    config.write_text(config.read_text().replace(f'"text_len": {TINY_SHAPE.text_len}', '"text_len": 5'))
    encoder = load_text_encoder(open_model(folder), FP32, "cpu")
    assert len(encoder.encode(["a cat runs over the house and under the tree"])[0]) == 5


# --------------------------------------------------------------------------------------------- the hook per tensor


def test_place_gets_each_tensor_by_its_official_name_and_decides_what_the_model_holds(whole):
    files, seen = files_of(whole), {}

    def place(name: str, tensor: Tensor) -> Tensor:
        seen[name] = tensor.clone()
        return -tensor

    model = load_weights(build_transformer(files), files, place)
    expected = tiny_transformer().state_dict()
    assert all(torch.equal(seen[name], tensor) for name, tensor in expected.items()) and len(seen) == len(expected)
    assert all(torch.equal(tensor, -expected[name]) for name, tensor in model.state_dict().items())


def test_a_tensor_is_let_go_before_the_next_is_read(whole):
    files, alive = files_of(whole), []

    def place(name: str, tensor: Tensor) -> Tensor:
        gc.collect()
        assert not [reference for reference in alive if reference() is not None]
        alive.append(weakref.ref(tensor))
        return tensor.bfloat16()

    model = build_transformer(files)
    gc.freeze()  # what is older cannot hold a tensor, and takes seconds to look through
    try:
        load_weights(model, files, place)
    finally:
        gc.unfreeze()
    assert len(alive) == len(files.tensors)


def test_a_model_that_was_widened_before_takes_the_tensors_that_are_widened_by_place(whole):
    files = files_of(whole)

    def widen(name: str, tensor: Tensor) -> Tensor:
        return F.pad(tensor, (0, 0, 0, 0, 0, 0, 0, 16)) if name == "patch_embedding.weight" else tensor

    model = build_transformer(files)
    widen_patch_embedding(model, 32)
    load_weights(model, files, widen)
    expected = tiny_transformer().patch_embedding.weight
    assert torch.equal(model.patch_embedding.weight, widen("patch_embedding.weight", expected))
    assert not any(parameter.requires_grad for parameter in model.parameters())
    wide = build_transformer(files)
    widen_patch_embedding(wide, 32)
    message = r"has the tensor patch_embedding\.weight of shape \[48, 16, 1, 2, 2\], not \[48, 32, 1, 2, 2\]"
    refused(message, load_weights, wide, files, cast_to(FP32))


def test_tensors_that_are_left_out_stay_as_the_model_has_them_and_are_read_later(whole):
    files, names = files_of(whole), ["blocks.1.ffn.0.weight", "head.head.bias"]
    model, expected = build_transformer(files), tiny_transformer().state_dict()
    seen: list[str] = []

    def place(name: str, tensor: Tensor) -> Tensor:
        seen.append(name)
        return tensor

    load_weights(model, files, place, unread=names)
    assert set(seen) == expected.keys() - set(names)
    assert {name for name, tensor in model.state_dict().items() if tensor.is_meta} == set(names)
    seen.clear()
    found = dict(read_some(files, names, lambda name, tensor: -place(name, tensor)))
    assert seen == list(found) == names and all(torch.equal(found[name], -expected[name]) for name in names)
    model.blocks[1].ffn[0] = nn.Linear(TINY_SHAPE.dim, 3)
    message = r"has the tensor blocks.1.ffn.0.weight of shape \[96, 48\], not \[3, 48\]"
    refused(message, load_weights, model, files, place, unread=["blocks.1.ffn.0.weight", "blocks.1.ffn.0.bias"])


class Int8Linear(nn.Module):
    """A linear layer as a quantiser would swap it in: integers with one scale for all."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty_like(linear.weight, dtype=torch.int8), requires_grad=False)
        self.bias, self.scale = linear.bias, 0.01

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


def test_layers_may_be_swapped_before_and_their_weights_stored_in_another_form(whole):
    files, name = files_of(whole), "blocks.1.ffn.0.weight"
    model = build_transformer(files)
    model.blocks[1].ffn[0] = Int8Linear(model.blocks[1].ffn[0])

    def place(key: str, tensor: Tensor) -> Tensor:
        return nn.Parameter((tensor / 0.01).round().to(torch.int8), False) if key == name else tensor

    load_weights(model, files, place)
    assert model.get_parameter(name).dtype == torch.int8
    exact = tiny_transformer()
    latents, text = torch.randn(1, 16, 2, 4, 4), torch.randn(1, 3, TINY_SHAPE.text_dim)
    expected, actual = (m(latents, torch.tensor([500.0]), text) for m in (exact, model))
    assert 0 < (actual - expected).abs().max() < 0.1 * expected.abs().max()


def test_names_are_checked_before_anything_is_read(folder):
    edit_tensors(folder, lambda s: s.pop("blocks.1.ffn.2.bias"))
    files = files_of(folder)
    refused("lacks tensor", load_weights, build_transformer(files), files, unread)


def unread(name: str, tensor: Tensor) -> Tensor:
    raise AssertionError(f"{name} was read")


# -------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda s: s.pop("blocks.1.ffn.2.bias"), r"lacks tensor blocks\.1\.ffn\.2\.bias"),
        (lambda s: s.update({"blocks.1.other": torch.ones(1, 514)}), r"foreign tensor blocks\.1\.other"),
        (
            lambda s: s.update({"blocks.0.ffn.2.bias": torch.ones(47)}),
            r"tensor blocks\.0\.ffn\.2\.bias of shape \[47\], not \[48\]$",
        ),
        (
            lambda s: s.update({"head.head.weight": torch.ones(64, 40)}),
            r"tensor head\.head\.weight of shape \[64, 40\], not \[64, 48\]$",
        ),
        (
            lambda s: s.update({"head.modulation": torch.tensor(1.0)}),
            r"tensor head\.modulation of shape \[\], not \[1, 2, 48\]$",
        ),
    ],
)
def test_a_missing_foreign_or_misshapen_tensor_is_named(folder, edit, message):
    edit_tensors(folder, edit)
    assert TRANSFORMER in refused(message, load_transformer, files_of(folder), FP32)
    assert TRANSFORMER in refused(message, open_model, folder)


@pytest.mark.parametrize(
    ("load", "file", "edit", "message"),
    [
        ("vae", VAE, lambda s: s.pop("conv2.weight"), r"lacks the tensor conv2\.weight"),
        ("vae", VAE, lambda s: s.pop("decoder.conv1.bias"), r"lacks tensor decoder\.conv1\.bias"),
        ("vae", VAE, lambda s: s.update({"conv2.weight": torch.tensor(1.0)}), "unexpected shape"),
        ("vae", VAE, lambda s: s.update({"conv2.weight": torch.ones(48, 48, 1, 1, 1)}), "z_dim 16, not 48"),
        ("vae", VAE, lambda s: s.update(other=torch.ones(1)), "foreign tensor other"),
        ("text", TEXT_ENCODER, lambda s: s.pop("blocks.0.ffn.fc1.weight"), r"lacks the tensor blocks\.0\.ffn\.fc1"),
        (
            "text",
            TEXT_ENCODER,
            lambda s: s.update({"norm.weight": torch.ones(3)}),
            r"tensor norm.weight of shape \[3\]",
        ),
        ("text", TEXT_ENCODER, lambda s: s.update({"token_embedding.weight": torch.ones(3)}), "unexpected shape"),
    ],
)
def test_a_pth_file_of_another_content_is_named(whole, folder, load, file, edit, message):
    edit_pth(folder / file, edit)
    assert file in refused(message, open_model, folder)
    part = "vae" if load == "vae" else "text_encoder"
    changed = replace(open_model(whole), **{part: read_weights(folder / file, part)})
    assert file in refused(
        message, *((load_vae, changed) if part == "vae" else (load_text_encoder, changed, FP32, "cpu"))
    )


@pytest.mark.parametrize("part", ["vae", "text_encoder"])
def test_a_part_that_is_no_flat_dictionary_is_named(folder, part):
    path = folder / getattr(FAMILY, part)
    edit_pth(path, lambda state: state.update(other={"nested": 1}))
    assert str(path) in refused("does not hold a flat dictionary of tensors", open_model, folder)


@pytest.mark.parametrize("name", ["tokenizer.json", ""])
def test_a_tokenizer_that_is_gone_or_broken_is_named(folder, name):
    files = open_model(folder)
    (files.tokenizer / "tokenizer.json").write_text("{}") if name else (files.tokenizer / "tokenizer.json").unlink()
    assert str(files.tokenizer) in refused("tokenizer", load_text_encoder, files, FP32, "cpu")


def test_image_positions_of_a_model_without_image_tokens_are_refused(folder):
    edit_tensors(folder, lambda s: s.update({"img_emb.emb_pos": torch.ones(1, 514, 1280)}))
    refused(r"foreign tensor img_emb\.emb_pos", load_transformer, files_of(folder), FP32)
    refused("not supported: t2v with 16 input and 16 output channels and image positions", open_model, folder)


def test_many_missing_tensors_are_counted_not_listed(folder):
    edit_tensors(folder, lambda s: [s.pop(name) for name in list(s) if name.startswith("blocks.1.self_attn")])
    assert "and 7 more" in refused("lacks tensor", load_transformer, files_of(folder), FP32)


# ------------------------------------------------------------------------------------------------ the vision encoder


@pytest.mark.parametrize("dim", [32, 80])
def test_the_vision_encoder_of_any_width_loads_exactly_and_without_what_is_beside_it(whole, tmp_path, dim):
    files = replace(open_model(whole), clip=read_weights(write_clip(tmp_path, dim), "clip"))
    shape = vision_shape({name: tensor.shape for name, tensor in tiny_clip(dim).items()})
    encoder, expected = load_vision_encoder(files), VisionEncoder(shape)
    expected.load_official(tiny_clip(dim))
    state = encoder.state_dict()
    assert state.keys() == expected.state_dict().keys()
    assert all(torch.equal(tensor, expected.state_dict()[name]) for name, tensor in state.items())
    assert not encoder.training and not any(parameter.requires_grad for parameter in encoder.parameters())
    assert encoder.encode(torch.zeros(1, 3, 20, 30)).shape == (1, 257, dim)
    assert load_vision_encoder(files, "cpu", BF16).visual.pre_layrnorm.weight.dtype == BF16


def drop_block(state: dict[str, Tensor]) -> None:
    for name in [name for name in state if name.startswith("visual.transformer.1.")]:
        del state[name]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda s: s.pop("visual.pre_norm.bias"), r"lacks tensor visual\.pre_norm\.bias"),
        (lambda s: s.pop("visual.pos_embedding"), r"lacks the tensor visual\.pos_embedding"),
        # Blocks are counted, so that the last one of three is beyond the two that there are.
        (drop_block, r"foreign tensor visual\.transformer\.2\.attn\.proj\.bias.* and 9 more"),
        (
            lambda s: s.update({"visual.patch_embedding.bias": torch.ones(80)}),
            r"foreign tensor visual\.patch_emb",
        ),
        (lambda s: s.update({"visual.head": torch.ones(79)}), "unexpected shape"),
        (
            lambda s: s.update({"visual.pos_embedding": torch.ones(1, 256, 80)}),
            r"tensor visual\.pos_embedding of shape \[1, 256, 80\], not \[1, 226, 80\]",
        ),
        (
            lambda s: s.update({"visual.transformer.0.attn.to_qkv.weight": torch.ones(80, 80)}),
            r"attn\.to_qkv\.weight of shape \[80, 80\], not \[240, 80\]",
        ),
        (
            lambda s: s.update({"visual.patch_embedding.weight": torch.ones(96, 3, 14, 14)}),
            "96 is not a multiple of",
        ),
        (lambda s: s.update({"visual.patch_embedding.weight": torch.ones(80)}), "unexpected shape"),
    ],
)
def test_a_vision_encoder_of_another_layout_is_refused_by_official_names(whole, tmp_path, edit, message):
    path = write_clip(tmp_path)
    edit_pth(path, edit)
    files = replace(open_model(whole), clip=read_weights(path, "clip"))
    assert CLIP in refused(message, load_vision_encoder, files)


@pytest.mark.parametrize("unread", ["visual.transformer.2.mlp.2.bias", "visual.post_norm.weight", "visual.head"])
def test_of_what_the_encoder_does_not_read_nothing_need_be_there(whole, tmp_path, unread):
    path, wrong = write_clip(tmp_path), torch.ones(3, 5) if unread == "visual.head" else torch.ones(3)
    for edit in (lambda s: s.update({unread: wrong}), lambda s: s.pop(unread)):
        edit_pth(path, edit)
        files = replace(open_model(whole), clip=read_weights(path, "clip"))
        expected = tiny_clip()["visual.pre_norm.bias"]
        assert torch.equal(load_vision_encoder(files).visual.pre_layrnorm.bias, expected)


def test_a_model_without_a_vision_encoder_says_so(whole):
    assert str(whole) in refused("has no vision encoder", load_vision_encoder, replace(open_model(whole), clip=None))
