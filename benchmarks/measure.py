"""What all checks share: the rows of the table, the sizes, the clock, and the measuring of time and memory."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from wan.modules.model import WanShape

FAILED = "failed"
SKIPPED = "skipped"


@dataclass(frozen=True)
class Row:
    """One line of the table. Only a verdict that begins with FAILED makes the whole run fail."""

    name: str
    value: float | str = ""
    unit: str = ""
    comparison: str = ""
    verdict: str = ""

    @property
    def failed(self) -> bool:
        return self.verdict.startswith(FAILED)


def skipped(name: str, reason: str) -> Row:
    return Row(name, verdict=f"{SKIPPED}: {reason}")


def at_least(name: str, value: float, limit: float) -> Row:
    """A row that fails if its value is below the limit or NaN."""
    return Row(name, value, comparison=f"limit >= {limit:g}", verdict="ok" if value >= limit else FAILED)


@dataclass(frozen=True)
class Sizes:
    """What is measured, and how often. The defaults are Wan2.1-T2V-1.3B at the trainer's default token limit."""

    shape: WanShape = WanShape()
    reference_layers: int = 30  # blocks of the comparison with fp32
    vae_dim: int = 96
    rank: int = 16
    text_tokens: int = 128  # rows of a long caption; zero rows follow up to the model's text length
    video: tuple[int, int, int] = (6, 60, 104)  # latents F, H, W: 21 frames of 832x480, 9,360 tokens
    image: tuple[int, int, int] = (1, 64, 64)  # 512x512, 1,024 tokens
    long: tuple[int, int, int] = (21, 60, 104)  # 81 frames of 832x480, 32,760 tokens
    shallow_layers: int = 4  # blocks of larger models
    deep_layers: int = 16  # of 14B in bf16 they do not fit into the smallest of `caps`
    caps: tuple[int, ...] = (8, 12, 16, 24)  # GB of a smaller GPU
    clip: tuple[int, int, int] = (25, 480, 832)  # pixels F, H, W for the VAE
    gemm_side: int = 8192
    warmups: int = 5
    steps: int = 20


class Clock:
    """A time limit in seconds, which starts when the clock is made."""

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self._end = time.monotonic() + limit

    def left(self) -> float:
        """The seconds that are left; negative after the limit."""
        return self._end - time.monotonic()


def count_tokens(grid: tuple[int, int, int]) -> int:
    """The number of tokens of latents F, H, W, in patches of 1 x 2 x 2."""
    frames, height, width = grid
    return frames * (height // 2) * (width // 2)


def seconds(action: Callable[[], object], device: torch.device) -> float:
    """The duration of an action, from an idle device until the device has finished.

    On a GPU measured by its events. On the CPU the processor time of this process, of all threads together, which other
    processes on the machine affect little.
    """
    if device.type != "cuda":
        started = time.process_time()
        action()
        return time.process_time() - started
    torch.cuda.synchronize(device)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    action()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def median_seconds(action: Callable[[], object], device: torch.device, warmups: int = 3, repeats: int = 10) -> float:
    """The median duration of an action, after the warm-ups."""
    for _ in range(warmups):
        action()
    return statistics.median(seconds(action, device) for _ in range(repeats))


def p90(values: list[float]) -> float:
    """The 90th percentile of at least two values."""
    return statistics.quantiles(values, n=10, method="inclusive")[-1]


def cosine(a: Tensor, b: Tensor) -> float:
    """The cosine of the angle between two tensors."""
    a, b = a.flatten().double(), b.flatten().double()
    return (a @ b / (a.norm() * b.norm())).item()


def peak_bytes(action: Callable[[], object], device: torch.device) -> int:
    """The peak of allocated memory during an action, minus what was allocated before; 0 on the CPU."""
    if device.type != "cuda":
        action()
        return 0
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    action()
    return torch.cuda.max_memory_allocated(device) - before


@lru_cache
def gemm_rate(side: int, device: torch.device) -> float:
    """FLOP/s of a square bf16 matrix product of random numbers: the device's real peak, not that of its data sheet."""
    a, b = (torch.randn(side, side, dtype=torch.bfloat16, device=device) for _ in range(2))
    return 2 * side**3 / median_seconds(lambda: a @ b, device)
