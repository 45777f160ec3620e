"""Which layers are held in which format, and what it takes."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from tests.formats import FORMATS
from tests.loras import make_pair
from tests.tiny import TINY_SHAPE, tiny_shape, tiny_text_encoder, tiny_transformer, write_model
from utils.adapters.attach import AdapterOptions, plan_adapter
from utils.adapters.lora_file import LoraFile, delta
from utils.adapters.lora_writer import write_lora
from utils.storage.formats import quantise
from utils.storage.linear import QuantisedLinear
from utils.storage.load import Store
from utils.storage.weights import Storage, format_of, linear_layers
from wan.checkpoints import ModelFiles, Quantised, build_transformer, cast_to, open_model
from wan.configs import FAMILIES
from wan.modules.model import WanModel, WanShape, is_fp32

BF16, FP32 = torch.bfloat16, torch.float32
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
WITH_IMAGES = "wan2.1-flf2v-14B-720P"
PATTERN = r"blocks\.\d+\.((self|cross)_attn\.(q|k|v|o|k_img|v_img)|ffn\.[02])"


# -------------------------------------------------------------------------------------------------- which layers


@pytest.mark.parametrize(("family", "per_block"), [("wan2.1-t2v-1.3B", 10), (WITH_IMAGES, 12)])
@pytest.mark.parametrize("keeps_ends", [False, True])
def test_the_linear_layers_of_blocks_are_quantised_and_nothing_else(family, per_block, keeps_ends):
    shape = tiny_shape(FAMILIES[family], WanShape(dim=48, ffn_dim=96, num_heads=2, num_layers=3))
    with torch.device("meta"):
        model = WanModel(shape)
    layers = Storage(CPU, BF16, "int8", keeps_ends).prepare(model)
    blocks = {1} if keeps_ends else {0, 1, 2}
    assert len(layers) == per_block * len(blocks)
    assert {int(name.split(".")[1]) for name in layers} == blocks
    found = {name for name, module in model.named_modules() if isinstance(module, QuantisedLinear)}
    assert {f"{name}.weight" for name in found} == layers.keys()
    assert all(model.get_submodule(name) is layers[f"{name}.weight"] for name in found)
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert linears - found >= {"text_embedding.0", "time_embedding.2", "time_projection.1", "head.head"}
    assert all(name.startswith("blocks.") for name in found)


IN_INT8 = {  # of a block that reads pictures, by what is said of them
    "fp8": "",
    "int8": "self_attn.q .k .v .o cross_attn.q .k .v .o .k_img .v_img ffn.0 ffn.2",
    "fp8_scaled": "self_attn.q .k .v .o cross_attn.q .k .v .o .k_img .v_img ffn.2",
    "nf4": "self_attn.q .k .v .o cross_attn.q .k .v .o .k_img .v_img",
}


@pytest.mark.parametrize("format", FORMATS)
def test_layers_whose_rounding_costs_most_are_in_int8(format):
    with torch.device("meta"):
        layers = linear_layers(WanModel(tiny_shape(FAMILIES[WITH_IMAGES], replace(TINY_SHAPE, num_layers=1))))
    found = {name.removeprefix("blocks.0.") for name in layers if format_of(name, format) == "int8"}
    expected, part = set[str](), ""
    for name in IN_INT8[format].split():
        part = part if name.startswith(".") else name.partition(".")[0]
        expected.add(f"{part}{name}" if name.startswith(".") else name)
    assert found == expected
    assert {format_of(name, format) for name in layers} <= {"int8", format} and len(layers) == 12


def test_without_a_format_no_layer_is_changed():
    with torch.device("meta"):
        model = WanModel(TINY_SHAPE)
    assert Storage(CPU, BF16).prepare(model) == {}
    assert not any(isinstance(module, QuantisedLinear) for module in model.modules())


# ------------------------------------------------------------------------------------------------------ what they hold


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> ModelFiles:
    """A small model in fp32."""
    return open_model(write_model(tmp_path_factory.mktemp("models") / "Wan2.1-T2V-1.3B"))


def load(files: ModelFiles, held: Storage, opts: AdapterOptions | None = None) -> WanModel:
    """A model, with what is fused by these options."""
    model = build_transformer(files.transformer)
    if opts is None:
        Store(held).load(model, files.transformer, cast_to)
        return model
    plan = plan_adapter(opts, build_transformer(files.transformer))
    Store(held).load(model, files.transformer, lambda dtype, device: plan.place(cast_to(dtype, device)), plan.changed)
    return model


def bytes_of(model: nn.Module) -> dict[str, int]:
    """What each parameter takes, with its scale."""
    sizes = {name: parameter.nbytes for name, parameter in model.named_parameters()}
    for name, module in model.named_modules():
        if isinstance(module, QuantisedLinear) and module.scale is not None:
            sizes[f"{name}.weight"] += module.scale.nbytes
    return sizes


@pytest.mark.parametrize("format", [None, *FORMATS])
@pytest.mark.parametrize("keeps_ends", [False, True])
def test_sizes_are_known_before_the_model_is_there(files, format, keeps_ends):
    held = Storage(CPU, BF16, format, keeps_ends)
    sizes = held.sizes(build_transformer(files.transformer))
    assert sizes == bytes_of(load(files, held))


@pytest.mark.parametrize("format", [None, *FORMATS])
def test_the_layers_that_are_not_quantised_compute_in_the_dtype_of_the_device_or_in_fp32(files, format):
    model = load(files, Storage(CPU, BF16, format))
    state = tiny_transformer().state_dict()
    for name, parameter in model.named_parameters():
        if format is None or name.removesuffix(".weight") not in linear_layers(model):
            dtype = FP32 if is_fp32(name) else BF16
            assert parameter.dtype == dtype and torch.equal(parameter, state[name].to(dtype))


@pytest.mark.parametrize("format", FORMATS)
def test_codes_are_made_of_what_the_file_says_and_not_of_what_is_left_of_it_in_bf16(files, format):
    model, state, others = load(files, Storage(CPU, BF16, format)), tiny_transformer().state_dict(), 0
    for name, layer in linear_layers(model).items():
        stored_in = format_of(name, format)
        exact = quantise(state[f"{name}.weight"], stored_in)
        assert torch.equal(layer.weight.float(), exact.codes.float())
        assert exact.scale is None if layer.scale is None else torch.equal(layer.scale, exact.scale)
        rounded = quantise(state[f"{name}.weight"].bfloat16(), stored_in)
        others += int((rounded.codes.float() != exact.codes.float()).sum())
    assert others > 0


@pytest.mark.parametrize("format", FORMATS)
def test_a_fused_lora_is_in_the_codes_of_its_layer_alone(files, format, tmp_path):
    pair, name = make_pair((TINY_SHAPE.dim, TINY_SHAPE.dim)), "blocks.0.self_attn.q"
    write_lora(tmp_path / "style.safetensors", LoraFile({name: pair}))
    held = Storage(CPU, BF16, format)
    fused = load(files, held, AdapterOptions(fuse_lora=tmp_path / "style.safetensors", fuse_lora_weight=0.5))
    state = tiny_transformer().state_dict()
    expected = quantise(state[f"{name}.weight"] + 0.5 * delta(pair), format_of(name, format))
    assert torch.equal(fused.get_submodule(name).weight.float(), expected.codes.float())
    plain = linear_layers(load(files, held))
    different = {each for each, layer in linear_layers(fused).items() if not same(layer, plain[each])}
    assert different == {name}


def same(layer: QuantisedLinear, other: QuantisedLinear) -> bool:
    return torch.equal(layer.weight.float(), other.weight.float())


def test_a_fused_lora_changes_codes_that_would_be_kept(tmp_path):
    """Only the layers that it changes are quantised again; those of a file in int8 stay as they are elsewhere."""
    layer = QuantisedLinear(nn.Linear(32, 16, device="meta"), Quantised(torch.empty(16, 32), None))
    stored = quantise(torch.randn(16, 32, generator=torch.Generator().manual_seed(0)), "int8")
    from_file = Quantised(stored.codes, stored.scale, stored.group)
    held = Storage(CPU, BF16, "int8")

    def cast(dtype: torch.dtype, device: torch.device) -> Callable[[str, object], Tensor]:
        return lambda _, each: each.values(dtype) + 1

    place = held.place({"blocks.0.a.weight": layer}, cast, lambda _: CPU)
    assert torch.equal(place("blocks.0.a.weight", from_file), stored.codes)
    place = held.place({"blocks.0.a.weight": layer}, cast, lambda _: CPU, changed=["blocks.0.a.weight"])
    expected = quantise(from_file.values(FP32) + 1, "int8")
    assert torch.equal(place("blocks.0.a.weight", from_file), expected.codes)


def test_a_tensor_of_another_shape_is_left_to_be_refused():
    layer = QuantisedLinear(nn.Linear(32, 16, device="meta"), Quantised(torch.empty(16, 32), None))
    place = Storage(CPU, BF16, "int8").place({"blocks.0.a.weight": layer}, cast_to, lambda _: CPU)
    assert place("blocks.0.a.weight", torch.ones(4, 4)).shape == (4, 4)


def test_values_are_quantised_on_the_device_and_go_where_they_wait():
    made_on = []

    def cast(dtype: torch.dtype, device: torch.device) -> Callable[[str, Tensor], Tensor]:
        made_on.append((dtype, device))
        return lambda _, each: each.to(dtype)

    layer = QuantisedLinear(nn.Linear(32, 16, device="meta"), Quantised(torch.empty(16, 32), None))
    device, wait = torch.device("cpu", 0), torch.device("meta")
    place = Storage(device, BF16, "int8").place({"blocks.0.a.weight": layer}, cast, lambda _: wait)
    assert place("blocks.0.a.weight", torch.randn(16, 32)).is_meta and layer.scale.is_meta
    assert made_on == [(FP32, device)]


@pytest.mark.parametrize(
    ("stored", "changed", "made_on"),
    [
        (torch.ones(4, 4), [], "meta"),  # a cast is the same everywhere
        (torch.ones(4, 4), ["a"], "cpu"),
        (Quantised(torch.ones(4, 4, dtype=torch.int8), torch.ones(4, 1), 4), [], "cpu"),
    ],
)
def test_values_that_are_computed_are_computed_on_the_device_wherever_they_wait(stored, changed, made_on):
    devices = []

    def cast(dtype: torch.dtype, device: torch.device) -> Callable[[str, object], Tensor]:
        devices.append(device.type)
        return cast_to(dtype, device)

    place = Storage(CPU, BF16).place({}, cast, lambda _: torch.device("meta"), changed)
    assert place("a", stored).is_meta and devices == [made_on]


def test_a_text_encoder_is_held_in_the_same_way():
    encoder = tiny_text_encoder(32)
    names = set(linear_layers(encoder))
    assert len(names) == 2 * 7  # q, k, v, o and the three of a gated ffn, in each of two blocks
    sizes = Storage(CPU, FP32, "int8").sizes(encoder, lambda _: False)
    assert sizes["blocks.0.attn.q.weight"] == 32 * 32 + 4 * 32
    assert sizes["token_embedding.weight"] == encoder.token_embedding.weight.numel() * 4
