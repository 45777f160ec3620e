"""Main memory is locked for as long as it lives, and no longer."""

import ctypes
import gc
from types import SimpleNamespace

import pytest
import torch

from utils.storage.arena import ALIGNMENT, M_MMAP_THRESHOLD, aligned, lock_pages, return_memory_at_once

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


@pytest.fixture
def kernels(monkeypatch) -> list[torch.device]:
    """The devices of the kernels that have run; the first raises what the runtime has not told anyone yet."""
    seen: list[torch.device] = []

    def run(size: int, device: str) -> None:
        seen.append(torch.device(device))
        if len(seen) == 1:
            raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch, "zeros", run)
    return seen


@pytest.mark.parametrize("runtime", [REFUSED], indirect=True)
def test_memory_that_cannot_be_locked_is_said_and_left_alone(runtime, kernels, capsys):
    memory = torch.empty(1000, dtype=torch.uint8)
    lock_pages(memory)
    said = " ".join(capsys.readouterr().out.split())
    assert said == "note: main memory could not be locked (2): copies of weights to the GPU are slower"
    del memory
    gc.collect()
    assert runtime.released == []


@pytest.mark.parametrize("runtime", [REFUSED], indirect=True)
def test_a_refusal_is_not_left_to_the_next_kernel_to_raise(runtime, kernels, capsys):
    lock_pages(torch.empty(1000, dtype=torch.uint8))
    assert kernels == [torch.device("cuda")] and "could not be locked" in capsys.readouterr().out


def test_where_memory_is_locked_no_kernel_is_run(runtime, kernels):
    lock_pages(torch.empty(1000, dtype=torch.uint8))
    assert kernels == []


# ------------------------------------------------------------------------------------------ memory that is given back


def test_pieces_of_a_weights_size_are_given_back_when_they_are_freed(monkeypatch):
    asked: list[tuple[int, int]] = []
    library = SimpleNamespace(mallopt=lambda *args: asked.append(args))
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library if name is None else None)
    return_memory_at_once()
    assert asked == [(M_MMAP_THRESHOLD, 2**20)] and M_MMAP_THRESHOLD == -3


def test_where_that_cannot_be_asked_for_nothing_is_raised(monkeypatch):
    def no_library(name: None) -> None:
        raise OSError("no such library")

    for library in (lambda name: SimpleNamespace(), no_library):  # without mallopt, and none at all
        monkeypatch.setattr(ctypes, "CDLL", library)
        return_memory_at_once()
