"""The command that measures what storing weights in 8 or 4 bits costs, on a small model."""

import gc
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from benchmarks import quantised
from benchmarks.measure import Sizes
from benchmarks.models import random_inputs
from benchmarks.quantised import Base, Options, Products, Way
from benchmarks.weights import random_transformer
from utils.common.errors import RunError
from utils.storage.linear import QuantisedLinear
from utils.storage.weights import IN_INT8, linear_layers
from wan.modules.model import WanShape

CPU = torch.device("cpu")
SHAPE = WanShape(dim=96, ffn_dim=192, num_heads=2, num_layers=1, text_dim=32, text_len=24, freq_dim=32)
SIZES = Sizes(shape=SHAPE, rank=4, text_tokens=20, video=(2, 8, 6))  # as many tokens as kernels for codes need
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantised, "SIZES", SIZES)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr(gc, "freeze", lambda: None)
    monkeypatch.setattr(gc, "collect", lambda: 0)  # half a second, in a process that has run other tests


def with_outliers(layers: int = 1) -> Base:
    model = quantised.add_outliers(random_transformer(replace(SHAPE, num_layers=layers), CPU))
    return Base(model, SIZES, list(linear_layers(model)))


def test_every_layer_has_a_heavy_column_and_reads_another_heavy_channel():
    model, inputs = with_outliers().model, dict[str, Tensor]()
    for name, layer in linear_layers(model).items():
        layer.register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0].flatten(0, -2)}))
    given = random_inputs(SIZES, SIZES.video, CPU)
    model(given.latents, given.noisy.timestep, given.text)
    assert len(inputs) == 10
    for name, layer in linear_layers(model).items():
        column, channel = layer.in_features // 3, 2 * layer.in_features // 3
        for sizes, heavy, factor in (
            (layer.weight.norm(dim=0), column, 30),
            (inputs[name].norm(dim=0), channel, 50),
        ):
            others = sizes[torch.arange(len(sizes)) != heavy]
            assert 0.2 * factor < sizes[heavy] / others.median() < 5 * factor, name
            assert sizes[heavy] > 2 * others.max(), name


def test_the_table_has_every_format_with_its_size_and_how_near_it_is(monkeypatch):
    # In so narrow a model outliers of the full size would drown everything else.
    monkeypatch.setattr(quantised, "HEAVY_WEIGHT", 6.0)
    monkeypatch.setattr(quantised, "HEAVY_INPUT", 6.0)
    rows = [cells for _, cells, _ in quantised.measure(Options(), SIZES)]
    found = {(row[0], row[1], row[3]): row for row in rows}
    assert len(found) == len(rows) == 2 * (1 + 3 * 3 + 5 * 2)
    exact = SHAPE.num_layers * 4 * (8 * 96**2 + 2 * 96 * 192)
    sizes = {row[0]: float(row[2].removesuffix(" MB")) * 1e6 / exact for row in rows}
    mixed = (8 * 96**2 * 8 + 2 * 96 * 192 * 4.5) / (8 * 96**2 + 2 * 96 * 192)  # attention in int8
    eight = ("fp8", "fp8_scaled", "fp8_scaled, all layers", "int8", "int8, not rotated")
    four = ("nf4, all layers", "nf4, all layers, rotated")
    bits = {"bf16": 16, "nf4": mixed} | dict.fromkeys(eight, 8) | dict.fromkeys(four, 4.5)
    assert sizes == pytest.approx({name: size / 32 for name, size in bits.items()}, abs=0.015)
    together = {key: float(row[5]) for key, row in found.items()}
    assert all(0.5 < float(row[6]) <= float(row[5]) < 1 for row in rows)
    for targets in ("attn", "all-linear"):
        by_format = {key[0]: value for key, value in together.items() if key[1:] == ("fp32", targets)}
        assert by_format["nf4, all layers"] < by_format["fp8_scaled, all layers"] < by_format["int8"]
        assert all(by_format[f"{name}, all layers"] < by_format[name] < by_format["int8"] for name in IN_INT8)
        assert by_format["int8, not rotated"] < by_format["int8"]
        assert together["bf16", "bf16", targets] > by_format["int8"]


def test_products_of_codes_are_made_where_that_is_asked_for():
    base = with_outliers(layers=2)
    values, codes = (base.take_step(Way("int8", BF16, in_codes), "attn") for in_codes in (False, True))
    assert values.loss != codes.loss
    assert not any(torch.equal(values.gradients[name], codes.gradients[name]) for name in values.gradients)
    assert all(gradient.isfinite().all() for gradient in codes.gradients.values())


def test_layers_that_are_kept_are_not_quantised():
    base = with_outliers(layers=3)
    base.quantised = [name for name in base.quantised if name.startswith("blocks.1.")]
    held = {
        name for name, module in base._held(Way("nf4", BF16)).named_modules() if isinstance(module, QuantisedLinear)
    }
    assert held == set(base.quantised) and len(held) == 10
    assert not any(isinstance(module, QuantisedLinear) for module in base.model.modules())


def test_the_options_choose_rows_and_layers(monkeypatch):
    asked = []
    monkeypatch.setattr(Base, "take_step", lambda base, *_: asked.append(base.quantised) or outcome())
    opts = Options(only=("fp8",), keep=("*.ffn.2",), keep_end_blocks=True)
    rows = [cells for _, cells, _ in quantised.measure(opts, replace(SIZES, shape=replace(SHAPE, num_layers=3)))]
    ways = ("fp32", "bf16", "bf16, products of codes")
    assert [row[:2] for row in rows] == [("fp8", way) for way in ways] * 2
    assert len(asked[0]) == 9 and all(name.startswith("blocks.1.") for name in asked[0])


def outcome() -> quantised.Outcome:
    return quantised.Outcome(1.0, {"a": torch.ones(3), "b": torch.ones(3)}, 10**6)


@pytest.mark.parametrize(("format", "missed"), [("int8", True), ("int8, not rotated", False)])
def test_a_format_with_a_limit_must_reach_it_in_the_worst_matrix_too(monkeypatch, capsys, format, missed):
    right = {"a": torch.ones(300), "b": torch.tensor([1.0, 0.0])}
    wrong = right | {"b": torch.tensor([1.0, 0.05])}  # hardly seen in all together
    steps = iter([right, *[wrong] * 5, right, *[right] * 5])
    monkeypatch.setattr(Base, "take_step", lambda *_: quantised.Outcome(1.0, next(steps), 10**6))
    if missed:
        with pytest.raises(RunError, match="int8 in bf16, LoRA on attn"):
            quantised.main(["--only", format])
    else:
        steps = iter([right, *[wrong] * 2, right, *[right] * 2])
        quantised.main(["--only", format])
    out = capsys.readouterr().out
    assert f"`python -m benchmarks.quantised --only {'int8' if missed else repr(format)}`" in out
    assert ("| 0.999, missed |" in out) == missed and "| b |" in out


def test_nan_misses_the_limit():
    wrong = replace(outcome(), gradients={"a": torch.full((3,), torch.nan), "b": torch.ones(3)})
    assert quantised._row(Way("int8", BF16), "attn", outcome(), wrong)[1]


def test_products_of_bf16_are_rounded_once_and_those_of_int8_are_exact():
    generator = torch.Generator().manual_seed(0)
    a, b, c = (torch.randn(size, generator=generator).bfloat16() for size in ((5, 64), (64, 7), (5, 7)))
    codes = [torch.randint(-128, 128, size, dtype=torch.int8, generator=generator) for size in ((32, 2048), (2048, 16))]
    codes[0][0], codes[1][:, 0] = -128, -128  # a sum that fp32 does not hold exactly, once one is added
    codes[0][0, 0], codes[1][0, 0] = 127, 127
    with Products():
        product, total, linear = a @ b, c.clone().addmm_(a, b, alpha=0.5), nn.functional.linear(a, b.T, c[0])
        exact = torch._int_mm(*codes)
    assert torch.equal(product, (a.float() @ b.float()).bfloat16())
    assert torch.equal(total, torch.addmm(c.float(), a.float(), b.float(), alpha=0.5).bfloat16())
    assert torch.equal(linear, torch.addmm(c[0].float(), a.float(), b.float()).bfloat16())
    assert torch.equal(exact, (codes[0].long() @ codes[1].long()).int())
