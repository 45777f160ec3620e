"""Projections are PEFT's layers: the same values and gradients, with matrices that are never out of date."""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from tests.adapted import fill
from utils.adapters.initial import load_lora
from utils.adapters.lora import ADAPTER, add_lora, extract_lora
from utils.adapters.projection import Projection, in_dtype, project, speaking_adapters
from utils.training.learner import Trainable
from utils.training.optim import Updater
from utils.training.optimizers import OptimizerSpec, ParameterGroup

FP32, BF16 = torch.float32, torch.bfloat16
WIDTH, OUT, RANK = 24, 40, 4


class Layers(nn.Module):
    """Three layers that read one input."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, OUT, bias=name != "k") for name in "qkv")


def adapted(dtype: torch.dtype = FP32, adapters: tuple[str, ...] = (ADAPTER,), names: str = "qkv", **changes) -> Layers:
    """With adapters of PEFT's own forward; all of them speak."""
    torch.manual_seed(0)
    layers = Layers().to(dtype).requires_grad_(False)
    config = {"r": RANK, "lora_alpha": 6.0, "target_modules": list(names)} | changes
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config` attribute", UserWarning)
        for adapter in adapters:
            inject_adapter_in_model(LoraConfig(**config), layers, adapter)
    for name in names:
        layer = getattr(layers, name)
        for parameter in layer.parameters():
            parameter.data = parameter.data.float() if parameter.requires_grad else parameter.data
        layer.set_adapter(list(adapters))
    fill(matrices(layers))
    return layers


def matrices(layers: nn.Module) -> list[nn.Parameter]:
    return [parameter for name, parameter in layers.named_parameters() if "lora_A" in name or "lora_B" in name]


def rows(dtype: torch.dtype = FP32) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(2, 7, WIDTH, generator=generator).to(dtype).requires_grad_()


def results(answers: tuple[Tensor, ...], leaves: list[Tensor]) -> list[Tensor]:
    weights = [torch.linspace(-1, 1 + n, answer.numel()).view_as(answer) for n, answer in enumerate(answers)]
    loss = sum((answer.float() * weight).sum() for answer, weight in zip(answers, weights, strict=True))
    return [*(answer.detach() for answer in answers), *torch.autograd.grad(loss, leaves)]


def both(layers: Layers, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Values, the input's gradient and the matrices' gradients: of projections, and of the layers by themselves."""
    projections = [Projection.of(getattr(layers, name)) for name in "qkv"]
    leaves = [x, *(matrix for projection in projections for matrix in projection.matrices)]
    own = results(tuple(getattr(layers, name)(x) for name in "qkv"), leaves)
    return results(project(x, projections), leaves), own


def assert_close(found: list[Tensor], expected: list[Tensor], bound: float = 1e-6) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert (a.double() - b.double()).norm() <= bound * b.double().norm()
        assert b.any()


@pytest.mark.parametrize("names", ["qkv", "k", "qv"])
@pytest.mark.parametrize(
    ("changes", "scale"), [({}, 1.5), ({"lora_alpha": 4.0}, 1), ({"use_rslora": True}, 3)], ids=["1.5", "1", "rslora"]
)
def test_values_and_gradients_are_those_of_peft(names, changes, scale):
    layers = adapted(names=names, **changes)
    assert_close(*both(layers, rows()))
    assert Projection.of(getattr(layers, names[0])).pairs[0].scale == scale


def test_several_adapters_speak_at_once_or_one_of_them():
    layers = adapted(adapters=("first", "second"))
    both_speak, own = both(layers, rows())
    assert_close(both_speak, own)
    for name in "qkv":
        getattr(layers, name).set_adapter("second")
    assert speaking_adapters(layers.q) == ["second"] and len(Projection.of(layers.q).pairs) == 1
    one_speaks, own = both(layers, rows())
    assert_close(one_speaks, own)
    assert not torch.allclose(both_speak[0], one_speaks[0])


def test_a_disabled_adapter_says_nothing():
    layers = adapted()
    for name in "qkv":
        getattr(layers, name).enable_adapters(False)
    assert speaking_adapters(layers.q) == [] and Projection.of(layers.q).pairs == ()
    found, own = both(layers, rows())
    assert_close(found, own)
    assert torch.equal(found[0], F.linear(rows(), layers.q.base_layer.weight, layers.q.base_layer.bias))


def test_a_layer_without_adapter_is_its_product():
    layer = nn.Linear(WIDTH, OUT).requires_grad_(False)
    assert Projection.of(layer) == Projection(layer) and speaking_adapters(layer) == []


def test_in_bf16_the_error_is_no_larger_than_that_of_layers_that_compute_in_bf16():
    exact, layers = adapted(), Layers().to(BF16).requires_grad_(False)
    fill(add_lora(layers, list("qkv"), RANK, 6.0))
    for name, parameter in layers.named_parameters():
        exact.get_parameter(name).data = parameter.data.float()
    x = rows(BF16)
    reference = both(exact, x.detach().float().requires_grad_())[1]
    found, own = both(layers, x)

    def errors(tensors: list[Tensor]) -> list[float]:
        pairs = zip(tensors, reference, strict=True)
        return [float((a.float() - b).norm() / b.norm()) for a, b in pairs]

    assert all(a <= 1.1 * b for a, b in zip(errors(found), errors(own), strict=True))
    assert all(tensor.dtype == FP32 for tensor in found[4:]) and found[0].dtype == found[3].dtype == BF16


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
def test_gradients_of_matrices_in_bf16_are_rounded_once_from_those_in_fp32(dtype):
    layers, x, found = adapted(dtype), rows(dtype), []
    for each in (FP32, BF16):
        for matrix in matrices(layers):
            matrix.data = matrix.data.to(BF16).to(each)
        projections = [Projection.of(getattr(layers, name)) for name in "qkv"]
        found.append(results(project(x, projections), [x, *matrices(layers)]))
    exact, rounded = found
    assert all(torch.equal(a, b) for a, b in zip(exact[:4], rounded[:4], strict=True))
    for gradient, other in zip(rounded[4:], exact[4:], strict=True):
        assert gradient.dtype == BF16 and torch.equal(gradient, other.to(BF16)) and gradient.any()


def test_an_input_that_needs_no_gradient_gets_none():
    layers, x = adapted(), rows().detach()
    projections = [Projection.of(getattr(layers, name)) for name in "qkv"]
    answers = project(x, projections)
    expected = results(tuple(getattr(layers, name)(x) for name in "qkv"), matrices(layers))
    assert_close(results(answers, matrices(layers)), expected)
    assert not project(x, [Projection(layers.q.base_layer)])[0].requires_grad
    grad = torch.ones(14, OUT)
    assert projections[0].backward(grad, x.flatten(0, 1), [torch.ones(14, RANK)], needs_input=False)[0] is None


def test_an_answer_that_nobody_reads_adds_no_gradient():
    layers, x = adapted(), rows()
    projections = [Projection.of(getattr(layers, name)) for name in "qkv"]
    found = torch.autograd.grad(project(x, projections)[1].sum(), x)[0]
    assert_close([found], [torch.autograd.grad(layers.k(x).sum(), x)[0]])


def test_without_loras_the_input_is_not_kept():
    layers, x = adapted(), rows()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        project(x, [Projection(layers.q.base_layer)])
        assert kept == []
        project(x, [Projection.of(layers.q), Projection.of(layers.k)])
    assert [tuple(tensor.shape) for tensor in kept] == [(14, WIDTH), (14, RANK), (14, RANK)]


# -------------------------------------------------------------------------------------------- more than a plain layer


class OtherLinear(nn.Linear):
    pass


@pytest.mark.parametrize(
    "changes", [{"use_dora": True}, {"lora_dropout": 0.1}, {"lora_bias": True}], ids=lambda changes: next(iter(changes))
)
def test_a_lora_that_is_not_plain_is_no_projection_while_it_speaks(changes):
    layers = adapted(names="q", **changes)
    assert Projection.of(layers.q) is None
    layers.q.enable_adapters(False)
    assert Projection.of(layers.q) == Projection(layers.q.base_layer)


def test_a_layer_that_is_trained_or_computes_in_its_own_way_is_no_projection():
    frozen = nn.Linear(3, 3).requires_grad_(False)
    assert Projection.of(frozen) is not None
    frozen.forward = lambda x: x
    assert Projection.of(frozen) is None
    assert Projection.of(nn.Linear(3, 3)) is None
    assert Projection.of(OtherLinear(3, 3).requires_grad_(False)) is None
    assert Projection.of(nn.Conv3d(3, 3, 1).requires_grad_(False)) is None
    layers = adapted()
    layers.q.base_layer.forward = lambda x: x
    assert Projection.of(layers.q) is None


# ------------------------------------------------------------------------------------------- matrices in another dtype


def is_current(parameters: list[nn.Parameter]) -> bool:
    return all(torch.equal(in_dtype(p, BF16), p.detach().to(BF16)) for p in parameters)


def test_a_matrix_is_converted_once_for_each_of_its_versions():
    (matrix,) = parameters = [nn.Parameter(torch.rand(4, 3))]
    first = in_dtype(matrix, BF16)
    assert in_dtype(matrix, BF16) is first and not first.requires_grad
    with torch.no_grad():
        matrix.add_(1)
    assert in_dtype(matrix, BF16) is not first and is_current(parameters)
    matrix.data = torch.rand(4, 3)
    assert is_current(parameters)
    half = in_dtype(matrix, torch.float16)
    assert half.dtype == torch.float16 and is_current(parameters)
    own = in_dtype(matrix, FP32)
    assert own.data_ptr() == matrix.data_ptr() and not own.requires_grad


SPEC = OptimizerSpec(0.1, 0.01, "constant", 0, 10)


def give_gradients(parameters: list[nn.Parameter], value: float = 1.0) -> None:
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, value)


def test_conversions_follow_updates_also_skipped_ones():
    parameters = [nn.Parameter(torch.rand(4, 3)) for _ in range(3)]
    updater = Updater([ParameterGroup({f"p{n}": p for n, p in enumerate(parameters)})], SPEC)
    for value in (1.0, math.nan, -1.0, 1.0):
        before = [in_dtype(p, BF16).clone() for p in parameters]
        assert is_current(parameters)
        give_gradients(parameters, value)
        updater.step(max_grad_norm=1.0)
        assert is_current(parameters)
        moved = not all(torch.equal(old, in_dtype(p, BF16)) for old, p in zip(before, parameters, strict=True))
        assert moved == math.isfinite(value)


class Matrices:
    """An adapter of these matrices, which has no file."""

    def __init__(self, parameters: dict[str, nn.Parameter]) -> None:
        self.parameters = parameters


def test_conversions_follow_a_restored_state_and_averages_do_not_touch_them():
    parameters = {name: nn.Parameter(torch.rand(4, 3)) for name in "ab"}
    trainable = Trainable("lora", Matrices(parameters), SPEC, ema_decay=0.5)
    saved = {name: p.detach().clone() for name, p in parameters.items()}
    state = trainable.state_dict() | {"parameters": saved}
    assert is_current(list(parameters.values()))
    give_gradients(list(parameters.values()))
    trainable.step(1.0)
    assert is_current(list(parameters.values()))
    kept = [in_dtype(p, BF16) for p in parameters.values()]
    trainable.ema.update(3)
    assert all(in_dtype(p, BF16) is old for p, old in zip(parameters.values(), kept, strict=True))
    trainable.load_state_dict(state | {"optimizer": {"step_count": 0, "state": {n: {} for n in "ab"}, "groups": []}})
    assert is_current(list(parameters.values()))
    assert all(torch.equal(in_dtype(p, BF16), saved[name].to(BF16)) for name, p in parameters.items())


def test_conversions_follow_a_lora_that_is_loaded():
    first, second = Layers().requires_grad_(False), Layers().requires_grad_(False)
    for seed, layers in enumerate((first, second)):
        fill(add_lora(layers, ["q"], RANK, 6.0), seed)
    lora = extract_lora(second, {})
    assert is_current(matrices(first))
    load_lora(first, lora)
    assert is_current(matrices(first))
    assert torch.equal(in_dtype(matrices(first)[0], BF16), in_dtype(matrices(second)[0], BF16))


def test_conversions_follow_a_state_dict_that_is_loaded_or_assigned():
    layers, other = adapted(), adapted()
    fill(matrices(other), seed=5)
    assert is_current(matrices(layers))
    layers.load_state_dict(other.state_dict())
    assert is_current(matrices(layers)) and torch.equal(matrices(layers)[0], matrices(other)[0])
