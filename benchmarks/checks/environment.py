"""The machine, and the speeds that it reaches: the upper limits for the other checks."""

import subprocess
from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.measure import Clock, Row, Sizes, count_tokens, gemm_rate, median_seconds, skipped
from wan.modules.attention import attention
from wan.modules.model import WanShape

COPY_BYTES_PER_GEMM_SIDE = 2**17  # 1 GiB at the full size


def check(sizes: Sizes, device: torch.device, clock: Clock) -> Iterator[Row]:
    """Versions, then the speed of a matrix product, of a copy, and of attention over the tokens of a video."""
    yield Row("torch", torch.__version__)
    if device.type == "cuda":
        yield from _gpu(device)
    else:
        yield skipped("GPU", "no GPU")
    yield Row("bf16 matrix product", gemm_rate(sizes.gemm_side, device) / 1e12, "TFLOP/s", f"side {sizes.gemm_side}")

    yield Row("copy on the device", copy_rate(sizes, device) / 1e9, "GB/s", "bytes read and written")
    yield from _attention(sizes.shape, count_tokens(sizes.video), device)


def _gpu(device: torch.device) -> Iterator[Row]:
    yield Row("GPU", torch.cuda.get_device_name(device))
    yield Row("GPU memory", torch.cuda.get_device_properties(device).total_memory / 1e9, "GB")
    yield Row("CUDA", str(torch.version.cuda))
    yield Row("cuDNN", str(torch.backends.cudnn.version()))
    yield Row("driver", _driver())


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.split("\n")[0]
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def copy_rate(sizes: Sizes, device: torch.device) -> float:
    """Bytes per second of a copy on the device, read and written."""
    source = torch.randn(sizes.gemm_side * COPY_BYTES_PER_GEMM_SIDE // 4, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / median_seconds(lambda: target.copy_(source), device)


def _attention(shape: WanShape, tokens: int, device: torch.device) -> Iterator[Row]:
    rate, kernel = attention_rate(shape, tokens, device)
    yield Row("attention kernel", kernel)
    yield Row("attention, forward and backward", rate / 1e12, "TFLOP/s", f"{tokens} tokens, {shape.num_heads} heads")


def attention_rate(shape: WanShape, tokens: int, device: torch.device) -> tuple[float, str]:
    """FLOP/s of bf16 attention over all tokens, forward and backward, and the kernel that computes it."""
    size = (1, tokens, shape.num_heads, shape.dim // shape.num_heads)
    q, k, v, grad = (torch.randn(size, dtype=torch.bfloat16, device=device) for _ in range(4))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    kernel = attention_kernel(attention(q, k, v))
    spent = median_seconds(lambda: torch.autograd.grad(attention(q, k, v), leaves, grad), device)
    return 3.5 * 4 * tokens**2 * shape.dim / spent, kernel


def attention_kernel(output: Tensor) -> str:
    """The kernel that computed this attention output, by the name of its autograd node; "math" if it was not fused."""
    node = output.grad_fn
    while node is not None:
        if "ScaledDotProduct" in node.name():
            return node.name().removesuffix("Backward0")
        node = node.next_functions[0][0] if node.next_functions else None
    return "math"
