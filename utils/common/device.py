"""The device: which one, the dtype to compute in, and the message when its memory is full."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from utils.common.console import say
from utils.common.errors import RunError


def pick_device() -> torch.device:
    """The GPU where there is one, else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        say("note: this GPU has no native bf16 support and emulates it, which is slow")
    return torch.device("cuda")


def describe(device: torch.device) -> str:
    """The device's name for people."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"


def compute_dtype(device: torch.device) -> torch.dtype:
    """The dtype of the large models: bf16 on a GPU, as in the releases, and fp32 on the CPU."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def out_of_memory(error: torch.OutOfMemoryError) -> str:
    """The message for a full GPU: what did not fit, and which options reduce it."""
    reason = str(error).split(". ")[0]
    return (
        f"{reason}\nfewer tokens need less memory: --token_limit and --base_res when training, --width, --height and "
        "--frames when generating\n--weight_dtype int8 or nf4 and --blocks_to_swap make room that the weights take\n"
        "in training --cache_latents keeps the encoders off the GPU, and "
        "--gradient_checkpointing offload what blocks keep"
    )


@contextmanager
def explain_out_of_memory() -> Iterator[None]:
    """Turns torch.OutOfMemoryError into a RunError that names the options to reduce."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise RunError(out_of_memory(error)) from None
