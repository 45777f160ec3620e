"""The transformer of every family equals diffusers' with the same weights, and the released layouts at full size."""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.manifests import load_manifest
from tests.peers import diffusers_transformer, to_diffusers
from wan.configs import FAMILIES
from wan.modules.model import WanModel, WanShape, is_fp32, modulate, rotary_table, rotate
from wan.names import diffusers_name, is_parameter

SHAPE = WanShape(dim=48, ffn_dim=96, num_heads=2, num_layers=3, text_dim=20, text_len=12, freq_dim=16)
KINDS = (
    "wan2.1-t2v-1.3B",
    "wan2.1-i2v-14B-480P",
    "wan2.1-flf2v-14B-720P",
    "wan2.2-t2v-A14B",
    "wan2.2-i2v-A14B",
    "wan2.2-ti2v-5B",
)
VISION = KINDS[1:3]
IMAGE_DIM, IMAGE_SCALE = 24, 0.02  # image tokens are so small that the eps of their norms matters
PER_IMAGE = 257  # tokens


def small_shape(family: str) -> WanShape:
    """Small widths with the channels of a family, and what diffusers takes for granted where there are image tokens."""
    released = FAMILIES[family].shape
    shape = replace(SHAPE, in_dim=released.in_dim, out_dim=released.out_dim)
    if not released.image_dim:
        return shape
    return replace(shape, text_len=512, image_dim=IMAGE_DIM, image_positions=released.image_positions)


@dataclass(frozen=True)
class Inputs:
    latents: Tensor
    timestep: Tensor
    text: Tensor
    image: Tensor | None = None


def make_inputs(shape: WanShape, batch: int, frames: int, height: int, width: int) -> Inputs:
    generator = torch.Generator().manual_seed(batch * frames + height)
    latents = torch.randn(batch, shape.in_dim, frames, height, width, generator=generator)
    text = torch.randn(batch, shape.text_len, shape.text_dim, generator=generator)
    timestep = torch.rand(batch, generator=generator) * 1000
    if not shape.image_dim:
        return Inputs(latents, timestep, text)
    tokens = shape.image_positions or PER_IMAGE
    image = torch.randn(batch, tokens, shape.image_dim, generator=generator)
    return Inputs(latents, timestep, text, IMAGE_SCALE * image)


def inputs(batch: int, frames: int, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    made = make_inputs(SHAPE, batch, frames, height, width)
    return made.latents, made.timestep, made.text


@dataclass(frozen=True)
class Pair:
    """Our transformer and diffusers', with the same weights."""

    ours: WanModel
    theirs: nn.Module

    def answers(self, made: Inputs) -> tuple[Tensor, Tensor]:
        """Our velocity and theirs."""
        image, timestep = made.image, made.timestep
        if image is not None and self.ours.shape.image_positions:
            image = image.unflatten(1, (2, -1)).flatten(0, 1)  # diffusers counts two images as two samples
        if timestep.ndim == 2:  # diffusers wants a timestep for every token
            frames = made.latents.shape[2]
            rows = torch.cat([timestep[:, :1], timestep[:, 1:].expand(-1, frames - 1)], dim=1)
            timestep = rows.repeat_interleave(made.latents[0, 0, 0].numel() // 4, dim=1)
        expected = self.theirs(made.latents, timestep, made.text, image).sample
        return self.ours(made.latents, made.timestep, made.text, made.image), expected


def draw_norms(model: WanModel) -> None:
    """Norms and positions that are not those of a new model."""
    for name, parameter in model.named_parameters():
        if "norm" in name or re.match(r"img_emb\.proj\.[04]", name):
            nn.init.normal_(parameter, 1.0, 0.2)
        elif name == "img_emb.emb_pos":
            nn.init.normal_(parameter, std=IMAGE_SCALE)
        elif name.startswith("img_emb.proj.3"):
            parameter.data *= IMAGE_SCALE


def parameter_in_diffusers(name: str) -> str:
    """The diffusers name of an official parameter, by that of its module."""
    module, _, kind = name.rpartition(".")
    return diffusers_name(name) if is_parameter(name) else f"{diffusers_name(module)}.{kind}"


@pytest.fixture(scope="module")
def pair_of() -> Callable[[str], Pair]:
    made: dict[str, Pair] = {}

    def make(family: str) -> Pair:
        if family not in made:
            torch.manual_seed(0)
            shape = small_shape(family)
            ours, theirs = WanModel(shape).eval(), diffusers_transformer(shape)
            draw_norms(ours)
            theirs.load_state_dict({parameter_in_diffusers(name): t for name, t in ours.state_dict().items()})
            made[family] = Pair(ours, theirs)
        return made[family]

    return make


@pytest.fixture
def pair(pair_of) -> tuple[WanModel, nn.Module]:
    made = pair_of(KINDS[0])
    return made.ours, made.theirs


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> bool:
    return bool((actual - expected).abs().max() <= tolerance * expected.abs().max())


def check_gradients(pair: Pair, made: Inputs) -> None:
    """Every parameter has the gradient that it has in diffusers."""
    for answer in pair.answers(made):
        answer.square().mean().backward()
    expected = dict(pair.theirs.named_parameters())
    for name, parameter in pair.ours.named_parameters():
        reference = expected[to_diffusers(name)].grad
        assert (parameter.grad - reference).abs().max() <= 2e-5 * reference.abs().max() + 1e-9, name
    pair.ours.zero_grad(), pair.theirs.zero_grad()


@pytest.mark.parametrize(("frames", "height", "width"), [(1, 4, 6), (2, 8, 6), (4, 6, 10)])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("family", KINDS)
@torch.no_grad()
def test_the_velocity_of_every_family_equals_that_of_diffusers(pair_of, family, batch, frames, height, width):
    pair = pair_of(family)
    made = make_inputs(pair.ours.shape, batch, frames, height, width)
    actual, expected = pair.answers(made)
    assert actual.shape == (batch, pair.ours.shape.out_dim, frames, height, width)
    assert close(actual, expected)


@pytest.mark.parametrize("family", KINDS)
def test_the_gradients_of_every_family_equal_those_of_diffusers(pair_of, family):
    pair = pair_of(family)
    check_gradients(pair, make_inputs(pair.ours.shape, 2, 2, 4, 6))


# ------------------------------------------------------------------------------------------------------ two timesteps


@pytest.mark.parametrize("first", [0.0, 333.25])
@pytest.mark.parametrize("frames", [1, 2, 4])
@torch.no_grad()
def test_a_timestep_for_the_first_frame_equals_one_per_token_in_diffusers(pair_of, frames, first):
    pair = pair_of("wan2.2-ti2v-5B")
    made = make_inputs(pair.ours.shape, 2, frames, 8, 6)
    two = torch.stack([torch.full_like(made.timestep, first), made.timestep], dim=1)
    assert close(*pair.answers(replace(made, timestep=two)))


def test_the_gradients_with_two_timesteps_equal_those_of_diffusers(pair_of):
    pair = pair_of("wan2.2-ti2v-5B")
    made = make_inputs(pair.ours.shape, 2, 3, 4, 6)
    two = torch.stack([torch.tensor([0.0, 40.0]), made.timestep], dim=1)
    check_gradients(pair, replace(made, timestep=two))


@torch.no_grad()
def test_two_timesteps_that_agree_are_one(pair):
    ours, _ = pair
    latents, timestep, text = inputs(2, 3, 4, 6)
    two = timestep[:, None].expand(2, 2)
    torch.testing.assert_close(ours(latents, two, text), ours(latents, timestep, text), rtol=1e-5, atol=1e-6)


def test_with_one_row_modulation_is_bit_for_bit_what_broadcasting_over_the_tokens_gives():
    torch.manual_seed(0)
    x, shift, scale = torch.randn(2, 77, 48), torch.randn(2, 1, 48), torch.randn(2, 1, 48)
    results = []
    for compute in (modulate, lambda x, shift, scale: x * (1 + scale) + shift):
        given = [tensor.clone().requires_grad_() for tensor in (x, shift, scale)]
        answer = compute(*given)
        answer.square().sum().backward()
        results.append([answer.detach(), *(tensor.grad for tensor in given)])
    assert all(torch.equal(ours, plain) for ours, plain in zip(*results, strict=True))


class Sizes(TorchDispatchMode):
    """Records how large the tensors are that are computed inside."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.largest = max(self.largest, *sizes, 0)
        return result


def test_two_timesteps_never_make_a_tensor_of_tokens_times_six_times_width():
    model = WanModel(SHAPE)
    latents, _, text = inputs(1, 3, 16, 12)
    projected = []
    model.time_projection.register_forward_hook(lambda module, args, output: projected.append(output.shape))
    with Sizes() as sizes:
        model(latents, torch.tensor([[0.0, 500.0]]), text).square().mean().backward()
    tokens = 3 * 8 * 6
    assert projected == [(1, 2, 6 * SHAPE.dim)]
    assert tokens * SHAPE.ffn_dim <= sizes.largest < tokens * 6 * SHAPE.dim


@pytest.mark.parametrize("shape", [(2, 3), (2, 36)])
def test_more_than_two_timesteps_of_a_sample_are_a_mistake_of_the_program(pair, shape):
    latents, _, text = inputs(2, 2, 4, 6)
    with pytest.raises(ValueError, match=f"one or two timesteps for each sample, not {shape[1]}"):
        pair[0](latents, torch.zeros(shape), text)


# -------------------------------------------------------------------------------------------------------- image tokens


@torch.no_grad()
def test_the_tokens_of_one_image_take_the_first_positions(pair_of):
    ours = pair_of("wan2.1-flf2v-14B-720P").ours
    made = make_inputs(ours.shape, 1, 2, 4, 6)
    image, positions = made.image[:, :PER_IMAGE], ours.img_emb.emb_pos[:, :PER_IMAGE]
    plain = pair_of("wan2.1-i2v-14B-480P").ours.img_emb
    plain.load_state_dict({name: t for name, t in ours.img_emb.state_dict().items() if name != "emb_pos"})
    assert torch.equal(ours.img_emb(image, torch.float32), plain(image + positions, torch.float32))
    alone = ours(made.latents, made.timestep, made.text, image)
    assert not close(alone, ours(made.latents, made.timestep, made.text, made.image), 1e-3)


@torch.no_grad()
def test_text_and_image_are_told_apart(pair_of):
    ours = pair_of(VISION[0]).ours
    made = make_inputs(ours.shape, 1, 1, 4, 4)
    expected = ours(made.latents, made.timestep, made.text, made.image)
    for changed in (replace(made, text=-made.text), replace(made, image=made.image.flip(2))):
        assert not close(ours(changed.latents, changed.timestep, changed.text, changed.image), expected, 1e-3)


@pytest.mark.parametrize("family", KINDS)
def test_an_image_that_is_missing_or_cannot_be_read_is_a_mistake_of_the_program(pair_of, family):
    ours = pair_of(family).ours
    made = make_inputs(ours.shape, 1, 1, 4, 4)
    wrong = None if family in VISION else torch.zeros(1, PER_IMAGE, IMAGE_DIM)
    with pytest.raises(ValueError, match="none are given" if family in VISION else "reads no image"):
        ours(made.latents, made.timestep, made.text, wrong)


@torch.no_grad()
def test_image_tokens_are_normalised_in_fp32_and_projected_in_the_dtype_of_the_other_layers(pair_of):
    exact = pair_of("wan2.1-flf2v-14B-720P").ours
    half = in_bf16(exact)
    dtypes = []
    for layer in half.img_emb.proj:
        layer.register_forward_hook(lambda module, args, output: dtypes.append(output.dtype))
    made = make_inputs(exact.shape, 1, 2, 8, 6)
    actual = half(made.latents, made.timestep, made.text, made.image.half())
    fp32, bf16 = torch.float32, torch.bfloat16
    assert dtypes == [fp32, bf16, bf16, bf16, fp32]
    expected = exact(made.latents, made.timestep, made.text, made.image)
    assert torch.nn.functional.cosine_similarity(actual.flatten(), expected.flatten(), dim=0) > 0.999


# ---------------------------------------------------------------------------------------------------------- all of them


@torch.no_grad()
def test_short_text_means_zero_rows_up_to_the_text_length(pair):
    ours, _ = pair
    latents, timestep, text = inputs(1, 1, 4, 4)
    padded = torch.cat([text[:, :5], torch.zeros(1, SHAPE.text_len - 5, SHAPE.text_dim)], dim=1)
    assert torch.equal(ours(latents, timestep, text[:, :5]), ours(latents, timestep, padded))
    assert not torch.allclose(ours(latents, timestep, text), ours(latents, timestep, padded))


def in_bf16(model: WanModel) -> WanModel:
    """A copy whose linear layers are bf16."""
    half = WanModel(model.shape).eval()
    half.load_state_dict(model.state_dict())
    for name, parameter in half.named_parameters():
        parameter.data = parameter.data if is_fp32(name) else parameter.data.bfloat16()
    return half


@torch.no_grad()
def test_in_bf16_the_islands_stay_fp32_and_the_velocity_is_close(pair):
    ours, _ = pair
    half = in_bf16(ours)
    latents, timestep, text = inputs(1, 2, 8, 6)
    expected, actual = ours(latents, timestep, text), half(latents, timestep, text)
    assert actual.dtype == torch.float32
    similarity = torch.nn.functional.cosine_similarity(actual.flatten(), expected.flatten(), dim=0)
    assert similarity > 0.999


def test_the_fp32_islands_are_those_of_the_official_precision():
    model = WanModel(small_shape("wan2.1-flf2v-14B-720P"))
    names = {re.sub(r"\d+", "N", name, count=1) for name, _ in model.named_parameters() if is_fp32(name)}
    assert {name for name in names if name.startswith("blocks")} == {
        "blocks.N.modulation", "blocks.N.norm3.weight", "blocks.N.norm3.bias",
        "blocks.N.self_attn.norm_q.weight", "blocks.N.self_attn.norm_k.weight",
        "blocks.N.cross_attn.norm_q.weight", "blocks.N.cross_attn.norm_k.weight",
        "blocks.N.cross_attn.norm_k_img.weight",
    }  # fmt: skip
    image = {name for name, _ in model.named_parameters() if name.startswith("img_emb") and is_fp32(name)}
    norms = {f"img_emb.proj.{layer}.{kind}" for layer in (0, 4) for kind in ("weight", "bias")}
    assert image == norms | {"img_emb.emb_pos"}
    others = {name.split(".")[0] for name in names if not name.startswith("blocks")}
    assert others == {"time_embedding", "time_projection", "head", "img_emb"}


@pytest.mark.parametrize("family", ["wan2.1-t2v-1.3B", "wan2.1-flf2v-14B-720P", "wan2.2-ti2v-5B"])
@torch.no_grad()
def test_nothing_in_the_forward_pass_waits_for_a_value(family):
    shape = small_shape(family)
    with torch.device("meta"):  # where there are no values to wait for
        model, latents, timestep = WanModel(shape), torch.empty(2, shape.in_dim, 3, 4, 6), torch.empty(2, 2)
        image = torch.empty(2, 2 * PER_IMAGE, IMAGE_DIM) if shape.image_dim else None
        velocity = model(latents, timestep, torch.empty(2, 5, SHAPE.text_dim), image)
    assert velocity.shape == (2, shape.out_dim, 3, 4, 6)


def test_the_rotary_table_is_built_once_per_shape():
    device = torch.device("cpu")
    first = rotary_table((2, 3, 4), 24, device)
    assert rotary_table((2, 3, 4), 24, device) is first
    assert first.shape == (24, 1, 12, 2) and first.dtype == torch.float32
    assert not rotary_table((2, 3, 5), 24, device).is_inference()


def test_a_rotary_table_built_while_sampling_can_be_trained_with():
    with torch.inference_mode():
        table = rotary_table((1, 5, 7), 24, torch.device("cpu"))
    assert not table.is_inference()


def test_rotation_keeps_lengths_and_is_the_same_in_real_numbers_for_a_compiler(monkeypatch):
    table = rotary_table((2, 3, 4), 24, torch.device("cpu"))
    assert torch.allclose(table.square().sum(-1), torch.ones(24, 1, 12))
    x = torch.randn(2, 24, 2, 24, generator=torch.Generator().manual_seed(0))
    turned = rotate(x, table)
    assert torch.allclose(turned.norm(dim=-1), x.norm(dim=-1)) and torch.equal(turned[:, 0], x[:, 0])
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert torch.allclose(rotate(x, table), turned, atol=1e-6)


def test_the_stream_that_blocks_read_is_contiguous():
    model, seen = WanModel(SHAPE), []
    model.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].is_contiguous()))
    model(torch.ones(2, SHAPE.in_dim, 2, 4, 6), torch.ones(2), torch.ones(2, 5, SHAPE.text_dim))
    assert seen == [True]


RELEASED = {
    "wan2.1-t2v-1.3B": ["wan2.1_t2v_1.3b"],
    "wan2.1-t2v-14B": ["wan2.1_t2v_14b"],
    "wan2.1-i2v-14B-480P": ["wan2.1_i2v_14b_480p"],
    "wan2.1-i2v-14B-720P": ["wan2.1_i2v_14b_720p"],
    "wan2.1-flf2v-14B-720P": ["wan2.1_flf2v_14b_720p"],
    "wan2.2-t2v-A14B": ["wan2.2_t2v_a14b_high_noise", "wan2.2_t2v_a14b_low_noise"],
    "wan2.2-i2v-A14B": ["wan2.2_i2v_a14b_high_noise", "wan2.2_i2v_a14b_low_noise"],
    "wan2.2-ti2v-5B": ["wan2.2_ti2v_5b"],
    "wan2.1-fun-14B-InP": ["wan2.1_fun_14b_inp"],
    "wan2.2-fun-A14B-InP": ["wan2.2_i2v_a14b_high_noise", "wan2.2_i2v_a14b_low_noise"],  # in the layout of I2V-A14B
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_released_models_have_exactly_the_official_names_and_shapes(family):
    with torch.device("meta"):
        model = WanModel(FAMILIES[family].shape)
    actual = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert len(RELEASED[family]) == len(FAMILIES[family].experts)
    for manifest in RELEASED[family]:
        assert actual == load_manifest(manifest)
