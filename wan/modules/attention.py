"""Scaled dot-product attention: the one place that chooses a kernel."""

import torch.nn.functional as F
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention without a mask. q (B, L, N, K), k and v (B, T, N, K), all of one dtype -> (B, L, N, K).

    PyTorch picks the fastest kernel for the device and dtype (FlashAttention or cuDNN in bf16 on CUDA).
    """
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
