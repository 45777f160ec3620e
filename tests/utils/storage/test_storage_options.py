"""What the options about base weights mean, which of them contradict each other, and what is measured for them."""

from dataclasses import fields
from pathlib import Path

import pytest
import torch

import train_wan_lora
from tests.tiny import TINY_SHAPE
from utils.common.decisions import Decisions
from utils.common.errors import UserError
from utils.common.options import parse_options
from utils.storage import formats, weights
from utils.storage.timing import Times
from utils.storage.weights import QUANTISED, Storage, StorageOptions, hold_as
from wan.modules.model import WanShape

BF16, FP32 = torch.bfloat16, torch.float32
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def options(*flags: str) -> train_wan_lora.Options:
    return parse_options(train_wan_lora.Options, list(flags))


def by_toml(folder: Path, name: str, value: str) -> train_wan_lora.Options:
    (folder / "run.toml").write_text(f"{name} = {value!r}\n", encoding="utf-8")
    return options("--config", str(folder / "run.toml"))


@pytest.mark.parametrize("flag", ["weight_dtype", "transformer_dtype", "text_encoder_dtype"])
@pytest.mark.parametrize(
    ("given", "meant"),
    [
        *((name, name) for name in ("auto", "fp32", "bf16", *QUANTISED)),
        *[("float32", "fp32"), ("bfloat16", "bf16"), ("float8", "fp8"), ("float8_e4m3fn", "fp8")],  # diffusion-pipe
        *[("FLOAT_32", "fp32"), ("BFLOAT_16", "bf16"), ("FLOAT_8", "fp8"), ("NFLOAT_4", "nf4")],  # OneTrainer
        *[("INT_8", "int8"), ("int_8", "int8"), ("float_8", "fp8"), ("Float8", "fp8"), ("fp8_e4m3fn", "fp8")],
    ],
)
def test_a_format_has_the_names_of_other_trainers_on_the_command_line_and_in_toml(flag, given, meant, tmp_path):
    name = "text_encoder_dtype" if flag.startswith("text") else "weight_dtype"
    for found in (options(f"--{flag}", given), by_toml(tmp_path, flag, given)):
        assert getattr(found, name) == meant


@pytest.mark.parametrize("flag", ["weight_dtype", "transformer_dtype", "text_encoder_dtype"])
@pytest.mark.parametrize("given", ["fp16", "float16", "int4", "", "fp8_e5m2", "INT_4"])
def test_an_unknown_format_is_refused_with_those_that_there_are(flag, given, tmp_path):
    for attempt in (lambda: options(f"--{flag}", given), lambda: by_toml(tmp_path, flag, given)):
        with pytest.raises(UserError, match="fp8_scaled"):
            attempt()


def test_weights_are_values_unless_another_format_is_asked_for():
    opts = options()
    assert (opts.weight_dtype, opts.text_encoder_dtype, opts.quantised_matmul) == ("auto", "auto", "auto")
    assert (opts.blocks_to_swap, opts.layer_offload_fraction, opts.keep_end_blocks) == (None, None, False)


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
        ({"layer_offload_fraction": 0.01}, 1),
        ({"layer_offload_fraction": 0.03}, 2),
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
    with pytest.raises(UserError, match="pip install .bitsandbytes"):
        storage(weight_dtype="nf4")
    assert storage(weight_dtype="int8").format == "int8"


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        ({"keep_end_blocks": True}, "--keep_end_blocks is for a quantised --weight_dtype: give fp8, fp8_scaled"),
        ({"keep_end_blocks": True, "weight_dtype": "bf16"}, "--keep_end_blocks is for a quantised --weight_dtype"),
        *(
            ({"quantised_matmul": "on", "weight_dtype": name}, "--quantised_matmul on is for --weight_dtype fp8, fp8_s")
            for name in ("auto", "bf16", "nf4")
        ),
        ({"blocks_to_swap": 41}, "--blocks_to_swap 41: the model has 40 blocks"),
        ({"blocks_to_swap": 1, "layer_offload_fraction": 0.5}, "say the same: give one of them"),
    ],
)
def test_options_that_contradict_each_other_or_would_be_ignored_are_refused(opts, message):
    with pytest.raises(UserError, match=message):
        StorageOptions(**opts).check_storage(40)


@pytest.mark.parametrize("name", ["weight_dtype", "text_encoder_dtype"])
def test_options_that_need_a_missing_library_are_refused_with_it(monkeypatch, name):
    def missing(_name: str):
        raise ImportError("none")

    StorageOptions(**{name: "nf4"}).check_storage(40)
    monkeypatch.setattr(formats.importlib, "import_module", missing)
    with pytest.raises(UserError, match="pip install .bitsandbytes"):
        StorageOptions(**{name: "nf4"}).check_storage(40)
    StorageOptions(**{name: "int8"}).check_storage(40)


@pytest.mark.parametrize(
    "opts",
    [
        {},
        {"blocks_to_swap": 40},
        *({"keep_end_blocks": True, "weight_dtype": name} for name in QUANTISED),
        *({"quantised_matmul": "on", "weight_dtype": name} for name in ("fp8", "fp8_scaled", "int8")),
        {"quantised_matmul": "off", "weight_dtype": "nf4"},
    ],
)
def test_all_others_are_taken(opts):
    StorageOptions(**opts).check_storage(40)


def test_the_flags_for_the_test_script_are_all_that_differ_from_the_defaults_and_mean_the_same_there():
    assert StorageOptions().storage_flags == ""
    opts = StorageOptions("int8", "nf4", True, "off", 7, 0.25)
    assert opts.storage_flags.split() == [
        *("--weight_dtype", "int8", "--text_encoder_dtype", "nf4", "--keep_end_blocks", "--quantised_matmul", "off"),
        *("--blocks_to_swap", "7", "--layer_offload_fraction", "0.25"),
    ]
    assert parse_options(StorageOptions, opts.storage_flags.split()) == opts


@pytest.mark.parametrize(
    ("name", "affects"),
    [("weight_dtype", True), ("quantised_matmul", True), ("blocks_to_swap", False)],
)
def test_a_resumed_run_must_have_the_options_that_change_numbers(name, affects):
    (spec,) = (spec for spec in fields(StorageOptions) if spec.name == name)
    assert spec.metadata["affects_training"] is affects


def measured(monkeypatch, in_codes: float | None) -> list[tuple[object, ...]]:
    """What is asked of the measurement, which says that codes take so long, and values one millisecond."""
    asked: list[tuple[object, ...]] = []

    def time_products(*args: object) -> Times:
        asked.append(args)
        return Times(str(args[0]), 100, BF16, in_codes, 1e-3, 1e-3)

    monkeypatch.setattr(weights, "time_products", time_products)
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
    asked = measured(monkeypatch, 2e-3 if in_codes else 5e-4)
    assert storage(device=device, weight_dtype=format, quantised_matmul=choice).in_codes is in_codes
    assert asked == []


@pytest.mark.parametrize("format", ["fp8", "fp8_scaled", "int8"])
@pytest.mark.parametrize(("in_codes", "faster"), [(5e-4, True), (2e-3, False), (None, False)])
def test_on_a_gpu_products_are_made_of_codes_where_that_is_measured_to_be_faster(
    monkeypatch, capsys, format, in_codes, faster
):
    asked, decisions = measured(monkeypatch, in_codes), Decisions("a GPU")
    opts = StorageOptions(weight_dtype=format)
    assert opts.storage(CUDA, TINY_SHAPE, 100, decisions).in_codes is faster
    assert asked == [(format, (TINY_SHAPE.ffn_dim, TINY_SHAPE.dim), 100, CUDA, BF16)]
    assert decisions.table() == {"device": "a GPU", "quantised_matmul": "on" if faster else "off"}
    assert capsys.readouterr().out.startswith(f"--quantised_matmul {'on' if faster else 'off'}: ")
    resumed = Decisions("a GPU", decisions.table())
    assert opts.storage(CUDA, TINY_SHAPE, 100, resumed).in_codes is faster and len(asked) == 1


@pytest.mark.parametrize("in_codes", [5e-4, 2e-3])
def test_what_is_asked_for_is_done_however_fast_it_is_and_is_no_decision(monkeypatch, in_codes):
    measured(monkeypatch, in_codes)
    opts, decisions = StorageOptions(weight_dtype="int8", quantised_matmul="on"), Decisions("a GPU")
    assert opts.storage(CUDA, TINY_SHAPE, 100, decisions).in_codes is True
    assert decisions.table() == {"device": "a GPU"}


def test_what_a_gpu_cannot_do_is_refused_where_it_is_asked_for(monkeypatch):
    measured(monkeypatch, None)
    with pytest.raises(UserError, match="--quantised_matmul on: this GPU does not multiply fp8_scaled"):
        storage(device=CUDA, weight_dtype="fp8_scaled", quantised_matmul="on")
