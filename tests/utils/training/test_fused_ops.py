"""The operations that stand for one CUDA kernel each compute what torch computes."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.training.fused_ops import fused_ops


def norm_and_gradient(norm: nn.RMSNorm, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    y = norm(x)
    (gradient,) = torch.autograd.grad((y * torch.arange(y.numel()).view_as(y)).sum(), x)
    return y, gradient


@pytest.mark.parametrize(("affine", "eps"), [(True, 1e-6), (False, 1e-2), (False, None)])
def test_the_norm_and_its_gradient_are_those_of_torch(affine, eps):
    norm = nn.RMSNorm(6, eps=eps, elementwise_affine=affine).requires_grad_(False)
    if affine:
        norm.weight.normal_(generator=torch.Generator().manual_seed(0))
    x = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(1))
    with fused_ops():
        replaced = norm_and_gradient(norm, x)
    for own, true in zip(replaced, norm_and_gradient(norm, x), strict=True):
        assert torch.allclose(own, true, rtol=1e-5, atol=1e-5)


def test_attention_on_the_meta_device_has_a_shape_and_a_gradient():
    q = torch.empty(1, 2, 5, 8, device="meta", requires_grad=True)
    k = torch.empty(1, 2, 7, 8, device="meta")
    with fused_ops():
        F.scaled_dot_product_attention(q, k, k).sum().backward()
    assert q.grad.shape == q.shape


def test_torchs_functions_are_back_afterwards():
    before = torch.rms_norm, F.scaled_dot_product_attention
    with fused_ops():
        assert torch.rms_norm is not before[0] and F.scaled_dot_product_attention is not before[1]
    assert (torch.rms_norm, F.scaled_dot_product_attention) == before
