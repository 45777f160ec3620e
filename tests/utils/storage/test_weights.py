"""Which layers are held in which format, how that is said on the command line, and what it takes."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import train_wan_lora
from tests.formats import FORMATS
from tests.loras import make_pair
from tests.tiny import TINY_SHAPE, tiny_shape, tiny_text_encoder, tiny_transformer, write_model
from utils.adapters.attach import AdapterOptions, plan_adapter
from utils.adapters.lora_file import LoraFile, delta
from utils.adapters.lora_writer import write_lora
from utils.common.decisions import Decisions
from utils.common.errors import UserError
from utils.common.options import parse_options
from utils.storage import formats, weights
from utils.storage.formats import quantise
from utils.storage.linear import QuantisedLinear
from utils.storage.load import Store
from utils.storage.weights import QUANTISED, Storage, StorageOptions, hold_as, linear_layers
from wan.checkpoints import ModelFiles, build_transformer, cast_to, open_model
from wan.configs import FAMILIES
from wan.modules.model import WanModel, WanShape, is_fp32

BF16, FP32 = torch.bfloat16, torch.float32
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
WITH_IMAGES = "wan2.1-flf2v-14B-720P"
PATTERN = r"blocks\.\d+\.((self|cross)_attn\.(q|k|v|o|k_img|v_img)|ffn\.[02])"


def options(*flags: str) -> train_wan_lora.Options:
    return parse_options(train_wan_lora.Options, list(flags))


def by_toml(folder: Path, name: str, value: str) -> train_wan_lora.Options:
    (folder / "run.toml").write_text(f"{name} = {value!r}\n", encoding="utf-8")
    return options("--config", str(folder / "run.toml"))


# ------------------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize("flag", ["weight_dtype", "transformer_dtype", "text_encoder_dtype"])
@pytest.mark.parametrize(
    ("given", "meant"),
    [
        *((name, name) for name in ("auto", "fp32", "bf16", *QUANTISED)),
        *[("float32", "fp32"), ("bfloat16", "bf16"), ("float8", "fp8"), ("float8_e4m3fn", "fp8")],  # diffusion-pipe
        *[("FLOAT_32", "fp32"), ("BFLOAT_16", "bf16"), ("FLOAT_8", "fp8"), ("NFLOAT_4", "nf4")],  # OneTrainer
    ],
)
def test_a_format_has_the_names_of_other_trainers_on_the_command_line_and_in_toml(flag, given, meant, tmp_path):
    name = "text_encoder_dtype" if flag.startswith("text") else "weight_dtype"
    for found in (options(f"--{flag}", given), by_toml(tmp_path, flag, given)):
        assert getattr(found, name) == meant


@pytest.mark.parametrize("flag", ["weight_dtype", "transformer_dtype", "text_encoder_dtype"])
@pytest.mark.parametrize("given", ["fp16", "float16", "int4", "Float8", "", "INT_8"])
def test_an_unknown_format_is_refused_with_those_that_there_are(flag, given, tmp_path):
    for attempt in (lambda: options(f"--{flag}", given), lambda: by_toml(tmp_path, flag, given)):
        with pytest.raises(UserError, match="fp8_scaled"):
            attempt()


def test_weights_are_values_unless_another_format_is_asked_for():
    opts = options()
    assert (opts.weight_dtype, opts.text_encoder_dtype, opts.quantised_matmul) == ("auto", "auto", "auto")
    assert (opts.blocks_to_swap, opts.layer_offload_fraction, opts.keep_end_blocks) == (0, 0.0, False)


@pytest.mark.parametrize(
    ("name", "device", "dtype", "format"),
    [
        ("auto", CPU, FP32, None),
        ("auto", CUDA, BF16, None),
        ("fp32", CUDA, FP32, None),
        ("bf16", CPU, BF16, None),
        *((name, device, dtype, name) for name in QUANTISED for device, dtype in ((CPU, FP32), (CUDA, BF16))),
    ],
)
def test_a_name_means_a_dtype_to_compute_in_and_a_format(name, device, dtype, format):
    held = hold_as(name, device)
    assert (held.device, held.dtype, held.format) == (device, dtype, format)
    assert held.is_plain == (format is None)


def storage(shape: WanShape = TINY_SHAPE, device: torch.device = CPU, **opts: object) -> Storage:
    return StorageOptions(**opts).storage(device, shape, 100, Decisions("here"))


@pytest.mark.parametrize(
    ("opts", "streamed"),
    [
        ({}, 0),
        ({"blocks_to_swap": 1}, 1),
        ({"blocks_to_swap": 40}, 40),
        ({"layer_offload_fraction": 0.5}, 20),
        ({"layer_offload_fraction": 1.0}, 40),
        ({"layer_offload_fraction": 0.01}, 0),
        ({"layer_offload_fraction": 0.03}, 1),
    ],
)
def test_blocks_that_wait_in_main_memory_are_counted_or_a_share_of_all(opts, streamed):
    held = storage(WanShape(num_layers=40), **opts)
    assert held.num_streamed == streamed and held.is_plain == (streamed == 0)


def test_more_blocks_than_there_are_and_two_ways_to_say_the_same_are_refused():
    with pytest.raises(UserError, match="--blocks_to_swap 3: the model has 2 blocks"):
        storage(blocks_to_swap=3)
    with pytest.raises(UserError, match="say the same: give one of them"):
        storage(blocks_to_swap=1, layer_offload_fraction=0.5)
    with pytest.raises(UserError, match="layer_offload_fraction"):
        options("--layer_offload_fraction", "1.5")


def test_a_missing_library_is_said_before_anything_is_loaded(monkeypatch):
    def missing(_name: str):
        raise ImportError("none")

    monkeypatch.setattr(formats.importlib, "import_module", missing)
    with pytest.raises(UserError, match="pip install bitsandbytes"):
        storage(weight_dtype="nf4")
    assert storage(weight_dtype="int8").format == "int8"


def measured(monkeypatch, faster: bool) -> list[tuple[object, ...]]:
    """What is asked of the measurement, which says that codes are faster or that they are not."""
    asked: list[tuple[object, ...]] = []
    monkeypatch.setattr(weights, "is_faster_in_codes", lambda *args: asked.append(args) or faster)
    return asked


@pytest.mark.parametrize(
    ("choice", "format", "device", "in_codes"),
    [
        ("on", "int8", CPU, True),
        ("off", "int8", CUDA, False),
        ("auto", "int8", CPU, False),
        ("auto", "nf4", CUDA, False),
        ("auto", "auto", CUDA, False),
    ],
)
def test_nothing_is_measured_where_the_answer_is_known(monkeypatch, choice, format, device, in_codes):
    asked = measured(monkeypatch, not in_codes)
    assert storage(device=device, weight_dtype=format, quantised_matmul=choice).in_codes is in_codes
    assert asked == []


@pytest.mark.parametrize("format", ["fp8", "fp8_scaled", "int8"])
@pytest.mark.parametrize("faster", [True, False])
def test_on_a_gpu_products_are_made_of_codes_where_that_is_measured_to_be_faster(monkeypatch, format, faster):
    asked, decisions = measured(monkeypatch, faster), Decisions("a GPU")
    opts = StorageOptions(weight_dtype=format)
    assert opts.storage(CUDA, TINY_SHAPE, 100, decisions).in_codes is faster
    assert asked == [(format, (TINY_SHAPE.ffn_dim, TINY_SHAPE.dim), 100, CUDA, BF16)]
    assert decisions.table() == {"device": "a GPU", "quantised_matmul": "on" if faster else "off"}
    resumed = Decisions("a GPU", decisions.table())
    assert opts.storage(CUDA, TINY_SHAPE, 100, resumed).in_codes is faster and len(asked) == 1


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
        exact = quantise(state[f"{name}.weight"], format)
        assert torch.equal(layer.weight.float(), exact.codes.float())
        assert exact.scale is None if layer.scale is None else torch.equal(layer.scale, exact.scale)
        rounded = quantise(state[f"{name}.weight"].bfloat16(), format)
        others += int((rounded.codes.float() != exact.codes.float()).sum())
    assert others > 0


@pytest.mark.parametrize("format", FORMATS)
def test_a_fused_lora_is_in_the_codes_of_its_layer_alone(files, format, tmp_path):
    pair, name = make_pair((TINY_SHAPE.dim, TINY_SHAPE.dim)), "blocks.0.self_attn.q"
    write_lora(tmp_path / "style.safetensors", LoraFile({name: pair}))
    held = Storage(CPU, BF16, format)
    fused = load(files, held, AdapterOptions(fuse_lora=tmp_path / "style.safetensors", fuse_lora_weight=0.5))
    state = tiny_transformer().state_dict()
    expected = quantise(state[f"{name}.weight"] + 0.5 * delta(pair), format)
    assert torch.equal(fused.get_submodule(name).weight.float(), expected.codes.float())
    plain = linear_layers(load(files, held))
    different = {each for each, layer in linear_layers(fused).items() if not same(layer, plain[each])}
    assert different == {name}


def same(layer: QuantisedLinear, other: QuantisedLinear) -> bool:
    return torch.equal(layer.weight.float(), other.weight.float())


def test_a_fused_lora_changes_codes_that_would_be_kept(tmp_path):
    """Only the layers that it changes are quantised again; those of a file in int8 stay as they are elsewhere."""
    layer = QuantisedLinear(nn.Linear(32, 16, device="meta"), weights.Quantised(torch.empty(16, 32), None))
    stored = quantise(torch.randn(16, 32, generator=torch.Generator().manual_seed(0)), "int8")
    from_file = weights.Quantised(stored.codes, stored.scale, stored.group)
    held = Storage(CPU, BF16, "int8")

    def cast(dtype: torch.dtype, device: torch.device) -> Callable[[str, object], Tensor]:
        return lambda _, each: each.values(dtype) + 1

    place = held.place({"blocks.0.a.weight": layer}, cast, lambda _: CPU)
    assert torch.equal(place("blocks.0.a.weight", from_file), stored.codes)
    place = held.place({"blocks.0.a.weight": layer}, cast, lambda _: CPU, changed=["blocks.0.a.weight"])
    expected = quantise(from_file.values(FP32) + 1, "int8")
    assert torch.equal(place("blocks.0.a.weight", from_file), expected.codes)


def test_a_tensor_of_another_shape_is_left_to_be_refused():
    layer = QuantisedLinear(nn.Linear(32, 16, device="meta"), weights.Quantised(torch.empty(16, 32), None))
    place = Storage(CPU, BF16, "int8").place({"blocks.0.a.weight": layer}, cast_to, lambda _: CPU)
    assert place("blocks.0.a.weight", torch.ones(4, 4)).shape == (4, 4)


def test_values_are_quantised_on_the_device_and_go_where_they_wait():
    made_on = []

    def cast(dtype: torch.dtype, device: torch.device) -> Callable[[str, Tensor], Tensor]:
        made_on.append((dtype, device))
        return lambda _, each: each.to(dtype)

    layer = QuantisedLinear(nn.Linear(32, 16, device="meta"), weights.Quantised(torch.empty(16, 32), None))
    device, wait = torch.device("cpu", 0), torch.device("meta")
    place = Storage(device, BF16, "int8").place({"blocks.0.a.weight": layer}, cast, lambda _: wait)
    assert place("blocks.0.a.weight", torch.randn(16, 32)).is_meta and layer.scale.is_meta
    assert made_on == [(FP32, device)]


def test_a_text_encoder_is_held_in_the_same_way():
    encoder = tiny_text_encoder(32)
    names = set(linear_layers(encoder))
    assert len(names) == 2 * 7  # q, k, v, o and the three of a gated ffn, in each of two blocks
    sizes = Storage(CPU, FP32, "int8").sizes(encoder, lambda _: False)
    assert sizes["blocks.0.attn.q.weight"] == 32 * 32 + 4 * 32
    assert sizes["token_embedding.weight"] == encoder.token_embedding.weight.numel() * 4
