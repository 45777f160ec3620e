"""The device: which one, the dtype to compute in, and the message when its memory is full."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from utils.common.console import say
from utils.common.errors import OutOfMemory


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


def free_memory() -> int:
    """The bytes that this process may still take of the GPU's memory."""
    free, total = torch.cuda.mem_get_info()
    allowed = torch.cuda.get_per_process_memory_fraction() * total - torch.cuda.memory_reserved()
    return min(free, int(allowed))


def what_did_not_fit(error: torch.OutOfMemoryError) -> str:
    """Such as "CUDA out of memory, while validating"."""
    return ", ".join([str(error).split(". ")[0], *getattr(error, "__notes__", ())])


@contextmanager
def explain_out_of_memory() -> Iterator[None]:
    """Turns torch.OutOfMemoryError into an OutOfMemory."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(what_did_not_fit(error)) from None


@contextmanager
def doing(what: str) -> Iterator[None]:
    """Says of torch.OutOfMemoryError what did not fit, such as "validating"."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        error.add_note(f"while {what}")
        raise
