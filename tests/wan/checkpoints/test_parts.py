"""Modules are built for the weights that there are, at any width; what is no such part is refused before loading."""

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from torch import nn

from tests.damage import refused
from tests.manifests import load_manifest
from tests.tiny import tiny_clip, tiny_text_encoder, tiny_vae, tiny_vae22
from wan.checkpoints.parts import (
    build_text_encoder,
    build_transformer,
    build_vae,
    check_module,
    check_names,
    check_shapes,
    check_vision,
    on_meta,
    shape_of_vision,
)
from wan.checkpoints.tensors import Entry, Piece
from wan.checkpoints.transformer import TransformerFiles
from wan.checkpoints.weights import Weights, count_blocks, reading_widths
from wan.modules.clip import VisionShape, used_shapes
from wan.modules.model import WanShape
from wan.modules.vae2_2 import Wan22VAE

PATH = Path("models/some/weights")
Shapes = Mapping[str, tuple[int, ...]]


def weights_of(shapes: Shapes) -> Weights:
    return Weights(PATH, {name: Entry(shape, (Piece(PATH, name),)) for name, shape in shapes.items()})


def shapes_of(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


VAE21, VAE22, UMT5 = shapes_of(tiny_vae()), shapes_of(tiny_vae22()), shapes_of(tiny_text_encoder())
CLIP = {name: tuple(tensor.shape) for name, tensor in tiny_clip().items()}


def check_vae(weights: Weights) -> None:
    check_module(build_vae(weights), weights)


def check_text_encoder(weights: Weights) -> None:
    check_module(build_text_encoder(weights), weights)


def check_clip(weights: Weights) -> None:
    check_vision(weights, shape_of_vision(weights))


# ------------------------------------------------------------------------------------------------------ what is built


@pytest.mark.parametrize(
    ("manifest", "build", "release"),
    [
        ("wan2.1_vae", build_vae, "Wan 2.1"),
        ("wan2.2_vae", build_vae, "Wan 2.2"),
        ("t5_umt5_xxl_enc", build_text_encoder, ""),
    ],
)
def test_the_released_parts_are_built_by_their_shapes_and_cost_no_memory(manifest, build, release):
    weights = weights_of(load_manifest(manifest))
    module = build(weights)
    check_module(module, weights)
    assert not module.training and all(p.is_meta and not p.requires_grad for p in module.parameters())
    assert getattr(module, "release", "") == release and isinstance(module, Wan22VAE) == (release == "Wan 2.2")


def test_the_released_vision_encoder_is_known_by_its_shapes():
    released = {name: shape for name, shape in load_manifest("clip_xlm_roberta_vit_h_14").items() if "visual." in name}
    assert shape_of_vision(weights_of(released)) == VisionShape()
    shortened = {name: shape for name, shape in released.items() if not name.startswith("visual.transformer.31.")}
    refused("has 31 blocks, not 32", shape_of_vision, weights_of(shortened))
    check_clip(weights_of(released))
    check_clip(weights_of({name: released[name] for name in used_shapes(VisionShape())} | last_block(released)))


def last_block(shapes: Shapes) -> Shapes:
    """One tensor of it is enough to count it."""
    return {"visual.transformer.31.norm1.bias": shapes["visual.transformer.31.norm1.bias"]}


@pytest.mark.parametrize(
    ("module", "build"),
    [
        (tiny_vae(dim=12), build_vae),
        (tiny_vae22(dim=12, decoder_dim=8), build_vae),
        (tiny_text_encoder(dim=16), build_text_encoder),
    ],
)
def test_other_widths_are_read_from_the_shapes(module, build):
    built = build(weights_of(shapes_of(module)))
    assert shapes_of(built) == shapes_of(module)


def test_a_transformer_is_built_of_its_shape_alone():
    shape = WanShape(dim=48, ffn_dim=64, num_heads=2, num_layers=1)
    model = build_transformer(TransformerFiles(PATH, {}, shape))
    assert model.shape == shape and all(p.is_meta and not p.requires_grad for p in model.parameters())


def test_a_transformer_of_impossible_widths_is_refused():
    for shape in (WanShape(dim=2**40, ffn_dim=2**40), WanShape(patch_size=(2**30, 2**30, 2**30))):
        refused("some/weights has a tensor of unexpected shape", build_transformer, TransformerFiles(PATH, {}, shape))


def test_on_meta_gives_a_frozen_module_in_eval_mode():
    module = on_meta(lambda: nn.Sequential(nn.Linear(10**6, 10**6), nn.Dropout()))
    assert module[0].weight.is_meta and not module[0].weight.requires_grad and not module[1].training


# ---------------------------------------------------------------------------------------------------- what is refused


def test_a_pruned_vae_is_named():
    pruned = VAE21 | {name: (4, *shape[1:]) for name, shape in VAE21.items() if name == "decoder.head.0.gamma"}
    message = r"is a pruned VAE \(its encoder has the width 8, its decoder 4\), which is not read here"
    refused(message, build_vae, weights_of(pruned))


def test_a_t5_that_is_no_umt5_is_named():
    plain = {name: shape for name, shape in UMT5.items() if not name.startswith("blocks.1.pos_embedding")}
    message = "is a T5 text encoder, not a UMT5 one: only its first block has a table of positions"
    refused(message, build_text_encoder, weights_of(plain))


def test_one_block_is_enough_for_a_umt5():
    check_text_encoder(weights_of({name: shape for name, shape in UMT5.items() if not name.startswith("blocks.1.")}))


def test_a_vae_of_other_latents_is_refused():
    for shapes, needed in ((VAE21, 16), (VAE22, 48)):
        wrong = shapes | {"conv2.weight": (7, 7, 1, 1, 1)}
        refused(f"latent statistics for z_dim {needed}, not 7", build_vae, weights_of(wrong))


def test_a_vision_encoder_of_other_heads_is_refused():
    wrong = CLIP | {"visual.patch_embedding.weight": (96, 3, 14, 14)}
    refused("unexpected shape: the width 96 is not a multiple of 80", shape_of_vision, weights_of(wrong))


WIDTHS: list[tuple[Callable[[Weights], None], Shapes, str]] = [
    *((check_vae, VAE21, name) for name in ("encoder.conv1.weight", "conv2.weight", "decoder.head.0.gamma")),
    *((check_vae, VAE22, name) for name in ("encoder.conv1.weight", "conv2.weight", "decoder.head.0.gamma")),
    *(
        (check_text_encoder, UMT5, f"blocks.0.{name}.weight")
        for name in ("attn.q", "ffn.fc1", "pos_embedding.embedding")
    ),
    (check_text_encoder, UMT5, "token_embedding.weight"),
    (check_text_encoder, UMT5, "norm.weight"),
    *((check_clip, CLIP, f"visual.{name}") for name in ("patch_embedding.weight", "pos_embedding", "cls_embedding")),
    *((check_clip, CLIP, f"visual.transformer.0.{name}.weight") for name in ("mlp.0", "attn.to_qkv")),
]


@pytest.mark.parametrize("wrong", [(), (1,), (3, 3), (1, 1, 1), (1, 2, 3, 4, 5), (2**40, 2**40), (2**62,), (1,) * 8])
@pytest.mark.parametrize(("check", "shapes", "name"), WIDTHS)
def test_any_other_shape_of_a_tensor_that_tells_a_width_is_refused(check, shapes, name, wrong):
    refused("unexpected shape|has the tensor|lacks|pruned", check, weights_of(dict(shapes) | {name: wrong}))


@pytest.mark.parametrize(("check", "shapes", "name"), WIDTHS)
def test_a_missing_tensor_that_tells_a_width_is_named(check, shapes, name):
    rest = {each: shape for each, shape in shapes.items() if each != name}
    assert name in refused("lacks", check, weights_of(rest))


@pytest.mark.parametrize("check", [check_vae, check_text_encoder, check_clip])
def test_weights_of_nothing_known_lack_the_official_layout(check):
    for shapes in ({}, {"x": ()}, {"": (1,)}):
        refused("some/weights lacks the tensor .+: not the official layout", check, weights_of(shapes))


def test_foreign_tensors_beside_a_vision_encoder_are_refused_and_unread_ones_are_not():
    refused(r"has the foreign tensor textual\.x", check_clip, weights_of(CLIP | {"textual.x": (1,)}))
    check_clip(weights_of(CLIP | {"visual.post_norm.weight": (7,), "visual.head": (1, 7)}))


# ------------------------------------------------------------------------------------------------ names and messages

EXPECTED = dict.fromkeys("abcdef", (1, 2))


def test_names_and_shapes_that_are_expected_pass_in_any_order():
    check_names(EXPECTED, reversed(EXPECTED), PATH)
    check_shapes(EXPECTED, dict(reversed(EXPECTED.items())), PATH)


def test_names_are_strict_in_both_directions_and_three_are_listed():
    refused(f"^{PATH} lacks tensor b, c, d and 2 more$", check_names, EXPECTED, ["a"], PATH)
    refused(f"^{PATH} has the foreign tensor x, y, z$", check_names, EXPECTED, [*EXPECTED, "z", "y", "x"], PATH)


def test_a_wrong_shape_is_shown_with_the_right_one():
    shapes = EXPECTED | {"b": (2, 1), "e": ()}
    message = rf"^{PATH} has the tensor b of shape \[2, 1\], not \[1, 2\], e of shape \[\], not \[1, 2\]$"
    refused(message, check_shapes, EXPECTED, shapes, PATH)


@pytest.mark.parametrize("error", [KeyError("x"), ValueError("a\nb\nc\nd"), IndexError(), OverflowError("y" * 10_000)])
def test_what_a_wrong_shape_raises_becomes_one_short_message(error):
    def read() -> None:
        with reading_widths(PATH):
            raise error

    message = refused(f"^{PATH} (lacks the tensor x: not the official layout|has a tensor of unexpected shape)", read)
    assert len(message) < 200


def test_blocks_are_counted_up_to_more_than_any_model_has():
    assert count_blocks(["blocks.0.a", "blocks.0.b", "blocks.7.a", "head.x", "vace_blocks.3.x"]) == 2
    with pytest.raises(ValueError, match="1001 blocks"):
        count_blocks([f"blocks.{n}.x" for n in range(1001)])
