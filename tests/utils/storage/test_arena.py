"""Main memory is locked for as long as it lives, and no longer."""

import gc
from types import SimpleNamespace

import pytest
import torch

from utils.storage.arena import ALIGNMENT, aligned, lock_pages

SUCCESS, REFUSED = 0, 2


class Runtime:
    """A runtime of CUDA that knows which memory is registered."""

    cudaError = SimpleNamespace(success=SUCCESS)

    def __init__(self, result: int = SUCCESS) -> None:
        self.result = result
        self.registered: dict[int, tuple[int, int]] = {}
        self.released: list[int] = []

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        if self.result == SUCCESS:
            self.registered[address] = size, flags
        return self.result

    def cudaHostUnregister(self, address: int) -> int:
        self.released.append(address)
        del self.registered[address]
        return SUCCESS


@pytest.fixture(params=[SUCCESS])
def runtime(request, monkeypatch) -> Runtime:
    runtime = Runtime(request.param)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    return runtime


@pytest.mark.parametrize(("size", "expected"), [(0, 0), (1, 256), (255, 256), (256, 256), (257, 512), (5000, 5120)])
def test_sizes_are_rounded_up_to_where_the_next_tensor_can_be(size, expected):
    assert aligned(size) == expected == -(-size // ALIGNMENT) * ALIGNMENT


def test_exactly_the_memory_of_a_tensor_is_locked_and_released_when_its_last_view_dies(runtime, capsys):
    memory = torch.empty(1000, dtype=torch.uint8)
    address = memory.data_ptr()
    lock_pages(memory)
    assert runtime.registered == {address: (1000, 0)}
    view = torch.empty(0, dtype=torch.uint8).set_(memory.untyped_storage(), 100, (100,))  # not of the tensor
    del memory
    gc.collect()
    assert runtime.registered and runtime.released == []
    del view
    gc.collect()
    assert runtime.released == [address] and runtime.registered == {}
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("runtime", [REFUSED], indirect=True)
def test_memory_that_cannot_be_locked_is_said_and_left_alone(runtime, capsys):
    memory = torch.empty(1000, dtype=torch.uint8)
    lock_pages(memory)
    said = " ".join(capsys.readouterr().out.split())
    assert said == "note: main memory could not be locked (2): copies of weights to the GPU are slower"
    del memory
    gc.collect()
    assert runtime.released == []
