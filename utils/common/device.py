"""The device: chosen once, what is computed on it, and what to say when it is full."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from utils.common.errors import RunError


def pick_device() -> torch.device:
    """The GPU where there is one, else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        print("note: this GPU has no bf16 of its own and emulates it, slowly")
    return torch.device("cuda")


def describe(device: torch.device) -> str:
    """The device's name for people."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"


def compute_dtype(device: torch.device) -> torch.dtype:
    """What the large models compute in: bf16 on a GPU, as they are released, and fp32 on the CPU."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def out_of_memory(error: torch.OutOfMemoryError) -> str:
    """In words what was too large, and what can be made smaller."""
    reason = str(error).split(". ")[0]
    return (
        f"{reason}\nfewer tokens need less memory: --token_limit and --base_res when training, --width, --height and "
        "--frames when generating; so does --gradient_checkpointing"
    )


@contextmanager
def explain_out_of_memory() -> Iterator[None]:
    """Turns a full GPU into a RunError that says what can be made smaller."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise RunError(out_of_memory(error)) from None
