"""Stand-ins for the packages of attention kernels, which need a GPU: the same calls and operations, on the CPU."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

OPERATIONS = {"flash_attn": "flash_attn::_flash_attn_forward", "flash_attn_interface": "flash_attn_3::fwd"}


def _forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The output (B, L, N, K) and the log-sum-exp of the scores (B, N, L)."""
    scores = torch.einsum("blnk,btnk->bnlt", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("bnlt,btnk->blnk", scores.softmax(-1), v), scores.logsumexp(-1)


class _Flash(torch.autograd.Function):
    """As in these packages: the forward pass is one operation, the backward pass reads what it has returned."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, operation: Any) -> Tensor:
        out, lse = operation(q, k, v)
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        scale = q.shape[-1] ** -0.5
        weights = (torch.einsum("blnk,btnk->bnlt", q, k) * scale - lse[..., None]).exp()
        inner = torch.einsum("blnk,btnk->bnlt", grad, v) - torch.einsum("blnk,blnk->bnl", grad, out)[..., None]
        scores = weights * inner * scale
        dq, dk = torch.einsum("bnlt,btnk->blnk", scores, k), torch.einsum("bnlt,blnk->btnk", scores, q)
        return dq, dk, torch.einsum("bnlt,blnk->btnk", weights, grad), None


def _operation(name: str) -> Any:
    space, own = name.split("::")
    if not hasattr(getattr(torch.ops, space), own):
        torch.library.custom_op(name, _forward, mutates_args=(), device_types="cpu")
    return getattr(getattr(torch.ops, space), own)


@contextmanager
def installed() -> Iterator[None]:
    """Inside, all packages are there."""
    modules = {}
    for package, name in OPERATIONS.items():
        operation, module = _operation(name), ModuleType(package)
        module.flash_attn_func = lambda q, k, v, operation=operation: _Flash.apply(q, k, v, operation)  # type: ignore[attr-defined]
        modules[package] = module
    sage = ModuleType("sageattention")

    def sageattn(q: Tensor, k: Tensor, v: Tensor, tensor_layout: str) -> Tensor:
        assert tensor_layout == "NHD"
        found = F.scaled_dot_product_attention(*(each.transpose(1, 2) for each in (q, k, v)))
        return found.transpose(1, 2)

    sage.sageattn = sageattn  # type: ignore[attr-defined]
    for name, module in (modules | {"sageattention": sage}).items():
        module.__spec__ = torch.__spec__  # whoever looks for it finds one
        modules[name] = module
    with patch.dict(sys.modules, modules):
        yield
