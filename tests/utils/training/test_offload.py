"""What is parked comes back as it was, from memory that is used again and never too early."""

import gc
import random

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from tests.trainees import answers, equal, inputs_of, loss_of, prepared
from utils.training.memory import Memory
from utils.training.offload import Parked, Parking

FP32, BF16 = torch.float32, torch.bfloat16
KB = 1 << 10


def tensor_of(size: int, seed: int = 0, dtype: torch.dtype = FP32) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def poison(parking: Parking, parked: list[Parked]) -> None:
    """Overwrites all main memory but that of what waits."""
    kept = [each._host.clone() for each in parked]
    for chunk in parking._chunks:
        chunk.fill_(255)  # NaN in every dtype
    for each, value in zip(parked, kept, strict=True):
        each._host.copy_(value)


def test_the_tensor_comes_back_with_its_shape_dtype_values_and_need_of_a_gradient():
    parking = Parking(KB)
    for shape, dtype in (((2, 3, 4), FP32), ((5,), BF16), ((3, 0), FP32), ((), FP32)):
        for needs_grad in (False, True):
            own = torch.rand(shape).to(dtype).requires_grad_(needs_grad)
            back = parking.park(own * 1).take()
            assert torch.equal(back, own) and back.dtype == dtype and back.shape == own.shape
            assert back.requires_grad == needs_grad and back.grad_fn is None


def test_a_tensor_whose_memory_is_not_contiguous_comes_back():
    own = tensor_of(24).view(4, 6).T
    assert torch.equal(Parking(KB).park(own).take(), own)
    assert torch.equal(Parking(KB).park(own[:1].expand(5, 4)).take(), own[:1].expand(5, 4))


def test_what_waits_is_a_copy_and_so_is_what_comes_back():
    parking = Parking(KB)
    own = tensor_of(9)
    first, second = parking.park(own), parking.park(own)
    expected = own.clone()
    own.fill_(torch.nan)
    second.take().fill_(torch.nan)
    taken = first.take()
    poison(parking, [])
    assert torch.equal(taken, expected)


def test_whenever_a_tensor_is_taken_the_one_before_it_is_fetched(monkeypatch):
    parking, order = Parking(KB), []
    parked = [parking.park(torch.full((3,), float(n))) for n in range(4)]
    fetch = Parking.back
    monkeypatch.setattr(
        Parking, "back", lambda self, host, *rest: order.append(int(host[0])) or fetch(self, host, *rest)
    )
    for n, fetched in ((3, [3, 2]), (2, [3, 2, 1]), (1, [3, 2, 1, 0]), (0, [3, 2, 1, 0])):
        assert parked[n].take()[0] == n and order == fetched


def test_what_has_been_taken_is_not_fetched_again(monkeypatch):
    parking, order = Parking(KB), []
    parked = [parking.park(torch.full((3,), float(n))) for n in range(4)]
    fetch = Parking.back
    monkeypatch.setattr(
        Parking, "back", lambda self, host, *rest: order.append(int(host[0])) or fetch(self, host, *rest)
    )
    for n, fetched in ((2, [2, 1]), (3, [2, 1, 3]), (1, [2, 1, 3, 0]), (0, [2, 1, 3, 0])):
        assert parked[n].take()[0] == n and order == fetched


def test_what_has_been_taken_belongs_to_its_taker():
    parking = Parking(KB)
    parked = [parking.park(tensor_of(3, n)) for n in range(2)]
    taken = parked[1].take()
    storage = StorageWeakRef(taken.untyped_storage())
    assert not storage.expired()
    del taken
    assert storage.expired()


def test_on_the_cpu_nothing_is_waited_for():
    parking = Parking(KB)
    for _ in range(2):
        parking.park(tensor_of(3)).take()
        assert parking.waited() == 0


def test_memory_is_used_again_by_the_next_pass():
    parking, places = Parking(KB), []
    for _ in range(3):
        parked = [parking.park(tensor_of(100, n)) for n in range(5)]
        places.append([each._host.data_ptr() for each in parked])
        assert len(set(places[-1])) == 5
        for n in reversed(range(5)):
            assert torch.equal(parked[n].take(), tensor_of(100, n))
    assert places[0] == places[1] == places[2]
    # 400 bytes begin at multiples of 64: two in each chunk.
    assert [len(chunk) for chunk in parking._chunks] == [KB] * 3


def test_tensors_of_different_dtypes_lie_beside_each_other():
    parking = Parking(KB)
    own = [tensor_of(size, size, dtype) for size, dtype in ((3, BF16), (5, FP32), (7, torch.float64), (1, BF16))]
    parked = [parking.park(tensor) for tensor in own]
    assert len(parking._chunks) == 1
    assert all(torch.equal(p.take(), tensor) for p, tensor in zip(parked[::-1], own[::-1], strict=True))


def test_larger_tensors_replace_chunks_that_are_too_small_and_smaller_ones_use_the_large_ones():
    parking = Parking(KB)
    for size, chunks in ((100, [KB]), (1000, [KB, 4000]), (100, [KB, 4000]), (2000, [KB, 8000]), (1000, [KB, 8000])):
        parked = parking.park(tensor_of(size))
        assert [len(chunk) for chunk in parking._chunks] == chunks
        assert torch.equal(parked.take(), tensor_of(size))
        del parked


def test_a_chunk_that_is_replaced_while_a_tensor_waits_in_it_keeps_that_tensor():
    parking = Parking(KB)
    small = [parking.park(tensor_of(200, n)) for n in range(3)]
    small[2].take()
    del small[2:]
    large = parking.park(tensor_of(2000, 9))
    poison(parking, [large, *small])
    assert torch.equal(large.take(), tensor_of(2000, 9))
    assert torch.equal(small[1].take(), tensor_of(200, 1)) and torch.equal(small[0].take(), tensor_of(200, 0))


@pytest.mark.parametrize("seed", range(20))
def test_any_nesting_of_passes_gives_every_tensor_back_although_free_memory_is_overwritten(seed):
    """Tensors come and go as in forward and backward passes: the last first, or dropped. Sizes are drawn."""
    rng, parking = random.Random(seed), Parking(KB)
    waiting: list[tuple[Parked, Tensor]] = []
    for turn in range(150):
        action = rng.random()
        if action < 0.5:
            own = tensor_of(rng.choice([1, 30, 100, 300, 900]), turn, rng.choice([FP32, BF16]))
            waiting.append((parking.park(own), own))
        elif waiting and action < 0.9:
            parked, own = waiting.pop()
            assert torch.equal(parked.take(), own)
            del parked
        elif action > 0.97:
            waiting.clear()  # a forward pass whose backward pass never comes
        poison(parking, [each for each, _ in waiting])
    while waiting:
        parked, own = waiting.pop()
        assert torch.equal(parked.take(), own)


def test_what_is_dropped_frees_its_memory_without_the_garbage_collector():
    parking = Parking(KB)
    gc.disable()
    try:
        parked = [parking.park(tensor_of(100)) for _ in range(8)]
        first = parked[0]._host.data_ptr()
        del parked
        assert parking.park(tensor_of(100))._host.data_ptr() == first
        assert len(parking._chunks) == 4
    finally:
        gc.enable()


def test_what_still_waits_is_not_overwritten_if_passes_end_in_the_order_of_their_beginning():
    parking = Parking(KB)
    first, second = parking.park(tensor_of(50, 1)), parking.park(tensor_of(50, 2))
    assert torch.equal(first.take(), tensor_of(50, 1))
    del first
    third = parking.park(tensor_of(120, 3))
    assert torch.equal(second.take(), tensor_of(50, 2)) and torch.equal(third.take(), tensor_of(120, 3))


# ----------------------------------------------------------------------------------------------------------- in a model


def test_passes_nest_accumulate_and_are_dropped_and_every_gradient_stays_the_same():
    model, parameters = prepared(Memory("offload"))
    batches = [inputs_of(model, seed=seed) for seed in range(3)]
    expected = [answers(model, parameters, inputs)[1:] for inputs in batches]

    def gradients(loss: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(loss, parameters))

    first = loss_of(model(*batches[0]))
    dropped = loss_of(model(*batches[2]))
    with torch.no_grad():
        model(*batches[1])
    second = loss_of(model(*batches[1]))
    assert equal(gradients(second), expected[1])
    del dropped, second
    third = loss_of(model(*batches[2]))
    assert equal(gradients(first), expected[0])
    fourth = loss_of(model(*batches[1]))
    assert equal(gradients(third), expected[2])
    assert equal(gradients(fourth), expected[1])
    for inputs in batches:
        loss_of(model(*inputs)).backward()
    sums = [sum(each[1:], each[0]) for each in zip(*expected, strict=True)]
    assert equal([parameter.grad for parameter in parameters], sums)
