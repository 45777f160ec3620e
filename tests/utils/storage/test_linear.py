"""A layer in codes computes with the values of its codes, forward and backward, and keeps none of them."""

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from tests.compiler import need_compiler
from tests.formats import FORMATS, in_format
from utils.adapters.lora import add_lora
from utils.adapters.projection import Projection, project
from utils.storage.formats import quantise
from utils.storage.linear import QuantisedLinear, product, product_backward
from wan.checkpoints import Quantised

BF16, FP32 = torch.bfloat16, torch.float32
DTYPES = (FP32, BF16)
ROWS, WIDTH, OUTPUT = 20, 64, 48


def plain(dtype: torch.dtype = FP32, bias: bool = True, seed: int = 0) -> nn.Linear:
    """A frozen layer, its bias too in the dtype of the computation."""
    torch.manual_seed(seed)
    return nn.Linear(WIDTH, OUTPUT, bias=bias).to(dtype).requires_grad_(False)


def draw(*size: int, dtype: torch.dtype, seed: int = 1) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed)).to(dtype)


# ------------------------------------------------------------------------------------------------- forward and backward


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
def test_the_answer_and_the_gradient_below_are_those_of_the_values_bit_for_bit(format, dtype, bias):
    layer = in_format(plain(dtype, bias), format)
    values = layer.values(dtype)
    assert values.dtype == dtype and values.shape == (OUTPUT, WIDTH)
    x = draw(2, ROWS, WIDTH, dtype=dtype).requires_grad_()
    grad = draw(2, ROWS, OUTPUT, dtype=dtype, seed=2)
    answer = layer(x)
    assert torch.equal(answer, F.linear(x.detach().view(-1, WIDTH), values, layer.bias).view(2, ROWS, OUTPUT))
    answer.backward(grad)
    assert torch.equal(x.grad, (grad.view(-1, OUTPUT) @ values).view(2, ROWS, WIDTH))
    assert x.grad.abs().max() > 0 and layer.weight.grad is None


@pytest.mark.parametrize("format", FORMATS)
def test_a_gradient_reaches_what_is_trained_below(format):
    below = nn.Linear(8, WIDTH)
    torch.nn.Sequential(below, in_format(plain(), format))(draw(3, 8, dtype=FP32)).sum().backward()
    assert below.weight.grad.abs().max() > 0 and below.bias.grad.abs().max() > 0


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_products_without_a_graph_are_the_same_and_are_added_to_what_is_given(format, dtype):
    layer = in_format(plain(dtype), format)
    values = layer.values(dtype)
    x, grad = draw(ROWS, WIDTH, dtype=dtype), draw(ROWS, OUTPUT, dtype=dtype)
    before = draw(ROWS, WIDTH, dtype=dtype, seed=3)
    assert torch.equal(product(layer, x), F.linear(x, values, layer.bias))
    assert torch.equal(product_backward(layer, grad), grad @ values)
    assert torch.equal(product_backward(layer, grad, before.clone()), before.addmm(grad, values))


# -------------------------------------------------------------------------------------------------- what is kept


def saved_by(run) -> list[Tensor]:
    """What autograd keeps of a computation."""
    saved: list[Tensor] = []
    with saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        run()
    return saved


@pytest.mark.parametrize("format", FORMATS)
def test_nothing_of_the_values_is_kept_for_the_backward_pass_and_neither_is_the_input(format):
    layer = in_format(plain(), format)
    x = draw(ROWS, WIDTH, dtype=FP32).requires_grad_()
    saved = saved_by(lambda: layer(x))
    own = {layer.weight.data_ptr()} | ({layer.scale.data_ptr()} if layer.scale is not None else set())
    assert {tensor.data_ptr() for tensor in saved} == own
    assert all(tensor.data_ptr() in own for tensor in saved)


def test_the_codes_that_are_kept_say_when_they_are_needed_again():
    """A stream learns by it that a block runs backward."""
    layer, needed = in_format(plain(), "int8"), []
    x = draw(ROWS, WIDTH, dtype=FP32).requires_grad_()
    with saved_tensors_hooks(lambda tensor: tensor, lambda tensor: needed.append(tensor.dtype) or tensor):
        answer = layer(x)
    assert needed == []
    answer.sum().backward()
    assert torch.int8 in needed


def test_what_else_decides_the_values_is_no_part_of_the_state_dict():
    layer = in_format(plain(), "int8")
    assert layer.state_dict().keys() == {"weight", "bias"} and layer.mixed_by.shape == (64, 64)
    assert isinstance(layer, nn.Linear) and not layer.weight.requires_grad
    assert (layer.in_features, layer.out_features) == (WIDTH, OUTPUT)


def test_a_layer_takes_another_weight():
    layer, other = in_format(plain(), "int8"), in_format(plain(seed=5), "fp8_scaled")
    layer.hold(quantise(plain(seed=5).weight, "fp8_scaled"), torch.device("cpu"))
    assert torch.equal(layer.values(FP32), other.values(FP32)) and layer.mixed_by is None


def test_what_a_weight_takes_and_whether_it_is_as_read_are_those_of_the_weight_that_is_held():
    layer, quantised = in_format(plain(), "int8"), quantise(plain().weight, "fp8")
    assert layer.nbytes == OUTPUT * WIDTH + 4 * OUTPUT and not layer.is_as_read
    layer.hold(quantised, torch.device("cpu"), is_as_read=True)
    assert layer.nbytes == OUTPUT * WIDTH and layer.is_as_read


def test_the_rotation_is_on_the_device_that_computes_wherever_the_codes_wait():
    layer = in_format(plain(), "int8")
    layer.hold(quantise(plain().weight, "int8"), torch.device("meta"))
    assert layer.mixed_by.is_meta and not layer.weight.is_meta and not layer.scale.is_meta


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [None, (), (1,), (1, 1), (OUTPUT, 1), (OUTPUT, 4, 1)])
@pytest.mark.parametrize("scale_dtype", DTYPES)
def test_a_scale_for_each_row_leaves_the_values_as_they_are_bit_for_bit(dtype, scale, scale_dtype):
    scales = None if scale is None else torch.full(scale, 0.3).mul_(1 + torch.rand(scale)).to(scale_dtype)
    layer = QuantisedLinear(plain(dtype), Quantised(plain().weight.to(torch.float8_e4m3fn), scales))
    before, given = layer.values(dtype), layer.scale
    layer.scale_rows()
    assert torch.equal(layer.values(dtype), before)
    assert layer.scale is given if scale in ((OUTPUT, 1), (OUTPUT, 4, 1)) else layer.scale.shape == (OUTPUT, 1)
    assert "scale" in dict(layer.named_buffers()) and "scale" not in layer.state_dict()


def test_what_is_in_nf4_keeps_its_scales():
    layer = in_format(plain(), "nf4")
    given = layer.scale
    layer.scale_rows()
    assert layer.scale is given


# --------------------------------------------------------------------------------------------------------------- LoRA


class Small(nn.Module):
    """A trained layer, and a frozen one above it."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.below, self.layer = nn.Linear(8, WIDTH), layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.below(x))


def filled(model: Small) -> list[nn.Parameter]:
    """The matrices of a LoRA around the frozen layer, none of them zero."""
    matrices = add_lora(model, ["layer"], rank=4, alpha=6.0)
    for number, matrix in enumerate(matrices):
        matrix.data = 0.2 * draw(*matrix.shape, dtype=FP32, seed=number)
    return matrices


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_fresh_lora_around_it_is_the_one_around_a_plain_layer_bit_for_bit(format, dtype):
    fresh = []
    for layer in (plain(dtype), in_format(plain(dtype), format)):
        model = Small(layer)
        torch.manual_seed(4)
        fresh.append(add_lora(model, ["layer"], rank=4, alpha=6.0))
    (a, b), others = fresh
    assert a.shape == (4, WIDTH) and a.abs().max() > 0 and b.eq(0).all()
    assert all(one.dtype == other.dtype and torch.equal(one, other) for one, other in zip((a, b), others, strict=True))


@pytest.mark.parametrize("format", FORMATS)
def test_a_lora_around_it_trains_as_around_a_plain_layer_of_the_same_values(format):
    layer = in_format(plain(), format)
    values = nn.Linear(WIDTH, OUTPUT).requires_grad_(False)
    values.weight.data, values.bias.data = layer.values(FP32), layer.bias.data.clone()
    found = []
    for frozen in (layer, values):
        model = Small(frozen)
        trained = [*filled(model), model.below.weight, model.below.bias]
        for parameter in trained:
            parameter.requires_grad_()
        answer = model(draw(3, 8, dtype=FP32))
        found.append([answer.detach(), *torch.autograd.grad(answer.square().sum(), trained)])
    assert len(found[0]) == 5 and all(tensor.abs().max() > 0 for tensor in found[0])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_fused_projections_compute_as_those_of_plain_layers_of_the_same_values(format, dtype):
    def projections(layers: Sequence[nn.Linear]) -> list[Projection]:
        found = []
        for number, layer in enumerate(layers):
            model = Small(layer)
            filled(model)
            found.append(Projection.of(model.layer if number else layer))  # with a LoRA and without
        return found

    layers = [in_format(plain(dtype, seed=seed), format) for seed in range(2)]
    others = [nn.Linear(WIDTH, OUTPUT).requires_grad_(False) for _ in layers]
    for layer, other in zip(layers, others, strict=True):
        other.weight.data, other.bias.data = layer.values(dtype), layer.bias.data
    results = []
    for each in (projections(layers), projections(others)):
        x = draw(2, ROWS, WIDTH, dtype=dtype).requires_grad_()
        answers = project(x, each)
        inputs = [x, *(matrix for projection in each for matrix in projection.matrices)]
        loss = sum((answer * draw(2, ROWS, OUTPUT, dtype=dtype)).sum() for answer in answers)
        results.append([*answers, *torch.autograd.grad(loss, inputs)])
    assert len(results[0]) == 5
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# ----------------------------------------------------------------------------------------------------------- compiled


@pytest.mark.parametrize(
    "format", ["int8", pytest.param("fp8", marks=pytest.mark.slow), pytest.param("nf4", marks=pytest.mark.slow)]
)
def test_compiled_it_computes_the_same(format):
    need_compiler()
    torch._dynamo.reset()
    layer = in_format(plain(), format)
    results = []
    for run in (layer, torch.compile(layer, fullgraph=True)):
        x = draw(ROWS, WIDTH, dtype=FP32).requires_grad_()
        answer = run(x)
        results.append([answer.detach(), *torch.autograd.grad(answer.square().sum(), x)])
    torch._dynamo.reset()
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
