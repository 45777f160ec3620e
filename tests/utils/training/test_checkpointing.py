"""What a strategy keeps, what it computes again, and that nothing is left over."""

import gc
from collections.abc import Iterator
from functools import cache

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import CheckpointPolicy

from tests.followed import Followed, kept_bytes
from tests.tiny import TINY_SHAPE
from tests.trainees import (
    SITUATIONS,
    answers,
    equal,
    inputs_of,
    loss_of,
    prepare_again,
    prepared,
    relative_error,
    trainee,
)
from utils.training.checkpointing import STRATEGIES, checkpointed, keep_kernels, keep_products, parked, with_saved
from utils.training.memory import Memory
from utils.training.offload import Parking
from wan.modules.model import WanModel

FP32, BF16 = torch.float32, torch.bfloat16
BLOCKS, WIDTH, HEADS, TOKENS = TINY_SHAPE.num_layers, TINY_SHAPE.dim, TINY_SHAPE.num_heads, 3 * 2 * 3
FUSED = pytest.mark.parametrize("fuse", [False, True], ids=["plain", "fused"])


@pytest.fixture(autouse=True)
def without_garbage_collection() -> Iterator[None]:
    """What a reference cycle keeps alive stays alive."""
    gc.disable()
    yield
    gc.enable()


@cache
def shared(situation: str, dtype: torch.dtype) -> tuple[WanModel, list[nn.Parameter], list[Tensor]]:
    """A model for several tests, which give it their own strategies; with its matrices, and inputs."""
    model, parameters = trainee(SITUATIONS[situation], dtype)
    return model, parameters, inputs_of(model, SITUATIONS[situation])


@FUSED
@pytest.mark.parametrize(("situation", "attentions"), [("text", 2), ("images", 3)])
@pytest.mark.parametrize(("strategy", "runs"), [("none", 1), ("selective", 1), ("full", 2), ("offload", 2)])
def test_the_attention_kernel_runs_once_where_its_answer_is_kept(strategy, runs, situation, attentions, fuse):
    model, parameters, inputs = shared(situation, BF16)
    prepare_again(model, Memory(strategy, fuse=fuse, stream=BF16))
    with Followed() as followed:
        velocity = model(*inputs)
        assert followed.kernel_runs == BLOCKS * attentions
        torch.autograd.grad(loss_of(velocity), parameters)
    assert followed.kernel_runs == runs * BLOCKS * attentions


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@FUSED
@pytest.mark.parametrize("situation", ["text", "images"])
def test_selective_keeps_the_input_and_the_answer_of_each_attention(situation, fuse, dtype):
    attentions = {"text": 2, "images": 3}[situation]
    kept, left = kept_bytes(Memory("selective", fuse=fuse, stream=dtype), *shared(situation, dtype))
    expected = WIDTH * dtype.itemsize + attentions * (WIDTH * dtype.itemsize + HEADS * FP32.itemsize)
    assert kept == pytest.approx(expected)
    assert left == 0


@FUSED
@pytest.mark.parametrize("stream", [FP32, BF16], ids=["fp32 stream", "bf16 stream"])
@pytest.mark.parametrize("situation", ["text", "images"])
def test_full_keeps_only_the_input_in_the_dtype_of_the_stream(situation, stream, fuse):
    kept, left = kept_bytes(Memory("full", fuse=fuse, stream=stream), *shared(situation, BF16))
    assert kept == WIDTH * stream.itemsize
    assert left == 0


@FUSED
@pytest.mark.parametrize("stream", [FP32, BF16], ids=["fp32 stream", "bf16 stream"])
def test_offload_keeps_nothing_beside_main_memory(stream, fuse):
    kept, left = kept_bytes(Memory("offload", fuse=fuse, stream=stream), *shared("images", BF16))
    assert kept == left == 0


def test_a_fused_block_keeps_less_than_a_plain_one_and_nothing_for_longer():
    (plain, left), (fused, left_too) = (
        kept_bytes(Memory("none", fuse=fuse), *shared("images", FP32)) for fuse in (False, True)
    )
    assert fused < 0.8 * plain
    assert left == left_too == 0


@FUSED
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_forward_pass_without_a_backward_pass_leaves_nothing(strategy, fuse):
    model, parameters, inputs = shared("text", BF16)
    prepare_again(model, Memory(strategy, fuse=fuse, stream=BF16))
    expected = answers(model, parameters, inputs)
    with Followed() as followed:
        model(*inputs)
    assert followed.living_bytes == 0
    assert equal(answers(model, parameters, inputs), expected)


@FUSED
@pytest.mark.parametrize("situation", ["text", "images"])
def test_where_attention_is_not_one_kernel_the_numbers_are_the_same_under_every_strategy(situation, fuse):
    model, parameters, inputs = shared(situation, FP32)
    expected = answers(model, parameters, inputs)
    results = []
    with sdpa_kernel(SDPBackend.MATH):
        for strategy in STRATEGIES:
            prepare_again(model, Memory(strategy, fuse=fuse))
            results.append(answers(model, parameters, inputs))
        with Followed() as followed:
            model(*inputs)
    assert followed.kernel_runs == 0
    assert all(equal(results[0], found) for found in results[1:])
    assert relative_error(results[0], expected) < 1e-5


def test_only_attention_kernels_are_kept():
    operations = torch.ops.aten
    kernel = operations._scaled_dot_product_flash_attention.default
    assert keep_kernels(None, kernel) == CheckpointPolicy.MUST_SAVE
    for operation in (operations.mm.default, operations.native_layer_norm.default, operations.gelu.default):
        assert keep_kernels(None, operation) == CheckpointPolicy.PREFER_RECOMPUTE


def test_a_policy_for_compilers_keeps_products_and_attention_and_leaves_the_rest_to_them():
    operations = torch.ops.aten
    for operation in (operations.mm, operations.addmm, operations.bmm, operations._scaled_dot_product_flash_attention):
        assert keep_products(None, operation.default) == CheckpointPolicy.MUST_SAVE
    for operation in (operations.native_layer_norm, operations.gelu):
        assert keep_products(None, operation.default) == CheckpointPolicy.PREFER_SAVE


# ------------------------------------------------------------------------------------- functions instead of the blocks


def run(x: Tensor, weight: Tensor, shift: Tensor | None) -> Tensor:
    y = (x.float() * weight).sin() * x
    return y if shift is None else y + shift.exp()


def leaves() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, generator=generator, requires_grad=True) for size in ((3, 4), (4,), (3, 1))]


def gradients(function, inputs: list[Tensor | None]) -> list[Tensor]:
    needed = [tensor for tensor in inputs if tensor is not None and tensor.requires_grad]
    value = function(*inputs)
    return [value.detach(), *torch.autograd.grad(value.square().sum(), needed)]


@pytest.mark.parametrize("without", [0, 1, 2, None])
def test_a_function_that_runs_again_has_its_own_value_and_gradients(without):
    """`parked` and `with_saved` stand in for `checkpointed`. One of the inputs needs no gradient."""
    inputs: list[Tensor | None] = [leaf.requires_grad_(n != without) for n, leaf in enumerate(leaves())]
    for arguments in (inputs, [*inputs[:2], None]):
        expected = gradients(run, arguments)
        for strategy in (checkpointed, lambda f: parked(f, Parking()), lambda f: with_saved(f, Parking(), None)):
            assert equal(gradients(strategy(run), arguments), expected)


def test_a_compiled_block_keeps_its_stream_in_main_memory_and_its_conditions_as_they_are(monkeypatch):
    parking, inputs = Parking(chunk=1 << 10), leaves()
    expected = gradients(run, inputs)
    parks: list[Tensor] = []
    own = parking.park
    monkeypatch.setattr(parking, "park", lambda tensor: parks.append(tensor) or own(tensor))
    assert equal(gradients(with_saved(run, parking, None), inputs), expected)
    assert {tensor.data_ptr() for tensor in parks} == {inputs[0].data_ptr()}


def test_two_models_under_offload_do_not_share_main_memory():
    first, second = (prepared(Memory("offload")) for _ in range(2))
    inputs = inputs_of(first[0])
    expected = answers(*first, inputs)
    velocities = [model(*inputs) for model, _ in (first, second)]
    found = [
        [velocity.detach(), *torch.autograd.grad(loss_of(velocity), parameters)]
        for velocity, (_, parameters) in zip(velocities, (first, second), strict=True)
    ]
    assert equal(found[0], expected) and equal(found[1], expected)


def test_compiled_blocks_let_go_of_a_stream_that_waits_in_main_memory():
    weight = nn.Parameter(torch.ones(4))
    run = with_saved(lambda x: (x * weight).sum(), Parking(1024), None)
    x = 2 * torch.randn(3, 4).requires_grad_()  # no leaf, which its graph would keep
    storage = StorageWeakRef(x.untyped_storage())
    expected = x.detach().sum(0)
    loss = run(x)
    del x
    assert storage.expired()
    loss.backward()
    assert torch.equal(weight.grad, expected)
