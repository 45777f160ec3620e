"""fp8 is read to the values that ComfyUI computes with; what else is quantised is refused by the name of its format."""

import json
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from tests.damage import refused
from wan.checkpoints.quantised import find_scales
from wan.checkpoints.stored import Quantised, values_of

BF16, FP32 = torch.bfloat16, torch.float32
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
NESTED = "[" * 100_000
LAYER = {"a.weight": ((6, 8), "F8_E4M3"), "a.bias": ((6,), "BF16"), "norm.weight": ((6,), "F32")}
Facts = Mapping[str, tuple[tuple[int, ...], str]]


def scales_of(
    facts: Facts, metadata: Mapping[str, str] | None = None, texts: Mapping[str, str | Tensor] | None = None
) -> tuple[dict[str, str], set[str]]:
    """The scales of a file with tensors of these shapes and dtypes, and with these JSON texts as tensors."""
    stored = {n: torch.tensor(list(t.encode())).byte() if isinstance(t, str) else t for n, t in (texts or {}).items()}
    facts = {**facts, **{name: (tuple(tensor.shape), "U8") for name, tensor in stored.items()}}
    shapes, dtypes = ({name: fact[index] for name, fact in facts.items()} for index in (0, 1))
    found = find_scales(shapes, dtypes, metadata or {}, stored.__getitem__)
    return found.scales, found.unread


def header(settings: object) -> dict[str, str]:
    return {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": {"a": settings}})}


# ------------------------------------------------------------------------------------------------------- the values


def stored(dtype: torch.dtype = E4M3) -> Tensor:
    return (torch.randn(6, 8, generator=torch.Generator().manual_seed(0)) * 3).to(dtype)


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("compute", [BF16, torch.float16, FP32])
def test_plain_fp8_is_cast_to_the_dtype_of_the_computation(dtype, compute):
    weight = Quantised(stored(dtype), None).values(compute)
    assert weight.dtype == compute and torch.equal(weight.float(), stored(dtype).float())


@pytest.mark.parametrize("dtype", [BF16, FP32, torch.float16])
def test_what_is_not_quantised_stays_as_it_is(dtype):
    weight = torch.randn(6, 8).to(dtype)
    assert values_of(weight, BF16) is weight


@pytest.mark.parametrize("dtype", [E4M3, E5M2, BF16])  # a layer of high precision may have a scale too
@pytest.mark.parametrize("size", [(), (1,), (1, 1), (6, 1), (6, 4, 1), (6, 1, 1), (6, 8, 1)])
def test_a_scale_multiplies_all_a_row_or_a_block_of_columns(dtype, size):
    scale = torch.rand(size, generator=torch.Generator().manual_seed(1)) + 0.5
    kept = stored(dtype)
    blocks = size[1] if len(size) == 3 else 1
    factors = scale.reshape(-1, blocks).repeat_interleave(8 // blocks, dim=1)
    assert torch.equal(Quantised(kept, scale).values(FP32), kept.float() * factors)


def test_the_scale_is_rounded_first_to_the_dtype_of_the_computation():
    scale = torch.tensor(1.00585)  # between two values of bf16
    weight = Quantised(stored(), scale).values(BF16)
    assert torch.equal(weight, stored().to(BF16) * scale.to(BF16))
    assert not torch.equal(weight, (stored().float() * scale).to(BF16))
    assert torch.equal(Quantised(stored(), scale.double()).values(FP32), stored().float() * scale)


@pytest.mark.parametrize("size", [(), (1,), (1, 1)])
def test_one_scale_fits_a_weight_of_any_axes(size):
    for shape in ((), (5,), (1, 5), (2, 3, 1, 2, 2)):
        weight = torch.full(shape, 3.0).to(E4M3)
        assert torch.equal(Quantised(weight, torch.full(size, 0.5)).values(FP32), torch.full(shape, 1.5))


@pytest.mark.parametrize("dtype", [BF16, FP32, E4M3])
def test_the_memory_of_the_file_is_not_changed(dtype):
    kept = stored(dtype)
    Quantised(kept, torch.tensor(2.0)).values(dtype if dtype != E4M3 else BF16)
    assert torch.equal(kept.float(), stored(dtype).float())


# ------------------------------------------------------------------------------------------------ where scales are


@pytest.mark.parametrize("spelling", ["scale_weight", "weight_scale"])
@pytest.mark.parametrize("size", [(), (1,), (1, 1), (6, 1), (6, 4, 1)])
@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "BF16", "F64"])
def test_scales_are_found_by_either_name_and_with_any_shape_that_fits(spelling, size, dtype):
    scale = f"a.{spelling}"
    facts = LAYER | {"a.weight": ((6, 8), dtype), scale: (size, "F32")}
    assert scales_of(facts) == ({"a.weight": scale}, {scale})


def test_marks_and_scales_of_inputs_are_of_no_module():
    facts = LAYER | {"scaled_fp8": ((0,), "F8_E4M3"), "model.scaled_fp8": ((2,), "F8_E4M3")}
    facts |= dict.fromkeys(("a.weight_scale", "a.input_scale", "a.scale_input"), ((), "F32"))
    scales, unread = scales_of(facts, texts={"a.comfy_quant": '{"format": "float8_e4m3fn"}'})
    assert scales == {"a.weight": "a.weight_scale"}
    assert unread == facts.keys() - LAYER.keys() | {"a.comfy_quant"}


@pytest.mark.parametrize("layer", ["a", "model.diffusion_model.a", "diffusion_model.a"])
def test_an_fp8_weight_that_is_stated_to_be_scaled_needs_its_scale(layer):
    facts = {f"{layer}.weight": ((6, 8), "F8_E4M3")}
    message = f"has no scale of {layer}.weight, which is stated to be scaled"
    refused(message, scales_of, facts, texts={f"{layer}.comfy_quant": '{"format": "float8_e4m3fn"}'})
    refused(message, scales_of, facts, metadata=header({"format": "float8_e4m3fn"}))
    other = {name.replace("a.weight", "b.weight"): fact for name, fact in facts.items()}
    assert scales_of(other, metadata=header({"format": "float8_e4m3fn"})) == ({}, set())
    in_bf16 = {f"{layer}.weight": ((6, 8), "BF16")}
    assert scales_of(in_bf16, metadata=header({"format": "float8_e4m3fn"})) == ({}, set())


def test_what_belongs_to_no_layer_is_left_to_be_refused_as_foreign():
    facts = LAYER | {"b.weight_scale": ((), "F32"), "b.input_scale": ((), "F32"), "scale_weight": ((), "F32")}
    assert scales_of(facts) == ({}, set())


@pytest.mark.parametrize("format_", ["float8_e4m3fn", "float8_e5m2", "float8_e4m3fn_rowwise"])
def test_a_stated_fp8_is_read_wherever_it_is_stated(format_):
    facts = LAYER | {"a.weight_scale": ((), "F32")}
    settings = {"format": format_, "full_precision_matrix_mult": True}
    for metadata, texts in (
        (header(settings), {}),
        (header(format_), {}),
        ({}, {"a.comfy_quant": json.dumps(settings)}),
    ):
        assert scales_of(facts, metadata, texts)[0] == {"a.weight": "a.weight_scale"}
    assert scales_of(LAYER, {"format": "pt"}) == ({}, set())


# ---------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("format_", ["nvfp4", "mxfp8", "int8_blockwise", "convrot_w4a4", "asym_w4a8_int8", "nf4", "x"])
def test_a_stated_format_that_is_not_read_is_named(format_):
    message = rf"is quantised to {format_} \(at a\), which is not read here; bf16, fp16, fp32, fp8, .+ are$"
    refused(message, scales_of, LAYER, header({"format": format_}))
    refused(message, scales_of, LAYER, header(format_))
    refused(message, scales_of, LAYER, {}, {"a.comfy_quant": json.dumps({"format": format_})})


U8, I8, MX = {"a.weight": ((6, 4), "U8")}, {"a.weight": ((6, 8), "I8")}, {"a.weight_scale": ((128, 4), "F8_E8M0")}
UNSTATED = {
    "nvfp4": U8 | {"a.weight_scale": ((128, 4), "F8_E4M3"), "a.weight_scale_2": ((), "F32")},
    "mxfp8": MX,
    "int8": I8 | {"a.weight_scale": ((6,), "F32")},
    "int8 of bitsandbytes": I8 | {"a.SCB": ((6,), "F32")},
    "nf4 of bitsandbytes": U8 | {"a.weight.quant_state.bitsandbytes__nf4": ((99,), "U8")},
    "fp4 of bitsandbytes": U8 | {"a.weight.quant_state.bitsandbytes__fp4": ((99,), "U8")},
    "GPTQ or AWQ": {"a.qweight": ((1, 8), "I32"), "a.scales": ((1, 8), "F16"), "a.qzeros": ((1, 1), "I32")},
    "a format with scaled inputs": {"a.pre_quant_scale": ((8,), "BF16")},
    "4 or 8 bits": U8,
    "fp4": {"a.weight": ((6, 8), "F4")},
    "I64": {"a.weight": ((6, 8), "I64")},
    "torch.qint8": {"a.weight": ((6, 8), "torch.qint8")},
}


@pytest.mark.parametrize("kind", UNSTATED)
@pytest.mark.parametrize("reverse", [False, True])
def test_an_unstated_format_is_named_by_its_tensors_in_whatever_order(kind, reverse):
    facts = LAYER | UNSTATED[kind]
    if reverse:
        facts = dict(reversed(facts.items()))
    assert refused(rf"is quantised to {kind} \(", scales_of, facts).endswith("and int8 of ComfyUI are")


@pytest.mark.parametrize(
    ("size", "weight"),
    [
        ((0,), (6, 8)),
        ((6,), (6, 8)),
        ((8, 1), (6, 8)),
        ((1, 8), (6, 8)),
        ((6, 3, 1), (6, 8)),
        ((6, 0, 1), (6, 8)),
        ((6, 4, 2), (6, 8)),
        ((6, 4, 1, 1), (6, 8)),
        ((6, 1), (6,)),
        ((6, 1), (6, 2, 1, 2, 2)),
        ((6, 1), ()),
        ((6, 16, 1), (6, 8)),
    ],
)
def test_a_scale_that_does_not_fit_its_weight_is_refused_with_both_shapes(size, weight):
    facts = LAYER | {"a.weight": (weight, "F8_E4M3"), "a.scale_weight": (size, "F32")}
    message = refused("has the scale a.scale_weight of shape", scales_of, facts)
    assert message.endswith(f"{list(size)}, which does not fit a.weight {list(weight)}")


def test_a_weight_with_two_scales_is_refused():
    facts = LAYER | {"a.scale_weight": ((), "F32"), "a.weight_scale": ((), "F32")}
    refused("has two scales of a.weight: a.scale_weight and a.weight_scale", scales_of, facts)


BAD_JSON = ["", "{", "[1]", "7", NESTED, '"float8_e4m3fn"', "\xff{}"]


@pytest.mark.parametrize("text", BAD_JSON)
def test_a_text_that_is_no_json_object_is_refused(text):
    refused("has a.comfy_quant that is not", scales_of, LAYER, {}, {"a.comfy_quant": torch.tensor([0xFF]).byte()})
    refused("has a.comfy_quant that is not a JSON object", scales_of, LAYER, {}, {"a.comfy_quant": text})
    metadata = {"_quantization_metadata": text}
    refused("has the metadata _quantization_metadata that is not a JSON object", scales_of, LAYER, metadata)


@pytest.mark.parametrize("settings", [{}, {"format": None}, {"format": ["float8_e4m3fn"]}, [], 7, None])
def test_settings_without_a_format_are_refused(settings):
    refused("states no format in the metadata of a", scales_of, LAYER, header(settings))
    if isinstance(settings, dict):
        texts = {"a.comfy_quant": json.dumps(settings)}
        refused("states no format in a.comfy_quant", scales_of, LAYER, {}, texts)


@pytest.mark.parametrize("layers", [[], "a", 7, None])
def test_metadata_without_a_table_of_layers_is_refused(layers):
    metadata = {"_quantization_metadata": json.dumps({"layers": layers})}
    refused("has metadata _quantization_metadata without a table of layers", scales_of, LAYER, metadata)


@pytest.mark.parametrize("content", [torch.zeros(2, 2).byte(), torch.zeros(()).byte(), torch.ones(3), torch.arange(3)])
def test_a_text_that_is_no_row_of_bytes_is_refused(content):
    refused("has a.comfy_quant that is no text", scales_of, LAYER, {}, {"a.comfy_quant": content})


def test_a_text_longer_than_any_is_not_read():
    content = torch.full((2**20 + 1,), ord(" "), dtype=torch.uint8)
    refused("has a.comfy_quant that is no text", scales_of, LAYER, {}, {"a.comfy_quant": content})


def test_names_from_a_file_do_not_break_the_message():
    wild = "a\n\n\n\n" + "b" * 10_000
    for metadata in (header(wild), {"_quantization_metadata": json.dumps({"layers": {wild: "nvfp4"}})}):
        assert len(refused("is quantised to", scales_of, LAYER, metadata)) < 500
    assert (
        len(refused("no format", scales_of, LAYER, {"_quantization_metadata": json.dumps({"layers": {wild: 1}})})) < 500
    )


# ---------------------------------------------------------------------------------------------------------------- int8

INT8 = {"a.weight": ((6, 512), "I8"), "a.weight_scale": ((6, 1), "F32"), "a.bias": ((6,), "BF16")}
TENSORWISE = {"format": "int8_tensorwise"}
ROTATED = TENSORWISE | {"convrot": True}


def groups_of(facts: Facts, settings: object, where: str = "a") -> dict[str, int]:
    """The groups of a file that states its format beside a layer; the same is found where its metadata states it."""
    stored = {f"{where}.comfy_quant": torch.tensor(list(json.dumps(settings).encode())).byte()}
    facts = {**facts, f"{where}.comfy_quant": ((9,), "U8")}
    shapes, dtypes = ({name: fact[index] for name, fact in facts.items()} for index in (0, 1))
    return find_scales(shapes, dtypes, {}, stored.__getitem__).groups


def below(prefix: str, facts: Facts = INT8) -> dict[str, tuple[tuple[int, ...], str]]:
    return {prefix + name: fact for name, fact in facts.items()}


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model.", "model."])
@pytest.mark.parametrize(
    ("settings", "group"),
    [
        (TENSORWISE, 0),
        (TENSORWISE | {"convrot": False, "convrot_groupsize": 7}, 0),
        (ROTATED, 256),
        (ROTATED | {"convrot_groupsize": 16}, 16),
        (ROTATED | {"convrot_groupsize": 64, "full_precision_matrix_mult": True}, 64),
    ],
)
def test_int8_is_read_where_it_is_stated_with_the_group_of_its_rotation(prefix, settings, group):
    weight = f"{prefix}a.weight"
    assert groups_of(below(prefix), settings, f"{prefix}a") == {weight: group}
    shapes, dtypes = ({name: fact[index] for name, fact in below(prefix).items()} for index in (0, 1))
    found = find_scales(shapes, dtypes, header(settings), {}.__getitem__)
    assert (found.groups, found.scales) == ({weight: group}, {weight: f"{prefix}a.weight_scale"})
    assert found.unread == {f"{prefix}a.weight_scale"}


@pytest.mark.parametrize("dtype", ["F8_E4M3", "BF16", "F32"])
def test_a_weight_that_is_none_of_int8_is_not_rotated_whatever_is_stated(dtype):
    assert groups_of(INT8 | {"a.weight": ((6, 512), dtype)}, ROTATED) == {}


@pytest.mark.parametrize("scale", [(), (1,), (1, 1), (6, 1), (6, 2, 1)])
@pytest.mark.parametrize("spelling", ["weight_scale", "scale_weight"])
def test_scales_of_int8_have_the_names_and_shapes_of_others(scale, spelling):
    facts = {"a.weight": INT8["a.weight"], f"a.{spelling}": (scale, "F32")}
    assert scales_of(facts, header(ROTATED))[0] == {"a.weight": f"a.{spelling}"}


@pytest.mark.parametrize("group", [0, 1, 2, 8, 128, 4096, -4, 16.0, True, "256", None, [256]])
def test_a_rotation_of_groups_that_are_none_is_refused(group):
    settings = ROTATED | {"convrot_groupsize": group}
    message = r"states a rotation of groups of .+ in a\.comfy_quant, which is not read here"
    refused(message, groups_of, INT8, settings)
    refused("states a rotation of groups of .+ in the metadata of a", scales_of, INT8, header(settings))


@pytest.mark.parametrize("rotated", [None, 0, 1, "yes", [], {}])
def test_a_rotation_that_is_neither_there_nor_not_is_refused(rotated):
    refused("states a rotation", groups_of, INT8, TENSORWISE | {"convrot": rotated})


def test_a_group_that_does_not_divide_the_columns_is_refused():
    facts = INT8 | {"a.weight": ((6, 384), "I8")}
    refused(r"^has a\.weight of 384 columns, which are rotated in groups of 256$", groups_of, facts, ROTATED)
    assert groups_of(facts, ROTATED | {"convrot_groupsize": 64}) == {"a.weight": 64}


def test_int8_without_its_scale_is_refused():
    refused(
        "has no scale of a.weight, which is stated to be scaled", groups_of, {"a.weight": ((6, 512), "I8")}, ROTATED
    )


@pytest.mark.parametrize("settings", [{"format": "float8_e4m3fn"}, None])
def test_int8_that_nothing_states_is_refused(settings):
    metadata = {} if settings is None else header(settings)
    refused(r"is quantised to int8 \(a\.weight is I8\), which is not read here", scales_of, INT8, metadata)
    both = INT8 | {name.replace("a.", "b."): fact for name, fact in INT8.items()}
    refused(r"is quantised to int8 \(b\.weight is I8\)", scales_of, both, header(ROTATED))


@pytest.mark.parametrize("shape", [(), (6,), (6, 256, 1, 2, 2)])
def test_int8_that_is_no_matrix_is_refused(shape):
    facts = {"a.weight": (shape, "I8"), "a.weight_scale": ((), "F32")}
    refused(r"has a\.weight of shape .+ in int8, which is no matrix", groups_of, facts, TENSORWISE)
