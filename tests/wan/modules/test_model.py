"""The transformer equals diffusers' with the same weights, and the released layouts at full size."""

import json
import re
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel

from tests.manifests import load_manifest
from tests.peers import diffusers_transformer
from wan.configs import FAMILIES
from wan.modules.model import WanModel, WanShape, is_fp32, rotary_table

SHAPE = WanShape(dim=48, ffn_dim=96, num_heads=2, num_layers=3, text_dim=20, text_len=12, freq_dim=16)
KEYMAP = json.loads((Path(__file__).parents[2] / "data" / "keymap_diffusers.json").read_text(encoding="utf-8"))


def to_diffusers(name: str) -> str:
    """The diffusers name of an official parameter: the first rule that matches."""
    for pattern, replacement in KEYMAP["dit"]:
        renamed, count = re.subn(pattern, replacement, name)
        if count:
            return renamed
    raise KeyError(name)


@pytest.fixture(scope="module")
def pair() -> tuple[WanModel, WanTransformer3DModel]:
    torch.manual_seed(0)
    ours = WanModel(SHAPE).eval()
    for name, parameter in ours.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, 1.0, 0.2)
    theirs = diffusers_transformer(SHAPE)
    theirs.load_state_dict({to_diffusers(name): tensor for name, tensor in ours.state_dict().items()})
    return ours, theirs


def inputs(batch: int, frames: int, height: int, width: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(batch * frames + height)
    latents = torch.randn(batch, 16, frames, height, width, generator=generator)
    text = torch.randn(batch, SHAPE.text_len, SHAPE.text_dim, generator=generator)
    timestep = torch.rand(batch, generator=generator) * 1000
    return latents, timestep, text


@pytest.mark.parametrize(("frames", "height", "width"), [(1, 4, 6), (2, 8, 6), (4, 6, 10)])
@pytest.mark.parametrize("batch", [1, 2])
@torch.no_grad()
def test_the_velocity_equals_that_of_diffusers(pair, batch, frames, height, width):
    ours, theirs = pair
    latents, timestep, text = inputs(batch, frames, height, width)
    expected = theirs(latents, timestep, text).sample
    actual = ours(latents, timestep, text)
    assert actual.shape == latents.shape
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_the_gradients_equal_those_of_diffusers(pair):
    ours, theirs = pair
    latents, timestep, text = inputs(2, 2, 4, 6)
    ours(latents, timestep, text).square().mean().backward()
    theirs(latents, timestep, text).sample.square().mean().backward()
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        reference = expected[to_diffusers(name)].grad
        assert (parameter.grad - reference).abs().max() <= 2e-5 * reference.abs().max() + 1e-9, name
    ours.zero_grad(), theirs.zero_grad()


@torch.no_grad()
def test_short_text_means_zero_rows_up_to_the_text_length(pair):
    ours, _ = pair
    latents, timestep, text = inputs(1, 1, 4, 4)
    padded = torch.cat([text[:, :5], torch.zeros(1, SHAPE.text_len - 5, SHAPE.text_dim)], dim=1)
    assert torch.equal(ours(latents, timestep, text[:, :5]), ours(latents, timestep, padded))
    assert not torch.allclose(ours(latents, timestep, text), ours(latents, timestep, padded))


@torch.no_grad()
def test_one_timestep_per_token_equals_one_per_clip_when_they_agree(pair):
    ours, _ = pair
    latents, timestep, text = inputs(2, 2, 4, 6)
    per_token = timestep[:, None].expand(2, 2 * 2 * 3)
    torch.testing.assert_close(ours(latents, per_token, text), ours(latents, timestep, text), rtol=1e-5, atol=1e-6)
    per_token = per_token.clone()
    per_token[:, 0] = 0
    assert not torch.allclose(ours(latents, per_token, text), ours(latents, timestep, text), atol=1e-3)


@torch.no_grad()
def test_in_bf16_the_islands_stay_fp32_and_the_velocity_is_close(pair):
    ours, _ = pair
    half = WanModel(SHAPE).eval()
    half.load_state_dict(ours.state_dict())
    for name, parameter in half.named_parameters():
        parameter.data = parameter.data if is_fp32(name) else parameter.data.bfloat16()
    latents, timestep, text = inputs(1, 2, 8, 6)
    expected, actual = ours(latents, timestep, text), half(latents, timestep, text)
    assert actual.dtype == torch.float32
    similarity = torch.nn.functional.cosine_similarity(actual.flatten(), expected.flatten(), dim=0)
    assert similarity > 0.999


def test_the_fp32_islands_are_those_of_the_official_precision():
    names = {re.sub(r"\d+", "N", name, count=1) for name, _ in WanModel(SHAPE).named_parameters() if is_fp32(name)}
    assert {name for name in names if name.startswith("blocks")} == {
        "blocks.N.modulation", "blocks.N.norm3.weight", "blocks.N.norm3.bias",
        "blocks.N.self_attn.norm_q.weight", "blocks.N.self_attn.norm_k.weight",
        "blocks.N.cross_attn.norm_q.weight", "blocks.N.cross_attn.norm_k.weight",
    }  # fmt: skip
    others = {name.split(".")[0] for name in names if not name.startswith("blocks")}
    assert others == {"time_embedding", "time_projection", "head"}


@torch.no_grad()
def test_nothing_in_the_forward_pass_waits_for_a_value():
    with torch.device("meta"):  # where there are no values to wait for
        model, latents, timestep = WanModel(SHAPE), torch.empty(2, 16, 3, 4, 6), torch.empty(2)
        velocity = model(latents, timestep, torch.empty(2, 5, SHAPE.text_dim))
    assert velocity.shape == latents.shape


def test_the_rotary_table_is_built_once_per_shape():
    device = torch.device("cpu")
    first = rotary_table((2, 3, 4), 24, device)
    assert rotary_table((2, 3, 4), 24, device) is first
    assert first.shape == (24, 1, 12)
    assert not rotary_table((2, 3, 5), 24, device).is_inference()


def test_a_rotary_table_built_while_sampling_can_be_trained_with():
    with torch.inference_mode():
        table = rotary_table((1, 5, 7), 24, torch.device("cpu"))
    assert not table.is_inference()


@pytest.mark.parametrize(
    ("config", "manifest"), [("wan2.1-t2v-1.3B", "wan2.1_t2v_1.3b"), ("wan2.1-t2v-14B", "wan2.1_t2v_14b")]
)
def test_the_released_models_have_exactly_the_official_names_and_shapes(config, manifest):
    with torch.device("meta"):
        model = WanModel(FAMILIES[config].shape)
    actual = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert actual == load_manifest(manifest)
