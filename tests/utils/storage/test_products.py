"""Products of codes are those of the values, but for the rounding of what is multiplied."""

import pytest
import torch
from torch import Tensor, nn

from tests.formats import in_format
from utils.storage import products
from utils.storage.linear import QuantisedLinear, product, product_backward
from utils.storage.products import FEWEST_ROWS, PRODUCTS, fits
from wan.checkpoints import Quantised

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
ROWS, WIDTH, OUTPUT = 40, 256, 96
# Relative errors of a product with normal inputs, of their rounding alone.
ERRORS = {"fp8": 0.04, "fp8_scaled": 0.04, "int8": 0.012}


def plain(width: int = WIDTH, output: int = OUTPUT, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(width, output, bias=bias).requires_grad_(False)


def draw(*size: int, seed: int = 1) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def both(layer: QuantisedLinear, rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The layer's answer, and the gradient of its input."""
    width, output = layer.in_features, layer.out_features
    x = draw(rows, width).to(dtype).requires_grad_()
    answer = layer(x)
    answer.backward(draw(rows, output, seed=2).to(dtype))
    return answer.detach(), x.grad


@pytest.fixture
def counted(monkeypatch) -> list[torch.Size]:
    """What was multiplied with codes."""
    seen: list[torch.Size] = []
    own = products.multiply
    monkeypatch.setattr(products, "multiply", lambda x, *weight: seen.append(x.shape) or own(x, *weight))
    return seen


def in_dtype(layer: QuantisedLinear, dtype: torch.dtype) -> QuantisedLinear:
    layer.bias = None if layer.bias is None else nn.Parameter(layer.bias.to(dtype), requires_grad=False)
    return layer


@pytest.mark.parametrize("format", PRODUCTS)
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("bias", [True, False])
def test_products_of_codes_are_near_those_of_the_values_and_gradients_are_those_of_the_values(
    format, dtype, bias, counted
):
    layer = in_dtype(in_format(plain(bias=bias), format, in_codes=True), dtype)
    answer, grad = both(layer, ROWS, dtype)
    assert counted == [(ROWS, WIDTH)] and answer.dtype == grad.dtype == dtype
    x, values = draw(ROWS, WIDTH).to(dtype).double(), layer.values(FP32).double()
    expected = x @ values.T + (0 if layer.bias is None else layer.bias.double())
    assert 1e-3 < error(answer, expected) < ERRORS[format]
    assert torch.equal(grad, draw(ROWS, OUTPUT, seed=2).to(dtype) @ layer.values(dtype))


@pytest.mark.parametrize("format", PRODUCTS)
def test_each_row_is_rounded_by_its_own_largest_value_and_rows_of_zeros_stay_zeros(format):
    layer = in_format(plain(bias=False), format, in_codes=True)
    x = draw(ROWS, WIDTH)
    sizes = torch.logspace(-20, 20, ROWS)[:, None]
    answer = product(layer, x * sizes)
    expected = (x * sizes).double() @ layer.values(FP32).double().T
    assert all(error(a, b) < 2 * ERRORS[format] for a, b in zip(answer, expected, strict=True))
    x[3] = 0
    assert product(layer, x)[3].eq(0).all() and product(layer, x).isfinite().all()
    assert product_backward(layer, torch.zeros(ROWS, OUTPUT)).eq(0).all()


def test_an_input_that_stands_out_is_shared_out_by_the_rotation():
    x = draw(ROWS, WIDTH)
    x[:, 5] *= 50
    layer = in_format(plain(bias=False), "int8", in_codes=True)
    assert error(product(layer, x), x.double() @ layer.values(FP32).double().T) < ERRORS["int8"]


def test_a_gradient_is_added_to_what_is_given():
    layer, before = in_format(plain(), "int8", in_codes=True), draw(ROWS, WIDTH, seed=3)
    grad = draw(ROWS, OUTPUT)
    assert torch.equal(product_backward(layer, grad, before.clone()), before.addmm(grad, layer.values(FP32)))


def test_int8_is_exact_where_nothing_is_rounded():
    """Whole numbers whose largest is 127 are their own codes, on either side."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-127, 128, (OUTPUT, WIDTH), generator=generator).to(torch.int8)
    x = torch.randint(-127, 128, (ROWS, WIDTH), generator=generator).float()
    x[:, 0] = 127
    layer = QuantisedLinear(plain(bias=False), Quantised(codes, torch.ones(OUTPUT, 1)), in_codes=True)
    assert torch.equal(product(layer, x), x @ codes.float().T)


# ----------------------------------------------------------------------------------------------- what is not multiplied


@pytest.mark.parametrize("format", PRODUCTS)
@pytest.mark.parametrize(
    ("rows", "width", "output"), [(FEWEST_ROWS - 1, 64, 48), (1, 64, 48), (40, 24, 48), (40, 64, 40)]
)
def test_few_rows_and_widths_that_no_kernel_takes_are_multiplied_with_values(format, rows, width, output, counted):
    layers = [in_format(plain(width, output), format, in_codes) for in_codes in (True, False)]
    found, expected = (both(layer, rows, FP32) for layer in layers)
    assert counted == [] and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("format", PRODUCTS)
def test_the_fewest_rows_are_multiplied_in_codes(format, counted):
    both(in_format(plain(64, 48), format, in_codes=True), FEWEST_ROWS, FP32)
    assert counted == [(FEWEST_ROWS, 64)]


def test_nf4_and_scales_of_blocks_are_multiplied_with_values(counted):
    nf4 = in_format(plain(), "nf4", in_codes=True)
    codes, scale = plain().weight.to(torch.float8_e4m3fn), torch.rand(OUTPUT, 4, 1) + 0.5
    blocks = QuantisedLinear(plain(), Quantised(codes, scale), in_codes=True)
    e5m2 = QuantisedLinear(plain(), Quantised(plain().weight.to(torch.float8_e5m2), None), in_codes=True)
    for layer in (nf4, blocks, e5m2):
        assert not fits(layer.weight, layer.scale, ROWS)
        found = both(layer, ROWS, FP32)
        layer.in_codes = False
        assert all(torch.equal(a, b) for a, b in zip(found, both(layer, ROWS, FP32), strict=True))
    assert counted == []


@pytest.mark.parametrize("size", [(), (1,), (1, 1), (OUTPUT, 1)])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_one_scale_or_one_for_each_row_is_multiplied(size, dtype, counted):
    scale = torch.rand(size, generator=torch.Generator().manual_seed(0)) + 0.5
    codes = (20 * draw(OUTPUT, WIDTH)).round().clamp(-127, 127).to(dtype)
    layer = QuantisedLinear(plain(bias=False), Quantised(codes, scale), in_codes=True)
    x, values = draw(ROWS, WIDTH), layer.values(FP32).double()
    assert error(product(layer, x), x.double() @ values.T) < 0.04
    assert counted == [(ROWS, WIDTH)]
