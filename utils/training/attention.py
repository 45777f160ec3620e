"""Which attention kernel a run uses: the one that is asked for, or the fastest of this machine at the run's shape."""

import importlib
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from utils.common.console import say
from utils.common.decisions import Decisions
from utils.common.errors import UserError
from utils.common.options import option
from wan.modules.attention import KERNELS, PACKAGES, SDPA, TRAINING_KERNELS, Attend, is_installed
from wan.modules.model import WanShape

AUTO = "auto"
WARMUPS, REPEATS = 2, 5
WORTH = 0.97  # of the time of PyTorch's choice: what is hardly faster changes nothing
MOST_ERROR = 0.02  # relative, of what a kernel returns in half precision, to attention in fp32
INSTALL = {
    "flash2": "pip install flash-attn --no-build-isolation",
    "flash3": "build it from the folder hopper/ of flash-attention",
    "sage": "pip install sageattention",
}


@dataclass(frozen=True)
class SamplingAttention:
    """attention"""

    attention: str = option(SDPA, "attention kernel; sdpa: PyTorch's choice; sage: in 8 bits", choices=tuple(KERNELS))

    def check_attention(self, device: torch.device, is_fp32: bool) -> None:
        """Raises UserError for a kernel that does not run here."""
        check_kernel(self.attention, device, is_fp32)


@dataclass(frozen=True)
class AttentionOptions:
    """attention"""

    attention: str = option(
        AUTO,
        "attention kernel; sdpa: PyTorch's choice; auto: on a GPU, the fastest that is installed, measured",
        choices=(AUTO, *TRAINING_KERNELS),
    )

    def check_attention(self, device: torch.device, is_fp32: bool) -> None:
        """Raises UserError for a kernel that does not run here."""
        if self.attention != AUTO:
            check_kernel(self.attention, device, is_fp32)

    def attention_kernel(
        self, device: torch.device, dtype: torch.dtype, shape: WanShape, size: tuple[int, int], decisions: Decisions
    ) -> str:
        """The kernel of a run that computes in this dtype on batches of `size`: samples, and tokens of each.

        Says which one it is, where it was measured.
        """
        if self.attention != AUTO:
            return self.attention
        if device.type != "cuda":
            return SDPA
        decide = partial(fastest, device, dtype, shape, size)
        chosen = decisions.take("attention", decide, TRAINING_KERNELS.__contains__)
        check_kernel(chosen, device, is_fp32=dtype == torch.float32)  # that of the saved run may be gone
        return chosen


def check_kernel(name: str, device: torch.device, is_fp32: bool) -> None:
    """Raises UserError for a kernel whose package is missing, or that does not serve this device and dtype."""
    if name in PACKAGES:
        try:
            importlib.import_module(PACKAGES[name])
        except Exception as error:  # whatever a package raises that was built for another version of torch
            needed = f"{PACKAGES[name]}, which cannot be imported: {error}"
            raise UserError(f"--attention {name} needs {needed}\n{INSTALL[name]}") from None
    if name != SDPA and device.type != "cuda":
        raise UserError(f"--attention {name} needs a CUDA GPU: leave it out")
    if name != SDPA and is_fp32:
        raise UserError(f"--attention {name} computes in half precision: leave out --weight_dtype fp32, or take sdpa")


def fastest(device: torch.device, dtype: torch.dtype, shape: WanShape, size: tuple[int, int]) -> str:
    """The kernel whose forward and backward pass at this shape takes the least time. Says the times."""
    batch, tokens = size
    heads = (batch, tokens, shape.num_heads, shape.dim // shape.num_heads)
    q, k, v, grad = (torch.randn(heads, dtype=dtype, device=device) for _ in range(4))
    names = [name for name in TRAINING_KERNELS if is_installed(name) and (name == SDPA or dtype != torch.float32)]
    times = {name: seconds for name in names if (seconds := measure(name, q, k, v, grad)) is not None}
    del q, k, v, grad
    torch.cuda.empty_cache()
    chosen = choose(times)
    listed = ", ".join(f"{name} {1e3 * seconds:.2f} ms" for name, seconds in times.items())
    say(f"--attention {chosen}: forward and backward of {batch}x{tokens:,} tokens take {listed}")
    return chosen


def choose(times: Mapping[str, float]) -> str:
    """The fastest kernel; PyTorch's own choice where it is about as fast."""
    best = min(times, key=times.__getitem__)
    return best if times[best] < WORTH * times[SDPA] else SDPA


def measure(name: str, q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> float | None:
    """The median seconds of a forward and backward pass; None for a kernel that fails or is not exact enough.

    Of one whose package is installed, why is said.
    """
    attend, leaves = KERNELS[name], [each.detach().requires_grad_() for each in (q, k, v)]
    try:
        if not is_exact(attend, q, k, v):
            say(f"{name} is left out: its answers are too far from attention in fp32")
            return None
        durations = []
        for _ in range(WARMUPS + REPEATS):
            _wait(q.device)
            started = time.perf_counter()
            torch.autograd.grad(attend(*leaves), leaves, grad)
            _wait(q.device)
            durations.append(time.perf_counter() - started)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a kernel raises that does not serve this device or shape, or is broken
        if name in PACKAGES:
            say(f"{name} is left out: {error}")
        return None
    return statistics.median(durations[WARMUPS:])


def is_exact(attend: Attend, q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether a kernel agrees with attention in fp32, within MOST_ERROR, on the first queries of the first sample."""
    few = q[:1, :64]
    exact = KERNELS[SDPA](few.float(), k[:1].float(), v[:1].float())
    found = attend(few, k[:1], v[:1]).float()
    return bool((found - exact).norm() <= MOST_ERROR * exact.norm())


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
