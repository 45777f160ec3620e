"""Which device is chosen, and the message when its memory is full."""

from types import SimpleNamespace

import pytest
import torch

from utils.common.device import doing, explain_out_of_memory, free_memory, pick_device
from utils.common.errors import OutOfMemory, RunError


def test_a_full_gpu_is_reported_with_the_options_to_reduce():
    with pytest.raises(RunError) as caught, explain_out_of_memory():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")
    first, second, third, fourth = str(caught.value).splitlines()
    assert first == "CUDA out of memory" and "--token_limit" in second
    assert "--weight_dtype" in third and "--blocks_to_swap" in third
    assert "--cache_latents" in fourth and "--gradient_checkpointing offload" in fourth


@pytest.mark.parametrize("available", [True, False])
def test_the_gpu_is_used_where_there_is_one(monkeypatch, available):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    assert pick_device() == torch.device("cuda" if available else "cpu")


def test_what_did_not_fit_is_said_from_the_innermost_outwards():
    with pytest.raises(OutOfMemory) as caught, explain_out_of_memory(), doing("rehearsing"), doing("validating"):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried")
    assert str(caught.value).splitlines()[0] == "CUDA out of memory, while validating, while rehearsing"
    assert caught.value.run_folder is None


def test_other_errors_pass_unchanged():
    with pytest.raises(KeyError) as caught, explain_out_of_memory(), doing("validating"):
        raise KeyError("x")
    assert not hasattr(caught.value, "__notes__")


@pytest.mark.parametrize(("share", "free"), [(1.0, 60), (0.7, 40), (0.2, -10)])
def test_no_more_is_free_than_the_process_may_take(monkeypatch, share, free):
    """Of 100 bytes 60 are free; of the others this process has reserved 30. PyTorch's own functions are called."""
    monkeypatch.setattr("torch.cuda.memory._lazy_init", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: SimpleNamespace(cudaMemGetInfo=lambda device: (60, 100)))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 30)
    monkeypatch.setattr(torch._C, "_cuda_getMemoryFraction", lambda index: share, raising=False)
    assert free_memory() == free
