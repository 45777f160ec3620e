"""Scaled dot-product attention, by each of the kernels that a model may use."""

import importlib.util
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention without a mask. q (B, L, N, K), k and v (B, T, N, K), all of one dtype -> (B, L, N, K).

    PyTorch picks the kernel by device, dtype and shape (FlashAttention in bf16 on CUDA). Every other function here
    takes and returns the same.
    """
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's kernel of cuDNN. Raises RuntimeError where it does not serve device, dtype or shape."""
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return attention(q, k, v)


def efficient(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's memory-efficient kernel. Raises RuntimeError as `cudnn`."""
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
        return attention(q, k, v)


def flash2(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """FlashAttention 2, of the package flash-attn: half precision on CUDA."""
    from flash_attn import flash_attn_func

    out: Tensor = flash_attn_func(q, k, v)
    return out


def flash3(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """FlashAttention 3, which is built from the folder hopper/ of flash-attention."""
    from flash_attn_interface import flash_attn_func

    found = flash_attn_func(q, k, v)
    out: Tensor = found[0] if isinstance(found, tuple) else found  # earlier versions return the log-sum-exp too
    return out


def sage(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """SageAttention, of the package sageattention: in 8 bits, and without a backward pass."""
    from sageattention import sageattn

    out: Tensor = sageattn(q, k, v, tensor_layout="NHD")
    return out


SDPA, SAGE = "sdpa", "sage"
TRAINING_KERNELS: dict[str, Attend] = {
    SDPA: attention,
    "cudnn": cudnn,
    "efficient": efficient,
    "flash2": flash2,
    "flash3": flash3,
}
KERNELS = TRAINING_KERNELS | {SAGE: sage}
PACKAGES = {"flash2": "flash_attn", "flash3": "flash_attn_interface", SAGE: "sageattention"}  # the names to import


def is_installed(kernel: str) -> bool:
    """Whether the package of a kernel is there; PyTorch's own always are."""
    return kernel not in PACKAGES or importlib.util.find_spec(PACKAGES[kernel]) is not None
