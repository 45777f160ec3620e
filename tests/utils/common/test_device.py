"""Which device is chosen, and the message when its memory is full."""

import pytest
import torch

from utils.common.device import explain_out_of_memory, pick_device
from utils.common.errors import RunError


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
