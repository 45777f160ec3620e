"""The backward pass of attention with the kernel's answer is the one without, and nothing lives longer than needed."""

import gc
import weakref

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.followed import Followed
from tests.trainees import equal
from utils.training.kept_attention import Answer, Tape, attend, attend_backward
from wan.modules.attention import attention

FP32, BF16 = torch.float32, torch.bfloat16


def heads(dtype: torch.dtype = FP32, keys: int = 9) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of two samples and two heads."""
    generator = torch.Generator().manual_seed(0)
    lengths = (7, keys, keys)
    q, k, v = (torch.randn(2, length, 2, 24, generator=generator).to(dtype) for length in lengths)
    return q, k, v


def expected(grad: Tensor, *inputs: Tensor) -> list[Tensor]:
    """The output of attention and the gradients of its inputs, by autograd."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = attention(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


@pytest.mark.parametrize("backend", [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH], ids=["kernel", "math"])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
def test_output_and_gradients_are_those_of_autograd_bit_for_bit(dtype, backend):
    inputs = heads(dtype)
    grad = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    with sdpa_kernel(backend):
        out, answer = attend(*inputs)
        found = [out, *attend_backward(grad, *inputs, answer)]
        assert equal(found, expected(grad, *inputs))
    assert bool(answer.tensors) == bool(answer.layout) == (backend == SDPBackend.FLASH_ATTENTION)
    assert not any(tensor.requires_grad for tensor in (*found, *answer.tensors))


def test_the_kernel_runs_once_and_its_answer_stands_for_it():
    inputs = heads()
    with Followed() as followed:
        _, answer = attend(*inputs)
        assert followed.kernel_runs == 1
        attend_backward(torch.ones_like(inputs[0]), *inputs, answer)
        assert followed.kernel_runs == 1
        attend_backward(torch.ones_like(inputs[0]), *inputs, Answer())
        assert followed.kernel_runs == 2


def test_the_backward_pass_reads_the_answer_that_is_given():
    inputs, grad = heads(), torch.ones(2, 7, 2, 24)
    _, answer = attend(*inputs)
    wrong = Answer((answer.tensors[0] + 1, *answer.tensors[1:]), answer.layout)
    assert not equal(attend_backward(grad, *inputs, wrong), attend_backward(grad, *inputs, answer))


def test_an_answer_is_returned_as_the_kernel_returned_it():
    tensor = torch.ones(3)
    answer = Answer.of((tensor, 5, None, 0.5, tensor + 1))
    first, *numbers, last = answer.returned()
    assert numbers == [5, None, 0.5] and torch.equal(first, tensor) and torch.equal(last, tensor + 1)
    assert first.data_ptr() == tensor.data_ptr()


def test_hooks_for_saved_tensors_see_nothing_of_the_graph_that_is_thrown_away():
    """Those of a checkpoint around it would count what is not saved again in the second pass."""
    seen: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: seen.append(tensor) or tensor, lambda tensor: tensor):
        attend(*(x.requires_grad_() for x in heads()))
    assert seen == []


@pytest.mark.parametrize("backend", [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH], ids=["kernel", "math"])
def test_nothing_outlives_its_use_also_without_the_garbage_collector(backend):
    inputs = heads()
    gc.disable()
    try:
        with Followed() as followed, sdpa_kernel(backend):
            out, answer = attend(*inputs)
            sizes = {tensor.untyped_storage().data_ptr(): tensor.nbytes for tensor in (out, *answer.tensors)}
            assert followed.living_bytes == sum(sizes.values())
            gradients = attend_backward(torch.ones_like(out), *inputs, answer)
            assert followed.living_bytes <= sum(sizes.values()) + sum(x.untyped_storage().nbytes() for x in gradients)
            del out, answer, gradients
        assert followed.living_bytes == 0
    finally:
        gc.enable()


def result(value: float) -> list[tuple[Tensor, Answer]]:
    return [(torch.full((2,), value), Answer((torch.full((1,), value),), (Tensor,)))]


def test_a_tape_computes_in_the_first_pass_and_gives_away_in_the_second():
    tape, computed = Tape(), []

    def play(value: float) -> float:
        return float(tape.play(lambda: computed.append(value) or result(value))[0][0][0])

    assert [play(value) for value in (1.0, 2.0, 3.0)] == [1, 2, 3]
    tape.rewind()
    assert [play(value) for value in (7.0, 8.0)] == [1, 2]
    tape.rewind()
    assert play(9.0) == 3
    assert computed == [1, 2, 3]


def test_what_a_tape_has_given_away_or_would_have_is_free_without_the_garbage_collector():
    gc.disable()
    try:
        tape = Tape()
        tensors = [weakref.ref(tape.play(lambda: result(1.0))[0][0]) for _ in range(2)]
        tape.rewind()
        assert all(tensor() is not None for tensor in tensors)
        tape.play(lambda: result(2.0))
        assert tensors[0]() is None and tensors[1]() is not None
        del tape
        assert tensors[1]() is None
    finally:
        gc.enable()
