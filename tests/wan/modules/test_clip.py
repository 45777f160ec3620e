"""The vision encoder computes what a ViT written out here does, from pixels prepared by Wan's formula."""

import json
import math
import re

import pytest
import torch
from torch import Tensor

from tests.manifests import load_manifest
from tests.tiny import DATA, tiny_clip
from wan.modules.clip import (
    MEAN,
    STD,
    VisionEncoder,
    VisionShape,
    official_shapes,
    preprocess,
    used_shapes,
    vision_shape,
)

KEYMAP = json.loads((DATA / "keymap_clip_transformers.json").read_text(encoding="utf-8"))
DIM = 160  # two heads


def load(weights: dict[str, Tensor]) -> VisionEncoder:
    shape = vision_shape({name: tensor.shape for name, tensor in weights.items()})
    encoder = VisionEncoder(shape)
    encoder.load_official({name: weights[name] for name in used_shapes(shape)})
    return encoder.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return tiny_clip(DIM)


@pytest.fixture(scope="module")
def encoder(weights) -> VisionEncoder:
    return load(weights)


def picture(height: int, width: int, count: int = 1) -> Tensor:
    """Noise in -1..1, which no resize leaves alone."""
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(height)) * 2 - 1


def relative_error(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    return ((actual - expected).abs().max() / expected.abs().max()).item()


# ------------------------------------------------------------------------------------------------------ the features


def vit(weights: dict[str, Tensor], pixels: Tensor, blocks: int) -> Tensor:
    """The output of this many blocks, for pixels (N, 3, S, S), written out in float64."""
    w = {name.removeprefix("visual."): tensor.double() for name, tensor in weights.items()}

    def norm(x: Tensor, name: str) -> Tensor:
        deviation = x - x.mean(-1, keepdim=True)
        scale = (deviation.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return deviation / scale * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def attention(x: Tensor, name: str) -> Tensor:
        heads = [linear(x, f"{name}.to_qkv")[..., start : start + 80] for start in range(0, 3 * DIM, 80)]
        count = DIM // 80
        mixed = []
        for q, k, v in zip(heads[:count], heads[count : 2 * count], heads[2 * count :], strict=True):
            scores = (q @ k.transpose(-1, -2) / math.sqrt(80)).exp()
            mixed.append(scores / scores.sum(-1, keepdim=True) @ v)
        return linear(torch.cat(mixed, -1), f"{name}.proj")

    def gelu(x: Tensor) -> Tensor:
        return x * (1 + torch.erf(x / math.sqrt(2))) / 2

    patches = pixels.double().unfold(2, 14, 14).unfold(3, 14, 14)  # (N, 3, rows, columns, 14, 14)
    tokens = torch.einsum("nchwyx,dcyx->nhwd", patches, w["patch_embedding.weight"]).flatten(1, 2)
    x = torch.cat([w["cls_embedding"].expand(len(tokens), -1, -1), tokens], 1) + w["pos_embedding"]
    x = norm(x, "pre_norm")
    for name in (f"transformer.{block}" for block in range(blocks)):
        x = x + attention(norm(x, f"{name}.norm1"), f"{name}.attn")
        x = x + linear(gelu(linear(norm(x, f"{name}.norm2"), f"{name}.mlp.0")), f"{name}.mlp.2")
    return x


def test_the_features_are_the_tokens_of_the_last_but_one_block(weights, encoder):
    frames = picture(60, 90, count=2)
    pixels = preprocess(frames, 224)
    features = encoder.encode(frames)
    assert features.shape == (2, 257, DIM) and features.dtype == torch.float32
    assert relative_error(features, vit(weights, pixels, blocks=2)) <= 1e-5
    assert relative_error(features, vit(weights, pixels, blocks=3)) > 0.1
    assert not features.requires_grad


def test_the_epsilon_of_the_norms_is_that_of_the_official_code(weights):
    faint = {name: tensor * (1e-3 if "embedding" in name else 1) for name, tensor in weights.items()}
    frames = picture(224, 224)
    # The variance of these tokens is smaller than the epsilon, so that another one shows.
    assert relative_error(load(faint).encode(frames), vit(faint, preprocess(frames, 224), blocks=2)) <= 1e-5


def test_neither_the_last_block_nor_the_last_norm_nor_the_head_has_a_say(weights, encoder):
    unused = ("visual.transformer.2.", "visual.post_norm.", "visual.head")
    without = {name: tensor * (torch.nan if name.startswith(unused) else 1) for name, tensor in weights.items()}
    frames = picture(50, 70)
    assert torch.equal(load(without).encode(frames), encoder.encode(frames))
    assert not any(name.startswith("encoder.layers.2.") for name in encoder.visual.state_dict())


def test_each_picture_of_a_batch_is_encoded_by_itself(encoder):
    frames = picture(40, 64, count=2)
    assert relative_error(encoder.encode(frames)[1:], encoder.encode(frames[1:])) <= 1e-5


def test_another_dtype_is_close_and_the_features_stay_fp32(weights, encoder):
    frames = picture(60, 90)
    features = load(weights).bfloat16().encode(frames)
    assert features.dtype == torch.float32
    assert 0 < relative_error(features, encoder.encode(frames)) < 0.1


# ------------------------------------------------------------------------------------------------- the preprocessing


def cubic_rows(count: int, size: int) -> Tensor:
    """The matrix (count, size) of a cubic convolution with a = -0.75 from `size` samples to `count`, edges repeated.

    Keys, 1981. A kernel of four samples, also where the size is reduced: there is no antialiasing.
    """
    rows = torch.zeros(count, size, dtype=torch.float64)
    for row in range(count):
        position = (row + 0.5) * size / count - 0.5
        for sample in range(math.floor(position) - 1, math.floor(position) + 3):
            x = abs(position - sample)
            near = (1.25 * x - 2.25) * x * x + 1
            far = -0.75 * (((x - 5) * x + 8) * x - 4)
            rows[row, min(max(sample, 0), size - 1)] += near if x <= 1 else far
    return rows


# At these sizes the positions between samples are exact in fp32, in which torch computes them.
@pytest.mark.parametrize(("height", "width"), [(112, 336), (448, 280), (224, 224), (7, 896)])
def test_pixels_are_resized_to_a_square_without_antialiasing_and_normalised(height, width):
    frames = picture(height, width)
    squares = cubic_rows(224, height) @ frames.double() @ cubic_rows(224, width).T
    mean, std = (
        torch.tensor(values, dtype=torch.float64).view(3, 1, 1)
        for values in ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
    )
    expected = (squares * 0.5 + 0.5 - mean) / std
    pixels = preprocess(frames, 224)
    assert pixels.dtype == torch.float32
    assert relative_error(pixels, expected) <= 1e-5


def test_what_bicubic_overshoots_is_kept():
    stripes = torch.ones(1, 3, 60, 60)
    stripes[..., ::2] = -1
    white = (1 - torch.tensor(MEAN)) / torch.tensor(STD)
    assert (preprocess(stripes, 224).amax((0, 2, 3)) > white + 0.01).all()


def test_the_pixels_of_transformers_processor_are_others_unless_nothing_is_resized():
    from transformers import CLIPImageProcessor

    processor = CLIPImageProcessor()
    for size, equal in (((224, 224), True), ((300, 500), False)):
        image = torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        theirs = torch.as_tensor(processor(image, return_tensors="pt").pixel_values)
        ours = preprocess(image[None].float() / 127.5 - 1, 224)
        assert (relative_error(ours, theirs) <= 1e-5) == equal
    assert relative_error(ours, theirs) > 0.1


def test_the_encoder_reads_preprocessed_pixels_of_any_size_and_dtype(encoder):
    frames = picture(300, 200)
    features = encoder.visual(preprocess(frames, 224)).last_hidden_state
    assert torch.equal(encoder.encode(frames), features)
    coarse = frames.bfloat16()
    assert torch.equal(encoder.encode(coarse), encoder.encode(coarse.float()))


# ------------------------------------------------------------------------------------------------- names and widths


def transformers_names(name: str) -> list[str]:
    """The names in transformers of an official one by the published map: q, k and v, or the first rule that matches."""
    if block := re.fullmatch(KEYMAP["split_qkv"], name):
        return [f"encoder.layers.{block[1]}.self_attn.{x}_proj.{block[2]}" for x in "qkv"]
    for pattern, replacement in KEYMAP["rules_structural"]:
        renamed, count = re.subn(pattern, replacement, name)
        if count:
            return [renamed]
    raise KeyError(name)


def test_the_released_checkpoint_fills_the_whole_encoder_and_leaves_only_what_comes_after_it():
    released = {name: size for name, size in load_manifest("clip_xlm_roberta_vit_h_14").items() if "visual." in name}
    assert official_shapes(VisionShape()) == released and len(released) == 392
    assert vision_shape(released) == VisionShape() and VisionShape().num_heads == 16
    weights = {name: torch.empty(size, device="meta") for name, size in used_shapes(VisionShape()).items()}
    assert len(weights) == 392 - 12 - 3  # without the last block, the norm and the projection after it
    with torch.device("meta"):
        encoder = VisionEncoder(VisionShape())
    encoder.load_official(weights)
    renamed = {new for name in released.keys() - {"visual.head"} for new in transformers_names(name)}
    unused = {name for name in renamed if name.startswith(("encoder.layers.31.", "post_layernorm."))}
    assert len(renamed) == 519 and len(unused) == 16 + 2
    assert encoder.visual.state_dict().keys() == renamed - unused


def test_each_official_tensor_goes_where_the_published_map_says(weights, encoder):
    loaded = encoder.visual.state_dict()
    for name, tensor in weights.items():
        if name.startswith(("visual.head", "visual.post_norm.", "visual.transformer.2.")):
            continue
        names = transformers_names(name)
        assert torch.equal(torch.cat([loaded[new] for new in names]).flatten(), tensor.flatten()), name


def test_weights_are_taken_over_without_a_copy(weights, encoder):
    fused = weights["visual.transformer.0.attn.to_qkv.weight"]
    q = encoder.visual.encoder.layers[0].self_attn.q_proj.weight
    assert q.untyped_storage().data_ptr() == fused.untyped_storage().data_ptr()


def test_a_file_without_the_projection_tells_the_same_shape():
    released = load_manifest("clip_xlm_roberta_vit_h_14")
    del released["visual.head"]
    assert vision_shape(released) == VisionShape()


@pytest.mark.parametrize(("dim", "heads"), [(32, 1), (80, 1), (160, 2), (1280, 16)])
def test_heads_have_80_channels_or_are_a_single_smaller_one(dim, heads):
    assert VisionShape(dim=dim).num_heads == heads


@pytest.mark.parametrize("dim", [768, 1024, 1408])
def test_the_widths_of_other_clips_are_refused(dim):
    with pytest.raises(ValueError, match="not a multiple of 80"):
        VisionShape(dim=dim)
    shapes = {name: size for name, size in load_manifest("clip_xlm_roberta_vit_h_14").items() if "visual." in name}
    with pytest.raises(ValueError, match="not a multiple of 80"):
        vision_shape(shapes | {"visual.patch_embedding.weight": (dim, 3, 14, 14)})
