"""Each format keeps a weight to its known error, in the bytes that it is said to take."""

import importlib
import sys

import pytest
import torch
from torch import Tensor

from tests.formats import FORMATS, values_in
from utils.common.errors import UserError
from utils.storage.formats import INSTALL, need_bitsandbytes, quantise, stored_bytes
from wan.checkpoints import Quantised

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
# Relative errors on normal weights: each a little above what is measured.
ERRORS = {"fp8": 0.028, "fp8_scaled": 0.027, "int8": 0.0076, "nf4": 0.094}
R4 = torch.tensor([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]], dtype=FP64)


def draw(rows: int = 48, columns: int = 512, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) / columns**0.5


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


# ------------------------------------------------------------------------------------------------------------ the error


@pytest.mark.parametrize("format", FORMATS)
def test_the_error_on_normal_weights_is_that_of_the_format(format):
    weight = draw()
    found = values_in(quantise(weight, format), 48, FP32)
    assert 0.7 * ERRORS[format] < error(found, weight) < ERRORS[format]


def test_a_rotation_shares_out_a_column_that_stands_out_and_each_row_has_its_own_scale():
    weight = draw()
    weight[:, 7] *= 30
    weight[3] *= 1e4
    plain = (weight / (scale := weight.abs().amax(dim=1, keepdim=True) / 127)).round() * scale
    usual = torch.arange(512) != 7
    found = values_in(quantise(weight, "int8"), 48, FP32)
    assert error(found[:, usual], weight[:, usual]) < 0.03 < error(plain[:, usual], weight[:, usual]) / 2


def test_a_scale_serves_weights_that_are_too_small_for_fp8_itself():
    weight = draw() * 1e-3
    assert error(values_in(quantise(weight, "fp8"), 48, FP32), weight) > 0.5
    assert error(values_in(quantise(weight, "fp8_scaled"), 48, FP32), weight) < ERRORS["fp8_scaled"]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_values_come_in_the_dtype_of_the_computation_and_bf16_is_quantised_as_its_fp32_values(format, dtype):
    codes = quantise(draw().bfloat16(), format)
    exact = quantise(draw().bfloat16().float(), format)
    assert torch.equal(codes.codes.float(), exact.codes.float())
    found = values_in(codes, 48, dtype)
    assert found.dtype == dtype and found.shape == (48, 512)
    assert error(found, draw()) < ERRORS[format] + (0.002 if dtype == BF16 else 0.001)


# ------------------------------------------------------------------------------------------------------ what is extreme


@pytest.mark.parametrize("format", FORMATS)
def test_rows_of_zeros_are_zeros(format):
    weight = draw()
    weight[5:9] = 0
    found = values_in(quantise(weight, format), 48, FP32)
    assert found.isfinite().all() and torch.equal(found[5:9], torch.zeros(4, 512))
    assert torch.equal(values_in(quantise(weight * 0, format), 48, BF16), torch.zeros(48, 512, dtype=BF16))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("size", [1e-38, 1e-20, 1e-6, 1e6, 1e30])
def test_tiny_and_huge_values_stay_numbers(format, size):
    weight = draw() * size
    found = values_in(quantise(weight, format), 48, FP32)
    assert found.isfinite().all()
    if format != "fp8" and size > 1e-30:
        assert error(found, weight) < ERRORS[format]
    if format == "fp8":
        assert float(found.abs().max()) <= 448


def test_what_is_beyond_the_largest_number_of_fp8_becomes_that():
    weight = torch.tensor([[500.0, -1e9, 448.0, 1.0]])
    assert quantise(weight, "fp8").codes.float().tolist() == [[448.0, -448.0, 448.0, 1.0]]


@pytest.mark.parametrize("format", ["fp8_scaled", "int8"])
def test_the_largest_value_of_a_row_takes_the_largest_code(format):
    codes = quantise(draw(), format)
    assert codes.codes.float().abs().amax(dim=1).eq(448 if format == "fp8_scaled" else 127).all()
    assert codes.scale.shape == (48, 1) and codes.scale.dtype == FP32


# ----------------------------------------------------------------------------------------------------------------- int8


def by_hand(weight: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scale, and how far each value is from where it is rounded otherwise: in float64, with every entry."""
    matrix = torch.ones(1, 1, dtype=FP64)
    while len(matrix) < group:
        matrix = torch.kron(matrix, R4)
    whole = torch.block_diag(*[matrix / group**0.5] * (weight.shape[1] // group)) if group else None
    rotated = weight.double() if whole is None else weight.double() @ whole
    scale = rotated.abs().amax(dim=1, keepdim=True) / 127
    steps = rotated / scale
    return steps.round().to(torch.int8), scale, (steps - steps.floor() - 0.5).abs()


@pytest.mark.parametrize(
    ("columns", "group"), [(512, 256), (256, 256), (320, 64), (64, 64), (48, 16), (16, 16), (24, 0), (100, 0)]
)
def test_int8_has_the_codes_of_an_explicit_rotation_in_the_widest_groups_that_fit(columns, group):
    weight = draw(columns=columns)
    found = quantise(weight, "int8")
    codes, scale, margin = by_hand(weight, group)
    assert found.group == group
    torch.testing.assert_close(found.scale.double(), scale, rtol=1e-6, atol=0)
    decided = margin > 1e-4  # what fp32 and fp64 round alike
    assert decided.float().mean() > 0.99
    assert torch.equal(found.codes[decided], codes[decided])
    assert int((found.codes.int() - codes.int()).abs().max()) <= 1


def test_rotated_in_bf16_the_codes_would_be_others():
    weight, exact = draw(), quantise(draw(), "int8")
    rounded, _, _ = by_hand(weight.bfloat16(), 256)
    assert float((exact.codes != rounded).float().mean()) > 0.05


# ------------------------------------------------------------------------------------------------------- what they take


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("rows", "columns"), [(48, 512), (96, 48), (7, 30), (5120, 64)])
def test_what_a_weight_takes_is_known_before_it_is_there(format, rows, columns):
    codes = quantise(draw(rows, columns), format)
    real = codes.codes.nbytes + (0 if codes.scale is None else codes.scale.nbytes)
    assert stored_bytes(rows, columns, format) == real


@pytest.mark.parametrize("format", FORMATS)
def test_codes_go_to_a_device_with_what_turns_them_into_values(format):
    codes = quantise(draw(), format)
    moved = codes.to(torch.device("meta"))
    assert isinstance(moved, Quantised) and moved.codes.is_meta and moved.group == codes.group
    assert moved.scale is None if codes.scale is None else moved.scale.is_meta


# -------------------------------------------------------------------------------------------------------- bitsandbytes


def test_a_missing_library_is_named_with_how_to_install_it(monkeypatch):
    def missing(name: str):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", missing)
    for attempt in (need_bitsandbytes, lambda: quantise(draw(), "nf4")):
        with pytest.raises(UserError, match="nf4 needs bitsandbytes, .*No module.*\npip install ") as caught:
            attempt()
        assert str(caught.value).endswith(INSTALL)
    quantise(draw(), "int8")  # the others need nothing


# What the library does when it is imported, on CPUs with instructions for bf16.
ASKS_A_HUB = """
import logging
try:
    from kernels import get_kernel
    get_kernel("kernels-community/quantization-bitsandbytes", version=1)
except Exception as error:
    logging.getLogger("bitsandbytes.backends.cpu.ops").warning("install kernels: %s", error)
"""
HUB = """
def get_kernel(name, version):
    raise SystemExit("a hub was asked for code")
"""


def test_importing_the_library_asks_no_hub_for_code_and_gives_no_advice(tmp_path, monkeypatch, caplog):
    for name, source in (("bitsandbytes", ASKS_A_HUB), ("kernels", HUB)):
        (tmp_path / f"{name}.py").write_text(source)
        monkeypatch.setitem(sys.modules, name, None)
        del sys.modules[name]  # undone afterwards, whatever was loaded
    monkeypatch.syspath_prepend(tmp_path)
    need_bitsandbytes()
    assert sys.modules["bitsandbytes"].__file__ == str(tmp_path / "bitsandbytes.py")
    assert caplog.records == []
    assert importlib.import_module("kernels").__file__ == str(tmp_path / "kernels.py")  # others find it
